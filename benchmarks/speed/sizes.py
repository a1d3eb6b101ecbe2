"""What all systems train: bases of a given size with random weights, and the same examples in the same order.

The lengths are those of a chat dataset (lognormal, median 150 tokens, 99% below 1,500, cut at 2,048), taken at evenly
spaced quantiles, so that a few dozen examples have the padding and the long tail of many. A fifth of each example is
the prompt, which is not trained. A word of the text is a token, so text and token ids are the same examples.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from ground import save_tokenizer

MEDIAN, SIGMA, LONGEST = 150, math.log(10) / NormalDist().inv_cdf(0.99), 2048
PROMPT_SHARE = 0.2
WARM_UP_STEPS, WARM_UP_LONGEST = 2, 64  # the first steps are not timed, so they are short
IGNORE = -100


@dataclass(frozen=True)
class Size:
    """A base, and how much of it is measured.

    Attributes:
        config: Arguments of the family's configuration.
        batch: Examples a step.
        steps: Timed steps; the warm-up comes before them.
        family: The model's name in transformers.
        note: What is not as in the model that it is named after.
    """

    config: dict[str, Any]
    batch: int
    steps: int
    family: str = "llama"
    note: str = ""


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


MOE = _llama(2048, 6144, 8, 32, 4, 151936) | {
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "head_dim": 128,
    "norm_topk_prob": True,
}
SIZES = {
    "tiny": Size(_llama(64, 128, 2, 4, 2, 512), batch=4, steps=2),
    "30m": Size(_llama(512, 1376, 8, 8, 8, 8000), batch=16, steps=3),
    "160m": Size(_llama(768, 2048, 16, 12, 12, 32000), batch=16, steps=2),
    "1.2b": Size(
        _llama(2048, 8192, 16, 32, 8, 32000),
        batch=8,
        steps=1,
        note="Llama-3.2-1B with a vocabulary of 32,000, whose logits a machine of 24 GiB can hold for every system",
    ),
    "llama-1b": Size(_llama(2048, 8192, 16, 32, 8, 128256), batch=64, steps=6),
    "llama-8b": Size(_llama(4096, 14336, 32, 32, 8, 128256), batch=64, steps=4),
    "qwen-moe": Size(MOE, batch=64, steps=4, family="qwen3_moe", note="Qwen3-30B-A3B with 8 of its 48 layers"),
}


def make_base(folder: Path, name: str, device: str = "cpu") -> Path:
    """Save a random base in bf16, with a tokenizer of a token a word; made on the device, which is faster on a GPU."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    size, target = SIZES[name], folder / f"base-{name}"
    if target.is_dir():
        return target
    disable_progress_bar()
    torch.manual_seed(0)
    more = {"max_position_embeddings": LONGEST, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    # rows of the head as long as those of a trained one, so that a loss says what the hidden states are
    config = AutoConfig.for_model(size.family, **size.config, **more, initializer_range=0.05)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    words = ["<pad>", "</s>", *(f"w{number}" for number in range(2, size.config["vocab_size"]))]
    save_tokenizer(target, words, pre_tokenizers.WhitespaceSplit())
    return target


def lengths(count: int, *, longest: int = LONGEST) -> np.ndarray:
    """Return the lengths of `count` examples, shuffled: the distribution's evenly spaced quantiles."""
    quantiles = [NormalDist().inv_cdf((number + 0.5) / count) for number in range(count)]
    found = np.exp(math.log(MEDIAN) + SIGMA * np.array(quantiles)).round().clip(4, longest)
    return np.random.default_rng(count).permutation(found.astype(int))


@dataclass(frozen=True)
class Example:
    """Token ids, of which the first `prompt` are not trained."""

    ids: list[int]
    prompt: int

    @property
    def labels(self) -> list[int]:
        """The ids that are trained, IGNORE elsewhere; not shifted."""
        return [IGNORE] * self.prompt + self.ids[self.prompt :]


@dataclass(frozen=True)
class Work:
    """What one measurement trains: the examples of every step, the warm-up's first."""

    folder: Path
    size: str
    batch: int
    steps: int

    @property
    def base(self) -> Path:
        """The folder of the base."""
        return self.folder / f"base-{self.size}"

    @property
    def data(self) -> Path:
        """The file of the same examples as text, in the order that a recipe's shuffle turns into ours."""
        return self.folder / f"data-{self.size}-{self.batch}-{self.steps}.jsonl"

    @property
    def all_steps(self) -> int:
        """Steps with the warm-up."""
        return self.steps + WARM_UP_STEPS

    def examples(self) -> list[Example]:
        """Return the examples in the order of training."""
        vocabulary = SIZES[self.size].config["vocab_size"]
        warm_up = lengths(WARM_UP_STEPS * self.batch, longest=WARM_UP_LONGEST)
        weights = 1 / np.arange(10, vocabulary + 8)  # words of a text are about that frequent
        rng = np.random.default_rng(0)
        found = []
        for length in [*warm_up, *lengths(self.steps * self.batch)]:
            ids = rng.choice(vocabulary - 2, length - 1, p=weights / weights.sum()) + 2
            found.append(Example([*ids.tolist(), 1], max(1, round(length * PROMPT_SHARE))))
        return found

    def write_data(self) -> None:
        """Write the examples as text, each where lora_kit's order looks for it."""
        from lora_kit.data.order import examples_at

        examples, count = self.examples(), self.batch * self.all_steps
        records: list[dict[str, str]] = [{}] * count
        for place, example in zip(examples_at(range(count), count, 0), examples, strict=False):
            words = [f"w{number}" for number in example.ids[:-1]]  # the end is added by whoever reads it
            prompt, completion = " ".join(words[: example.prompt]), " ".join(words[example.prompt :])
            records[place] = {"prompt": prompt, "completion": f" {completion}"}
        self.data.write_text("".join(json.dumps(record) + "\n" for record in records))


@dataclass(frozen=True)
class Counts:
    """What some examples are to a floor: their lengths and their trained tokens."""

    lengths: tuple[int, ...]
    supervised: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Counts":
        """Count examples."""
        return cls(tuple(len(one.ids) for one in examples), sum(len(one.ids) - one.prompt for one in examples))

    @property
    def tokens(self) -> int:
        """All tokens; there is no padding in them."""
        return sum(self.lengths)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.lengths + other.lengths, self.supervised + other.supervised)
