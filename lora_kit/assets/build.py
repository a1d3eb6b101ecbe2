"""Make the embedded default: a tiny base that has learned to read made-up text, and a dataset for it.

    python -m lora_kit.assets.build [--out FOLDER] [--seed N]

Everything comes from `lora_kit.assets.text` and a seed, so nobody else's text or weights are in it. One CPU
thread is enough, and faster than two for a model this small. The same machine and versions give the same
bytes again; another machine gives a base that is as good.
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
ROWS, LENGTH = 8, 256  # a step of text
PEAK_RATE, REPEAT_RATE = 3e-3, 2e-3
CYCLES = ((450, 4000), (0, 3000), (0, 3000))
"""Steps of repeats and of text in each cycle; a cycle begins with a fresh optimizer and a high rate, which is what it
takes to get from copying something to copying what was asked for."""

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

README = """# The embedded default

All of it is synthetic: made by this project, from text that it generates, for demonstration and tests. No
text, weights or vocabulary of anyone else are in it. Licence: Apache-2.0, as the rest of the project.

- `base/`: a Llama of {parameters:,} parameters ({layers} layers of {width}, context {context}), fp32, with
  {vocabulary} tokens: a character each, the marks of the turns, and `<|end|>`.
- `quickstart.train.jsonl`: {train:,} micro-stories, each with JSON that names its person, animal and place.
- `quickstart.validation.jsonl`: {validation:,} more. No story is in both files, and in half of these the
  person has a name that neither the base nor the training data ever showed.

The base was trained from nothing, first on rows that repeat a few tokens ({repeats} steps; they teach copying), then
on stories and short notes with some of their facts in nine notations (40% of the documents), questions on stories and
records with their answers (20%), micro-stories (16%), invented phrases said again (13%) and key-value records (11%),
much of it in the form of the chat template. It never saw the dataset's task, JSON made from a story. Every token of its
vocabulary is frequent in that text, because an adapter cannot teach a token whose frozen embedding was never trained.

Made with `python -m lora_kit.assets.build --seed {seed}`: {steps:,} steps of 2,048 tokens in {cycles} cycles, AdamW
with a cosine down from {rate:g}, one thread, {minutes:.0f} minutes of CPU time, torch {torch}. Its loss on new text of
the same kind is {loss:.3f} nats a token; one that had learned nothing would have {random:.2f}.
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: a token a character, special tokens first, and the chat template."""
    vocabulary = {token: number for number, token in enumerate([*text.SPECIAL, *text.ALPHABET])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=text.UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    roles = [f"<|{role}|>" for role in text.ROLES]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
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
    """Return the base's shape; widths are multiples of 32, as quantised kernels want them."""
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
    """Yield [32, 64] token ids without end, each row a few distinct tokens over and over.

    Nothing but looking back predicts them, so a model learns to copy in seconds that it would not learn in an hour of
    text: after that, everything else that it reads teaches it what to copy.
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
    """Yield [ROWS, LENGTH] token ids without end; each row begins with a document and is cut at its end."""
    unread = text.documents(seed)
    while True:
        rows = []
        for _ in range(ROWS):
            row: list[int] = []
            while len(row) < LENGTH:
                row += tokenizer(next(unread), add_special_tokens=False)["input_ids"]
            rows.append(row[:LENGTH])
        yield torch.tensor(rows)


def learning_rate(step: int, repeat_steps: int, text_steps: int) -> float:
    """Return the rate of a step of a cycle: a rise for the repeats, then a higher one and a cosine down."""
    if step < repeat_steps:
        return REPEAT_RATE * min(1, (step + 1) / 50)
    step -= repeat_steps
    return PEAK_RATE * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / text_steps)))


def read_cycle(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, number: int, *, seed: int) -> None:
    """Let a base read one of the cycles, printing the loss (nats a token) on the way."""
    repeat_steps, text_steps = CYCLES[number]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    reading = chain(islice(repeats(len(tokenizer), seed), repeat_steps), batches(tokenizer, seed + 100 * number))
    recent: list[float] = []
    for step, ids in enumerate(islice(reading, repeat_steps + text_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, repeat_steps, text_steps)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            loss_now, seconds = sum(recent[-50:]) / 50, time.process_time()
            print(f"cycle {number}, step {step + 1}: loss {loss_now:.4f}, {seconds:.0f} s of CPU", flush=True)


def pretrain(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Return a base that has read all cycles."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(tokenizer)).train()
    for number in range(len(CYCLES)):
        read_cycle(model, tokenizer, number, seed=seed)
    return model.eval()


@torch.no_grad()
def loss_on_new_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> float:
    """Return the loss (nats a token) on 20 batches of pretraining text of another seed."""
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in islice(batches(tokenizer, seed + 1), 20)]
    return sum(losses) / len(losses)


def write_dataset(folder: Path, *, seed: int) -> dict[str, int]:
    """Write the two files of the task and return how many records each has."""
    records = text.dataset(seed)
    for name, some in records.items():
        lines = "".join(json.dumps(one) + "\n" for one in some)
        (folder / f"quickstart.{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: len(some) for name, some in records.items()}


def build(folder: Path, *, seed: int) -> None:
    """Write the base, the dataset and the page about them to a folder."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    counts = write_dataset(folder, seed=seed)
    tokenizer = make_tokenizer()
    began = time.process_time()
    model = pretrain(tokenizer, seed=seed)
    minutes = (time.process_time() - began) / 60
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    (folder / "base" / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
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
    page = README.format(**facts, seed=seed, minutes=minutes)
    (folder / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded base and dataset.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this package)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"decides text and weights (default: {SEED})")
    arguments = parser.parse_args()
    build(arguments.out, seed=arguments.seed)
