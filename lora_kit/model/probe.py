"""Test how a base computes (causally, without random numbers, packed examples apart), and choose its attention."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lora_kit.data.packing import IGNORE, Fork, MicroBatch
from lora_kit.errors import BaseError
from lora_kit.kernels.attention import SEGMENT, attention_of, own_attention, use_attention
from lora_kit.kernels.segments import Segments, moved
from lora_kit.model.forward import model_inputs
from lora_kit.recipe.schema import Base

PROBE_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
}  # largest relative difference of logits; a leak causes 0.4 or more, rounding 1e-6 (float32) or 1e-2 (bfloat16)
LOOK_AHEAD_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 1e-2,
}  # largest relative difference of a prefix's logits when what follows it changes; a causal model has none or rounding
MAX_TOLERANCE = 0.25  # the tolerance for a base so wide or deep that rounding errors are larger than usual


def choose_attention(model: PreTrainedModel, base: Base, device: torch.device) -> tuple[str, str]:
    """Set and return the fastest attention implementation and layout that compute every example correctly.

    Args:
        model: The base; its attention implementation is changed.
        base: The recipe's section. Other values of `attention` than auto are kept.
        device: The device of the model.

    Returns:
        The attention implementation, and the layout of micro-batches, "packed" or "padded".
    """
    default, vocabulary = attention_of(model), model.config.get_text_config().vocab_size
    if base.attention == "auto" and use_attention(model, SEGMENT):
        if not leaks_when_packed(model, vocabulary, device):
            return SEGMENT, "packed"
        use_attention(model, default)
    leaks = leaks_when_packed(model, vocabulary, device)
    return default, "padded" if leaks else "packed"


@torch.no_grad()
def refuse_unfit(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Check that a base is causal, and that its forward pass in training repeats: it draws no random numbers.

    Args:
        model: The base.
        name: Its name, for the message.
        device: The device of the model.

    Raises:
        BaseError: The logits of a prefix depend on what follows it, or the logits depend on the random seed.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(3, 20, device=device)[None] * 7 % vocabulary
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % vocabulary
    logits, other = (model(input_ids=row, use_cache=False).logits[0, :9] for row in (ids, changed))
    if _finite_difference(other, logits) > LOOK_AHEAD_TOLERANCE[logits.dtype]:
        raise BaseError(
            f"base.repo: {name} ({type(model).__name__}) is not causal: its logits at a token depend on later tokens, "
            "so it would learn to copy what it must predict; choose a causal language model"
        )
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        seen = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            seen.append(model(input_ids=ids, use_cache=False).logits[0])
    model.train(was_training)
    # the same pass twice: kernels that add in a varying order cause a difference
    noise = _finite_difference(seen[1], seen[0])
    if _finite_difference(seen[2], seen[0]) > max(2 * noise, 1e-6):
        raise BaseError(
            f"base.repo: {name} ({type(model).__name__}) draws random numbers in training that its configuration does "
            "not switch off, so no run could be repeated; choose another base"
        )


@torch.no_grad()
def leaks_when_packed(model: PreTrainedModel, vocabulary: int, device: torch.device) -> bool:
    """Return whether packing examples into a row changes their logits in this model.

    The logits of two packed examples are compared with those of each example alone, computed with the model's default
    attention. A model also counts as leaking if it accepts no position ids, or if it has sliding windows that the
    attention by segments would not know.

    Args:
        model: The base, with the attention implementation to test.
        vocabulary: The number of token ids to choose from.
        device: The device of the model.
    """
    examples = [np.arange(start, start + length) * 7 % vocabulary for start, length in ((3, 17), (5, 30))]
    ends = np.cumsum([0, *map(len, examples)])
    places = [np.arange(*span) for span in itertools.pairwise(ends)]
    return _differ(model, probe_batch(examples), examples, places, device)


@torch.no_grad()
def shares_beginnings(model: PreTrainedModel, device: torch.device) -> bool:
    """Return whether two sequences may share the computation of their common beginning in this model.

    The logits of sequences that share their beginnings, packed into a row, are compared with those of each sequence
    alone, computed with the model's default attention.

    Args:
        model: The base, which attends by segment to packed examples.
        device: The device of the model.
    """
    vocabulary, pairs = model.config.get_text_config().vocab_size, ((11, 8, 13), (18, 5, 3))
    row = np.arange(3, 3 + sum(map(sum, pairs))) * 7 % vocabulary
    examples, places, position_ids, forks, start = list[np.ndarray](), list[np.ndarray](), list[int](), list[Fork](), 0
    for shared, *rests in pairs:
        begin = start + shared
        for rest in rests:
            places.append(np.concatenate([np.arange(start, start + shared), np.arange(begin, begin + rest)]))
            examples.append(row[places[-1]])
            begin += rest
        position_ids += [*range(shared + rests[0]), *range(shared, shared + rests[1])]
        forks.append(Fork(shared, shared + rests[0], IGNORE))
        start = begin
    lengths = tuple(map(sum, pairs))
    batch = MicroBatch(row[None], row[None], np.array([position_ids]), None, lengths, forks=tuple(forks))
    return not _differ(model, batch, examples, places, device)


def _differ(
    model: PreTrainedModel,
    batch: MicroBatch,
    examples: Sequence[np.ndarray],
    places: Sequence[np.ndarray],
    device: torch.device,
) -> bool:
    """Return whether the logits of a packed row are not those of its examples alone.

    Args:
        model: The base, with the attention implementation to test.
        batch: The packed row.
        examples: The token ids of the examples.
        places: The places of each example in the row.
        device: The device of the model.
    """
    inputs = model_inputs(model, batch, device)
    try:
        logits = model(**inputs).logits[0]
    except (TypeError, ValueError):
        return True
    segments = inputs.get("segments")
    if isinstance(segments, Segments) and not _knows_windows(model.config.get_text_config(), segments.windows):
        return True
    for example, own in zip(examples, places, strict=True):
        single = model_inputs(model, probe_batch([example]), device)
        with own_attention(model):
            alone = model(**single).logits[0]
        difference = _relative_difference(logits[moved(own, device)], alone)
        if not difference <= PROBE_TOLERANCE[alone.dtype]:
            # the same example, computed by other operations, shows the rounding error
            with own_attention(model, "eager"):
                rounding = _relative_difference(model(**single).logits[0], alone)
            if not difference <= min(2 * rounding, MAX_TOLERANCE):
                return True
    return False


def _relative_difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def _finite_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest relative difference where both logits are finite; a logit that is not tells nothing."""
    finite = logits.isfinite() & expected.isfinite()
    difference = (logits - expected)[finite].abs()
    if not difference.any():
        return 0.0
    return float(difference.max() / expected[finite].abs().max())


def _knows_windows(config: PreTrainedConfig, passed: list[int | None]) -> bool:
    """Return whether every layer with a sliding window passed the window to its attention function.

    The probe's examples are shorter than the windows, so their logits cannot show this. Some families (phimoe,
    qwen2_moe) express the window only in the attention mask.

    Args:
        config: The configuration of the base.
        passed: The window that each call of the attention function received.
    """
    values = config.to_dict()
    layers = values.get("layer_types") or []
    has_windows = values.get("sliding_window") is not None and values.get("use_sliding_window", True)
    expected = layers.count("sliding_attention") if layers else len(passed) * has_windows
    return "chunked_attention" not in layers and sum(window is not None for window in passed) >= expected


def probe_batch(examples: list[np.ndarray]) -> MicroBatch:
    """Pack examples (token ids) into a micro-batch whose labels are the ids themselves."""
    ids = np.concatenate(examples)[None]
    position_ids = np.concatenate([np.arange(len(example)) for example in examples])[None]
    return MicroBatch(ids, ids, position_ids, None, tuple(map(len, examples)))
