"""Near duplicates are the pairs that a comparison of all pairs finds; needs the extra `check`."""

import numpy as np
import pytest
from conftest import make_records, write_jsonl

from lora_kit.check import check
from lora_kit.data import near_duplicates as near
from lora_kit.data.preflight import Signs, inspect
from lora_kit.data.tokens import Tokens
from lora_kit.errors import InputError
from lora_kit.recipe.load import load_recipe


def tokens(rows):
    return Tokens.of([(np.array(row, np.int32), np.ones(len(row), np.bool_)) for row in rows])


def hashes(parts):
    return np.concatenate([inspect(part, [Signs(stop=0)], [len(part)]).hashes for part in parts])


def similar(first, second):
    """The share of sequences of five tokens, without those of the first 12 tokens, which all examples have."""
    own, other = ({tuple(row[at : at + 5]) for at in range(12, len(row) - 4)} for row in (first, second))
    return len(own & other) / len(own | other)


def test_the_pairs_are_those_of_a_comparison_of_all(monkeypatch):
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(3)
    rows = [[*range(1000, 1012), *rng.integers(1, 900, rng.integers(60, 90)).tolist()] for _ in range(40)]
    for source in (3, 9, 20):
        changed = list(rows[source])
        changed[40] = 999
        rows.append(changed)
    rows += [[*rows[5][:40], 999, *rows[5][41:50]], [1, 2, 3], rows[7]]  # half of one, a short one, an equal one
    expected = [
        (early, late)
        for late in range(len(rows) - 2)
        for early in range(late)
        if similar(rows[early], rows[late]) >= near.LIKE
    ]
    assert expected == [(3, 40), (9, 41), (20, 42)]
    parts = [tokens(rows[:41]), tokens(rows[41:])]
    found = near.near_duplicates(parts, hashes(parts))
    assert list(found.pairs) == expected and found.sampled == len(rows) - 1
    assert near.near_duplicates(parts, hashes(parts), sample=10).sampled == 10


def test_the_template_and_the_system_message_make_no_near_duplicates():
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(4)
    rows = [[*range(1000, 1200), *rng.integers(1, 900, 20).tolist()] for _ in range(30)]
    parts = [tokens(rows)]
    assert near.near_duplicates(parts, hashes(parts)).pairs == ()


def test_many_copies_of_an_example_are_no_template():
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(5)
    rows = [rng.integers(1, 900, 80).tolist() for _ in range(86)]
    rows += [[*rows[0][:40], 1000 + number, *rows[0][41:]] for number in range(14)]
    parts = [tokens(rows)]
    assert near.near_duplicates(parts, hashes(parts)).pairs == tuple((0, index) for index in range(86, 100))


def test_a_check_names_the_first_near_duplicate(recipe_file, tmp_path):
    pytest.importorskip("datasketch")
    records = make_records(40, seed=2)
    records[9]["messages"][0]["content"] = "a long question that is asked again with another letter at its end x"
    changed = {"messages": [{**records[9]["messages"][0]}, *records[9]["messages"][1:]]}
    changed["messages"][0]["content"] = changed["messages"][0]["content"][:-1] + "y"
    data = write_jsonl(tmp_path / "data.jsonl", records)
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [changed])
    report = check(load_recipe(recipe_file, [f"data.train={data}", f"data.validation={held_out}"]))
    (note,) = [note for note in report.notes if "token sequences" in note]
    assert note.startswith(f"{held_out}:1 (as {data}:10): 1 of 41 compared examples share at least 80%")
    assert "(validation examples that resemble a training example: 1); remove them" in note


def test_without_the_extra_a_check_says_what_to_install(recipe_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(InputError, match="datasketch is not installed"):
        near.near_duplicates([tokens([[1, 2]])], hashes([tokens([[1, 2]])]))
    report = check(load_recipe(recipe_file))
    assert "near duplicates: datasketch is not installed; pip install 'lora_kit[check]'" in report.unchecked
    assert not report.problems
