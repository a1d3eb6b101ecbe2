"""Records of preferences become examples with two sides, or an error with file and line; both sides are shown."""

import numpy as np
import pytest
from chat_oracle import tokenize
from conftest import make_tokenizer, write_jsonl
from transformers import AutoTokenizer

from lora_kit.check import preview
from lora_kit.data.formats import Completion, Preference, detect, to_example
from lora_kit.data.messages import Conversation
from lora_kit.data.packing import IGNORE, collate, pack
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import prompt
from lora_kit.data.tokens import Tokens, check_context, prepare
from lora_kit.errors import DataError
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Data

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Good."), ("assistant", "Bad"))
)
PAIR = Preference(Conversation((USER, GOOD)), Conversation((USER, BAD)))
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Good.", "rejected": "Bad"},
        {"prompt": [USER], "chosen": GOOD, "rejected": {"from": "gpt", "value": "Bad"}},
        {"prompt": [{"from": "human", "value": "Hi?"}], "chosen": GOOD, "rejected": BAD},
        {"conversations": [{"from": "human", "value": "Hi?"}], "chosen": GOOD, "rejected": BAD},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    ],
    ids=lambda record: ", ".join(f"{key} {type(value).__name__}" for key, value in record.items()),
)
@pytest.mark.quick
def test_a_pair_is_read_however_its_prompt_and_its_answers_are_written(record):
    assert detect([*record, "id"], {}, kind="dpo") == "preference"
    assert to_example(record, "preference", {}) == PAIR


def test_a_pair_of_strings_is_raw_text_and_its_common_words_are_the_prompt_if_it_has_none():
    explicit = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    assert to_example(explicit, "preference", {}) == Preference(Completion("1+1=", "2"), Completion("1+1=", "3"))
    implicit = {"chosen": "Human: hi\n\nAssistant: I am well", "rejected": "Human: hi\n\nAssistant: I ate"}
    made = to_example(implicit, "preference", {})
    assert (made.chosen.prompt, made.chosen.completion) == ("Human: hi\n\nAssistant: I", " am well")
    assert (made.rejected.prompt, made.rejected.completion) == ("Human: hi\n\nAssistant: I", " ate")


def test_both_sides_have_the_system_prompt_the_tools_and_every_answer_after_the_prompt():
    turns = [USER, GOOD, USER]
    record = {"chosen": [*turns, GOOD, USER, GOOD], "rejected": [*turns, BAD], "system": "Be brief.", "tools": TOOLS}
    made = to_example(record, "preference", {})
    for side, answers in ((made.chosen, [4, 6]), (made.rejected, [4])):
        assert side.answers == answers and side.messages[0]["content"] == "Be brief."
        assert side.tools[0]["function"]["name"] == "f"


@pytest.mark.parametrize(("label", "side"), [(True, 0), (False, 1), (1, 0), ("no", 1), ("True", 0)])
def test_an_answer_with_a_label_has_one_side(label, side):
    record = {"prompt": [USER], "completion": [GOOD], "label": label}
    assert detect([*record], {}, kind="kto") == "unpaired"
    made = to_example(record, "unpaired", {})
    assert (made.chosen, made.rejected)[side] == Conversation((USER, GOOD))
    assert (made.chosen, made.rejected)[1 - side] is None and made.sides == (Conversation((USER, GOOD)),)


def test_a_label_of_a_conversation_is_about_its_last_answer():
    record = {"messages": [USER, BAD, USER, GOOD], "label": False}
    assert detect([*record], {}, kind="kto") == "unpaired-messages"
    made = to_example(record, "unpaired-messages", {})
    assert made.chosen is None and made.rejected.messages == (USER, BAD, USER, GOOD) and made.rejected.answers == [3]
    with pytest.raises(DataError, match=r"messages\[2\] is not an answer of the assistant, so the label says nothing"):
        to_example(record | {"messages": [USER, BAD, USER]}, "unpaired-messages", {})


REFUSED = {
    "two prompts": (
        {"prompt": "q", "messages": [USER], "chosen": [GOOD], "rejected": [BAD]},
        "prompt and messages may both be the prompt of chosen and rejected; remove one of the columns",
    ),
    "equal strings": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal, so the pair"),
    "equal messages": (
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        "chosen and rejected are equal, so the pair",
    ),
    "equal in two spellings": (
        {"prompt": [USER], "chosen": "Good.", "rejected": [GOOD]},
        "chosen and rejected are equal, so the pair states no preference; remove the record",
    ),
    "equal tokens": (
        {"prompt": "q", "chosen": "é", "rejected": "ü"},  # both unknown to this tokenizer
        "the tokenizer knows no character of completion",
    ),
    "equal tokens in part": (
        {"prompt": "q", "chosen": "aé", "rejected": "aü"},
        "chosen and rejected have the same tokens, so the pair states no preference; remove it",
    ),
    "other questions": (
        {"chosen": [USER | {"content": "A?"}, GOOD], "rejected": [USER, BAD]},
        "chosen[0] is not an answer of the assistant, so the prompts of chosen and rejected differ; a pair has two",
    ),
    "other strings": (
        {"chosen": "abc", "rejected": "xyz"},
        "chosen and rejected begin differently, so they have no common prompt; add a column prompt, or write the",
    ),
    "another question than the column's": (
        {"prompt": "A?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "prompt is not among the messages with which chosen and rejected begin; remove the column, or write it as",
    ),
    "no question": (
        {"chosen": [GOOD], "rejected": [BAD]},
        "chosen[0] is an assistant message; a message to answer must come before it",
    ),
    "no answer": ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen has no answer after the prompt; ad"),
    "an empty list": ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "chosen has no messages; expected at least"),
    "an empty string": ({"prompt": "q", "chosen": " ", "rejected": "a"}, "chosen is empty after the prompt; add an an"),
    "a number": ({"prompt": 1, "chosen": "a", "rejected": "b"}, "prompt is a number; expected a string or a list of m"),
    "tools for raw text": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "tools": TOOLS},
        "tools is given, and prompt is raw text that no template renders",
    ),
    "too long": (
        {"prompt": "q", "chosen": "a" * 70, "rejected": "b"},
        "72 tokens of chosen are more than data.sequence_length (64); raise it, or set data.overlong to drop or trunc",
    ),
}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Renderer(AutoTokenizer.from_pretrained(folder), kind="kto")


@pytest.fixture
def make(renderer, tmp_path):
    """Prepare records that are written to train.jsonl."""

    def prepare_records(records, *, prompts=0, **fields):
        write_jsonl(tmp_path / "train.jsonl", records)
        data = Data(train="train.jsonl", sequence_length=64, **fields)
        return prepare(data, renderer, base_dir=tmp_path, seed=0, prompts=prompts)

    return prepare_records


def test_every_broken_pair_is_refused_with_its_file_and_line(make):
    with pytest.raises(DataError) as error:
        make([record for record, _ in REFUSED.values()])
    lines = str(error.value).splitlines()
    assert len(lines) == len(REFUSED)
    for number, (name, (_, message)) in enumerate(REFUSED.items(), 1):
        assert lines[number - 1].startswith(f"train.jsonl:{number}: {message}"), (name, lines[number - 1])


def test_pairs_that_are_too_long_are_counted_in_one_message(make):
    long = {"prompt": "q", "chosen": "a", "rejected": "b" * 70}
    with pytest.raises(DataError, match=r"train.jsonl:1: 72 tokens of rejected are more .* \(64\); raise it"):
        make([long])
    with pytest.raises(DataError, match=r"1: 72 tokens of rejected .* \(64\), as in 1 other of up to 79 tokens; raise"):
        make([long, {"prompt": "q", "chosen": "a" * 77, "rejected": "b"}])


def test_a_label_that_is_none_is_refused(make):
    with pytest.raises(DataError, match=r"train\.jsonl:1: label is 'good'; expected true for a desirable answer"):
        make([{"prompt": "q", "completion": "a", "label": "good"}])


@pytest.mark.parametrize(
    ("columns", "kind", "named", "message"),
    [
        (
            "prompt chosen rejected",
            "sft",
            None,
            "fit the format preference, which needs objective.kind dpo or orpo",
        ),
        (
            "prompt completion",
            "dpo",
            None,
            "fit the format prompt-completion, which needs objective.kind sft, not dpo",
        ),
        ("prompt completion label", "dpo", None, "which needs objective.kind"),
        (
            "messages",
            "sft",
            "preference",
            "the format preference needs objective.kind dpo or orpo or simpo or kto, not sft",
        ),
        ("a", "orpo", None, r"expected those of a format \(preference: chosen, rejected, \[prompt\]"),
    ],
)
def test_data_of_another_objective_is_refused(columns, kind, named, message):
    with pytest.raises(DataError, match=message):
        detect(columns.split(), {}, kind=kind, named=named)


def test_a_column_named_label_changes_nothing_for_supervised_fine_tuning():
    assert detect(["prompt", "completion", "label"], {}) == "prompt-completion"
    assert detect(["prompt", "chosen", "rejected"], {"completion": "chosen"}) == "prompt-completion"


RECORDS = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "1+1=", "chosen": "2", "rejected": "eleven"},
]


def test_the_sides_are_tokenised_as_two_records_would_be_and_only_answers_are_trained(make, renderer):
    made = make(RECORDS, validation=0.5).train
    (index,) = range(len(made))
    record = RECORDS[0] if made.lengths[0] > 20 else RECORDS[1]
    expected = [tokenize(side, renderer) for side in to_example(record, "preference", {}).sides]
    assert [(ids.tolist(), trained.tolist()) for ids, trained in made.sides(index)] == [
        (side.ids, side.trained) for side in expected
    ]
    assert made.chosen.tolist() == [len(expected[0].ids)] and made.longest == max(len(side.ids) for side in expected)


def test_the_prompt_to_generate_from_is_that_of_the_chosen_side(make, renderer):
    made = make(RECORDS[:1] * 2, validation=0.5, prompts=1)
    assert made.prompts == (prompt(Conversation((USER, GOOD)), renderer),) and made.prompts[0].expected == "Good."


def sides_of_three():
    rng = np.random.default_rng(0)
    sides = [(5, 9), (4, 0), (0, 7)]
    examples = [(rng.integers(5, 90, sum(each)), np.arange(sum(each)) % 3 == 2) for each in sides]
    return sides, Tokens.of(examples, [chosen for chosen, _ in sides])


@pytest.mark.parametrize("padded", [False, True])
def test_each_side_is_a_segment_of_its_own_and_a_pair_is_one_example(padded):
    _, tokens = sides_of_three()
    batch = collate(tokens, [2, 0, 1], padded=padded)
    assert batch.segments == (7, 5, 9, 4)
    assert batch.sides.tolist() == [[-1, 0], [1, 2], [3, -1]]
    segments = [side for index in (2, 0, 1) for side in tokens.sides(index)]
    labels = [np.where(np.append(trained[1:], False), np.append(ids[1:], 0), IGNORE) for ids, trained in segments]
    rows = batch.labels if padded else np.split(batch.labels[0], np.cumsum(batch.segments)[:-1])
    assert all(row[: len(label)].tolist() == label.tolist() for row, label in zip(rows, labels, strict=True))
    positions = batch.position_ids if padded else np.split(batch.position_ids[0], np.cumsum(batch.segments)[:-1])
    assert all(
        row[: len(ids)].tolist() == [*range(len(ids))] for row, (ids, _) in zip(positions, segments, strict=True)
    )
    assert tokens.places([0, 1, 2], padded=padded) == ([18, 4, 7] if padded else [14, 4, 7])


@pytest.mark.parametrize("padded", [False, True])
def test_no_micro_batch_of_pairs_exceeds_its_tokens(padded):
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 60, (40, 2))
    examples = [(np.zeros(sum(each), int), np.ones(sum(each), bool)) for each in lengths]
    tokens = Tokens.of(examples, lengths[:, 0].tolist())
    groups = pack(tokens.places(slice(None), padded=padded), 200, padded=padded)
    assert sorted(index for group in groups for index in group) == [*range(40)]
    assert max(collate(tokens, group, padded=padded).ids.size for group in groups) <= 200


def test_a_side_and_not_a_pair_must_fit_the_context(make):
    made = make(RECORDS[:1])
    check_context(made, made.train.longest)
    with pytest.raises(DataError, match="the longest example has"):
        check_context(made, made.train.longest - 1)


def test_the_fingerprint_knows_where_the_rejected_side_begins():
    _, tokens = sides_of_three()
    moved = Tokens(tokens.ids, tokens.trained, tokens.offsets, tokens.chosen - [1, 0, 0])
    alone = Tokens(tokens.ids, tokens.trained, tokens.offsets)
    assert len({each.fingerprint for each in (tokens, moved, alone)}) == 3


def test_the_preview_shows_both_sides_with_their_trained_tokens(tmp_path, base_folder):
    unpaired = [{"prompt": [USER], "completion": [BAD], "label": False}]
    for name, records in (("pairs", RECORDS[:1]), ("unpaired", unpaired)):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    path = tmp_path / "r.yaml"
    path.write_text(
        f"base: {{repo: {base_folder}}}\ndata: {{train: pairs.jsonl, sequence_length: 64}}\n"
        "objective: {kind: kto}\ntrain: {steps: 1, batch_size: 1}\n"
    )
    chosen, rejected = preview(load_recipe(path)).examples
    assert chosen.title.startswith("example 0 · chosen · pairs.jsonl:1 · ")
    assert rejected.title.startswith("example 0 · rejected · pairs.jsonl:1 · ")
    assert [[piece.text for piece in side.pieces if piece.trained] for side in (chosen, rejected)] == [
        ["Good.</s>"], ["Bad</s>"]
    ]  # fmt: skip
    (only,) = preview(load_recipe(path, ["data.train=unpaired.jsonl"])).examples
    assert only.title.startswith("example 0 · undesirable · unpaired.jsonl:1 · ")
