"""Merge an adapter into its base: a model for tools that do not support adapters.

Merging rounds the sum of weight and update to the dtype of the weights. Quantised weights would lose the update, so the
base is loaded without quantisation, or dequantised. The written model is read back, and its logits are compared with
those of base and adapter.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lora_kit.artifacts.answering import positions_of, prompt_ids, stop_ids
from lora_kit.artifacts.load import open_adapter
from lora_kit.data.rendering import Renderer
from lora_kit.errors import CheckpointError, InputError

REPORT = "merge.json"
MIN_AGREEMENT = 0.9  # least share of equal most likely tokens; rounding to bfloat16 leaves more
PROMPTS = (
    "What is the capital of France, and how many people live there?",
    "Write a short letter to a friend who moved to another city.",
    "def mean(values):\n    return sum(values) / len(values)\n\nExplain this function.",
    "Translate to German: The weather is fine today, so we walk to the lake.",
    "12 + 30 = 42; 7 * 8 = 56; 100 - 1 =",
    'Make JSON of it: name Ada, born 1815, field "mathematics".',
    "¿Qué hora es? Quelle heure est-il? 今何時ですか?",
    "A short story about a fox, a bridge and a clever baker:",
)


@dataclass(frozen=True)
class Merged:
    """A merged model, compared with base and adapter.

    Attributes:
        folder: The folder of the merged model.
        dtype: The dtype of its weights.
        largest_difference: The largest absolute difference between two logits.
        largest_logit: The largest absolute logit, for comparison.
        top1_agreement: The fraction of positions with the same most likely token.
        positions: The number of positions compared.
    """

    folder: str
    dtype: str
    largest_difference: float
    largest_logit: float
    top1_agreement: float
    positions: int

    @property
    def agrees(self) -> bool:
        """Whether the merged model predicts what base and adapter predict, apart from rounding."""
        return self.top1_agreement >= MIN_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def merge(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    prompts: Sequence[str] = PROMPTS,
) -> Merged:
    """Merge an adapter into its base, write the model, and compare it with base and adapter.

    Args:
        path: A checkpoint, run or Hub name, as for `lora_kit.load`.
        out: A new or empty folder. A new folder appears when the model in it is complete; in an existing folder
            config.json appears last.
        base: The base's folder, if it is not where it was in training.
        dtype: `bfloat16` or `float32`; None takes the dtype of the training.
        trust_remote_code: Whether transformers may run Python files of the base, as for `lora_kit.load`.
        prompts: User messages for the comparison.

    Raises:
        InputError: `out` is a file or a folder that is not empty.
        CheckpointError: The model could not be written; the partial model was deleted.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: it exists and is not an empty folder; choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    loaded = open_adapter(path, base=base, dtype=dtype, quantized=False, trust_remote_code=trust_remote_code)
    model, tokenizer = loaded.model, loaded.tokenizer
    renderer = Renderer(tokenizer)
    ids = [prompt_ids(text, renderer)[: positions_of(model)] for text in prompts]
    expected = _logits(model, ids)
    _untie_adapted_head(cast(PreTrainedModel, model.get_base_model()))
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft's safe_merge found NaN in the merged weights
        raise CheckpointError(f"{path}: it cannot be merged: {error}; nothing was written") from error
    merged.config.use_cache = True
    merged.generation_config = _valid(merged.generation_config, stop_ids(renderer))
    device, weights = next(merged.parameters()).device, merged.dtype
    try:
        shutil.rmtree(partial, ignore_errors=True)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del loaded, model, merged  # free the memory for the model that is read back
        written = AutoModelForCausalLM.from_pretrained(
            partial, dtype=weights, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        found = _logits(written.to(device).eval(), ids)
        report = Merged(
            folder=str(out),
            dtype=str(weights).removeprefix("torch."),
            largest_difference=float((expected - found).abs().max()),
            largest_logit=float(expected.abs().max()),
            top1_agreement=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
            positions=len(expected),
        )
        (partial / REPORT).write_text(json.dumps(report.to_dict() | {"folder": out.name}, indent=2) + "\n")
        _apply_umask(partial)
        if out.exists():  # perhaps the working folder, which must stay the same folder
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(out / file.name)
        else:
            partial.rename(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{out}: not written: {reason}; the partial model was deleted, so try again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _untie_adapted_head(base: PreTrainedModel) -> None:
    """Give a head that has an adapter weights of its own, if it shares those of the embedding, which has none."""
    head, embedding = cast(Any, base.get_output_embeddings()), cast(Any, base.get_input_embeddings())
    inner = getattr(head, "base_layer", None)  # only a layer with an adapter has a base_layer
    if inner is None or inner.weight is not embedding.weight:
        return
    inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def _valid(settings: GenerationConfig, stop: Sequence[int]) -> GenerationConfig:
    """Return settings of generation that also end at the stop tokens, without those that transformers refuses to save.

    Args:
        settings: The base's settings. Contradictory ones, e.g. a temperature with `do_sample: false`, have no effect.
        stop: The ids that end an answer of the adapter; the recipe may have set another stop token than the base has.
    """
    ends = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    settings.eos_token_id = list(dict.fromkeys([*stop, *ends]))
    try:
        settings.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE):
            setattr(settings, name, None)
    return settings


def _apply_umask(folder: Path) -> None:
    """Give the files in a folder the permissions of new files; safetensors makes files that only their owner reads."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


@torch.no_grad()
def _logits(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> Float32[Tensor, "positions vocabulary"]:
    """Return the logits at all positions of the prompts, one prompt after the other, on the CPU."""
    device = next(model.parameters()).device
    rows = (torch.tensor([list(ids)], device=device) for ids in prompts)
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows])
