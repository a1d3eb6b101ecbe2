"""What each real chat template should train, written by hand: a conversation as pieces that are trained or not."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from transformers import AutoTokenizer

from lora_kit.data.messages import Conversation
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import tokenize_all
from lora_kit.errors import DataError


def tokenize(example, renderer):
    """Return the tokens of a single example, or raise its error."""
    (made,) = tokenize_all([example], renderer)
    if isinstance(made, DataError):
        raise made
    return made


def chatml(conversation, *, head="", thought=""):
    parts = [(head, False)]
    for index, message in enumerate(conversation.messages):
        last = index == len(conversation.messages) - 1
        parts.append((f"<|im_start|>{message['role']}\n", False))
        text = (thought if last else "") * (message["role"] == "assistant") + message["content"] + "<|im_end|>"
        parts += [(text, index in conversation.answers), ("\n", False)]
    return parts


def qwen2_5(conversation):
    own = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    return chatml(conversation, head="" if conversation.messages[0]["role"] == "system" else own)


def qwen3(conversation):
    return chatml(conversation, thought="<think>\n\n</think>\n\n")


def phi4(conversation, *, head="", system=True):
    parts = [(head, False)]
    for index, message in enumerate(conversation.messages):
        if message["role"] != "system" or system:
            parts += [
                (f"<|{message['role']}|>", False),
                (message["content"] + "<|end|>", index in conversation.answers),
            ]
    return [*parts, ("<|end|>", False)]  # the template writes the tokenizer's end, which the test sets to <|end|>


def phi4_reasoning(conversation):
    system = [message["content"] for message in conversation.messages if message["role"] == "system"]
    head = "<|system|>Your name is Phi, an AI math expert developed by Microsoft." + "".join(f" {s}" for s in system)
    return phi4(conversation, head=head + "<|end|>", system=False)


def gemma3(conversation, *, turn=("<start_of_turn>", "<end_of_turn>")):
    messages, first = conversation.messages, ""
    if messages[0]["role"] == "system":
        first = messages[0]["content"] + "\n\n"
    parts = [("<bos>", False)]
    for index, message in enumerate(messages):
        if message["role"] == "system":
            continue
        role = {"assistant": "model"}.get(message["role"], message["role"])
        parts.append((f"{turn[0]}{role}\n{first}", False))
        parts += [(message["content"] + turn[1], index in conversation.answers), ("\n", False)]
        first = ""
    return parts


def gemma4(conversation):
    messages, head = conversation.messages, ""
    if messages[0]["role"] == "system":
        head, messages = f"<|turn>system\n{messages[0]['content']}<turn|>\n", messages[1:]
    skipped = len(conversation.messages) - len(messages)
    rest = Conversation(messages, None, frozenset(index - skipped for index in conversation.untrained))
    parts = gemma3(rest, turn=("<|turn>", "<turn|>"))
    return [parts[0], (head, False), *parts[1:]]


def gpt_oss(conversation):
    system = "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    system += "Current date: 2025-01-01\n\nreasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel "
    system += (
        "must be included for every message.\nCalls to these tools must go to the commentary channel: 'functions'."
    )
    parts = [(f"<|start|>system<|message|>{system}<|end|>", False)]
    for index, message in enumerate(conversation.messages):
        if message["role"] == "system":
            parts.append((f"<|start|>developer<|message|># Instructions\n\n{message['content']}<|end|>", False))
            continue
        parts.append((f"<|start|>{message['role']}", False))
        parts.append((f"<|message|>{message['content']}<|end|>", index in conversation.answers))
    return parts


def smollm3(conversation):
    head = "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 01 January 2025\n"
    head += "Reasoning Mode: /no_think\n\n## Custom Instructions\n\n"
    messages, own = conversation.messages, "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
    if messages[0]["role"] == "system":
        own, messages = messages[0]["content"].replace("/no_think", "").rstrip(), messages[1:]
    skipped = len(conversation.messages) - len(messages)
    answers = {index - skipped for index in conversation.answers}
    parts = [(f"{head}{own}\n\n", False)]
    for index, message in enumerate(messages):
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts.append(("<think>\n\n</think>\n" * (message["role"] == "assistant"), False))
        parts += [(message["content"] + "<|im_end|>", index in answers), ("\n", False)]
    return parts


@dataclass(frozen=True)
class Family:
    file: str
    oracle: Callable[[Conversation], list[tuple[str, bool]]]
    stop: str
    markers: tuple[str, ...] = ()


FAMILIES = {
    "qwen2.5": Family("qwen2.5__tokenizer_config.json", qwen2_5, "<|im_end|>"),
    "qwen3": Family("qwen3__tokenizer_config.json", qwen3, "<|im_end|>"),
    "qwen2.5-synthetic": Family("v5__qwen2.5-synthetic__chat_template.jinja", chatml, "<|im_end|>", ("<|im_start|>",)),
    "phi-4-mini": Family("phi-4-mini__tokenizer_config.json", phi4, "<|end|>"),
    "phi-4-mini-reasoning": Family("phi-4-mini-reasoning__chat_template.jinja", phi4_reasoning, "<|end|>"),
    "gemma-3": Family("gemma-3-chat__chat_template.json", gemma3, "<end_of_turn>", ("<start_of_turn>",)),
    "gemma-4": Family("models__gemma-4__chat_template.jinja", gemma4, "<turn|>", ("<|turn>",)),
    "gpt-oss": Family("gpt-oss__chat_template.jinja", gpt_oss, "<|end|>", ("<|start|>", "<|message|>")),
    "smollm3": Family("v5__smollm3__chat_template.jinja", smollm3, "<|im_end|>", ("<|im_start|>",)),
}


@cache
def load_family(name, shared_data):
    """Return the renderer and the oracle of a family; nobody may change them."""
    chosen = FAMILIES[name]
    text = (shared_data / "chat-templates" / chosen.file).read_text()
    config = json.loads(text) if chosen.file.endswith(".json") else {"chat_template": text}
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tok-gpt2")
    added = config.get("added_tokens_decoder", {}).values()
    tokenizer.add_tokens([token["content"] for token in added if not token["special"]])
    special = [token["content"] for token in added if token["special"]]
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *chosen.markers, chosen.stop, "<bos>"]})
    tokenizer.bos_token, tokenizer.eos_token = "<bos>", chosen.stop
    template = config["chat_template"]
    if name == "smollm3":  # its thinking mode differs in the system message alone, which is long
        template = "{% set enable_thinking = false %}" + template
    return Renderer(tokenizer, template), chosen.oracle


def runs(ids, trained, tokenizer):
    """Neighbouring tokens that are trained alike, decoded."""
    found = []
    for token, mark in zip(ids, trained, strict=True):
        if found and found[-1][1] == mark:
            found[-1][0].append(token)
        else:
            found.append(([token], mark))
    return [(tokenizer.decode(tokens), mark) for tokens, mark in found]


def expected(parts):
    """The oracle's pieces with neighbours of the same kind joined."""
    found = []
    for text, mark in parts:
        if text and found and found[-1][1] == mark:
            found[-1] = (found[-1][0] + text, mark)
        elif text:
            found.append((text, mark))
    return found
