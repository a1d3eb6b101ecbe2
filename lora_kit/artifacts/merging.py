"""Merge an adapter into its base: a model for tools that do not support adapters.

Merging rounds the sum of weight and update to the dtype of the weights. Quantised weights would lose the update, so the
base is loaded without quantisation. The written model is read back, and its logits are compared with those of base and
adapter.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_kit.artifacts.answering import prompt_ids, stop_ids
from lora_kit.artifacts.load import load
from lora_kit.data.rendering import Renderer
from lora_kit.errors import CheckpointError, InputError

REPORT = "merge.json"
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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def merge(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> Merged:
    """Merge an adapter into its base, write the model, and compare it with base and adapter.

    Args:
        path: A checkpoint, run or Hub name, as for `lora_kit.load`.
        out: A new or empty folder. A new folder appears when the model in it is complete; in an existing folder
            config.json appears last.
        base: The base's folder, if it is not where it was in training.
        dtype: `bfloat16` or `float32`; None takes the dtype of the training.
        prompts: User messages for the comparison.

    Raises:
        InputError: `out` is a file or a folder that is not empty.
        CheckpointError: The model could not be written; the partial model was deleted.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: it exists and is not an empty folder; choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    model, tokenizer = load(path, base=base, dtype=dtype, quantized=False)
    renderer = Renderer(tokenizer)
    ids = [prompt_ids([{"role": "user", "content": text}], renderer) for text in prompts]
    expected = _logits(model, ids)
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.generation_config.eos_token_id = list(stop_ids(renderer))  # the recipe may set another stop token
    device, weights = next(merged.parameters()).device, merged.dtype
    try:
        shutil.rmtree(partial, ignore_errors=True)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del model, merged  # free the memory for the model that is read back
        written = AutoModelForCausalLM.from_pretrained(partial, dtype=weights).to(device).eval()
        found = _logits(written, ids)
        report = Merged(
            folder=str(out),
            dtype=str(weights).removeprefix("torch."),
            largest_difference=float((expected - found).abs().max()),
            largest_logit=float(expected.abs().max()),
            top1_agreement=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
            positions=len(expected),
        )
        (partial / REPORT).write_text(json.dumps(report.to_dict() | {"folder": out.name}, indent=2) + "\n")
        if out.exists():  # perhaps the working folder, which must stay the same folder
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(out / file.name)
        else:
            partial.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: not written: {error.strerror or error}; the partial model was deleted, so try again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


@torch.no_grad()
def _logits(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> Float32[Tensor, "positions vocabulary"]:
    """Return the logits at all positions of the prompts, one prompt after the other, on the CPU."""
    device = next(model.parameters()).device
    rows = (torch.tensor([list(ids)], device=device) for ids in prompts)
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows])
