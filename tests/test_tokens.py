"""A recipe's data becomes arrays from which every example can be read back, or one error tells every problem."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from chat_oracle import tokenize
from conftest import labels_of, make_records, make_tokenizer, write_jsonl
from transformers import AutoTokenizer

from lora_kit.data.formats import to_example
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import prompt
from lora_kit.data.tokens import Tokens, prepare
from lora_kit.errors import BaseError, DataError
from lora_kit.recipe.schema import Data


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Renderer(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(renderer, tmp_path):
    """Prepare records that are written to train.jsonl."""

    def prepare_records(records, *, prompts=0, seed=0, renderer=renderer, **fields):
        write_jsonl(tmp_path / "train.jsonl", records)
        data = Data(train="train.jsonl", **fields)
        return prepare(data, renderer, base_dir=tmp_path, seed=seed, prompts=prompts)

    return prepare_records


@pytest.fixture
def refusal(make):
    def errors(records, **options):
        with pytest.raises(DataError) as error:
            make(records, **options)
        return str(error.value).splitlines()

    return errors


def pairs(*answers):
    return [{"prompt": "q:", "completion": answer} for answer in answers]


@pytest.mark.quick
def test_every_example_can_be_read_back(make, renderer):
    records = make_records(700)  # more than are tokenised at once
    made = make(records).train
    assert len(made) == 700
    assert made.ids.dtype == np.int32 and made.trained.dtype == np.bool_ and made.offsets.dtype == np.int64
    for index, record in enumerate(records):
        alone = tokenize(to_example(record, "messages", {}), renderer)
        ids, trained = made.example(index)
        assert (ids.tolist(), trained.tolist()) == (alone.ids, alone.trained)
        assert made.lengths[index] == len(ids) and made.weight(index) == sum(alone.trained[1:])


def test_the_first_token_of_an_example_is_no_label():
    made = Tokens.of([(np.array([1, 2]), np.array([True, True])), (np.array([3]), np.array([True]))])
    assert labels_of(made).tolist() == [2] and (made.weight(0), made.weight(1)) == (1, 0)


def test_the_fingerprint_sees_every_array():
    def of(ids, trained, offsets):
        return Tokens(np.array(ids, np.int32), np.array(trained), np.array(offsets, np.int64)).fingerprint

    same = of([1, 2, 3], [False, True, True], [0, 3])
    assert same == of([1, 2, 3], [False, True, True], [0, 3])
    others = [of([1, 2, 4], [False, True, True], [0, 3]), of([1, 2, 3], [False, True, False], [0, 3])]
    others.append(of([1, 2, 3], [False, True, True], [0, 1, 3]))
    assert len({same, *others}) == 4


def test_the_same_data_gives_the_same_tokens_and_another_seed_another_split(make):
    first, again, other = (make(make_records(40), validation=0.2, seed=seed) for seed in (0, 0, 1))
    assert first.train.fingerprint == again.train.fingerprint != other.train.fingerprint
    assert first.validation.fingerprint == again.validation.fingerprint


def test_a_fraction_holds_out_whole_examples(make):
    everything = make(make_records(40)).train
    made = make(make_records(40), validation=0.2)
    assert (len(made.train), len(made.validation)) == (32, 8)
    both = [t.example(i)[0].tobytes() for t in (made.train, made.validation) for i in range(len(t))]
    assert sorted(both) == sorted(everything.example(i)[0].tobytes() for i in range(40))


def test_validation_from_a_file_may_have_another_format(make, tmp_path):
    write_jsonl(tmp_path / "held.jsonl", [{"text": "abc"}])
    made = make(make_records(3), validation="held.jsonl")
    assert made.counts.train.format == "messages" and made.counts.validation.format == "text"


def test_the_summary_counts(make):
    made = make(pairs("ab", "ab", "abcd"))
    counts = made.counts.train
    assert asdict(counts) == {
        "format": "prompt-completion",
        "examples": 3,
        "tokens": 5 + 5 + 7,
        "trained_tokens": 3 + 3 + 5,
        "trained_share": round(11 / 17, 4),
        "longest": 7,
        "dropped": 0,
        "truncated": 0,
        "emptied": 0,
        "merged": 0,
        "split": 0,
        "bad": 0,
        "raw": 3,
        "records": 3,
    }
    assert counts.tokens == len(made.train.ids) and counts.trained_tokens == len(labels_of(made.train))
    assert made.counts.validation is None and made.notes == ()


def test_max_examples_takes_the_first(make):
    assert len(make(make_records(9), max_examples=4).train) == 4


LONG = [*pairs("a", "b" * 20, "c" * 30, "d"), {"prompt": "e" * 20, "completion": "f"}]


def test_overlong_examples_are_an_error_that_names_the_first_and_the_length_of_the_longest(refusal):
    assert refusal(LONG, sequence_length=10) == [
        "train.jsonl:2: 23 tokens are more than data.sequence_length (10), as in 2 others of up to 33 tokens; raise "
        "it, or set data.overlong to drop or truncate"
    ]
    assert refusal([*LONG, {}], sequence_length=30) == [
        "train.jsonl:6: prompt is missing; found nothing; the format prompt-completion needs prompt and completion",
        "train.jsonl:3: 33 tokens are more than data.sequence_length (30); raise it, or set data.overlong to drop or "
        "truncate",
    ]


def test_overlong_examples_can_be_dropped(make):
    made = make(LONG, sequence_length=10, overlong="drop")
    assert made.train.lengths.tolist() == [4, 4]
    assert made.counts.train.dropped == 3 and made.counts.train.examples == 2


def test_overlong_examples_can_be_truncated_if_something_trained_is_left(make):
    made = make(LONG, sequence_length=10, overlong="truncate")
    assert made.train.lengths.tolist() == [4, 10, 10, 4]
    counts = made.counts.train
    assert (counts.truncated, counts.emptied, counts.dropped) == (2, 1, 0)
    assert all(made.train.weight(index) for index in range(4))


def test_nothing_left_is_an_error(refusal):
    assert refusal(pairs("a" * 20), sequence_length=10, overlong="drop") == [
        "train.jsonl: every record (1) is longer than data.sequence_length (10); raise it"
    ]


def test_problems_of_every_kind_and_both_files_are_told_at_once(refusal, tmp_path):
    good = make_records(1)[0]
    system_only = {"messages": [{"role": "system", "content": "x"}]}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    unrendered = {"messages": [{"role": "user", "content": "x"}, call]}
    (tmp_path / "held.jsonl").write_text(json.dumps(good) + "\n\nnot json\n")
    found = refusal([good, system_only, {"other": 1}, unrendered], validation="held.jsonl")
    assert [line.partition(": ")[0] for line in found] == [*(f"train.jsonl:{n}" for n in (2, 3, 4)), "held.jsonl:3"]
    assert "no assistant message to train on" in found[0] and "messages is missing; found other" in found[1]
    assert "leaves out messages[1].tool_calls[0]" in found[2] and "not JSON" in found[3]


def test_of_many_problems_twenty_are_told_and_all_counted(refusal):
    found = refusal([*make_records(1), *[{"messages": []}] * 1234])
    assert len(found) == 21
    assert found[0].startswith("train.jsonl:2: ") and found[19].startswith("train.jsonl:21: ")
    assert found[20] == "and 1,214 more problems of 1,234"


def test_columns_of_no_format_are_told_once(refusal):
    (found,) = refusal([{"a": "x", "b": "y"}] * 3)
    assert found.startswith("train.jsonl: the columns are a, b; expected those of a format")


def test_a_file_without_one_good_line_tells_each(make, tmp_path, renderer):
    (tmp_path / "bad.jsonl").write_text("x\ny\n")
    with pytest.raises(DataError) as error:
        prepare(Data(train="bad.jsonl"), renderer, base_dir=tmp_path, seed=0)
    assert [line[:20] for line in str(error.value).splitlines()] == ["bad.jsonl:1: not JSO", "bad.jsonl:2: not JSO"]


def test_a_missing_chat_template_is_told_once(refusal, tmp_path):
    make_tokenizer(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    plain = Renderer(AutoTokenizer.from_pretrained(tmp_path / "plain"))
    (found,) = refusal(make_records(3), renderer=plain)
    assert "the tokenizer has no chat template" in found


def test_a_wrong_stop_token_is_reported_before_the_data_is_read(make, renderer):
    with pytest.raises(BaseError, match=r"base\.stop_token: '<\|stop\|>' is not a single token"):
        make([], renderer=Renderer(renderer.tokenizer, stop_token="<|stop|>"))


def test_prompts_are_the_first_held_out_examples(make, renderer):
    records = make_records(30)
    made = make(records, validation=0.3, prompts=4)
    assert len(made.prompts) == 4
    for one, (ids, trained) in zip(made.prompts, map(made.validation.example, range(4)), strict=True):
        assert ids.tolist()[: len(one.ids)] == one.ids and trained[len(one.ids)]
        assert renderer.tokenizer.decode(ids[len(one.ids) : -1]) == one.expected
    texts = [prompt(to_example(record, "messages", {}), renderer) for record in records]
    assert all(one in texts for one in made.prompts)


def test_prompts_of_dropped_examples_are_not_asked(make):
    records = pairs(*("a" * length for length in range(1, 21)))
    made = make(records, validation=0.5, sequence_length=12, overlong="drop", prompts=99)
    assert len(made.prompts) == len(made.validation) < 10
    assert all(len(one.expected) <= 9 for one in made.prompts)


def test_prompts_need_something_held_out(refusal):
    assert refusal(make_records(3), prompts=2) == [
        "evaluate.generate is 2, but there is no validation data to answer; set data.validation"
    ]


def test_plain_text_has_no_prompts(refusal):
    (found,) = refusal([{"text": "ab"}] * 4, validation=0.5, prompts=2)
    assert found == "evaluate.generate is 2, but train.jsonl is plain text without prompts; set it to 0"


def test_a_template_with_a_date_is_noted(make, renderer):
    template = "{% set d = strftime_now('%Y') %}" + renderer.tokenizer.chat_template
    made = make(make_records(2), renderer=Renderer(renderer.tokenizer, template))
    (note,) = made.notes
    assert note.startswith("train.jsonl: the chat template prints today's date; it is fixed at 2025-01-01")


def test_the_date_is_noted_for_the_sources_whose_own_template_prints_it(renderer, tmp_path):
    (tmp_path / "dated.jinja").write_text("{% set d = strftime_now('%Y') %}" + renderer.tokenizer.chat_template)
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", make_records(2))
    write_jsonl(tmp_path / "d.jsonl", [{"text": "abc"}])
    dated = [{"source": f"{name}.jsonl", "template": "dated.jinja"} for name in "bcd"]
    made = prepare(Data(train=["a.jsonl", *dated]), renderer, base_dir=tmp_path, seed=0)
    (note,) = (note for note in made.notes if "today's date" in note)
    assert note.startswith("b.jsonl, c.jsonl: the chat template prints")


def test_prompts_are_divided_evenly_and_a_small_set_gives_what_it_has(renderer, tmp_path):
    sizes = {"a": 9, "b": 1, "c": 9}
    for name, size in sizes.items():
        pairs = [{"prompt": "q", "completion": f"{name}{number}"} for number in range(size)]
        write_jsonl(tmp_path / f"{name}.jsonl", pairs)
    data = Data(train="a.jsonl", validation={name: f"{name}.jsonl" for name in sizes})
    for count in (2, 8, 30):
        made = prepare(data, renderer, base_dir=tmp_path, seed=0, prompts=count)
        expected = sorted([(number, name) for name, size in sizes.items() for number in range(size)])[:count]
        assert [one.expected for one in made.prompts] == [f"{name}{number}" for number, name in expected]


# Real data.


@pytest.fixture(scope="module")
def chatml(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tok-gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    config = json.loads((shared_data / "chat-templates" / "qwen2.5__tokenizer_config.json").read_text())
    return Renderer(tokenizer, config["chat_template"])


@pytest.mark.parametrize(
    ("source", "fields", "format", "examples"),
    [
        ("fastchat-dummy/dummy_conversation.json", {}, "sharegpt", 500),
        ("gsm8k/test.jsonl", {"columns": {"prompt": "question", "completion": "answer"}}, "prompt-completion", 1319),
        ("instruct-rasbt/instruction-data.json", {}, "alpaca", 1100),
        ("instruct-rasbt/instruction-data-with-preference.json", {}, "alpaca", 1100),
        ("llamafactory-demos/alpaca_zh_demo.json", {}, "alpaca", 1000),
        ("llamafactory-demos/glaive_toolcall_en_demo.json", {}, "sharegpt", 300),
        ("llamafactory-demos/v1_sft_demo.jsonl", {}, "messages", 500),
        ("llamafactory-demos/c4_demo.jsonl", {"overlong": "truncate"}, "text", 300),
        ("wikisql-lora", {"validation": "wikisql-lora[validation]"}, "text", 1000),
    ],
)
def test_real_datasets_are_read_whole(shared_data, chatml, source, fields, format, examples):
    made = prepare(Data(train=source, **{"sequence_length": 2100} | fields), chatml, base_dir=shared_data, seed=0)
    counts = made.counts.train
    assert (counts.format, counts.examples) == (format, examples)
    assert 0.2 < counts.trained_share < 1
    stop = chatml.stop_id
    for index in range(0, examples, 50):
        ids, trained = made.train.example(index)
        assert len(ids) == 2100 or ids[trained][-1] == stop


def test_every_real_answer_ends_with_the_stop_token(shared_data, chatml):
    source = "fastchat-dummy/dummy_conversation.json"
    made = prepare(Data(train=source), chatml, base_dir=shared_data, seed=0).train
    answers = sum(
        turn["from"] == "gpt"
        for record in json.loads((shared_data / source).read_text())
        for turn in record["conversations"]
    )
    assert (labels_of(made) == chatml.stop_id).sum() == answers


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("bfcl/BFCL_v4_simple_python.json", "the columns are id, question, function; expected those of a format"),
        (
            "snips/train_GetWeather_full.json",
            "a single object, and its records seem to be in GetWeather",
        ),
        (
            "tinystories-sample/tinystories_1000.json",
            "1000.json:2: the record is a string; expected an object",
        ),
        (
            "llamafactory-demos/reason_tool_use_demo_50.jsonl",
            ":1: the chat template leaves out messages[2].reasoning_content (role assistant)",
        ),
        (
            "llamafactory-demos/wiki_demo.txt",
            ":1: 8,071 tokens are more than data.sequence_length (2,048)",
        ),
    ],
)
def test_real_data_that_cannot_be_used_is_refused_with_the_reason(shared_data, chatml, source, expected):
    with pytest.raises(DataError) as error:
        prepare(Data(train=source), chatml, base_dir=shared_data, seed=0)
    assert expected in str(error.value)
