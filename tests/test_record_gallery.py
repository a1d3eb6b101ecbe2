"""Records that many tools train otherwise than they say: each is trained as it says, refused, or noted."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from chat_oracle import load_family, runs
from conftest import make_tokenizer, write_jsonl
from random_conversations import OWN, examine, own_tokenizer, record, templates
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import prepare
from lora_kit.errors import DataError
from lora_kit.recipe.schema import Data

USER, BAD, GOOD = (
    {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "BAD"), ("assistant", "GOOD"))
)
CALL = {"name": "f", "arguments": {"b": 1, "a": "é", "c": [True, None, 1.0, 10**20]}}
CITY = {"name": "f", "description": "Weather.", "parameters": {"type": "object", "properties": {"city": {
    "type": "string", "description": "Its \"name\"."}}}}  # fmt: skip
CALL_TEXT = '<call>f {"b": 1, "a": "é", "c": [true, null, 1.0, 100000000000000000000]}</call>'
TEXT_CALL = {"name": "f", "arguments": '{"b": 1, "a": "\\u00e9", "c": [true, null, 1.0, 100000000000000000000]}'}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "GOOD"}]
LEAVES_OUT = "train.jsonl:1: the chat template leaves out "
CUT = OWN["thinking"].replace("{{ m.content }}", "CUT")


def chat(*answers, **columns):
    """A record with an answer to each of several questions."""
    return {"messages": [turn for answer in answers for turn in (USER, {"role": "assistant"} | answer)], **columns}


def calling(**calls):
    result = (
        {"role": "function", "name": "f", "content": "ok"}
        if "function_call" in calls
        else {"role": "tool", "content": "ok"}
    )
    return {"messages": [USER, {"role": "assistant", "content": None} | calls, result, GOOD]}


@dataclass
class Case:
    """Attributes: the record; the trained runs, or the beginning of the error; a part of the only note."""

    record: dict[str, Any]
    trained: list[str] | str
    note: str | None = None
    template: str = "thinking"
    options: dict[str, Any] = field(default_factory=dict)


KEYS = ({"train": False}, {"training": False}, {"masked": True}, {"loss_mask": 0}, {"weight": 0}, {"loss_weight": 0.0},
        {"loss": False}, {"loss_scale": 0.0}, {"trainable": False})  # fmt: skip
CASES = {
    **{f"{key} is context": Case(chat(BAD | {key: off}, GOOD), ["GOOD"]) for one in KEYS for key, off in one.items()},
    **{
        f"{key} of all": Case(
            chat(BAD | one, GOOD),
            ["user\na<|end|><|m|>assistant\n", "<|m|>user\na<|end|><|m|>assistant\nGOOD"],
            options={"train_on": "all"},
        )
        for one in KEYS[:5]
        for key in one
    },
    "an excluded call of all": Case(
        chat({"content": "", "tool_calls": [CALL], "train": False}, GOOD),
        ["user\na<|end|><|m|>assistant\n", "<|m|>user\na<|end|><|m|>assistant\nGOOD"],
        options={"train_on": "all"},
    ),
    "an excluded empty turn of all": Case(
        chat({"content": "", "train": False}, GOOD),
        ["user\na<|end|><|m|>assistant\n", "<|m|>user\na<|end|><|m|>assistant\nGOOD"],
        options={"train_on": "all"},
    ),
    "a sharegpt turn": Case(
        {"conversations": [*SHAREGPT[:1], {"from": "gpt", "value": "BAD", "train": False}, *SHAREGPT]}, ["GOOD"]
    ),
    "a detail mask": Case(
        chat(GOOD | {"training_detail": [{"begin_offset": 0}]}), "train.jsonl:1: messages[1].training_detail is not sup"
    ),
    "contradiction": Case(
        chat(GOOD | {"train": True, "masked": True}), "train.jsonl:1: messages[1]: train and masked contradict"
    ),
    "train as text": Case(
        chat(GOOD | {"train": "false"}), "train.jsonl:1: messages[1].train is 'false'; expected 0 (context) or 1"
    ),
    "masked half": Case(
        chat(GOOD | {"masked": 0.5}), "train.jsonl:1: messages[1].masked is 0.5; expected 1 (context) or 0 (trained)"
    ),
    "a record's weight": Case(chat(GOOD, weight=0), "train.jsonl:1: weight is 0 for the whole record"),
    "a trained user": Case(
        {"messages": [USER | {"train": True}, GOOD]}, "train.jsonl:1: messages[0].train is True for the role 'user'"
    ),
    "empty context": Case(chat({"content": "", "weight": 0}, GOOD), ["GOOD"]),
    "missing context": Case(chat({"train": False}, GOOD), ["GOOD"]),
    "last": Case(chat(BAD, GOOD), ["GOOD"], options={"train_on": "last"}),
    "last that is trained": Case(chat(GOOD, BAD | {"weight": 0}), ["GOOD"], options={"train_on": "last"}),
    "function_call": Case(calling(function_call=TEXT_CALL), [CALL_TEXT, "GOOD"]),
    "function_call and text": Case(calling(function_call=CALL, content="Look."), ["Look." + CALL_TEXT, "GOOD"]),
    "arguments as text": Case(calling(tool_calls=[{"function": TEXT_CALL}]), [CALL_TEXT, "GOOD"]),
    "arguments as object": Case(calling(tool_calls=[{"function": CALL}]), [CALL_TEXT, "GOOD"]),
    "template needs text": Case(
        calling(tool_calls=[{"function": CALL}]), [CALL_TEXT, "GOOD"], template="text-arguments"
    ),
    "both calls": Case(
        calling(function_call=CALL, tool_calls=[CALL]),
        "train.jsonl:1: messages[1] has both tool_calls and function_call",
    ),
    "function_call auto": Case(
        chat(GOOD | {"function_call": "auto"}), "train.jsonl:1: messages[1].function_call is a string"
    ),
    "a user's call": Case(
        {"messages": [USER | {"function_call": CALL}, GOOD]}, "train.jsonl:1: messages[0].function_call: only an assis"
    ),
    "repeated key": Case(
        calling(function_call={"name": "f", "arguments": '{"a": 1, "a": 2}'}),
        "train.jsonl:1: messages[1].function_call.function.arguments: the key 'a' stands twice in one object",
    ),
    "NaN": Case(
        calling(function_call={"name": "f", "arguments": '{"a": NaN}'}),
        "train.jsonl:1: messages[1].function_call.function.argume",
    ),
    "functions": Case({"messages": [USER, GOOD], "functions": [{"name": "f"}]}, ["GOOD"]),
    "system": Case(
        chat(GOOD, system="Pirate."),
        ["system\nPirate.<|end|><|m|>user\na<|end|><|m|>assistant\nGOOD<|end|>"],
        options={"train_on": "all"},
    ),
    "system twice": Case(
        {"messages": [{"role": "system", "content": "Pirate."}, USER, GOOD], "system": "Pirate."}, ["GOOD"]
    ),
    "two systems": Case(
        {"messages": [{"role": "system", "content": "x"}, USER, GOOD], "system": "y"},
        "train.jsonl:1: the column system and messages[0] are different system prompts",
    ),
    "system and lists": Case(
        {"prompt": [USER], "completion": [GOOD], "system": "Pirate."},
        ["system\nPirate.<|end|><|m|>user\na<|end|><|m|>assistant\nGOOD<|end|>"],
        options={"train_on": "all"},
    ),
    "system and raw text": Case(
        {"prompt": "a", "completion": "b", "system": "x"}, "train.jsonl:1: system is given, and prompt is raw text"
    ),
    "system is no text": Case(chat(GOOD, system=["x"]), "train.jsonl:1: system is a list; expected a string"),
    "columns": Case(
        chat(GOOD, id=5, system_prompt="x"),
        ["GOOD"],
        note="train.jsonl:1: columns of the data that are not read: id, system_prompt (1",
    ),
    "images": Case(chat(GOOD, images=["x.png"]), "train.jsonl:1: images is a list, and lora_kit trains on text only"),
    "template variables": Case(
        chat(GOOD, chat_template_kwargs={"x": 1}), "train.jsonl:1: chat_template_kwargs is an object"
    ),
    "reasoning": Case(chat(GOOD | {"reasoning_content": "hm"}), ["<think>hm</think>GOOD"]),
    "reasoning, renamed": Case(chat(GOOD | {"reasoning": "hm"}), ["<think>hm</think>GOOD"]),
    "reasoning, masked": Case(
        chat(GOOD | {"thinking": "hm é"}), ["<think>", "</think>GOOD"], options={"reasoning": "mask"}
    ),
    "thought in content, masked": Case(
        chat({"content": "<think>hm</think>GOOD"}), ["<think>", "</think>GOOD"], options={"reasoning": "mask"}
    ),
    "another tag of reasoning, masked": Case(
        chat({"content": "<thinking>hm</thinking>GOOD"}),
        ["<thinking>hm</thinking>GOOD"],
        note="train.jsonl:1, messages[1].content: objective.reasoning: mask does not mask these tags",
        options={"reasoning": "mask"},
    ),
    "an open tag, masked": Case(
        chat({"content": "<think>hm"}),
        ["<think>hm"],
        note="train.jsonl:1, messages[1].content: objective.reasoning: mask does not mask these tags",
        options={"reasoning": "mask"},
    ),
    "a tag in a completion, masked": Case(
        {"prompt": "ab", "completion": "<think>hm</think>GOOD"},
        ["<think>hm</think>GOOD"],
        note="train.jsonl:1, completion: objective.reasoning: mask does not mask these tags",
        options={"reasoning": "mask"},
    ),
    "reasoning alone": Case(chat({"content": "", "thinking": "hm"}), ["<think>hm</think>"]),
    "reasoning unread": Case(
        chat(GOOD | {"thinking": "hm"}),
        LEAVES_OUT + "messages[1].thinking (role assistant)",
        template="compact",
    ),
    "reasoning is no text": Case(
        chat(GOOD | {"thinking": ["hm"]}), "train.jsonl:1: messages[1].thinking is a list; expected a string"
    ),
    "two reasonings": Case(
        chat(GOOD | {"thinking": "a", "reasoning": "b"}), "train.jsonl:1: messages[1] has different reasoning in"
    ),
    "history": Case(
        chat({"content": "<think>x</think>A"}, {"content": "<think>y</think>B"}),
        ["A", "<think>y</think>B"],
        note="train.jsonl:1, messages[1].content: the chat template leaves the reasoning of answers out",
        template="last-thought",
    ),
    "a tag in an answer": Case(
        chat({"content": "It ends with </think> there."}, GOOD),
        "train.jsonl:1: the chat template does not render messages[1].content (role assistant) as it is, but ' there.'",
        template="last-thought",
    ),
    "a cut answer": Case(
        chat({"content": "keep [note] this"}),
        "train.jsonl:1: the chat template does not render messages[1].content",
        template=CUT.replace("CUT", "{{ m.content.split('[note]')[-1] }}"),
    ),
    "a shortened answer": Case(
        chat({"content": "0123456789"}),
        "train.jsonl:1: the chat template",
        template=CUT.replace("CUT", "{{ m.content[:8] }}"),
    ),
    "lower case": Case(
        chat({"content": "Hello"}),
        "train.jsonl:1: the chat template",
        template=CUT.replace("CUT", "{{ m.content | lower }}"),
    ),
    "a replaced word": Case(
        chat({"content": "red blue"}),
        "train.jsonl:1: the chat template",
        template=CUT.replace("CUT", "{{ m.content | replace('red', 'x') }}"),
    ),
    "trimmed": Case(
        chat({"content": " GOOD\n"}),
        ["GOOD"],
        note="train.jsonl:1, messages[1].content: the chat template trims blanks",
        template="trimming",
    ),
    "blanks before a call, trimmed": Case(
        calling(tool_calls=[{"function": CALL}], content="\n\n"),
        [CALL_TEXT, "GOOD"],
        note="train.jsonl:1, messages[1].content: the chat template trims blanks",
        template="trimming",
    ),
    "blanks before a call": Case(
        calling(tool_calls=[{"function": CALL}], content="\n\n"), ["\n\n" + CALL_TEXT, "GOOD"]
    ),
    "a thought without text, left out": Case(
        chat({"content": "<think>\n\n</think>\n\nGOOD"}, GOOD),
        ["\n\nGOOD", "GOOD"],
        note="train.jsonl:1, messages[1].content: the chat template leaves the reasoning of answers out",
        template="last-thought",
    ),
    "a thought without text": Case(
        chat({"content": "<think>\n\n</think>\n\nGOOD"}, GOOD), ["<think>\n\n</think>\n\nGOOD", "GOOD"]
    ),
    "blanks kept": Case(chat({"content": " GOOD\n"}), [" GOOD\n"]),
    "a call's field left out": Case(
        calling(tool_calls=[{"function": {"name": "f", "arguments": {"a": "x", "b": True}}}]),
        LEAVES_OUT + "a part of messages[1].tool_calls[0]",
        template=OWN["fields"].replace("f.arguments.items()", "f.arguments.items() if v is string"),
    ),
    "a call's name left out": Case(
        calling(tool_calls=[{"function": CALL}]),
        LEAVES_OUT + "messages[1].tool_calls[0] (role",
        template=OWN["thinking"].replace("{{ f.name }} ", ""),
    ),
    "parts": Case(
        chat({"content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "GOOD"}]}),
        ["<think>hm</think>GOOD"],
    ),
    "parts in another order": Case(
        chat({"content": [{"type": "text", "value": "GOOD"}, {"type": "thinking", "thinking": "hm"}]}),
        "train.jsonl:1: messages[1].content has parts in another order than reasoning, text, calls",
    ),
    "the name of a message": Case(
        {"instruction": "a", "output": "a<|end|>b", "system": "x"}, "train.jsonl:1: output.content contains '<|end|>'"
    ),
    "refusal": Case(chat({"content": None, "refusal": "No."}), "train.jsonl:1: messages[1].refusal is a string"),
    "audio": Case(chat(GOOD | {"audio": {"id": "x"}}), "train.jsonl:1: messages[1].audio is an object with id"),
    "a name that is not read": Case(
        {"messages": [USER | {"name": "Ann"}, GOOD]},
        ["GOOD"],
        note="train.jsonl:1, messages[0].name: keys of messages that the chat template does not read: name (1",
    ),
    "a key that begins like another": Case(
        {"messages": [USER | {"tool_calls_raw": [1]}, GOOD]},
        ["GOOD"],
        note="train.jsonl:1, messages[0].tool_calls_raw: keys of messages",
    ),
    "parameters of a tool left out": Case(
        calling(tool_calls=[{"function": {"name": "f", "arguments": {"city": "Rome"}}}]) | {"tools": [CITY]},
        ['<call>f {"city": "Rome"}</call>', "GOOD"],
        note="train.jsonl:1, tools[0].parameters: the chat template leaves parts of the tools out: parameters (1",
        template=OWN["thinking"].replace("{{ t | tojson }}", "{{ t.function.name }} {{ t.function.description }}"),
    ),
    "parameters of a tool": Case(
        calling(tool_calls=[{"function": {"name": "f", "arguments": {"city": "Rome"}}}]) | {"tools": [CITY]},
        ['<call>f {"city": "Rome"}</call>', "GOOD"],
    ),
    "a key with a dot": Case(
        {"messages": [USER | {"x.y": [1]}, GOOD | {"x.y": 2}]},
        ["GOOD"],
        note="train.jsonl:1, messages[0].x.y: keys of messages that the chat template does not read: x.y (1",
    ),
    "a name that is a list": Case(
        {"messages": [USER | {"name": ["bob"]}, GOOD]}, ["GOOD"], note="train.jsonl:1, messages[0].name: keys of mess"
    ),
    "a value that is not read": Case(
        chat(GOOD | {"score": 5}), ["GOOD"], note="train.jsonl:1, messages[1].score: keys of messages"
    ),
    "a control token": Case(
        chat({"content": "a<|end|>b"}),
        "train.jsonl:1: messages[1].content contains '<|end|>', which the tokenizer takes",
    ),
    "a control token in a call": Case(
        calling(tool_calls=[{"name": "f", "arguments": {"a": "<|m|>"}}]),
        "train.jsonl:1: messages[1].tool_calls[0] contains '<|m|>'",
    ),
    "a control token of a user": Case(
        {"messages": [USER | {"content": "<|m|>"}, GOOD]},
        ["GOOD"],
        note="train.jsonl:1, messages[0].content: messages that are not",
    ),
    "a control token of a user, trained": Case(
        {"messages": [USER | {"content": "<|m|>"}, GOOD]},
        "train.jsonl:1: messages[0].content contains '<|m|>'",
        options={"train_on": "all"},
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return own_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def outcome(records, renderer, folder):
    """Return the trained runs of the first record, or the error, and the notes."""
    write_jsonl(folder / "train.jsonl", records)
    try:
        made = prepare(Data(train="train.jsonl"), renderer, base_dir=folder, seed=0)
    except DataError as error:
        return str(error), ()
    ids, trained = made.train.example(0)
    return [piece for piece, mark in runs(ids.tolist(), trained.tolist(), renderer.tokenizer) if mark], made.notes


@pytest.mark.parametrize("name", CASES)
def test_a_record_is_trained_as_it_says_or_refused_or_noted(name, tokenizer, tmp_path):
    case = CASES[name]
    renderer = Renderer(tokenizer, OWN.get(case.template, case.template), stop_token="<|end|>")
    found, notes = outcome([case.record], replace(renderer, **case.options), tmp_path)
    if isinstance(case.trained, str):
        assert isinstance(found, str) and found.startswith(case.trained), found
        assert ";" in found or "supported:" in found, "no remedy"
    else:
        ended = [
            run if run.endswith(("<|end|>", "<think>", "assistant\n")) else f"{run}<|end|>" for run in case.trained
        ]
        assert found == ended
        assert [case.note in note for note in notes] == [True] if case.note else notes == ()


def test_characters_that_become_unknown_are_noted_with_the_first_line(tmp_path):
    make_tokenizer(tmp_path)
    renderer = Renderer(AutoTokenizer.from_pretrained(tmp_path))
    found, notes = outcome([chat(GOOD), chat({"content": "12 €, 中"})], renderer, tmp_path)
    assert notes == (
        "train.jsonl:2: the tokenizer does not know these characters and writes its unknown token: "
        "'€', '中' (1 record in all)",
    )
    found, _ = outcome([chat({"content": "中文"})], renderer, tmp_path)
    assert found.startswith("train.jsonl:1: the tokenizer knows no character of messages[1] ('中文')")


def bare_tokenizer():
    """A tokenizer with neither an unknown token nor bytes."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?\n-"
    inner = Tokenizer(models.BPE({"</s>": 0} | {letter: number for number, letter in enumerate(letters, 1)}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def test_characters_that_vanish_are_noted_with_the_first_line(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    template += "\n{% endfor %}"
    renderer = Renderer(bare_tokenizer(), template + "{% if add_generation_prompt %}assistant: {% endif %}")
    _, notes = outcome([chat({"content": "Café, €5"})], renderer, tmp_path)
    assert notes == ("train.jsonl:1: the tokenizer drops or changes characters: 'é', '€' (1 record in all)",)
    found, _ = outcome([chat({"content": "中文"})], renderer, tmp_path)
    assert found.startswith("train.jsonl:1: the tokenizer knows no character of messages[1] ('中文')")


def test_qwen_3_keeps_reasoning_after_the_last_question_only(shared_data, tmp_path):
    renderer, _ = load_family("qwen3", shared_data)
    reasoned = [GOOD | {"reasoning_content": "x"}, GOOD | {"reasoning_content": "y"}]
    last = "<think>\ny\n</think>\n\nGOOD<|im_end|>"
    found, notes = outcome([chat(*reasoned)], renderer, tmp_path)
    assert (
        found == ["GOOD<|im_end|>", last]
        and len(notes) == 1
        and notes[0].startswith("train.jsonl:1, messages[1].reasoning")
    )
    found, _ = outcome([chat(*reasoned)], replace(renderer, train_on="last"), tmp_path)
    assert found == [last]
    found, _ = outcome([chat(*reasoned)], replace(renderer, reasoning="mask"), tmp_path)
    assert found == ["GOOD<|im_end|>", "<think>\n", "\n</think>\n\nGOOD<|im_end|>"]


def test_a_thought_before_the_name_of_a_tag_is_masked(shared_data, tmp_path):
    """Qwen 3 tests a user's text for `<tool_response>`, so these contents are rendered without marks."""
    renderer, _ = load_family("qwen3", shared_data)
    turns = [USER, {"role": "assistant", "content": "<think>\nSECRET\n</think>\n\nuse <tool_call>"},
             {"role": "user", "content": "<tool_response>x</tool_response>"}, GOOD]  # fmt: skip
    found, _ = outcome([{"messages": turns}], replace(renderer, reasoning="mask"), tmp_path)
    assert found[:2] == ["<think>\n", "\n</think>\n\nuse <tool_call><|im_end|>"]


def test_a_call_after_reasoning_is_trained_in_a_history_without_it(shared_data, tmp_path):
    """Qwen 3 renders the reasoning before a call while the exchange goes on, and not once a question follows."""
    renderer, _ = load_family("qwen3", shared_data)
    called = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]}
    turns = [USER, called, {"role": "tool", "content": "ok"}, GOOD, USER, GOOD]
    found, notes = outcome([{"messages": turns}], renderer, tmp_path)
    assert found[1:] == ["GOOD<|im_end|>", "<think>\n\n</think>\n\nGOOD<|im_end|>"] and found[0].startswith(
        "<tool_call>"
    )
    assert len(notes) == 1 and notes[0].startswith("train.jsonl:1, messages[1].reasoning_content")


def test_the_number_of_renderings_does_not_grow_with_the_calls(tokenizer, monkeypatch):
    from lora_kit.data import answers, layout, rendering

    renderer, counts = Renderer(tokenizer, OWN["thinking"], stop_token="<|end|>"), []
    own = rendering._apply

    def counted(*arguments, **named):
        counts[-1] += 1
        return own(*arguments, **named)

    monkeypatch.setattr(rendering, "_apply", counted)
    for length in (2, 40):
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
        turns = [USER, *[call, {"role": "tool", "content": "ok", "index": 1}] * length, GOOD]
        counts.append(0)
        made = answers.render(layout.Conversation(tuple(turns)), renderer)
        assert len(made.answers) == length + 1
    assert counts[1] <= counts[0] <= 10


def test_random_conversations_decode_to_their_answers(tokenizer):
    records = [record(random.Random(f"test {index}")) for index in range(60)]
    for name, template in templates(tokenizer, real=False).items():
        counts, faults = examine(records, template)
        assert not faults and counts["trained"] > 30, (name, faults, counts)
