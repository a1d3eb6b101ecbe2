"""Generate answers to prompts, greedily or by sampling, in batches of similar length.

A prompt becomes the token ids with which training began such an example: after a training on raw text, a text is
continued without a chat template; otherwise it is a user message. An answer ends at the last position of the base.
"""

import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from lora_kit.data import strict_json
from lora_kit.data.formats import to_question
from lora_kit.data.messages import Conversation, question
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import prompt_tokens, text_tokens
from lora_kit.errors import DataError
from lora_kit.kernels.attention import own_attention
from lora_kit.kernels.gathered import is_sharded
from lora_kit.model.sizes import context_of


@dataclass(frozen=True)
class Answering:
    """Settings of generation.

    Attributes:
        stop_ids: The ids of the tokens that end an answer.
        max_new_tokens: The maximum length of an answer, in tokens.
        temperature: The sampling temperature; 0 generates greedily.
        batch_size: The number of prompts answered together.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    batch_size: int = 32


def positions_of(model: PeftModel | PreTrainedModel) -> int | None:
    """Return the number of positions that a model was made for; None if its configuration does not say."""
    return context_of(cast(Any, model.config).to_dict())


def new_tokens(prompt: Sequence[int], positions: int | None, settings: Answering) -> int:
    """Return the maximum length of the answer to a prompt: at most the positions that the prompt leaves, or 0."""
    limit = settings.max_new_tokens
    return limit if positions is None else max(0, min(limit, positions - len(prompt)))


def no_room(prompt: Sequence[int], positions: int | None) -> str:
    """Return the message about a prompt that leaves no position for an answer."""
    return f"{len(prompt):,} tokens leave none of the base's {positions:,} positions for an answer"


@torch.no_grad()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], settings: Answering
) -> list[str]:
    """Return the model's answer to each prompt, without the stop token; empty where the prompt leaves no position.

    Prompts of similar length are answered together, padded on the left. Prompts whose answers may have different
    lengths are never answered together, so that an answer does not depend on the other prompts.

    Args:
        model: The base with or without its adapter.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        settings: The settings of generation.
    """
    was_training = model.training
    model.eval()
    positions = positions_of(model)
    limits = [new_tokens(prompt, positions, settings) for prompt in prompts]
    shortest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for limit, group in groupby(shortest_first, key=limits.__getitem__):
        indices = list(group) if limit else []
        for start in range(0, len(indices), settings.batch_size):
            members = indices[start : start + settings.batch_size]
            with own_attention(model), _quiet():
                batch = [prompts[index] for index in members]
                rows = _answer_batch(model, batch, replace(settings, max_new_tokens=limit))
            for index, ids in zip(members, rows, strict=True):
                answers[index] = str(tokenizer.decode(ids, skip_special_tokens=True))
    model.train(was_training)
    return answers


def _answer_batch(model: PeftModel, prompts: list[Sequence[int]], settings: Answering) -> list[list[int]]:
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    padding = settings.stop_ids[0]
    ids = torch.tensor([[padding] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    # with a sharded base each process continues until all have ended, even if their answers differ in length
    together = is_sharded(model)
    output = model.generate(input_ids=ids, attention_mask=mask, synced_gpus=together, **_generate_arguments(settings))
    return [list(takewhile(lambda token: token not in settings.stop_ids, row)) for row in output[:, longest:].tolist()]


def _generate_arguments(settings: Answering) -> dict[str, Any]:
    sampling = {"temperature": settings.temperature} if settings.temperature > 0 else {}
    return sampling | {
        "do_sample": settings.temperature > 0,
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": list(settings.stop_ids),
        "pad_token_id": settings.stop_ids[0],
        "use_cache": True,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep notices of transformers, e.g. about unused settings of a base, out of the answers."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)


def stream(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    settings: Answering,
    *,
    on_cut: Callable[[], object] = lambda: None,
) -> Generator[str, None, None]:
    """Yield the answer to a prompt piece by piece, while the model generates it in another thread.

    Closing the generator stops the model.

    Args:
        model: The base with or without its adapter.
        tokenizer: Its tokenizer.
        ids: The token ids of the prompt.
        settings: The settings of generation.
        on_cut: Called after the last piece if `max_new_tokens` ended the answer.

    Raises:
        Exception: Any error of the model, after the last piece.
    """
    pieces = TextIteratorStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
    closed, errors, rows = threading.Event(), [], []

    def run() -> None:
        row = torch.tensor([list(ids)], device=next(model.parameters()).device)
        try:
            with torch.no_grad(), own_attention(model), _quiet():
                output = model.generate(
                    input_ids=row,
                    attention_mask=torch.ones_like(row),
                    streamer=pieces,
                    stopping_criteria=[lambda *_: closed.is_set()],
                    **_generate_arguments(settings),
                )
            rows.append(output[0].tolist())
        except BaseException as error:  # the thread that reads the pieces raises it again
            errors.append(error)
            pieces.end()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield from (piece for piece in pieces if piece)
    finally:
        closed.set()
        thread.join()
    if errors:
        raise errors[0]
    if rows[0][-1] not in settings.stop_ids:
        on_cut()


def stop_ids(renderer: Renderer) -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer: the stop token and the end-of-sequence token."""
    eos = renderer.tokenizer.eos_token_id
    return tuple(dict.fromkeys([renderer.stop_id] + ([] if eos is None else [eos])))


def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Conversation],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> list[str]:
    """Answer prompts with a model and tokenizer from `lora_kit.load`.

    If the tokenizer has a chat template, a text is rendered as a user message. Otherwise the model continues the text;
    the tokenizer of a run on raw text has none. Prompt and answer together are at most as long as the base has
    positions.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        prompts: Texts, or conversations with messages and tools from `lora_kit.question`.
        max_new_tokens: The maximum length of an answer, in tokens.
        temperature: The sampling temperature; 0 generates greedily.

    Returns:
        The answer to each prompt.

    Raises:
        DataError: A prompt is a conversation and there is no chat template, a text is empty and the tokenizer has no
            BOS token to start from, or a prompt leaves no position for an answer.
    """
    renderer = Renderer(tokenizer)
    settings = Answering(stop_ids(renderer), max_new_tokens, temperature)
    ids = [prompt_ids(prompt, renderer) for prompt in prompts]
    positions = positions_of(model)
    for number, prompt in enumerate(ids, 1):
        if not new_tokens(prompt, positions, settings):
            raise DataError(f"prompt {number}: {no_room(prompt, positions)}; shorten it")
    return answer(model, tokenizer, ids, settings)


def prompt_ids(prompt: str | Conversation, renderer: Renderer) -> list[int]:
    """Return the token ids that the model continues: those with which training begins an example of this kind.

    Raises:
        DataError: The prompt is a conversation, and there is no chat template; or a text is empty.
    """
    if renderer.tokenizer.chat_template is None:
        if isinstance(prompt, str):
            return text_tokens(prompt, renderer)
        raise DataError(
            "a conversation cannot be rendered: the run was trained on raw text, or its tokenizer has no chat "
            "template; give the text to continue as a prompt"
        )
    if isinstance(prompt, str):
        prompt = question([{"role": "user", "content": prompt}])
    return prompt_tokens(prompt, renderer)


def read_questions(path: Path) -> list[Conversation]:
    """Read conversations to be continued: records of the format `messages`, or only their messages.

    Args:
        path: A JSON file with a conversation or a list of them, or a JSONL file with a conversation in each line.

    Raises:
        DataError: The file cannot be read, or a conversation is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = text.split("\n") if path.suffix == ".jsonl" else [text]
        filled = {number: line for number, line in enumerate(lines, 1) if line.strip() or path.suffix != ".jsonl"}
        values = {number: strict_json.loads(line.strip()) for number, line in filled.items()}
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if path.suffix != ".jsonl" and isinstance(values[1], list):
        first = next(iter(values[1]), None)
        values = values if isinstance(first, dict) and "role" in first else dict(enumerate(values[1], 1))
    return [_question(value, f"{path}:{number}") for number, value in values.items()]


def _question(value: Any, where: str) -> Conversation:
    try:
        return to_question(value if isinstance(value, dict) else {"messages": value})
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
