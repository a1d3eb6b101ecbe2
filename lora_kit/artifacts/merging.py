"""Fold an adapter into its base: one ordinary model, for tools that know nothing of adapters.

Merging rounds: a weight has fewer digits than the sum that it holds, a quantised one as good as none, so the base is
loaded whole. What was written is read back and compared with base and adapter apart, and the difference is told.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_kit.artifacts.answering import prompt_ids, stop_ids
from lora_kit.artifacts.load import load
from lora_kit.data.template import Renderer
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
    """A merged model, and how far it is from base and adapter apart.

    Attributes:
        folder: Where it is.
        dtype: Of its weights.
        largest_difference: The largest difference of two logits.
        largest_logit: The largest logit, to compare it with.
        top1_agreement: The share of positions at which both find the same token likeliest.
        positions: How many positions were compared.
    """

    folder: str
    dtype: str
    largest_difference: float
    largest_logit: float
    top1_agreement: float
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def merge(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> Merged:
    """Write base and adapter as one model, read it back and compare it with the two apart.

    Args:
        path: As in `lora_kit.load`.
        out: A new or empty folder; it appears when the model in it is whole.
        base: The base's folder, if it is not where the training had it.
        dtype: `bfloat16` or `float32`; by default as in training.
        prompts: What both are compared on, as user messages.

    Raises:
        InputError: `out` holds something.
        CheckpointError: It could not be written; nothing half is left.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already and not empty; choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    model, tokenizer = load(path, base=base, dtype=dtype, quantized=False)
    renderer = Renderer(tokenizer)
    ids = [prompt_ids([{"role": "user", "content": text}], renderer) for text in prompts]
    apart = [_logits(model, one) for one in ids]
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.generation_config.eos_token_id = list(stop_ids(renderer))  # a recipe may have named another stop token
    device, weights = next(merged.parameters()).device, merged.dtype
    try:
        shutil.rmtree(partial, ignore_errors=True)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del model, merged  # the copy that is read back takes their room
        written = AutoModelForCausalLM.from_pretrained(partial, dtype=weights).to(device).eval()
        together = [_logits(written, one) for one in ids]
        report = _compare(out, str(weights).removeprefix("torch."), apart, together)
        (partial / REPORT).write_text(json.dumps(report.to_dict() | {"folder": out.name}, indent=2) + "\n")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: not written: {error.strerror or error}; nothing half is left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


@torch.no_grad()
def _logits(model: PreTrainedModel | torch.nn.Module, ids: Sequence[int]) -> Tensor:
    row = torch.tensor([list(ids)], device=next(model.parameters()).device)
    return model(input_ids=row, use_cache=False).logits[0].float().cpu()


def _compare(out: Path, dtype: str, apart: Sequence[Tensor], together: Sequence[Tensor]) -> Merged:
    first, second = torch.cat(list(apart)), torch.cat(list(together))
    return Merged(
        str(out),
        dtype,
        float((first - second).abs().max()),
        float(first.abs().max()),
        float((first.argmax(-1) == second.argmax(-1)).double().mean()),
        len(first),
    )
