"""Talk to a trained adapter: answers come token by token, and the adapter can be switched off in mid-conversation.

A conversation is a list of messages that is rendered anew for every answer, as in training; nothing else is kept.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_kit.artifacts.answering import Answering, prompt_ids, stop_ids, stream
from lora_kit.data.template import Renderer

HELP = """/adapter off   go on with the base alone (/adapter on for the adapter again)
/again         answer the last message once more, e.g. after switching
/reset         forget the conversation
/help          this
/quit          leave (so does Ctrl-D; Ctrl-C cuts an answer short)"""


def chat(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    write: Callable[[str], object],
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> list[dict[str, str]]:
    """Answer line after line in one conversation and return it.

    Without a chat template a line is text to go on from, and every line stands alone.

    Args:
        model: From `lora_kit.load`.
        tokenizer: Likewise.
        lines: What the person types; `/help` names the commands.
        write: Takes the answers, piece by piece.
        system: What the conversation begins with.
        max_new_tokens: Where an answer is cut.
        temperature: 0 is greedy.
    """
    renderer = Renderer(tokenizer)
    how = Answering(stop_ids(renderer), max_new_tokens, temperature)
    beginning = [{"role": "system", "content": system}] if system else []
    messages, adapted = list(beginning), True
    for line in map(str.strip, lines):
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(beginning)
        elif line in ("/adapter on", "/adapter off"):
            adapted = line.endswith("on")
        elif line == "/again" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        elif line.startswith("/"):
            write(f"{HELP}\n")
            continue
        elif line:
            messages.append({"role": "user", "content": line})
        if not messages or messages[-1]["role"] != "user":
            continue
        write("" if adapted else "[base] ")
        answer = "".join(_told(model, renderer, messages, how, adapted=adapted, write=write))
        write("\n")
        messages.append({"role": "assistant", "content": answer})
    return messages


def _told(
    model: PeftModel,
    renderer: Renderer,
    messages: list[dict[str, str]],
    how: Answering,
    *,
    adapted: bool,
    write: Callable[[str], object],
) -> Iterator[str]:
    """Yield an answer's pieces as they are written; Ctrl-C ends it early."""
    with nullcontext() if adapted else model.disable_adapter():
        pieces = stream(model, renderer.tokenizer, prompt_ids(messages, renderer), how)
        try:
            for piece in pieces:
                write(piece)
                yield piece
        except KeyboardInterrupt:
            write(" [cut]")
        finally:
            pieces.close()
