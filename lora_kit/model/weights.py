"""Find the files from which transformers loads a base's weights, and check that each is a whole safetensors file.

Headers are read, and for `check` the rows of the head. The rules are those of `from_pretrained(...,
use_safetensors=True)`: `model.safetensors` if it exists, otherwise the files that `model.safetensors.index.json` names.
Other files beside them are never loaded.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_kit.data.vocabulary import MAX_DIMENSIONS
from lora_kit.errors import BaseError
from lora_kit.recipe.schema import Base

WEIGHTS, INDEX_ENDING = "model.safetensors", ".safetensors.index.json"
INDEX = f"model{INDEX_ENDING}"
SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")  # transformers' name for a distributed shard
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HEADS = ("lm_head.weight", "embed_out.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight")
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LFS_POINTER = b"version https://git-lfs"
POINTER_REMEDY = "a pointer of git-lfs instead of the file; run `git lfs pull` in its folder, or use `hf download`"


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files from which transformers loads the weights of a base, an index among them.

    Raises:
        BaseError: The folder has no safetensors weights under the names that transformers reads, or its index is wrong.
    """
    names = {path.name for path in folder.iterdir()}
    if shards := sorted(filter(SHARD.match, names)):
        raise BaseError(
            f"{folder / shards[0]}: a shard of a distributed checkpoint, which transformers would load instead of "
            f"{WEIGHTS}; gather the shards into one model first, or remove them from the folder"
        )
    named = read_json(folder / "config.json").get("transformers_weights")
    first = str(named) if named else WEIGHTS if WEIGHTS in names else INDEX
    if first == INDEX and INDEX not in names:
        raise BaseError(_no_weights(folder))
    if not first.endswith(INDEX_ENDING):
        return [_loadable(first, folder / "config.json")]
    index = folder / first
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseError(f"{index}: it has no weight_map, so it names no weights; {_again(index)}")
    return [first, *sorted({_loadable(str(name), index) for name in weight_map.values()})]


def _loadable(name: str, source: Path) -> str:
    """Return the name of a file with weights, as `source` gives it.

    Raises:
        BaseError: It is not a safetensors file, or not in the folder of `source`.
    """
    if not name.endswith(".safetensors"):
        raise BaseError(f"{source}: it names {name}, and pickled weights are not loaded; {_convert(source.parent)}")
    if Path(name).name != name:
        raise BaseError(f"{source}: it names {name}, which is not a file of this folder; {_again(source)}")
    return name


def check_weights(folder: Path) -> list[str]:
    """Return `weight_files` after checking that each is there and whole: its header says how many bytes it has.

    Raises:
        BaseError: As for `weight_files`; or a file is missing, cut, empty, a pointer of git-lfs, or not safetensors.
    """
    names = weight_files(folder)
    for path in (folder / name for name in names if name.endswith(".safetensors")):
        if not path.is_file():
            raise BaseError(f"{path}: missing, but {names[0]} names it; {_again(path)}")
        if problem := _problem(path):
            raise BaseError(f"{path}: {problem}")
    return names


def is_pointer(path: Path) -> bool:
    """Return whether a file is only the pointer that git-lfs puts in its place; False if it does not exist."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _problem(path: Path) -> str | None:
    size = path.stat().st_size
    if size == 0:
        return f"empty; {_again(path)}"
    if is_pointer(path):
        return POINTER_REMEDY
    try:
        with safe_open(path, "numpy"):  # reads the header, and compares it with the size of the file
            return None
    except SafetensorError as error:
        return f"not a whole safetensors file ({size:,} bytes: {error}); {_again(path)}"


def file_with(tensor: str, folder: Path, files: Iterable[str]) -> Path:
    """Return the file that has a tensor; the folder if none has a tensor of this name."""
    for path in (folder / name for name in files if name.endswith(".safetensors")):
        with safe_open(path, "numpy") as weights:
            if tensor in weights.keys():  # noqa: SIM118 (not a mapping)
                return path
    return folder


def published_quantization(folder: Path, base: Base) -> str | None:
    """Return the quantisation in which a base was published, which must be the recipe's; None for plain weights.

    Args:
        folder: The folder of the base.
        base: The recipe's section.

    Raises:
        BaseError: The recipe names another quantisation, or lora_kit cannot train the base's.
    """
    config = read_json(folder / "config.json")
    nested = [value for value in config.values() if isinstance(value, dict)]
    found = next((part["quantization_config"] for part in (config, *nested) if part.get("quantization_config")), None)
    if not isinstance(found, dict):
        if base.quantization == "fp8":
            raise BaseError(
                f"base.quantization: fp8 needs a base that was published in fp8, and {folder} is not quantised; set "
                "int8 or nf4, which quantise at loading, or choose another base"
            )
        return None
    four_bits = found.get("load_in_4bit") or found.get("_load_in_4bit")
    eight_bits = found.get("load_in_8bit") or found.get("_load_in_8bit")
    kind = str(found.get("quant_method", "bitsandbytes"))
    if kind == "bitsandbytes" and (four_bits or eight_bits):
        kind = str(found.get("bnb_4bit_quant_type", "fp4")) if four_bits else "int8"
    where = f"base.repo: {folder / 'config.json'}: the base was published in {kind}"
    if kind not in ("nf4", "int8", "fp8"):
        raise BaseError(
            f"{where}, which lora_kit does not train; choose the base in bfloat16, float32, or published in nf4, int8 "
            "(bitsandbytes) or fp8 (a scale for each block)"
        )
    if kind != base.quantization:
        raise BaseError(
            f"{where}, and the recipe has base.quantization: {base.quantization}; write `quantization: {kind}` in the "
            f"section base (--set base.quantization={kind})"
        )
    return kind


def head_rows(folder: Path, files: Iterable[str]) -> np.ndarray | None:
    """Return the rows of a base's head, or of the embedding that it is tied to, read from its files.

    Args:
        folder: The folder of the base.
        files: The names of the safetensors files.

    Returns:
        float32 [vocabulary, at most 256], with evenly spaced dimensions; None if no file has a tensor under
        a usual name, or it is quantised.
    """
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in (folder / name for name in files if name.endswith(".safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        found |= {name: (path, 8 + length, entry) for name, entry in header.items() if name.endswith(HEADS)}
    name = min(found, key=lambda key: [key.endswith(head) for head in HEADS].index(True), default=None)
    if name is None:
        return None
    path, start, entry = found[name]
    if entry["dtype"] not in DTYPES or len(entry["shape"]) != 2:
        return None
    dtype, (rows, width) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
    begin = start + entry["data_offsets"][0]
    values = np.memmap(path, dtype, "r", offset=begin, shape=(rows, width))[:, :: -(-width // MAX_DIMENSIONS)]
    if entry["dtype"] == "BF16":  # numpy has no bfloat16; its bits are the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a base.

    Raises:
        BaseError: The file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if is_pointer(path):
            raise BaseError(f"base.repo: {path}: {POINTER_REMEDY}") from error
        raise BaseError(f"base.repo: {path} is not JSON: {error}; {_again(path)}") from error
    if not isinstance(content, dict):
        raise BaseError(f"base.repo: {path} is not a JSON object; {_again(path)}")
    return content


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"base.repo: {folder} has {others[0]}, but transformers loads only {WEIGHTS}, or the files that {INDEX} "
            "names; rename it, or download the base again"
        )
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        return (
            f"base.repo: {folder} has no .safetensors weights, only {pickled[0]}, and pickled weights are not loaded; "
            f"{_convert(folder)}"
        )
    return f"base.repo: {folder} has no .safetensors weights; download the base again, or give another folder"


def _convert(folder: Path) -> str:
    return (
        'if you trust their author, convert them once: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('NEW')\", copy the tokenizer's files to NEW, and set base.repo "
        "to NEW"
    )


def _again(path: Path) -> str:
    return f"download or copy {path.name} again"
