"""Let a model answer prompts: greedy or sampled text, batched by length."""

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from lora_kit.data.formats import Conversation
from lora_kit.data.template import Renderer, prompt
from lora_kit.kernels.attention import own_attention


@dataclass(frozen=True)
class Answering:
    """How answers are made.

    Attributes:
        max_new_tokens: Where an answer is cut.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        stop_ids: Tokens that end an answer.
        batch_size: Prompts answered at once.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    batch_size: int = 32


@torch.no_grad()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], how: Answering
) -> list[str]:
    """Return the model's answer to each prompt (token ids), without the token that ended it.

    Prompts of like length are answered together, padded on the left.
    """
    was_training = model.training
    model.eval()
    shortest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(prompts), how.batch_size):
        members = shortest_first[start : start + how.batch_size]
        with own_attention(model):
            texts = _answer_batch(model, [prompts[index] for index in members], how)
        for index, ids in zip(members, texts, strict=True):
            answers[index] = str(tokenizer.decode(ids, skip_special_tokens=True))
    model.train(was_training)
    return answers


def _answer_batch(model: PeftModel, prompts: list[Sequence[int]], how: Answering) -> list[list[int]]:
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    padding = how.stop_ids[0]
    ids = torch.tensor([[padding] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    output = model.generate(input_ids=ids, attention_mask=mask, **_settings(how))
    return [_until_stop(row.tolist(), how.stop_ids) for row in output[:, longest:]]


def _settings(how: Answering) -> dict[str, Any]:
    sampling = {"do_sample": True, "temperature": how.temperature} if how.temperature > 0 else {"do_sample": False}
    return sampling | {
        "max_new_tokens": how.max_new_tokens,
        "eos_token_id": list(how.stop_ids),
        "pad_token_id": how.stop_ids[0],
        "use_cache": True,
    }


def stream(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], how: Answering
) -> Generator[str, None, None]:
    """Yield the answer to one prompt (token ids) piece by piece; closing the generator stops the model."""
    pieces = TextIteratorStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
    unwanted, failed = threading.Event(), []

    def run() -> None:
        one = torch.tensor([list(ids)], device=next(model.parameters()).device)
        try:
            with torch.no_grad(), own_attention(model):
                model.generate(
                    input_ids=one,
                    attention_mask=torch.ones_like(one),
                    streamer=pieces,
                    stopping_criteria=[lambda *_: unwanted.is_set()],
                    **_settings(how),
                )
        except BaseException as error:  # told by the thread that reads
            failed.append(error)
            pieces.end()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield from (piece for piece in pieces if piece)
    finally:
        unwanted.set()
        thread.join()
    if failed:
        raise failed[0]


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def stop_ids(renderer: Renderer) -> tuple[int, ...]:
    """Return the ids that end an answer: the stop token's and the tokenizer's own end."""
    own = renderer.tokenizer.eos_token_id
    return tuple(dict.fromkeys([renderer.stop_id] + ([] if own is None else [own])))


def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> list[str]:
    """Answer user messages with a model and tokenizer from `lora_kit.load`.

    A tokenizer with a chat template gets each prompt as a user's message; one without gets it as plain text to go on
    from.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        prompts: What to answer.
        max_new_tokens: Where an answer is cut.
        temperature: 0 is greedy.
    """
    renderer = Renderer(tokenizer)
    ids = [prompt_ids([{"role": "user", "content": text}], renderer) for text in prompts]
    return answer(model, tokenizer, ids, Answering(stop_ids(renderer), max_new_tokens, temperature))


def prompt_ids(messages: Sequence[dict[str, str]], renderer: Renderer) -> list[int]:
    """Return what an answer to the last of some messages goes on from; without a template that message as it is."""
    if renderer.tokenizer.chat_template is None:
        return renderer.tokenizer(messages[-1]["content"])["input_ids"]
    return prompt(Conversation((*messages, {"role": "assistant", "content": ""})), renderer).ids
