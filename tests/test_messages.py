"""Every variant of messages and tools becomes the same structure, or is refused with its place in the record."""

import json

import pytest

from lora_kit.data.messages import ROLES, Conversation, conversation, labelled, unknown_nulls
from lora_kit.data.remarks import KEYS, Remark
from lora_kit.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def make(*messages, tools=None):
    return conversation([labelled(list(messages), "messages")], tools)


def refusal(*messages, tools=None):
    with pytest.raises(DataError) as error:
        make(*messages, tools=tools)
    return str(error.value)


@pytest.mark.quick
def test_messages_pass_unchanged_and_assistant_turns_are_answers():
    made = make(USER, ASSISTANT, USER, ASSISTANT)
    assert made == Conversation((USER, ASSISTANT, USER, ASSISTANT))
    assert made.answers == [1, 3]


@pytest.mark.parametrize("part", [{"type": "text", "text": "Hello."}, {"type": "text", "value": "Hello."}])
def test_a_list_of_text_parts_becomes_one_string(part):
    assert make(USER, ASSISTANT | {"content": [part, part]}).messages[1]["content"] == "Hello.Hello."


def test_empty_reasoning_beside_another_key_is_ignored():
    made = make(USER, ASSISTANT | {"reasoning_content": "", "reasoning": "hm"})
    assert made.messages[1] == ASSISTANT | {"reasoning": "hm"}


def test_other_keys_of_a_part_are_noted_and_empty_ones_ignored():
    part = {"type": "text", "text": "Hello.", "cache_control": {"type": "ephemeral"}, "annotations": [], "train": None}
    made = make(USER, ASSISTANT | {"content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, part]})
    assert made.remarks == (Remark(KEYS, "signature", "messages[1].content[0].signature"),)


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_weight_zero_makes_a_turn_context_and_reaches_no_template(key):
    made = make(USER, ASSISTANT | {key: 0.0}, USER | {key: 0}, ASSISTANT | {key: 1.0})
    assert made.answers == [3] and made.untrained == {1}
    assert all(key not in message for message in made.messages)


def test_only_the_last_part_is_trained():
    made = conversation([labelled([USER, ASSISTANT, USER], "prompt"), labelled([ASSISTANT], "completion")], None)
    assert made.answers == [3]


def test_other_keys_are_kept_for_the_template_and_null_ones_dropped():
    made = make(USER | {"name": "Ann", "tool_calls": None}, ASSISTANT | {"reasoning_content": "hm", "tool_calls": []})
    assert made.messages[0] == USER | {"name": "Ann"}
    assert made.messages[1] == ASSISTANT | {"reasoning_content": "hm"}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "weather", "arguments": {"city": "Rome"}},
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    ],
)
def test_every_variant_of_tool_calls_becomes_the_same(call):
    made = make(USER, {"role": "assistant", "content": None, "tool_calls": [call]})
    assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_the_id_of_a_call_is_kept():
    made = make(USER, {"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]})
    assert made.messages[1]["tool_calls"][0]["id"] == "c1"


def test_other_keys_of_a_call_are_noted_and_empty_ones_ignored():
    call = {"id": "c1", "index": 0, "comment": "x", "parameters": {}, "thought": None, **CALL}
    call["function"] = CALL["function"] | {"result": 0, "args": ""}
    made = make(USER, {"role": "assistant", "tool_calls": [call]})
    assert made.messages[1]["tool_calls"] == [CALL | {"id": "c1"}]
    places = ("messages[1].tool_calls[0].comment", "messages[1].tool_calls[0].function.result")
    assert made.remarks == tuple(Remark(KEYS, place.rpartition(".")[2], place) for place in places)


@pytest.mark.parametrize("shape", ["wrapped", "flat", "json"])
def test_every_variant_of_tools_becomes_the_same(shape):
    flat = {"name": "weather", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": flat}
    given = {"wrapped": [wrapped], "flat": [flat], "json": json.dumps([flat])}[shape]
    assert make(USER, ASSISTANT, tools=given).tools == (wrapped,)


PLACE = {"type": "object", "properties": {"city": {}}}


@pytest.mark.parametrize(
    ("schema", "nulls"),
    [
        (None, ["f.loc.city", "f.loc.zip", "f.stops.city", "f.day"]),
        ({"loc": PLACE}, ["f.loc.zip", "f.stops.city", "f.day"]),
        ({"loc": PLACE, "stops": {"items": PLACE}, "day": {}}, ["f.loc.zip"]),
        ({"loc": {"anyOf": [PLACE, {"type": "null"}]}, "stops": {"$ref": "#/$defs/stops"}}, ["f.loc.zip", "f.day"]),
        ({"loc": "odd", "stops": {"items": [PLACE]}}, ["f.loc.city", "f.loc.zip", "f.stops.city", "f.day"]),
    ],
)
def test_null_arguments_that_the_schema_lacks_are_found_at_any_depth(schema, nulls):
    arguments = {"loc": {"city": None, "zip": None}, "stops": [{"city": None}, None], "day": None}
    tools = schema and [{"name": "f", "parameters": {"type": "object", "properties": schema}}]
    made = make(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}, tools=tools)
    assert unknown_nulls(made.messages, made.tools) == nulls


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_empty_tools_become_none(nothing):
    assert make(USER, ASSISTANT, tools=nothing).tools is None


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "the record has no messages"),
        ([USER], "no assistant message to train on; the roles are user"),
        ([USER, ASSISTANT | {"weight": 0}], "no assistant message to train on"),
        (
            [ASSISTANT, USER],
            "messages[0] is an assistant message; a message to answer must come before it",
        ),
        (["hi"], "messages[0] is a string; expected an object with role and content"),
        (
            [USER, ASSISTANT, USER | {"role": "bot"}],
            f"messages[2].role is 'bot'; expected one of {', '.join(ROLES)}",
        ),
        ([{"content": "x"}], "messages[0] has no role, only content"),
        ([{"from": "gpt", "value": "x"}], "if the keys are from and value, set data.format: sharegpt"),
        ([USER | {"content": 5}], "messages[0].content is a number; expected a string"),
        ([USER | {"content": {"a": 1}}], "messages[0].content is an object with a; expected a string"),
        ([{"role": "user"}], "messages[0].content is missing"),
        (
            [USER | {"content": [{"type": "image"}]}],
            "messages[0].content[0].type is 'image'; expected a part of type",
        ),
        ([USER | {"content": ["x"]}], "messages[0].content[0] is a string; expected a part of type 'text'"),
        ([USER | {"content": [{"type": "text"}]}], "messages[0].content[0].text is null; expected a string"),
        *(
            (
                [USER, ASSISTANT | {"content": [{"type": kind, kind: "x", key: False}, {"type": "text", "text": "y"}]}],
                f"messages[1].content[0].{key} is not supported: a message is trained as a whole",
            )
            for kind in ("text", "thinking")
            for key in ("train", "weight", "mask")
        ),
        ([USER, ASSISTANT | {"content": " \n"}], "messages[1] is an assistant message without content"),
        (
            [USER, ASSISTANT | {"weight": 0.5}],
            "messages[1].weight is 0.5; expected 0 (context) or 1 (trained)",
        ),
        (
            [USER | {"weight": 1}, ASSISTANT],
            "messages[0].weight is 1 for the role 'user'; only assistant messages",
        ),
        (
            [USER | {"tool_calls": [CALL]}],
            "messages[0].tool_calls: only an assistant message may call tools; the role is 'user'",
        ),
        (
            [USER, ASSISTANT | {"tool_calls": [{}]}],
            "messages[1].tool_calls[0] is an object with no keys",
        ),
        ([USER, ASSISTANT | {"tool_calls": "f()"}], "messages[1].tool_calls is a string; expected a list"),
        (
            [USER, ASSISTANT | {"tool_calls": [{"name": "f", "arguments": "x=1"}]}],
            "messages[1].tool_calls[0].function.arguments is not JSON",
        ),
        (
            [USER, ASSISTANT | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            "messages[1].tool_calls[0].function.arguments is a list; expected an object",
        ),
        *(
            ([USER, ASSISTANT | {"tool_calls": [call | {key: {"city": "Rome"}}]}], f"tool_calls[0].{key} is an object")
            for key in ("parameters", "input", "args")
            for call in ({"name": "f"}, {"name": "f", "arguments": {"city": "Oslo"}})
        ),
        (
            [USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f"}, "arguments": {"city": "Rome"}}]}],
            "messages[1].tool_calls[0].arguments is an object with city, which lora_kit does not read; write",
        ),
        (
            [USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f", "input": "Rome"}}]}],
            "messages[1].tool_calls[0].function.input is a string",
        ),
    ],
)
def test_a_wrong_message_is_refused_with_its_place(messages, expected):
    assert expected in refusal(*messages)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("weather", "tools is not JSON"),
        ({"name": "weather"}, "tools is an object with name; expected a list"),
        (
            [{"parameters": {}}],
            "tools[0] is an object with parameters; expected an object with a function's name",
        ),
    ],
)
def test_wrong_tools_are_refused_with_their_place(tools, expected):
    assert expected in refusal(USER, ASSISTANT, tools=tools)
