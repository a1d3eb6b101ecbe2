"""Records of every format become the same two kinds of example; other records are refused with a remedy."""

import json

import pytest

from lora_kit.data.formats import FORMATS, Completion, Conversation, detect, to_example
from lora_kit.data.remarks import COLUMNS, Remark
from lora_kit.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
RECORDS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "alpaca": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "prompt-completion": {"prompt": [USER], "completion": [ASSISTANT]},
}

OTHERS = {
    "text": {"text": "Once."},
    "preference": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": "No."},
    "unpaired": {"prompt": [USER], "completion": [ASSISTANT], "label": True},
    "unpaired-messages": {"messages": [USER, ASSISTANT], "label": True},
}


def refusal(record, format, columns=None):
    with pytest.raises(DataError) as error:
        to_example(record, format, columns or {})
    return str(error.value)


@pytest.mark.parametrize("format", RECORDS)
@pytest.mark.quick
def test_the_same_exchange_is_the_same_example_in_every_format(format):
    assert to_example(RECORDS[format], format, {}) == Conversation((USER, ASSISTANT))


@pytest.mark.parametrize("format", RECORDS)
def test_a_format_is_detected_by_its_columns(format):
    assert detect([*RECORDS[format], "id"], {}) == format


@pytest.mark.parametrize("format", FORMATS)
def test_renamed_columns_are_found_and_read(format):
    required = FORMATS[format].required
    renames = {name: f"my {name}" for name in required}
    record = (RECORDS | OTHERS)[format]
    renamed = {renames.get(name, name): value for name, value in record.items()}
    assert detect(list(renamed), renames, kind=FORMATS[format].kinds[-1]) == format
    assert to_example(renamed, format, renames) == to_example(record, format, {})


def test_text_is_a_completion_without_a_prompt():
    assert detect(["text"], {}) == "text"
    assert to_example({"text": "Once."}, "text", {}) == Completion("", "Once.")


def test_strings_as_prompt_and_completion_are_raw_text():
    assert to_example({"prompt": "1+1=", "completion": "2"}, "prompt-completion", {}) == Completion("1+1=", "2")


def test_only_the_completion_of_a_list_of_messages_is_trained():
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert to_example(record, "prompt-completion", {}).answers == [3]


def test_alpaca_takes_input_system_and_history():
    record = RECORDS["alpaca"] | {"input": "Now.", "system": "Be brief.", "history": [["Hi?", "Hello."]]}
    made = to_example(record, "alpaca", {})
    assert made.messages == (SYSTEM, USER, ASSISTANT, USER | {"content": "Hi?\n\nNow."}, ASSISTANT)
    assert made.answers == [2, 4]


def test_sharegpt_takes_system_tools_and_calls():
    tools = [{"name": "weather", "parameters": {}}]
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    turns = [
        ("human", "Hi?"),
        ("function_call", json.dumps(call)),
        ("observation", "sunny"),
        ("gpt", "Hello."),
    ]
    conversations = [{"from": who, "value": value} for who, value in turns]
    record = {"system": "Be brief.", "tools": json.dumps(tools), "conversations": conversations}
    made = to_example(record, "sharegpt", {})
    assert [message["role"] for message in made.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert made.messages[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert made.tools == ({"type": "function", "function": tools[0]},)


def test_a_sharegpt_turn_may_repeat_its_role_and_content():
    turns = [{"from": "human", "value": "Hi?"} | USER, {"from": "gpt", "value": "Hello.", "role": "assistant"}]
    assert to_example({"conversations": turns}, "sharegpt", {}) == Conversation((USER, ASSISTANT))


@pytest.mark.parametrize("said", [{"weight": "1"}, {"train": "yes"}, {"masked": "false"}, {"loss": "0.25"}])
def test_a_column_that_excludes_no_record_is_noted(said):
    assert to_example({"text": "x"} | said, "text", {}).remarks == (Remark(COLUMNS, *said, ""),)


def test_a_text_column_beside_another_format_is_ignored():
    assert detect(["instruction", "input", "output", "text"], {}) == "alpaca"
    assert detect(["instruction", "input", "output", "text"], {}, named="text") == "text"


def test_columns_of_two_formats_need_data_format():
    with pytest.raises(DataError, match=r"match messages and prompt-completion; set data\.format"):
        detect(["messages", "prompt", "completion"], {})


def test_unknown_columns_are_reported_with_every_format_and_how_to_rename():
    with pytest.raises(DataError) as error:
        detect(["question", "answer"], {})
    message = str(error.value)
    assert message.startswith("the columns are question, answer; expected those of a format (")
    assert all((f"{name}: {columns}" in message) == ("sft" in columns.kinds) for name, columns in FORMATS.items())
    assert message.endswith("map them in data.columns, e.g. {prompt: question, completion: answer}")


def test_a_named_format_whose_columns_are_missing_is_refused():
    with pytest.raises(DataError, match=r"expected those of the format \(alpaca: instruction, output"):
        detect(["messages"], {}, named="alpaca")


def test_a_renamed_column_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="text: the data has no column 'story'; its columns are body, id"):
        detect(["body", "id"], {"text": "story"})


def test_a_rename_of_no_format_s_column_is_refused():
    with pytest.raises(DataError, match=r"'body' is not a column of text; expected one of text \(the format"):
        detect(["body"], {"body": "text"}, named="text")


@pytest.mark.parametrize(
    ("format", "record", "expected"),
    [
        ("alpaca", {"instruction": "x"}, "output is missing; found instruction; the format alpaca needs"),
        ("alpaca", {"instruction": "x", "output": 5}, "output is a number; expected a string"),
        ("alpaca", {"instruction": "x", "output": ""}, "output is an assistant message without content"),
        ("alpaca", {"instruction": "x", "output": "y", "history": [["a"]]}, "history[0] has 1 items"),
        ("text", {"text": ["a"]}, "text is a list; expected a string"),
        *(
            ("text", {"text": "x", key: value}, f"{key} is {value!r} for the whole record")
            for key, values in (("weight", (0, "0", "0.0")), ("train", (False, "no", " False")), ("masked", ("1",)))
            for value in values
        ),
        (
            "prompt-completion",
            {"prompt": [USER, ASSISTANT | {"train": True}, USER], "completion": [ASSISTANT]},
            "prompt[1] says that it is trained, and only messages of the completion are trained; move it there",
        ),
        ("text", {"text": "\n"}, "text is empty"),
        ("prompt-completion", {"prompt": "a", "completion": " "}, "completion is empty"),
        ("prompt-completion", {"prompt": "a", "completion": [1]}, "prompt is a string and completion"),
        ("prompt-completion", {"prompt": [USER], "completion": [5]}, "completion[0] is a number"),
        ("messages", {"messages": "hi"}, "messages is a string; expected a list"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from is 'bot'"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": 1}]}, "conversations[0].value is a number"),
        ("sharegpt", {"conversations": [USER]}, "set data.format: messages and data.columns: {messages"),
        *(
            ("sharegpt", {"conversations": [{"from": "human", "value": "x"} | other]}, "conversations[0] has from and")
            for other in ({"content": "y"}, {"role": "assistant"}, {"role": "gpt"})
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]},
            "conversations[1].value is not JSON",
        ),
    ],
)  # fmt: skip
def test_a_record_that_is_not_of_its_format_is_refused_with_the_place(format, record, expected):
    assert expected in refusal(record, format)


def test_a_missing_column_is_reported_by_the_name_it_has_in_the_file():
    assert refusal({"q": "x"}, "alpaca", {"instruction": "q", "output": "a"}).startswith("a is missing; found q;")
