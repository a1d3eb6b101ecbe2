"""A source is found or refused with what to do, and a held-out part is a function of seed and size alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_jsonl
from runs import WAIT_SECONDS

from lora_kit.data import sources
from lora_kit.data.sources import HubName, load, parse_hub_name, split, validation_indices
from lora_kit.errors import DataError


def texts(*words):
    return [{"text": word} for word in words]


def words(records):
    return [record["text"] for record in records.read(0, len(records))]


def refusal(source, folder):
    with pytest.raises(DataError) as error:
        load(source, base_dir=folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("gsm8k", ("gsm8k", None, None, None)),
        ("openai/gsm8k", ("openai/gsm8k", None, None, None)),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", None, None)),
        ("openai/gsm8k@v1.0", ("openai/gsm8k", None, "v1.0", None)),
        ("openai/gsm8k@refs/pr/3", ("openai/gsm8k", None, "refs/pr/3", None)),
        ("openai/gsm8k[test]", ("openai/gsm8k", None, None, "test")),
        ("a/b:c@d[train[:100]]", ("a/b", "c", "d", "train[:100]")),
        ("a/b:c d@e[test+train]", ("a/b", "c d", "e", "test+train")),
    ],
)
def test_a_hub_name_is_taken_apart(source, parts):
    assert parse_hub_name(source) == HubName(*parts)


@pytest.mark.parametrize("source", ["", "a/b/c", "a b", "a/b[", "/a/b", "a/b@", "a/b:"])
def test_what_is_no_hub_name_is_not_taken_for_one(source):
    assert parse_hub_name(source) is None


def test_paths_start_from_the_recipe_s_folder_and_records_name_their_line(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", texts("a", "b", "c"))
    records = load("data/a.jsonl", base_dir=tmp_path)
    assert words(records) == ["a", "b", "c"]
    assert records.where(1) == "data/a.jsonl:2"
    assert words(load(str(tmp_path / "data" / "a.jsonl"), base_dir=tmp_path / "data")) == ["a", "b", "c"]


@pytest.mark.quick
def test_max_examples_takes_the_first(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts("a", "b", "c"))
    assert words(load("a.jsonl", base_dir=tmp_path, max_examples=2)) == ["a", "b"]


def test_a_folder_is_its_files_in_order_of_name(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", texts("c", "d"))
    (tmp_path / "a.json").write_text(json.dumps(texts("a", "b")))
    records = load(".", base_dir=tmp_path)
    assert words(records) == ["a", "b", "c", "d"]
    assert [records.where(index) for index in (1, 3)] == ["./a.json:1, record 2", "./b.jsonl:2"]
    assert [record["text"] for record in records.read(1, 3)] == ["b", "c"]


@pytest.fixture
def folder_of_splits(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train-00", "train-01", "validation", "test", "dev_extra"):
        write_jsonl(folder / f"{name}.jsonl", texts(name))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("data", ["train-00", "train-01"]),
        ("data[train]", ["train-00", "train-01"]),
        ("data[validation]", ["dev_extra", "validation"]),
        ("data[test]", ["test"]),
    ],
)
def test_a_folder_s_test_data_is_not_trained_on(folder_of_splits, source, found):
    assert words(load(source, base_dir=folder_of_splits)) == found


@pytest.mark.parametrize("name", ["latest", "contest", "developers", "trainer_notes", "evaluate_it"])
def test_a_word_inside_another_names_no_split(tmp_path, name):
    write_jsonl(tmp_path / f"{name}.jsonl", texts("a"))
    if name == "evaluate_it":
        assert refusal(".", tmp_path).endswith("the split train; choose .[test]")
    else:
        assert words(load(".", base_dir=tmp_path)) == ["a"]


def test_a_folder_without_the_split_says_which_it_has(folder_of_splits):
    found = refusal("data[dev]", folder_of_splits)
    assert found == (
        "data[dev]: no file or folder name contains the split dev; choose data[test] or data[train] or data[validation]"
    )


def test_a_folder_of_several_formats_or_none_is_refused(tmp_path):
    assert refusal(".", tmp_path).startswith(".: the folder has no file of .json, .jsonl, .ndjson, .csv")
    write_jsonl(tmp_path / "a.jsonl", texts("a"))
    (tmp_path / "a.csv").write_text("text\na\n")
    assert refusal(".", tmp_path) == (
        ".: the folder has files of several formats (csv: a.csv, json: a.jsonl); name a single file"
    )


def test_a_missing_file_suggests_a_similar_name(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", texts("a"))
    assert refusal("trian.jsonl", tmp_path).endswith("trian.jsonl does not exist; did you mean train.jsonl?")
    assert refusal("./other", tmp_path).endswith("relative paths start in the recipe's folder")


@pytest.mark.parametrize("content", ["[]", "\n \n", "text\n"])
def test_a_source_without_records_is_refused(tmp_path, content):
    name = "a.csv" if content.startswith("text") else "a.json"
    (tmp_path / name).write_text(content)
    assert refusal(name, tmp_path) == f"{name}: it contains no records; write at least one"


def test_builtin_names_what_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ASSETS", tmp_path)
    write_jsonl(tmp_path / "stories.jsonl", texts("a"))
    assert words(load("builtin:stories", base_dir=tmp_path / "elsewhere")) == ["a"]
    assert words(load("builtin:stories.jsonl", base_dir=tmp_path / "elsewhere")) == ["a"]
    assert refusal("builtin:tales", tmp_path) == "builtin:tales: not shipped with lora_kit; choose one of stories.jsonl"


def test_an_unreachable_hub_is_reported_with_what_to_check(tmp_path):
    found = refusal("nobody/nothing:config@main[train]", tmp_path)
    assert found.startswith("nobody/nothing:config@main[train]: cannot be read: ")
    assert "the recipe's folder has no such file either" in found and "`hf auth login`" in found


def test_the_hub_is_asked_for_config_revision_and_split(tmp_path, monkeypatch):
    import datasets

    asked = []

    def answer(name, config, *, revision, split):
        asked.append((name, config, revision, split))
        return datasets.Dataset.from_list([{"text": "a", "extra": None}])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    records = load("a/b:c@d[e]", base_dir=tmp_path)
    assert records.read(0, 1) == [{"text": "a"}] and records.where(0) == "a/b:c@d[e], record 1"
    load("a/b", base_dir=tmp_path)
    assert asked == [("a/b", "c", "d", "e"), ("a/b", None, None, "train")]


@pytest.mark.parametrize("count", [2, 3, 10, 999])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_the_two_parts_of_a_fraction_are_disjoint_complete_and_not_empty(tmp_path, count, fraction):
    chosen = validation_indices(count, fraction, seed=7)
    assert len(set(chosen.tolist())) == len(chosen) and set(chosen.tolist()) <= set(range(count))
    assert len(chosen) == min(max(1, round(count * fraction)), count - 1)
    assert np.array_equal(chosen, validation_indices(count, fraction, seed=7))


def test_another_seed_holds_out_others():
    assert not np.array_equal(validation_indices(1000, 0.1, seed=0), validation_indices(1000, 0.1, seed=1))


def test_every_record_is_held_out_equally_often():
    counts = np.zeros(50)
    for seed in range(400):
        counts[validation_indices(50, 0.2, seed)] += 1
    assert abs(counts - 80).max() < 4.5 * 8  # a binomial's deviation is 8


def test_splitting_keeps_the_places(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(*map(str, range(20))))
    rest, held_out = split(load("a.jsonl", base_dir=tmp_path), 0.25, seed=3)
    assert sorted(words(rest) + words(held_out), key=int) == [str(number) for number in range(20)]
    assert len(held_out) == 5
    for part in (rest, held_out):
        assert [part.where(index) for index in range(len(part))] == [f"a.jsonl:{int(word) + 1}" for word in words(part)]


def test_one_record_cannot_be_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts("a"))
    with pytest.raises(DataError, match=r"a\.jsonl has only one record, so none can be held out"):
        split(load("a.jsonl", base_dir=tmp_path), 0.5, seed=0)


def test_two_processes_can_open_a_file_at_once_and_say_nothing(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(*map(str, range(1000))))
    code = "import sys; from pathlib import Path; from lora_kit.data.sources import load\n"
    code += "sys.exit(len(load('a.jsonl', base_dir=Path(sys.argv[1]))) != 1000)"
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "shared")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) for _ in range(2)
    ]
    assert [(process.communicate(timeout=WAIT_SECONDS)[0], process.returncode) for process in both] == [(b"", 0)] * 2


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("~nobody.of.this.name/a.jsonl", "Could not determine home directory"),
        ("a" * 300 + ".jsonl", "File name too long"),
    ],
    ids=["home", "name"],
)
def test_a_path_that_cannot_be_used_is_named(tmp_path, source, reason):
    found = f"{source}: the path cannot be used: {reason}; check its spelling and permissions"
    assert refusal(source, tmp_path) == found


def test_a_template_whose_path_cannot_be_used_is_named(tmp_path):
    from lora_kit.data.tokens import renderer_of
    from lora_kit.recipe.schema import Source

    source = Source(source="a.jsonl", template="~nobody.of.this.name/t.jinja")
    with pytest.raises(DataError, match=r"a\.jsonl: template: the path cannot be used: Could not determine home"):
        renderer_of(source, None, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"_data_files": [{"filename": 5}]}',
        b'{"_data_files": [{"filename": "/etc/a.jsonl"}]}',
        b'{"_data_files": [{"filename": "../a.jsonl"}]}',
        b'{"_data_files": [' + b"[" * 5000 + b"]" * 5000 + b"]}",
        b"[",
        None,
    ],
    ids=["number", "absolute", "parent", "deep", "cut off", "pipe"],
)
def test_a_damaged_list_of_the_files_of_a_folder_is_not_followed(tmp_path, content, monkeypatch):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "a.jsonl", texts("a"))
    write_jsonl(tmp_path / "a.jsonl", texts("outside"))
    if content is None:
        os.mkfifo(tmp_path / "d" / "state.json")
        monkeypatch.setattr(sources.Path, "read_text", lambda *_: pytest.fail("it would block"))
    else:
        (tmp_path / "d" / "state.json").write_bytes(content)
    assert words(load("d", base_dir=tmp_path)) == ["a"]


def test_the_columns_are_those_of_the_first_records_that_have_any(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{}] * 1500 + texts("a"))
    assert load("a.jsonl", base_dir=tmp_path).columns == ["text"]
    write_jsonl(tmp_path / "b.jsonl", [{}] * 3)
    assert load("b.jsonl", base_dir=tmp_path).columns == []
