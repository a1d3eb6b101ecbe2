"""What every measurement stands on: bases of a given size, the same tokens for both sides, runs that are started."""

import contextlib
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LETTERS = "abcdefgh "
SHAPES = {  # hidden, intermediate, layers, vocabulary, precision; the peer gets the same base
    "tiny": (64, 128, 2, 512, "float32"),
    "30M": (512, 1376, 8, 8000, "float32"),
    "160M": (768, 2048, 16, 32000, "bfloat16"),
}
RECIPE = """
base: {{repo: {base}, dtype: {dtype}}}
data: {{train: {data}, sequence_length: 256}}
adapter: {{rank: {rank}, alpha: 16, dropout: 0.1}}
optim: {{learning_rate: 1e-3, warmup: 0}}
train: {{steps: {steps}, batch_size: {batch}, micro_batch_tokens: {tokens}, seed: 0}}
checkpoint: {{every_steps: {every}, every_seconds: {seconds}, keep: 2}}
"""
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def make_base(folder: Path, shape: str) -> Path:
    """Save a random Llama of a shape, with a tokenizer of a token a letter."""
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    hidden, intermediate, layers, vocabulary, dtype = SHAPES[shape]
    target = folder / f"base-{shape}"
    if target.is_dir():
        return target
    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(target)
    words = ["<pad>", "</s>", *LETTERS, *(f"<{number}>" for number in range(vocabulary - 2 - len(LETTERS)))]
    save_tokenizer(target, words, pre_tokenizers.Split("", "isolated"), decoders.Fuse())
    return target


def save_tokenizer(target: Path, words: list[str], split: Any, join: Any = None) -> None:
    """Save a tokenizer of a token a word; the first word pads, the second ends."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = split
    if join is not None:
        inner.decoder = join
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=words[0], eos_token=words[1]).save_pretrained(target)


def make_data(folder: Path, examples: int, *, characters: int = 120) -> Path:
    """Save examples of equal length as raw text for us and as token ids for the peer."""
    import random

    from transformers import AutoTokenizer

    target = folder / f"data-{examples}-{characters}.jsonl"
    if target.is_file():
        return target
    rng = random.Random(0)
    texts = ["".join(rng.choices(LETTERS, k=characters)) for _ in range(examples)]
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base-tiny")
    target.with_suffix(".ids").write_text(json.dumps([tokenizer(text)["input_ids"] for text in texts]))
    return target


def make_recipe(folder: Path, name: str, shape: str, data: Path, **settings: object) -> Path:
    """Write a recipe; settings are `steps`, `batch`, `tokens`, `every`, `seconds`, `rank`."""
    path = folder / f"{name}.yaml"
    defaults = {"rank": 8, "steps": 20, "batch": 8, "tokens": 256, "every": 1000000, "seconds": 30}
    base, dtype = make_base(folder, shape), SHAPES[shape][4]
    path.write_text(RECIPE.format(base=base, dtype=dtype, data=data, **defaults | settings))
    return path


def ours(recipe: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    """Return our command line."""
    many = ["--processes", str(processes)] if processes > 1 else []
    return [sys.executable, "-m", "lora_kit", "train", str(recipe), "--out", str(out), *many, *more]


def peer(base: Path, data: Path, out: Path, *more: object, processes: int = 1, restarts: int = 0) -> list[str]:
    """Return the command line of the same job with transformers' Trainer and peft."""
    script = [str(HERE / "peer.py"), "--base", str(base), "--data", str(data), "--out", str(out), *map(str, more)]
    if processes == 1 and not restarts:
        return [sys.executable, *script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "--max-restarts", str(restarts), *script]


def start(command: list[str], log: Path | None = None) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own."""
    output = log.open("ab") if log else subprocess.DEVNULL
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True)


def finish(command: list[str], log: Path | None = None, *, timeout: float = 900) -> int:
    """Run a command to its end; 124 and no process left when it takes too long."""
    process = start(command, log)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        return 124


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL a command and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines(path: Path) -> list[dict]:
    """Return a log's whole lines."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def wait_for(condition: object, process: "subprocess.Popen[bytes]", *, timeout: float = 300) -> bool:
    """Wait until a function returns something true; False when the process ends or the time is over before."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return bool(condition())
        time.sleep(0.002)
    return True


def state_hash(run: Path, step: int) -> str:
    """Return a hash of the bytes of our adapter and moments after a step."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def median(values: list[float]) -> float:
    """Return the median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def machine() -> dict:
    """Return what figures depend on."""
    from importlib.metadata import version

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {known[0] if known else 'no AVX'}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
