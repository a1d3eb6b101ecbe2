"""Chat with a trained adapter; the adapter can be switched off during the conversation.

The conversation is a list of messages. All of its messages are rendered for every answer, as in training.
"""

from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_kit.artifacts.answering import Answering, prompt_ids, stop_ids, stream
from lora_kit.data.messages import Conversation
from lora_kit.data.rendering import Renderer

HELP = """/adapter off   answer with the base alone (/adapter on switches the adapter on again)
/again         answer the last message again, e.g. after /adapter off
/reset         start a new conversation
/tool TEXT     answer a call of a tool with its result
/help          show this list
/quit          leave (also Ctrl-D; Ctrl-C stops an answer)"""


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

    Without a chat template, the model continues each line as plain text, independently of earlier lines. Ctrl-C ends
    the answer, not the conversation.

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
    """
    renderer = Renderer(tokenizer)
    settings = Answering(stop_ids(renderer), max_new_tokens, temperature)
    first: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    first.extend(beginning.messages if beginning else ())
    tools = beginning.tools if beginning else None
    messages, use_adapter = list(first), True
    for line in map(str.strip, lines):
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
        ids = prompt_ids(Conversation(tuple(messages), tools, frozenset(range(len(messages)))), renderer)
        cut = partial(write, f" [cut at {max_new_tokens} tokens; --max-new-tokens allows more]")
        answer, pieces = "", stream(model, tokenizer, ids, settings, on_cut=cut)
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
