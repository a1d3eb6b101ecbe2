"""Chat with a trained adapter; the adapter can be switched off during the conversation.

The conversation is a list of messages. All of its messages are rendered for every answer, as in training.
"""

from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_kit.artifacts.answering import Answering, prompt_ids, stop_ids, stream
from lora_kit.data.rendering import Renderer

HELP = """/adapter off   answer with the base alone (/adapter on switches the adapter on again)
/again         answer the last message again, e.g. after /adapter off
/reset         start a new conversation
/help          show this list
/quit          leave (also Ctrl-D; Ctrl-C stops an answer)"""


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
    """Answer the lines of a user in a conversation.

    Without a chat template, the model continues each line as plain text, independently of earlier lines. Ctrl-C ends
    the answer, not the conversation.

    Args:
        model: A model from `lora_kit.load`.
        tokenizer: Its tokenizer.
        lines: The lines that the user types: messages, or commands such as `/help`.
        write: Called with each piece of an answer.
        system: The system message of the conversation.
        max_new_tokens: The maximum length of an answer, in tokens.
        temperature: The sampling temperature; 0 generates greedily.

    Returns:
        The messages of the conversation.
    """
    renderer = Renderer(tokenizer)
    settings = Answering(stop_ids(renderer), max_new_tokens, temperature)
    beginning = [{"role": "system", "content": system}] if system else []
    messages, use_adapter = list(beginning), True
    for line in map(str.strip, lines):
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(beginning)
        elif line in ("/adapter on", "/adapter off"):
            use_adapter = line.endswith("on")
        elif line == "/again" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        elif line.startswith("/"):
            write(f"{HELP}\n")
            continue
        elif line:
            messages.append({"role": "user", "content": line})
        if not messages or messages[-1]["role"] != "user":
            continue
        write("" if use_adapter else "[base] ")
        answer, pieces = "", stream(model, tokenizer, prompt_ids(messages, renderer), settings)
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
