"""Data at a URL is read like data on disk, downloaded once for each state of the URL, and never outside its folder."""

import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from stores import SIGNATURE, Unsteady
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.data import sources
from lora_kit.errors import DataError
from lora_kit.files import CACHE
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import name_of


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A function that writes a file into the empty store; the cache is empty too."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    Unsteady.reset()
    return lambda path, data: MemoryFileSystem.pipe_file(Unsteady(), path, data)


def jsonl(*texts):
    """The bytes of records."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(source, folder):
    """The texts that a source gives."""
    records = sources.load(source, base_dir=folder)
    return [record["text"] for record in records.read(0, len(records))]


def test_a_file_is_downloaded_once_and_again_when_it_has_changed(tmp_path, store):
    store("/bucket/data.jsonl", jsonl("one", "two"))
    assert texts("flaky://bucket/data.jsonl", tmp_path) == ["one", "two"]
    assert texts("flaky://bucket/data.jsonl", tmp_path) == ["one", "two"]
    assert [verb for verb, _ in Unsteady.requests].count("get") == 1
    store("/bucket/data.jsonl", jsonl("three"))
    assert texts("flaky://bucket/data.jsonl", tmp_path) == ["three"]
    records = sources.load("flaky://bucket/data.jsonl", base_dir=tmp_path)
    assert records.where(0) == "flaky://bucket/data.jsonl:1"


def test_a_folder_has_its_splits_and_its_files_have_their_names(tmp_path, store):
    store("/bucket/set/train/a.jsonl", jsonl("one"))
    store("/bucket/set/train/b.jsonl", jsonl("two"))
    store("/bucket/set/test/a.jsonl", jsonl("three"))
    assert texts("flaky://bucket/set", tmp_path) == ["one", "two"]
    assert texts("flaky://bucket/set[test]", tmp_path) == ["three"]
    assert sources.load("flaky://bucket/set", base_dir=tmp_path).where(1) == "flaky://bucket/set/train/b.jsonl:1"


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, store):
    store("/bucket/set/a.jsonl", jsonl("one"))
    store("/bucket/set/../../../../outside.jsonl", jsonl("evil"))
    with pytest.raises(DataError, match=r"outside.jsonl' leads out of the folder"):
        texts("flaky://bucket/set", tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_a_smaller_set(tmp_path, store):
    store("/bucket/set/one/a.jsonl", jsonl("one"))
    store("/bucket/set/two/b.jsonl", jsonl("two"))

    def fail(verb, path):
        if verb == "ls" and path.endswith("two"):
            raise PermissionError("no access")

    Unsteady.before = fail
    with pytest.raises(DataError, match="cannot be read: PermissionError: no access"):
        texts("flaky://bucket/set", tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("flaky://bucket/nothing.jsonl", "there is no such file or folder"),
        ("gs://bucket/d.jsonl", "needs the package gcsfs, which is not installed; pip install gcsfs"),
        ("flaky://bucket/d.jsonl?X-Amz-Signature=abc", "a URL with a password"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_the_reason(tmp_path, url, message):
    with pytest.raises(DataError, match=message):
        sources.load(url, base_dir=tmp_path)


def test_a_store_that_fails_is_told_without_its_signatures(tmp_path, store):
    store("/bucket/data.jsonl", jsonl("one"))
    Unsteady.share = 1.0
    with pytest.raises(DataError, match=r"(cannot be read|not downloaded): OSError") as caught:
        sources.load("flaky://bucket/data.jsonl", base_dir=tmp_path)
    assert SIGNATURE not in str(caught.value)


def test_check_reads_it_but_not_offline(tmp_path, store, recipe_file, data_file):
    store("/bucket/data.jsonl", data_file.read_bytes())
    source = ["--set", "data.train=flaky://bucket/data.jsonl"]
    offline = CliRunner().invoke(app, ["check", str(recipe_file), "--offline", "--json", *source])
    assert json.loads(offline.output)["unchecked"] == ["data: a Hub dataset or a URL, not read with --offline"]
    assert not Unsteady.requests
    found = CliRunner().invoke(app, ["check", str(recipe_file), "--json", *source])
    assert json.loads(found.output)["data"]["train"]["examples"] == 23


def test_a_source_without_a_name_has_that_of_its_file(recipe_file):
    assert name_of("s3://bucket/folder/code.jsonl.gz") == "code" == name_of("data/code.jsonl.gz")
    with pytest.raises(Exception, match="a token or a password"):
        load_recipe(recipe_file, ["data.train=s3://key:secret@bucket/d.jsonl"])
