"""Build what ships with lora_kit: a tiny base, pretrained on synthetic text, and a dataset to fine-tune it on.

    python -m lora_kit.assets.build [--out FOLDER] [--seed N]

All text comes from `lora_kit.assets.text` and a seed. Training uses one CPU thread, which is faster than two for a
model this small. The same machine and library versions reproduce the same bytes; another machine gives an equivalent
base.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_kit.assets import text

HERE = Path(__file__).parent
SEED = 0
CONTEXT = 512
ROWS, LENGTH = 8, 256  # shape of a batch of text
PEAK_RATE, REPEAT_RATE = 3e-3, 2e-3
CYCLES = ((450, 4000), (0, 3000), (0, 3000))
"""(steps on repeated tokens, steps on text) of each cycle. Each cycle begins with a new optimizer and a high learning
rate; without that, the model copies tokens but not those that a question asks for."""

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a character-level tokenizer with special tokens and a chat template."""
    vocabulary = {token: number for number, token in enumerate([*text.SPECIAL, *text.ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=text.UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    roles = [f"<|{role}|>" for role in text.ROLES]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=text.END,
        pad_token=text.END,
        unk_token=text.UNKNOWN,
        additional_special_tokens=roles,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the configuration of the base. Widths are multiples of 32, which quantisation kernels require."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def repeats(vocabulary: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of token ids [32, 64] without end; each row repeats a random sequence of 8 to 27 distinct tokens.

    Such tokens can be predicted only by attending to an earlier occurrence. The model learns to copy in seconds, which
    takes more than an hour on text alone.
    """
    generator = torch.Generator().manual_seed(seed)
    first = len(text.SPECIAL)
    while True:
        rows = []
        for _ in range(32):
            period = int(torch.randint(8, 28, (1,), generator=generator))
            tokens = torch.randperm(vocabulary - first, generator=generator)[:period] + first
            rows.append(tokens.repeat(64 // period + 1)[:64])
        yield torch.stack(rows)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of token ids [ROWS, LENGTH] without end; each row is concatenated documents, cut to LENGTH."""
    documents = text.documents(seed)
    while True:
        rows = []
        for _ in range(ROWS):
            row: list[int] = []
            while len(row) < LENGTH:
                row += tokenizer(next(documents), add_special_tokens=False)["input_ids"]
            rows.append(row[:LENGTH])
        yield torch.tensor(rows)


def learning_rate(step: int, repeat_steps: int, text_steps: int) -> float:
    """Return the learning rate of a step of a cycle: warm-up and constant for the repeats, then warm-up and cosine."""
    if step < repeat_steps:
        return REPEAT_RATE * min(1, (step + 1) / 50)
    step -= repeat_steps
    return PEAK_RATE * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / text_steps)))


def train_cycle(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, number: int, *, seed: int) -> None:
    """Train a base for one of the CYCLES, and print the loss (nats per token) every 50 steps."""
    repeat_steps, text_steps = CYCLES[number]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    data = chain(islice(repeats(len(tokenizer), seed), repeat_steps), batches(tokenizer, seed + 100 * number))
    recent: list[float] = []
    for step, ids in enumerate(islice(data, repeat_steps + text_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, repeat_steps, text_steps)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            mean, seconds = sum(recent[-50:]) / 50, time.process_time()
            print(f"cycle {number}, step {step + 1}: loss {mean:.4f}, {seconds:.0f} s of CPU", flush=True)


def pretrain(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Return a base trained for all CYCLES."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(tokenizer)).train()
    for number in range(len(CYCLES)):
        train_cycle(model, tokenizer, number, seed=seed)
    return model.eval()


@torch.no_grad()
def loss_on_new_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> float:
    """Return the loss (nats per token) on 20 batches of text from another seed."""
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in islice(batches(tokenizer, seed + 1), 20)]
    return sum(losses) / len(losses)


def write_dataset(folder: Path, *, seed: int) -> dict[str, int]:
    """Write the files of the dataset and of the preferences, and return the number of records of each."""
    counts = {}
    for task, records in (("quickstart", text.dataset(seed)), ("preferences", text.preferences(seed))):
        for name, split in records.items():
            lines = "".join(json.dumps(record) + "\n" for record in split)
            (folder / f"{task}.{name}.jsonl").write_text(lines, encoding="utf-8")
            counts[name if task == "quickstart" else f"{task}_{name}"] = len(split)
    return counts


def build(folder: Path, *, seed: int) -> None:
    """Write the base, the dataset and their README to a folder."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    counts = write_dataset(folder, seed=seed)
    tokenizer = make_tokenizer()
    began = time.process_time()
    model = pretrain(tokenizer, seed=seed)
    minutes = (time.process_time() - began) / 60
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    (folder / "base" / "model.safetensors").chmod(0o644)  # safetensors makes it readable only for the owner
    facts = counts | {
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
        "context": CONTEXT,
        "vocabulary": len(tokenizer),
        "repeats": sum(repeat_steps for repeat_steps, _ in CYCLES),
        "steps": sum(map(sum, CYCLES)),
        "cycles": len(CYCLES),
        "rate": PEAK_RATE,
        "loss": loss_on_new_text(model, tokenizer, seed=seed),
        "random": math.log(len(tokenizer)),
        "torch": torch.__version__.split("+")[0],
    }
    page = (HERE / "README.template").read_text(encoding="utf-8").format(**facts, seed=seed, minutes=minutes)
    (folder / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the base and the dataset that ship with lora_kit.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this package)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of text and weights (default: {SEED})")
    arguments = parser.parse_args()
    build(arguments.out, seed=arguments.seed)
