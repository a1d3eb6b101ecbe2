"""Random conversations through every chat template at hand: the trained tokens decode to the answers, or it is said.

`python tests/random_conversations.py --conversations 20000` makes so many for each template. The oracle reads the
record and the decoded runs of trained tokens, nothing else: each run must be the next answer's reasoning, content and
calls and its end. Calls are parsed back to JSON, which must be equal, with the order of keys. A record may be refused
only if it has something peculiar: a plain record must be trained.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

sys.path.insert(0, str(Path(__file__).parent))
from chat_oracle import FAMILIES, load_family, runs
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_kit.data.formats import to_example
from lora_kit.data.remarks import CHANGED, CONTROL, HISTORY, TRIMMED
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import Tokenized, attempt, tokenize_all
from lora_kit.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
HEAD = "{% for m in messages %}{% if m.role == 'assistant' %}<|m|>assistant\n"
TAIL = (
    "<|end|>{% else %}{{ '<|m|>' + m.role + '\n' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|m|>assistant\n{% endif %}"
)
TOOLS = "{% if tools %}<|m|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|end|>{% endif %}"
LOOP = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
OWN = {  # name -> template
    "thinking": TOOLS
    + HEAD
    + "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}"
    + LOOP
    + "<call>{{ f.name }} {{ f.arguments | tojson }}</call>{% endfor %}"
    + TAIL,
    "text-arguments": TOOLS
    + HEAD
    + "{{ m.content }}"
    + LOOP
    + "{{ '<call>' + f.name + ' ' + f.arguments + '</call>' }}{% endfor %}"
    + TAIL,
    "compact": TOOLS
    + HEAD
    + "{{ m.content }}"
    + LOOP
    + "<call>{{ f.name }} {{ f.arguments | tojson(separators=(',', ':')) }}</call>{% endfor %}"
    + TAIL,
    "fields": TOOLS + HEAD + "{{ m.content }}" + LOOP + "<call>{{ f.name }}{% for k, v in f.arguments.items() %}"
    "<field>{{ k | tojson }} {{ v | tojson }}</field>{% endfor %}</call>{% endfor %}" + TAIL,
    "tagged": TOOLS
    + HEAD
    + "{% generation %}{{ m.content }}"
    + LOOP
    + "<call>{{ f.name }} {{ f.arguments | tojson }}</call>{% endfor %}"
    + TAIL.replace("<|end|>", "<|end|>{% endgeneration %}", 1),
    "trimming": TOOLS
    + HEAD
    + "{{ m.content | trim }}"
    + LOOP
    + "<call>{{ f.name }} {{ f.arguments | tojson }}</call>{% endfor %}"
    + TAIL.replace("m.content", "m.content | trim"),
    "last-thought": TOOLS
    + HEAD
    + "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] if not loop.last "
    "else m.content }}{% else %}{{ m.content }}{% endif %}"
    + LOOP
    + "<call>{{ f.name }} {{ f.arguments | tojson }}</call>{% endfor %}"
    + TAIL,
}
PIECES = (
    "a",
    " b",
    "\n",
    "x",
    "y z",
    "<",
    "|",
    "end",
    "é",
    "👍",
    "中文",
    "1",
    "assistant",
    "user\n",
    "{{ m }}",
    "{% if %}",
    '"',
    "'",
    "\\",
    "{",
    "}",
    "\t",
    "{}",
    "\\n",
    "e\u0301",
    "\u200b",
    "null",
    "Zq7",
    "739000000",
    "function",
    "a" * 40,
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_response>", "/no_think", "<|channel>", "<channel|>")
CONTROLS = ("<|im_end|>", "<|im_start|>", "<|end|>", "<|m|>", "<end_of_turn>", "<turn|>", "</s>", "<bos>", "<s>")


@dataclass(frozen=True)
class Template:
    """A template, and how its answers are read.

    Attributes:
        renderer: Tokenizer and template.
        thought: Reads reasoning at the beginning of an answer, in its first group.
        call: Matches a call after the content.
        exact: Whether decoding gives blanks back.
        head: Matches what an answer begins with after the generation prompt.
    """

    renderer: Renderer
    thought: str = r"(?!)"
    call: str = r"<call>(?P<name>[\w.]+) (?P<arguments>.*?)</call>"
    exact: bool = True
    head: str = ""


def templates(tokenizer: PreTrainedTokenizerBase, *, real: bool) -> dict[str, Template]:
    """Return the templates: own ones on a tokenizer, and real ones if asked for and there is a folder of them."""
    made = {}
    for name, text in OWN.items():
        call = (
            r"<call>(?P<name>[\w.]+)(?P<arguments>(<field>.*?</field>)*)</call>" if name == "fields" else Template.call
        )
        thought = r"<think>(.*?)</think>" if name == "thinking" else r"(?!)"
        made[name] = Template(Renderer(tokenizer, text, stop_token="<|end|>"), thought, call)
    if not real or not SHARED.is_dir():
        return made
    qwen = r"\n?<tool_call>\n\{\"name\": \"(?P<name>[\w.]+)\", \"arguments\": (?P<arguments>.*?)\}\n</tool_call>"
    for name in FAMILIES:
        renderer, _ = load_family(name, SHARED)
        thought = r"<think>\n(.*?)\n</think>\n\n" if name == "qwen3" else r"(?!)"
        head = r"(<\|channel\|>final)?<\|message\|>" if name == "gpt-oss" else ""
        made[name] = Template(renderer, thought, qwen if name.startswith("qwen") else Template.call, head=head)
    for name in ("tok-llama2-hf", "tok-mistral-v3-hf", "tok-neox"):
        other = AutoTokenizer.from_pretrained(SHARED / name)
        other.add_special_tokens({"additional_special_tokens": ["<|m|>", "<|end|>"]})
        made[name] = Template(Renderer(other, OWN["compact"], stop_token="<|end|>"), exact=False)
    other = AutoTokenizer.from_pretrained(SHARED / "tok-phi3-mini")
    made["tok-phi3-mini"] = Template(Renderer(other, stop_token="<|end|>"), exact=False)
    return made


def text(rng: random.Random, *, peculiar: float = 0.0, most: int = 8) -> str:
    pieces = rng.choices(PIECES, k=rng.randint(1, most))
    if rng.random() < peculiar:
        pieces.insert(rng.randint(0, len(pieces)), rng.choice(TAGS + CONTROLS))
    return "".join(pieces)


def value(rng: random.Random, depth: int = 0) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: text(rng),
        lambda: rng.choice([0, -1, 7, 10**20, 12345678901234567890]),
        lambda: rng.choice([0.1, 1.0, 1e-9, 1e300, -2.5]),
        lambda: rng.choice([True, False, None]),
        lambda: "",
        lambda: rng.choice(["1", "true", "null", " x "]),
    ]
    if depth < 2:
        kinds.append(lambda: {text(rng, most=2): value(rng, depth + 1) for _ in range(rng.randint(0, 3))})
        kinds.append(lambda: [value(rng, depth + 1) for _ in range(rng.randint(0, 3))])
    return rng.choice(kinds)()


def record(rng: random.Random) -> dict[str, Any]:
    """Return a random record of the format messages."""
    peculiar, tools = rng.choice([0.0, 0.0, 0.3]), rng.random() < 0.4
    turns: list[dict[str, Any]] = []
    made: dict[str, Any] = {}
    if rng.random() < 0.3:
        turns.append({"role": "system", "content": text(rng)})
    elif rng.random() < 0.2:
        made["system"] = text(rng) + "."
    for _ in range(rng.randint(1, 4)):
        turns.append({"role": "user", "content": text(rng, peculiar=peculiar)})
        while tools and rng.random() < 0.5:
            turns.append(answer(rng, peculiar, calls=True))
            turns.extend(
                {"role": "tool", "tool_call_id": call["id"], "content": rng.choice([text(rng), "", '{"a": 1}'])}
                for call in turns[-1]["tool_calls"]
            )
        turns.append(answer(rng, peculiar, calls=False))
    if tools:
        made["tools"] = [{"type": "function", "function": {"name": "weather", "description": text(rng)}}]
    for turn in turns:
        if turn["role"] == "assistant" and rng.random() < 0.1:
            key, off = rng.choice([("weight", 0), ("train", False), ("masked", True), ("loss_mask", 0)])
            turn[key] = off
        elif rng.random() < 0.03:
            turn["timestamp"] = text(rng)
    return made | {"messages": turns}


def answer(rng: random.Random, peculiar: float, *, calls: bool) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": text(rng, peculiar=peculiar)}
    if peculiar and rng.random() < 0.3:
        key = rng.choice(["reasoning_content", "reasoning", "thinking"])
        turn[key] = text(rng)
    elif peculiar and rng.random() < 0.3:
        turn["content"] = f"<think>\n{text(rng)}\n</think>\n\n" + turn["content"]
    if calls:
        turn["content"] = rng.choice(["", turn["content"]])
        turn["tool_calls"] = []
        for number in range(rng.choice([1, 1, 2])):
            arguments: Any = {text(rng, most=2): value(rng) for _ in range(rng.randint(0, 3))}
            if rng.random() < 0.3:
                arguments = json.dumps(arguments)
            call = {"name": rng.choice(["weather", "f.g"]), "arguments": arguments}
            turn["tool_calls"].append({"id": f"call{number}", "type": "function", "function": call})
    return turn


def is_plain(made: dict[str, Any]) -> bool:
    """Return whether a record has nothing that a template or a tokenizer may be unable to render."""
    turns = made["messages"]
    texts = [turn["content"] for turn in turns] + [made.get("system", "x")]
    roles = {turn["role"] for turn in turns}
    odd = any(mark in text for text in texts for mark in TAGS + CONTROLS) or not all(text.strip() for text in texts)
    return (
        not odd
        and "tools" not in made
        and roles <= {"system", "user", "assistant"}
        and not any(map(reasoning_of, turns))
    )


def reasoning_of(turn: dict[str, Any]) -> str:
    return next((turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)), "")


def is_trained(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and turn.get("weight") != 0 and turn.get("train") is not False and not (
        turn.get("masked") or turn.get("loss_mask") == 0
    )  # fmt: skip


class Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON object; a tokenizer may make two keys equal."""


def in_order(value: Any) -> Any:
    """Return JSON with the order of keys and the types of numbers visible."""
    if isinstance(value, Pairs):
        return [(key, in_order(inner)) for key, inner in value]
    if isinstance(value, dict):
        return [(key, in_order(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return [in_order(inner) for inner in value]
    return (type(value).__name__, value)


def wrong(
    made: dict[str, Any], trained: list[str], remarks: set[str], template: Template, *, merged: bool
) -> str | None:
    """Return what is wrong with the decoded runs of trained tokens of a record; None if nothing is."""
    turns = made["messages"]
    last_user = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
    answers = [(index, turn) for index, turn in enumerate(turns) if is_trained(turn)]
    if len(answers) != len(trained):
        return f"{len(trained)} runs for {len(answers)} answers"
    for (index, turn), run in zip(answers, trained, strict=True):
        stop = template.renderer.stop
        if not run.endswith(stop) or stop in run.removesuffix(stop):
            return f"the end of {run!r}"
        rest, reasoning, content = (
            re.sub(f"^{template.head}", "", run).removesuffix(stop),
            reasoning_of(turn),
            turn["content"],
        )
        thought = re.match(template.thought, rest, re.S)
        block = None if reasoning else re.fullmatch(r"\s*<think>(.*?)</think>(.*)", content, re.S)
        in_content = block and not thought and "</think>" not in rest
        if thought and (reasoning or block or not thought[1].strip()):
            expected = reasoning or (block[1] if block else "")
            if thought[1].strip() != expected.strip() and (thought[1].strip() or HISTORY not in remarks):
                return f"reasoning {thought[1]!r} for {expected!r}"
            rest, content = rest[thought.end() :], block[2] if block else content
        elif reasoning.strip() or in_content:
            says_something = reasoning.strip() or (block and block[1].strip())  # else a note is enough
            kept = template.thought != r"(?!)" and index > last_user and says_something
            if HISTORY not in remarks or kept:
                return f"no reasoning in {run!r}"
            content = block[2] if block else content
        calls = turn.get("tool_calls", [])
        found = []
        while calls:
            candidates = [m for m in re.finditer(template.call, rest, re.S) if m.end() == len(rest)]
            if not candidates:
                break
            call = parsed(candidates[-1])
            if call is None:
                break
            found.insert(0, call)
            rest = rest[: candidates[-1].start()]
        record_calls = []
        for call in calls:
            arguments = call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            record_calls.append((call["function"]["name"], in_order(arguments)))
        if not same_calls(found, record_calls, template):
            return f"calls {found} for {record_calls}"
        if merged and rest.rstrip().endswith(content.strip()):  # the first token has characters of the prompt too
            rest = rest[rest.rindex(content.strip()) :]
        if not same(rest, content, template):
            return f"content {rest!r} for {content!r}"
        if (
            template.exact
            and len(rest) < len(content)
            and rest.strip() == content.strip()
            and not (remarks or block or thought)
        ):
            return f"trimmed without a word: {rest!r} for {content!r}"
    return None


def parsed(found: re.Match[str]) -> tuple[str, Any] | None:
    body = found["arguments"]
    try:
        if "<field>" in body or not body:
            pairs = re.findall(r"<field>(.*?)</field>", body, re.S)
            decoder, fields = json.JSONDecoder(), []
            for pair in pairs:
                key, end = decoder.raw_decode(pair)
                fields.append((key, in_order(json.loads(pair[end:], object_pairs_hook=Pairs))))
            return found["name"], fields
        return found["name"], in_order(json.loads(body, object_pairs_hook=Pairs))
    except ValueError:
        return None


def same_calls(found: Any, expected: Any, template: Template) -> bool:
    if template.exact:
        return bool(found == expected)
    return normalize("NFC", "".join(str(found).split())) == normalize("NFC", "".join(str(expected).split()))


def same(found: str, expected: str, template: Template) -> bool:
    if template.exact:
        return found.strip() == expected.strip()
    return normalize("NFC", "".join(found.split())) == normalize("NFC", "".join(expected.split()))


def examine(made: list[dict[str, Any]], template: Template) -> tuple[Counter[str], list[str]]:
    """Tokenise records and return the counts of what happened, and what is wrong."""
    counts, faults = Counter[str](), list[str]()
    examples = [attempt(lambda one: to_example(one, "messages", {}), one) for one in made]
    results = tokenize_all(examples, template.renderer)
    for one, result in zip(made, results, strict=True):
        if isinstance(result, DataError):
            message = re.sub(r"\d+|'.*?'|\".*\"", "_", str(result))[:60]
            answered = any(map(is_trained, one["messages"]))
            counts[f"refused: {message}"] += 1
            if is_plain(one) and answered:
                faults.append(f"a plain record is refused: {result}: {json.dumps(one)}")
            continue
        counts["trained"] += 1
        decoded = [piece for piece, mark in runs(result.ids, result.trained, template.renderer.tokenizer) if mark]
        remarks = {remark.text for remark in result.remarks}
        counts.update(f"noted: {remark[:60]}" for remark in remarks & {CHANGED, CONTROL, HISTORY, TRIMMED})
        if fault := wrong(one, decoded, remarks, template, merged=result.merged):
            faults.append(f"{fault}: {json.dumps(one)}")
    for changes, check in (({"train_on": "last"}, last_only), ({"reasoning": "mask"}, without_reasoning)):
        others = tokenize_all(examples, replace(template.renderer, **changes))
        for one, result, other in zip(made, results, others, strict=True):
            fault = None
            if isinstance(result, DataError):  # with fewer answers it may be trained
                continue
            if not isinstance(other, DataError):
                fault = check(one, result, other, template.renderer.tokenizer)
            elif "no token of this example is trained" not in str(other):
                fault = str(other)
            if fault:
                faults.append(f"{changes}: {fault}: {json.dumps(one)}")
    return counts, faults


def last_only(made: dict[str, Any], result: Tokenized, last: Tokenized, tokenizer: Any) -> str | None:
    """Return what is wrong if only the last answer is trained."""
    every, only = (runs(each.ids, each.trained, tokenizer) for each in (result, last))
    trained, single = ([text for text, mark in each if mark] for each in (every, only))
    return None if single == trained[-1:] and result.ids == last.ids else f"{single} for {trained[-1:]}"


def without_reasoning(made: dict[str, Any], result: Tokenized, masked: Tokenized, tokenizer: Any) -> str | None:
    """Return what is wrong if reasoning is masked: the tokens that are no longer trained must be reasoning."""
    fewer = [before and not after for before, after in zip(result.trained, masked.trained, strict=True)]
    pieces = [text for text, mark in runs(result.ids, fewer, tokenizer) if mark]
    texts = [reasoning_of(turn) for turn in made["messages"]]
    texts += [
        found[1] for turn in made["messages"] if (found := re.match(r"\s*<think>(.*?)</think>", turn["content"], re.S))
    ]
    known = [normalize("NFC", "".join(text.split())) for text in texts]
    wrongs = [piece for piece in pieces if normalize("NFC", "".join(piece.split())) not in known]
    more = any(after and not before for before, after in zip(result.trained, masked.trained, strict=True))
    return f"{wrongs} masked, {more} more" if wrongs or more else None


def own_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer of bytes with the markers of the templates above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|m|>"]})
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, template in templates(own_tokenizer(Path(folder)), real=True).items():
            if options.only and name not in options.only:
                continue
            started, counts, faults = time.monotonic(), Counter[str](), list[str]()
            for start in range(0, options.conversations, 500):
                rngs = (
                    random.Random(f"{options.seed} {index}")
                    for index in range(start, min(start + 500, options.conversations))
                )
                some, wrongs = examine([record(rng) for rng in rngs], template)
                counts.update(some)
                faults += wrongs
            total += len(faults)
            print(
                f"{name}: {len(faults)} wrong, {time.monotonic() - started:.0f} s; {dict(counts.most_common())}",
                flush=True,
            )
            for fault in faults[:3]:
                print("   ", fault[:1500], flush=True)
    print(f"{total} wrong")
    return bool(total)


if __name__ == "__main__":
    sys.exit(main())
