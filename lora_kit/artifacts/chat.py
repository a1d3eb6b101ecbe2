"""Chat with a trained adapter; the adapter can be switched off during the conversation.

The conversation is a list of messages. All of its messages are rendered for every answer, as in training.
"""

from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_kit.artifacts.answering import (
    Answering,
    new_tokens,
    no_room,
    positions_of,
    prompt_ids,
    stop_ids,
    stream,
)
from lora_kit.data.messages import Conversation
from lora_kit.data.rendering import Renderer
from lora_kit.errors import DataError

HELP = """/adapter off   answer with the base alone (/adapter on switches the adapter on again)
/again         answer the last message again, e.g. after /adapter off
/reset         start a new conversation
/tool TEXT     answer a call of a tool with its result
/help          show this list
/quit          leave (also Ctrl-D; Ctrl-C stops an answer)"""
RAW = (
    "there is no chat template, because the run was trained on raw text or its tokenizer has none: each line is "
    "continued as text, without the lines before it"
)


def chat(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    write: Callable[[str], object],
    *,
    system: str | None = None,
    beginning: Conversation | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> list[dict[str, Any]]:
    """Answer the lines of a user in a conversation.

    Without a chat template, the model continues each line as text, independently of earlier lines. Ctrl-C ends the
    answer, not the conversation. A message that the template refuses, or that leaves no position of the base for an
    answer, is left out with a note.

    Args:
        model: A model from `lora_kit.load`.
        tokenizer: Its tokenizer.
        lines: What the user enters: messages, which may have several lines, or commands such as `/help`.
        write: Called with each piece of an answer.
        system: The system message of the conversation.
        beginning: The first messages and the tools, from `lora_kit.question`.
        max_new_tokens: The maximum length of an answer, in tokens.
        temperature: The sampling temperature; 0 generates greedily.

    Returns:
        The messages of the conversation.

    Raises:
        DataError: There is no chat template for `system` or `beginning`.
    """
    renderer, positions, raw = Renderer(tokenizer), positions_of(model), tokenizer.chat_template is None
    if raw and (system or beginning):
        raise DataError(f"{RAW}; leave out the system message and the first messages")
    settings = Answering(stop_ids(renderer), max_new_tokens, temperature)
    first: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    first.extend(beginning.messages if beginning else ())
    tools = beginning.tools if beginning else None
    messages, use_adapter = list(first), True
    for line in (text.strip("\r\n" if raw else None) for text in lines):
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(first)
        elif line in ("/adapter on", "/adapter off"):
            use_adapter = line.endswith("on")
        elif line == "/again" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        elif line.startswith("/tool "):
            messages.append({"role": "tool", "content": line.removeprefix("/tool ")})
        elif line.startswith("/") and "\n" not in line:
            write(f"{HELP}\n")
            continue
        elif line:
            messages.append({"role": "user", "content": line})
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            continue
        write("" if use_adapter else "[base] ")
        asked = Conversation(tuple(messages), tools, frozenset(range(len(messages))))
        try:
            ids = prompt_ids(str(messages[-1]["content"]) if raw else asked, renderer)
        except DataError as error:
            write(f"[{error}]\n")
            messages.pop()
            continue
        limit = new_tokens(ids, positions, settings)
        if not limit:
            write(f"[{no_room(ids, positions)}; /reset starts a new conversation]\n")
            messages.pop()
            continue
        more = "--max-new-tokens allows more" if limit == max_new_tokens else f"the base has {positions:,} positions"
        cut = partial(write, f" [cut at {limit} tokens; {more}]")
        answer, pieces = "", stream(model, tokenizer, ids, replace(settings, max_new_tokens=limit), on_cut=cut)
        with nullcontext() if use_adapter else model.disable_adapter(), closing(pieces):
            try:
                for piece in pieces:
                    write(piece)
                    answer += piece
            except KeyboardInterrupt:
                write(" [stopped]")
        write("\n")
        messages.append({"role": "assistant", "content": answer})
    return messages
