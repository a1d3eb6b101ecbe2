"""A gallery of broken data: each entry gets a message that names its file, its line if it has lines, and the remedy."""
# ruff: noqa: E501  (a row of a table is a line)

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import labels_of, make_tokenizer

from lora_kit.data import sources
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import prepare
from lora_kit.errors import DataError
from lora_kit.recipe.schema import Data

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
GOOD = b'{"prompt": "Hi", "completion": "Hello"}\n'
CALL = (
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", '
)
CALL += b'"arguments": %s}}]}]}\n'
INNER = b'{"a": [\n{"x": 1},\n{"y": 2}\n]}\n'
JQ = b'{\n  "prompt": "a",\n  "completion": "b"\n}\n'


def parquet(**columns):
    """Return a builder of d.parquet with these columns."""

    def build(folder):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "d.parquet")

    return build


def arrow(values, kind):
    import pyarrow

    return pyarrow.array(values, kind)


def timestamp(zone):
    import pyarrow

    return pyarrow.timestamp("ms", zone)


def map_of_objects():
    import pyarrow

    return pyarrow.map_(pyarrow.struct([("y", pyarrow.int64())]), pyarrow.int64())


def twice_a_field(folder):
    import pyarrow

    twice = pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["y", "y"])
    table = pyarrow.table({"text": ["a"], "x": twice})
    with pyarrow.ipc.new_file(folder / "d.arrow", table.schema) as writer:
        writer.write_table(table)


def cut(builder, name, keep):
    """Return a builder that cuts the end off a file of another builder."""

    def build(folder):
        builder(folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[:keep])

    return build


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("d.jsonl", content)
    return file.getvalue()


def saved(folder, splits=("train",), name="ds"):
    """Save a dataset, or several splits, as `datasets` does, with a stale cache beside it."""
    import datasets

    made = {split: datasets.Dataset.from_list([{"prompt": "a", "completion": split}]) for split in splits}
    if len(splits) > 1:
        datasets.DatasetDict(made).save_to_disk(folder / name)
    else:
        made[splits[0]].save_to_disk(folder / name)
        (folder / name / "cache-1.arrow").write_bytes(b"stale")


def link_without_target(folder):
    (folder / "data").mkdir()
    (folder / "data" / "d.jsonl").symlink_to("gone.jsonl")


def pipe(folder):
    os.mkfifo(folder / "d.jsonl")


def nested(depth):
    return b'{"prompt": "a", "completion": "b", "x": ' + b"[" * depth + b"]" * depth + b"}\n"


class Broken(NamedTuple):
    """A dataset that is refused.

    Attributes:
        name: The kind of damage.
        files: The content of files by name, or a function that builds them in a folder.
        expected: Parts of the message: file and line first, the remedy last.
        data: The recipe's section `data`; `train` is the first file if it is not given.
    """

    name: str
    files: object
    expected: tuple[str, ...]
    data: dict[str, object] = {}  # noqa: RUF012  (never changed)


BROKEN = [
    # JSON Lines
    Broken("empty file", {"d.jsonl": b""}, ("d.jsonl: the file is empty", "write it again")),
    Broken("blank lines only", {"d.jsonl": b"\n \n"}, ("d.jsonl: it contains no records", "write at least one")),
    Broken("no JSON", {"d.jsonl": GOOD + b"hello\n"}, ("d.jsonl:2: not JSON", "write records with json.dumps")),
    Broken("record cut off", {"d.jsonl": GOOD + GOOD[:-9]}, ("d.jsonl:2: not JSON", "cut off")),
    Broken("single quotes", {"d.jsonl": GOOD + b"{'prompt': 'a'}\n"}, ("d.jsonl:2:", "no single quotes; write records with json.dumps")),
    Broken("words of Python", {"d.jsonl": GOOD + b'{"prompt": None}\n'}, ("d.jsonl:2:", "spells them true, false and null")),
    Broken("keys without quotes", {"d.jsonl": GOOD + b"{prompt: 1}\n"}, ("d.jsonl:2:", "put keys in double quotes")),
    Broken("comment", {"d.jsonl": GOOD + b"// more\n"}, ("d.jsonl:2:", "JSON has no comments; remove it")),
    Broken("comma at the end of a line", {"d.jsonl": GOOD + GOOD[:-1] + b",\n"}, ("d.jsonl:2:", "remove the comma")),
    Broken("comma before a brace", {"d.jsonl": GOOD + b'{"prompt": "a",}\n'}, ("d.jsonl:2:", "remove the comma")),
    Broken("two records on a line", {"d.jsonl": GOOD + GOOD[:-1] + GOOD}, ("d.jsonl:2:", "put each record on its own line")),
    Broken("tab in a string", {"d.jsonl": GOOD + b'{"prompt": "a\tb"}\n'}, ("d.jsonl:2:", "write the character inside the string as \\t")),
    Broken("backslash", {"d.jsonl": GOOD + b'{"prompt": "C:\\data"}\n'}, ("d.jsonl:2:", "write a backslash inside a string twice")),
    Broken("list as a record", {"d.jsonl": GOOD + b'["x"]\n'}, ("d.jsonl:2: the record is a list; expected an object", '{"text": "..."}')),
    Broken("key twice", {"d.jsonl": GOOD + b'{"prompt": "a", "prompt": "b", "completion": "c"}\n'}, ("d.jsonl:2: the key 'prompt' stands twice", "keep one")),
    Broken("NaN", {"d.jsonl": GOOD + GOOD[:-2] + b', "score": NaN}\n'}, ("d.jsonl:2: NaN is not JSON", "write null or a string")),
    Broken("NaN in arguments", {"d.jsonl": CALL % b'{"a": NaN}'}, ("d.jsonl:1: NaN is not JSON", "write null or a string")),
    Broken("number without an end", {"d.jsonl": CALL % b'{"a": 1e999}'}, ("d.jsonl:1: the number 1e999 is too large", "write it as a string")),
    Broken("NaN in arguments as a string", {"d.jsonl": CALL % b'"{\\"a\\": -Infinity}"'}, ("d.jsonl:1: messages[1].tool_calls[0].function.arguments", "-Infinity is not JSON", "write null")),
    Broken("no JSON in arguments", {"d.jsonl": CALL % b'"x=1"'}, ("d.jsonl:1: messages[1].tool_calls[0].function.arguments is not JSON", "expected an object")),
    Broken("number of 5,000 digits", {"d.jsonl": GOOD + GOOD[:-2] + b', "id": ' + b"1" * 5000 + b"}\n"}, ("d.jsonl:2: a number has 5,000 digits", "write it as a string")),
    Broken("huge number in arguments as a string", {"d.jsonl": CALL % (b'"{\\"a\\": ' + b"1" * 5000 + b'}"')}, ("d.jsonl:1: messages[1]", "5,000 digits", "write it as a string")),
    Broken("deep nesting", {"d.jsonl": GOOD + nested(20_000)}, ("d.jsonl:2: lists and objects are nested more than 100 deep", "write a flatter record")),
    Broken("deep nesting in the first line", {"d.jsonl": nested(20_000)}, ("d.jsonl:1:", "nested", "write a flatter record")),
    Broken("nesting that only recursion cannot stand", {"d.jsonl": GOOD + nested(600)}, ("d.jsonl:2:", "nested more than 100 deep")),
    Broken("half a surrogate pair", {"d.jsonl": GOOD + b'{"prompt": "\\ud83d", "completion": "b"}\n'}, ("d.jsonl:2: the string escape \\ud83d is half", "write the whole character")),
    Broken("half a surrogate pair as a key", {"d.jsonl": GOOD + b'{"prompt": "a", "completion": "b", "\\udC4d": [1]}\n'}, ("d.jsonl:2: the string escape \\udc4d", "write the whole character")),
    Broken("half a surrogate pair in arguments as a string", {"d.jsonl": CALL % b'"{\\"a\\": \\"\\\\ud83d\\"}"'}, ("d.jsonl:1: messages[1]", "\\ud83d is half", "write the whole character")),
    Broken("a NUL byte", {"d.jsonl": GOOD + b'{"prompt": "a\0"}\n'}, ("d.jsonl:2: a NUL byte (column 14)", "write it again")),
    Broken("windows-1252", {"d.jsonl": GOOD + '{"prompt": "café"}\n'.encode("latin-1")}, ("d.jsonl:2: byte 0xe9 is not UTF-8, maybe windows-1252", "`iconv -f windows-1252 -t utf-8`")),
    Broken("UTF-16", {"d.jsonl": GOOD.decode().encode("utf-16")}, ("d.jsonl:1: byte 0xff is not UTF-8, maybe utf-16", "iconv -f utf-16")),
    Broken("UTF-16 without a mark", {"d.jsonl": GOOD.decode().encode("utf-16-le")}, ("d.jsonl:1:", "maybe utf-16le", "iconv -f utf-16le")),
    Broken("UTF-32", {"d.jsonl": GOOD.decode().encode("utf-32")}, ("d.jsonl:1:", "maybe utf-32;", "iconv -f utf-32 ")),
    Broken("damage between carriage returns", {"d.jsonl": b'{"prompt": "a",\r"completion" "b"}\r'}, ("d.jsonl:1: not JSON", "tr '\\r' '\\n'")),
    Broken("gzip cut off", {"d.jsonl.gz": gzip.compress(GOOD * 99)[:-12]}, ("d.jsonl.gz: cannot be decompressed (gzip)", "copy it again")),
    Broken("gzip of nothing", {"d.jsonl.gz": gzip.compress(b"")}, ("d.jsonl.gz: the file is empty",)),
    Broken("xz", {"d.jsonl": lzma.compress(GOOD)}, ("d.jsonl: the file is compressed by xz", "xz -d")),
    Broken("zip", {"d.jsonl": zipped(GOOD)}, ("d.jsonl: the file is a zip archive", "unpack it")),
    Broken("pickle", {"d.json": b"\x80\x04K\x01."}, ("d.json: the file is a pickle", "write JSON Lines or Parquet")),
    Broken("Git LFS", {"d.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"}, ("d.jsonl: the file is a pointer of Git LFS", "git lfs pull")),
    Broken("web page", {"d.jsonl": b"<!DOCTYPE html><html>"}, ("d.jsonl: the file is a web page", "download the file itself")),
    Broken("web page as CSV", {"d.csv": b"<html lang='en'>"}, ("d.csv: the file is a web page", "download the file itself")),
    # JSON
    Broken("number with more digits than Python has", {"d.jsonl": CALL % b'{"a": [0.30000000000000000001]}'}, ("d.jsonl:1: messages[1].tool_calls[0].function.arguments.a[0] is 0.30000000000000000001, which is read as 0.3", "write it as a string")),
    Broken("number that is read as zero, in text", {"d.jsonl": CALL % b'"{\\"a\\": 1e-400}"'}, ("d.jsonl:1: messages[1].tool_calls[0].function.arguments.a is 1e-400, which is read as 0.0", "write it as a string")),
    Broken("cut off, and its inner objects begin lines", {"d.json": INNER[:-4]}, ("d.json:3: not JSON", "the file is cut off here")),
    Broken("list that does not end", {"d.json": b'[{"prompt": "a"},\n{"prompt": "b"}'}, ("d.json:2: not JSON", "cut off")),
    Broken("list with a comma at its end", {"d.json": b'[{"prompt": "a"},\n]'}, ("d.json:2: not JSON", "remove the comma")),
    Broken("list with a missing comma", {"d.json": b'[{"prompt": "a"}\n{"prompt": "b"}]'}, ("d.json:2: not JSON: Expecting ',' delimiter", "put a comma before it")),
    Broken("two lists", {"d.json": b'[{"prompt": "a"},\n{}]\n[{"prompt": "b"}]'}, ("d.json:3:", "put every record into one list")),
    Broken("list with NaN", {"d.json": b'[{"prompt": "a", "completion": "b"},\n{"x": NaN}]'}, ("d.json:2: NaN is not JSON", "write null")),
    Broken("empty list", {"d.json": b"[]"}, ("d.json: it contains no records", "write at least one")),
    Broken("object with a list inside", {"d.json": b'{"version": 1,\n"data": [{"prompt": "a", "completion": "b"}]}'}, ("d.json: the columns are version, data", "jq -c '.data[]'")),
    Broken("object of records by name", {"d.json": b'{"0": {"prompt": "a"}, "1": {"prompt": "b"}}'}, ("d.json: the columns are 0, 1", "jq -c '.[]' FILE")),
    Broken("object with a list inside, of which a part is held out", {"d.json": b'{"version": 1, "data": [{"prompt": "a"}]}'}, ("d.json: the columns are version, data", "jq -c '.data[]'"), {"train": "d.json", "validation": 0.1}),
    Broken("columns of ids", {"d.jsonl": b'{"question_id": 1, "id": 2, "question": "a", "answer": "b"}\n'}, ("d.jsonl: the columns are question_id, id", "e.g. {prompt: question, completion: answer}")),
    Broken("object without lists", {"d.json": b'{"version": 1}'}, ("d.json: the columns are version; expected those of a format", "map them in data.columns")),
    Broken("damage in an object over several lines", {"d.json": JQ + JQ.replace(b'"a",', b'"a"')}, ("d.json:7: not JSON", "put a comma before it")),
    # CSV
    Broken("row too long", {"d.csv": b"prompt,completion\na,b\nHi, you,Hello\n"}, ("d.csv:3: 3 fields, the header has 2", "quote fields that contain commas")),
    Broken("every row too long", {"d.csv": b"prompt,completion\nHi,Hello, friend\nHi,Hello, friend\n"}, ("d.csv:2: 3 fields, the header has 2; quote fields that contain commas\nd.csv:3: 3 fields", "quote fields that contain commas")),
    Broken("row too short", {"d.csv": b"prompt,completion\na,b\nc\n"}, ("d.csv:3: 1 field, the header has 2", "write empty fields too")),
    Broken("blank before a quote", {"d.csv": b'prompt,completion\na, "b, c"\n'}, ("d.csv:2: 3 fields, the header has 2", "remove the blanks before quotes")),
    Broken("quote that never closes", {"d.csv": b'prompt,completion\na,b\nc,"d\ne,f\n'}, ("d.csv:3: a quote opens in this row and never closes", "close it")),
    Broken("quote inside a quoted field", {"d.csv": b'prompt,completion\na,"say "hi" now"\n'}, ("d.csv:2: text follows a closing quote", "write a quote inside a field twice")),
    Broken("column twice", {"d.csv": b"prompt,prompt\na,b\n"}, ("d.csv:1: the header has an empty or repeated name", "name each column once")),
    Broken("column without a name", {"d.csv": b"prompt,completion,\na,b,c\n"}, ("d.csv:1: the header has an empty", "name each column once")),
    Broken("header alone", {"d.csv": b"prompt,completion\n"}, ("d.csv: it contains no records",)),
    Broken("CSV in windows-1252", {"d.csv": "prompt,completion\na,b\ncafé,b\n".encode("latin-1")}, ("d.csv:3: byte 0xe9 is not UTF-8", "iconv")),
    Broken("CSV header in windows-1252", {"d.csv": "café,completion\na,b\n".encode("latin-1")}, ("d.csv:1: byte 0xe9 is not UTF-8", "iconv")),
    Broken("CSV with carriage returns", {"d.csv": b"prompt,completion\ra,b\r"}, ("d.csv:1: a carriage return alone", "tr '\\r' '\\n'")),
    Broken("CSV with a NUL", {"d.csv": b"prompt,completion\na,b\0c\n"}, ("d.csv:2: a NUL byte", "write it again")),
    Broken("text in windows-1252", {"d.txt": "one\ncafé\n".encode("latin-1")}, ("d.txt:2: byte 0xe9 is not UTF-8", "iconv")),
    # Parquet and Arrow
    Broken("Parquet cut off", cut(parquet(text=["a", "b"]), "d.parquet", 60), ("d.parquet: cannot be read as Parquet", "download it again"), {"train": "d.parquet"}),
    Broken("Parquet with a wrong beginning", {"d.parquet": b"PAR1 nothing"}, ("d.parquet: cannot be read as Parquet", "download it again")),
    Broken("no Parquet", {"d.parquet": b"nothing"}, ("d.parquet: cannot be read as Parquet", "download it again")),
    Broken("NaN in a table", lambda folder: parquet(messages=arrow([[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": float("nan")}}}]}]], None))(folder), ("d.parquet, record 1: messages[1].tool_calls[0].function.arguments.a is nan", "write null or a string"), {"train": "d.parquet"}),
    Broken("time after the year 9999", lambda folder: parquet(text=["a", "b"], at=arrow([0, 10**15], "timestamp[ms]"))(folder), ("d.parquet, record 2: at: the value cannot be read", "cast or remove the column"), {"train": "d.parquet"}),
    Broken("duration without an end", lambda folder: parquet(text=["a", "b"], at=arrow([0, 2**62], "duration[s]"))(folder), ("d.parquet, record 2: at: the value cannot be read", "cast or remove the column"), {"train": "d.parquet"}),
    Broken("unknown time zone", lambda folder: parquet(text=["a"], at=arrow([0], timestamp("Mars/X")))(folder), ("d.parquet, record 1: at: the value cannot be read", "cast or remove the column"), {"train": "d.parquet"}),
    Broken("field twice", twice_a_field, ("d.arrow, record 1: x: the value cannot be read", "cast or remove the column"), {"train": "d.arrow"}),
    Broken("map with objects as keys", lambda folder: parquet(text=["a"], x=arrow([[({"y": 1}, 2)]], map_of_objects()))(folder), ("d.parquet, record 1: x: the value cannot be read", "cast or remove the column"), {"train": "d.parquet"}),
    Broken("bytes as text", lambda folder: parquet(text=[b"x"])(folder), ("d.parquet, record 1: text is a bytes", "expected a string"), {"train": "d.parquet"}),
    Broken("saved dataset that is cut off", cut(saved, "ds/data-00000-of-00001.arrow", 90), ("ds/data-00000-of-00001.arrow: cannot be read as Arrow", "download it again"), {"train": "ds"}),
    # files and folders
    Broken("suffix that is not read", {"d.xml": b"x"}, ("d.xml: the file has the suffix '.xml'", "expected one of .json, .jsonl", ".arrow, also compressed (.gz, .zst, .bz2)")),
    Broken("no suffix", {"data": b"x"}, ("data: the file has no suffix", "expected one of .json, .jsonl")),
    Broken("missing file", {"train.jsonl": GOOD}, ("trian.jsonl: ", "did you mean train.jsonl?"), {"train": "trian.jsonl"}),
    Broken("pattern", {"a.jsonl": GOOD}, ("./*.jsonl: ", "name the folder"), {"train": "./*.jsonl"}),
    Broken("pipe", pipe, ("d.jsonl: not a regular file", "write the records to a file first"), {"train": "d.jsonl"}),
    Broken("broken link in a folder", link_without_target, ("data: ", "is a broken link", "remove or replace it"), {"train": "data"}),
    Broken("folder of several formats", {"a.jsonl": GOOD, "b.csv": b"x"}, (".: the folder has files of several formats (csv: b.csv, json: a.jsonl)", "name a single file"), {"train": "."}),
    Broken("folder without data", {"data/a.xml": b"x"}, ("data: the folder has no file of .json", "name a single file"), {"train": "data"}),
    Broken("folder without the split", {"data/test/0.jsonl": GOOD}, ("data: no file or folder name contains the split train", "choose data[test]"), {"train": "data"}),
    Broken("missing shard", {"data/train-00000-of-00002.jsonl": GOOD}, ("data: 1 of 2 shards are missing", "train-00001-of-00002", "copy them too"), {"train": "data"}),
    Broken("splits of which none is train", {"data/train_a-00000-of-00001.jsonl": GOOD, "data/train_b-00000-of-00001.jsonl": GOOD}, ("data: the folder has the splits train_a and train_b", "choose one: data[train_a]"), {"train": "data"}),
    Broken("directory with a suffix", {"d.jsonl/x.xml": b""}, ("d.jsonl: the folder has no file of",), {"train": "d.jsonl"}),
    # long texts and bad records
    Broken("overlong text", {"d.jsonl": b'{"text": "' + b"a" * 99 + b'"}\n'}, ("d.jsonl:1: ", "set data.overlong to drop, truncate or split"), {"sequence_length": 50}),
    Broken("overlong chat with split", {"d.jsonl": b'{"prompt": "a", "completion": "' + b"a" * 99 + b'"}\n'}, ("d.jsonl:1: ", "set data.overlong to drop or truncate"), {"sequence_length": 50, "overlong": "split"}),
    Broken("only bad records", {"d.jsonl": b'x\n{"prompt": "a", "completion": 1}\n'}, ("d.jsonl: 2 of 2 records were left out", "d.jsonl:1: not JSON", "d.jsonl:2: ", "no record is left", "mend them"), {"bad_records": "drop", "format": "prompt-completion"}),
]  # fmt: skip


@pytest.fixture(scope="session")
def renderer(tmp_path_factory):
    """The renderer of a small character-level tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Renderer(PreTrainedTokenizerFast.from_pretrained(folder))


def build(files, folder):
    """Make the files of an entry in a folder, and return the name of the first."""
    if callable(files):
        files(folder)
        return None
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return next(iter(files))


@pytest.mark.parametrize("entry", BROKEN, ids=lambda entry: entry.name)
def test_broken_data_is_refused_with_file_line_and_remedy(entry, tmp_path, renderer):
    first = build(entry.files, tmp_path)
    data = Data(**{"train": first, **entry.data})
    with pytest.raises(DataError) as error:
        prepare(data, renderer, base_dir=tmp_path, seed=0)
    message = str(error.value)
    assert message.startswith(entry.expected[0]) and all(part in message for part in entry.expected), message
    places = [message.rfind(part) for part in entry.expected]
    assert places == sorted(places), message
    assert all(len(line) < 600 for line in message.splitlines()), message


def test_every_remedy_is_on_the_page():
    """The page lists what goes wrong; its words are those of the messages."""
    page = " ".join(PAGE.read_text().replace("`", "").split())
    remedies = {entry.expected[-1].replace("`", "") for entry in BROKEN if len(entry.expected) > 1}
    assert not [remedy for remedy in sorted(remedies) if remedy not in page]


PAIR = {"prompt": "Hi", "completion": "Hello"}


class Read(NamedTuple):
    """A dataset that is read.

    Attributes:
        name: What is special about it.
        files: As for `Broken`.
        records: The records.
        train: The source.
    """

    name: str
    files: object
    records: list[object]
    train: str | None = None


def zstd(content):
    import pyarrow

    codec = pyarrow.Codec("zstd")
    return codec.compress(content, asbytes=True)


def looped(folder):
    (folder / "data" / "more").mkdir(parents=True)
    (folder / "data" / "more" / "d.jsonl").write_bytes(GOOD)
    (folder / "data" / "more" / "up").symlink_to(folder / "data")


def typed(folder):
    """A table with a map, a struct, a dictionary, a JSON column, a large string and real nulls."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({
        "map": pa.array([[("a", 1), ("b", None)], []], pa.map_(pa.string(), pa.int64())),
        "struct": pa.array([{"x": 1, "y": None}, {"x": None, "y": [{"z": None, "w": "v"}]}]),
        "word": pa.array(["one", "one"]).dictionary_encode(),
        "json": pa.array(['{"a": null, "b": [12345678901234567890]}', "null"], pa.json_()),
        "large": pa.array(["x", None], pa.large_string()),
        "list": pa.array([["a", None], []], pa.large_list(pa.string())),
    })  # fmt: skip
    pyarrow.parquet.write_table(table, folder / "d.parquet")


TYPED = [
    {"map": {"a": 1, "b": None}, "struct": {"x": 1}, "word": "one", "json": {"a": None, "b": [12345678901234567890]},
     "large": "x", "list": ["a", None]},
    {"map": {}, "struct": {"y": [{"w": "v"}]}, "word": "one", "list": []},
]  # fmt: skip

READ = [
    Read("upper case", {"D.JSONL": GOOD}, [PAIR]),
    Read("ndjson", {"d.ndjson": GOOD}, [PAIR]),
    Read("gzip", {"d.jsonl.gz": gzip.compress(GOOD)}, [PAIR]),
    Read("gzip of two members", {"d.jsonl.gz": gzip.compress(GOOD) * 2}, [PAIR, PAIR]),
    Read("gzip named jsonl", {"d.jsonl": gzip.compress(GOOD)}, [PAIR]),
    Read("jsonl named gz", {"d.jsonl.gz": GOOD}, [PAIR]),
    Read("zstd", {"d.JSONL.zst": zstd(GOOD)}, [PAIR]),
    Read("zstd named jsonl", {"d.jsonl": zstd(GOOD)}, [PAIR]),
    Read("bzip2", {"d.csv.bz2": bz2.compress(b"prompt,completion\nHi,Hello\n")}, [PAIR]),
    Read("jsonl named csv", {"d.csv": GOOD}, [PAIR]),
    Read("jsonl named txt", {"d.txt": GOOD}, [PAIR]),
    Read("lines of text", {"d.txt": b"one\r\n\r\ntwo\x0c \xe2\x80\xa8\n"}, [{"text": "one"}, {"text": "two\x0c \u2028"}]),
    Read("text with a byte order mark", {"d.txt": b"\xef\xbb\xbfone"}, [{"text": "one"}]),
    Read("tabs", {"d.tsv": b"prompt\tcompletion\nHi\tHello\n"}, [PAIR]),
    Read("semicolons", {"d.csv": b"prompt;completion\nHi;Hello\n"}, [PAIR]),
    Read("tabs in a csv", {"d.csv": b"prompt\tcompletion\nHi\tHello\n"}, [PAIR]),
    Read("csv with a byte order mark", {"d.csv": b"\xef\xbb\xbfprompt,completion\r\nHi,Hello\r\n"}, [PAIR]),
    Read("csv with other line separators", {"d.csv": "prompt,completion\na\u2028b,c\x85d\x0b\n".encode()}, [{"prompt": "a\u2028b", "completion": "c\x85d\x0b"}]),
    Read("csv with a long field", {"d.csv": b"prompt,completion\na," + b"x" * 200_000 + b"\n"}, [{"prompt": "a", "completion": "x" * 200_000}]),
    Read("byte order marks of joined files", {"d.jsonl": b"\xef\xbb\xbf" + GOOD + b"\xef\xbb\xbf" + GOOD}, [PAIR, PAIR]),
    Read("other line separators", {"d.jsonl": '{"text": "a\u2028b\x85c\u2029"}\n'.encode()}, [{"text": "a\u2028b\x85c\u2029"}]),
    Read("objects over several lines", {"d.jsonl": JQ * 2}, [{"prompt": "a", "completion": "b"}] * 2),
    Read("objects over several lines with inner objects at their beginning", {"d.json": INNER * 2}, [{"a": [{"x": 1}, {"y": 2}]}] * 2),
    Read("object over more lines than are looked at", {"d.json": b'{"a": [\n' + b'{"x": 1},\n' * 200 + b"{}\n]}\n"}, [{"a": [*[{"x": 1}] * 200, {}]}]),
    Read("text that begins as other files do", {"d.txt": b"<html>\n<!DOCTYPE html>\nBZh\nPAR1\n"}, [{"text": line} for line in ("<html>", "<!DOCTYPE html>", "BZh", "PAR1")]),
    *(Read(f"text that begins with {begin.decode()}", {"d.txt": begin + b"9 x\n"}, [{"text": begin.decode() + "9 x"}]) for begin in (b"BZh", b"PAR1", b"ARROW1", b"%PDF", b"SQLite format 3", b"<!DOCTYPE html>")),
    Read("numbers with all their digits", {"d.jsonl": b'{"text": [0.1, 1.10, 1E5, -0.0, 0e-999999999999999999999, 123456789012345678]}\n'}, [{"text": [0.1, 1.1, 1e5, 0.0, 0.0, 123456789012345678]}]),
    Read("numbers with more digits in a column", {"d.jsonl": b'{"text": "a", "score": 0.10000000000000000555}\n'}, [{"text": "a", "score": 0.1}]),
    Read("objects on one line", {"d.json": b'{"text": 1,\n"x": 2} {"text": 3}'}, [{"text": 1, "x": 2}, {"text": 3}]),
    Read("carriage returns", {"d.jsonl": (GOOD * 2).replace(b"\n", b"\r")}, [PAIR, PAIR]),
    Read("pairs of surrogates", {"d.jsonl": b'{"text": "\\ud83d\\ude00"}\n'}, [{"text": "\U0001f600"}]),
    Read("whole list on one line", {"d.jsonl": b'[{"text": "a"}, {"text": "\xc3\xa9"}, {"text": "b"}]'}, [{"text": "a"}, {"text": "é"}, {"text": "b"}]),
    Read("types of tables", typed, TYPED, "d.parquet"),
    Read("saved dataset", saved, [{"prompt": "a", "completion": "train"}], "ds"),
    Read("saved splits", lambda folder: saved(folder, ("train", "test")), [{"prompt": "a", "completion": "test"}], "ds[test]"),
    Read("saved split with a name of its own", lambda folder: saved(folder, ("train_a", "train_b")), [{"prompt": "a", "completion": "train_b"}], "ds[train_b]"),
    Read("loop of links", looped, [PAIR], "data"),
    Read("hidden files", {"data/d.jsonl": GOOD, "data/.ipynb_checkpoints/d.jsonl": GOOD, "data/._d.jsonl": b"\0", "data/__MACOSX/d.jsonl": GOOD, "data/README.txt": b"x", "data/Thumbs.db": b"x", "data/dataset_infos.json": b"{}"}, [PAIR], "data"),
    Read("folders of splits", {"data/train/0.jsonl": GOOD, "data/test/0.jsonl": b"x", "data/validation/0.jsonl": b"x"}, [PAIR], "data"),
    Read("split inside a split", {"r/data/train/test_questions.jsonl": GOOD, "r/data/test/train.jsonl": b"x"}, [PAIR], "r"),
    Read("shards", {"data/train-00000-of-00002.jsonl": GOOD, "data/train-00001-of-00002.jsonl": GOOD}, [PAIR, PAIR], "data"),
    Read("shards of two sets", {"data/a-00000-of-00001.jsonl": GOOD, "data/b-00000-of-00001.jsonl": GOOD}, [PAIR, PAIR], "data"),
    Read("split between dots", {"data/a.valid.jsonl.gz": gzip.compress(GOOD), "data/a.train.jsonl": b"x"}, [PAIR], "data[validation]"),
    Read("directory with a suffix", {"d.jsonl/a.jsonl": GOOD}, [PAIR], "d.jsonl"),
    Read("large file", {"d.jsonl": GOOD * 9000}, [PAIR] * 9000),
    Read("glob characters", {"a[1]*/d?.jsonl": GOOD}, [PAIR], "a[1]*/d?.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize("entry", READ, ids=lambda entry: entry.name)
def test_data_is_read_as_it_stands(entry, tmp_path):
    first = build(entry.files, tmp_path)
    records = sources.load(entry.train or first, base_dir=tmp_path)
    assert records.read(0, len(records)) == entry.records
    assert records.read(len(records) - 1, len(records)) == entry.records[-1:]


def test_temporary_files_are_in_the_cache_folder(tmp_path, monkeypatch):
    """The system's temporary folder is often in memory, or small."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(GOOD))
    parquet(text=["a"])(tmp_path)
    for name, expected in (("d.jsonl.gz", PAIR), ("d.parquet", {"text": "a"})):
        assert sources.load(name, base_dir=tmp_path).read(0, 1) == [expected]


def test_records_of_a_list_are_named_by_their_lines(tmp_path):
    (tmp_path / "d.json").write_text('[\n {"text": "é"},\n {"text":\n "b"},\n 5, 6]')
    records = sources.load("d.json", base_dir=tmp_path)
    assert [records.where(index) for index in range(4)] == [
        "d.json:2",
        "d.json:3",
        "d.json:5, record 3",
        "d.json:5, record 4",
    ]


def notes_of(content, renderer, folder, **data):
    (folder / "d.jsonl").write_bytes(content)
    prepared = prepare(Data(train="d.jsonl", **data), renderer, base_dir=folder, seed=0)
    return prepared, prepared.notes


def test_bad_records_can_be_left_out_and_are_named(tmp_path, renderer):
    content = GOOD + b"x\n" * 11 + b'{"prompt": "a"}\n' + GOOD.replace(b"Hi", b"Ho")
    prepared, (note,) = notes_of(content, renderer, tmp_path, bad_records="drop")
    assert len(prepared.train) == 2 and prepared.counts.train.bad == 12
    lines = note.splitlines()
    assert lines[0] == "d.jsonl: 12 of 14 records were left out (data.bad_records: drop)"
    assert len(lines) == 12 and lines[1].startswith("  d.jsonl:2: not JSON") and lines[-1] == "  and 2 more"


def test_bad_records_excuse_no_record_that_is_too_long(tmp_path, renderer):
    with pytest.raises(DataError, match=r"d\.jsonl:2: .* tokens are more than data\.sequence_length"):
        notes_of(b"x\n" + GOOD, renderer, tmp_path, bad_records="drop", sequence_length=5, format="prompt-completion")


@pytest.mark.parametrize(("length", "overlap"), [(2, 1), (7, 1), (7, 6), (10, 3), (100, 5), (37, 36)])
def test_each_token_of_a_long_text_is_trained_once(tmp_path, renderer, length, overlap):
    texts = ["abcdefghijklmnopqrstuvwxyz0123456789", "x", "abc abc abc abc"]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    options = {"sequence_length": length, "overlong": "split", "overlap": overlap}
    prepared, _ = notes_of(content, renderer, tmp_path, **options)
    whole = [[*renderer.tokenizer(text).input_ids, renderer.stop_id] for text in texts]
    trained = np.concatenate([ids[mask] for ids, mask in map(prepared.train.example, range(len(prepared.train)))])
    assert trained.tolist() == [token for ids in whole for token in ids[1:]]
    assert labels_of(prepared.train).tolist() == trained.tolist()
    assert prepared.counts.train.split == sum(len(ids) > length for ids in whole)
    before = None
    for index in range(len(prepared.train)):
        ids, mask = prepared.train.example(index)
        assert len(ids) <= length
        if not mask[:overlap].any() and len(ids) > 1 and before is not None and overlap > 1:
            assert ids[:overlap].tolist() == before[-overlap:].tolist()  # the context is the end of the piece before
        before = ids


def test_a_text_file_is_one_text_if_it_is_split(tmp_path, renderer):
    (tmp_path / "d.txt").write_bytes(b"one\r\ntwo\n")
    prepared = prepare(Data(train="d.txt", overlong="split", sequence_length=5), renderer, base_dir=tmp_path, seed=0)
    trained = "".join(
        renderer.tokenizer.decode(prepared.train.example(index)[0][prepared.train.example(index)[1]])
        for index in range(len(prepared.train))
    )
    assert trained == "ne\ntwo\n</s>" and prepared.counts.train.split == 1
    first, cut = prepared.notes
    assert "the first token has the beginning of the answer and is never trained" in first
    assert cut == "d.txt: 1 of 1 texts were cut, into 2 pieces of at most data.sequence_length tokens"


PADDED = {"city": {"type": "string", "enum": None}, "ticker": None, "default": None}


def test_tool_schemas_lose_the_nulls_of_a_table_and_calls_are_told(tmp_path, renderer):
    from lora_kit.data.formats import to_example

    call = {"function": {"name": "w", "arguments": {"city": "Rome", "ticker": None}}}
    tool = {"name": "w", "parameters": {"properties": PADDED, "required": None}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    example = to_example({"messages": messages, "tools": [tool]}, "messages", {})
    assert example.tools[0]["function"]["parameters"] == {"properties": {"city": {"type": "string"}}}
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "ticker": None}


@pytest.mark.parametrize("schema", [{"default": None}, {"enum": [None, 1]}, {"const": None}])
def test_a_null_that_json_schema_knows_stays(schema):
    from lora_kit.data.messages import without_padding

    tools = [{"name": "f", "parameters": {"properties": {"a": schema}}}]
    assert without_padding(tools) == tools


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "t.jinja: the file is empty; write it again, or remove data.template"),
        (b" \n", "t.jinja: the file is empty"),
        ("x".encode("utf-16"), "t.jinja:1: byte 0xff is not UTF-8, maybe utf-16; convert"),
        (b"{{ x }}\n\xe9", "t.jinja:2: byte 0xe9 is not UTF-8, maybe windows-1252; convert"),
        (b"{{ x }}\n\0", "t.jinja:2: a NUL byte"),
    ],
)
def test_a_template_file_that_is_damaged_is_named(tmp_path, content, expected):
    from lora_kit.data.files import read_text

    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_text(tmp_path / "t.jinja", "t.jinja")
    assert str(error.value).startswith(expected)


def test_a_template_file_has_no_byte_order_mark(tmp_path):
    from lora_kit.data.files import read_text

    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf{{ x }}\r\n\xc3\xa9")
    assert read_text(tmp_path / "t.jinja", "t.jinja") == "{{ x }}\n\u00e9"


def test_records_that_cannot_be_read_are_told_before_a_missing_template(tmp_path, renderer, monkeypatch):
    monkeypatch.setattr(renderer.tokenizer, "chat_template", None)
    (tmp_path / "d.csv").write_text("prompt,completion\nHi,Hello, friend\n")
    with pytest.raises(DataError, match=r"d\.csv:2: 3 fields"):
        prepare(Data(train="d.csv"), renderer, base_dir=tmp_path, seed=0)


def whole_files():
    """Return undamaged files of every format by name."""
    import pyarrow as pa
    import pyarrow.parquet

    table, parquet_file, arrow_file = pa.table({"text": ["é", "b"], "s": [{"x": 1}, None]}), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet_file)
    with pa.ipc.new_stream(arrow_file, table.schema) as writer:
        writer.write_table(table)
    records = '{"text": "é \\ud83d\\ude00", "n": [1.5, null]}\n' * 3
    return {
        "a.jsonl": records.encode(),
        "b.json": json.dumps([json.loads(line) for line in records.splitlines()], indent=1).encode(),
        "c.csv": b'prompt,completion\n"x, ""y""","z\nw"\na,b\n',
        "d.txt": "one é\ntwo\n".encode(),
        "e.parquet": parquet_file.getvalue(),
        "f.arrow": arrow_file.getvalue(),
        "g.jsonl.gz": gzip.compress(records.encode()),
        "h.jsonl.zst": zstd(records.encode()),
    }


DAMAGE = (
    b"\0",
    b"\xff",
    b'"',
    b"'",
    b"\\",
    b"{",
    b"[",
    b"}",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"NaN",
)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_an_error_of_one_line_or_harmless(seed, tmp_path):
    rng, files = random.Random(seed), whole_files()
    for _ in range(100):
        name = rng.choice(list(files))
        content, place = files[name], rng.randrange(len(files[name]))
        damage = rng.choice([b"", *DAMAGE])
        kept = content[place + rng.randrange(20) :] if rng.random() < 0.8 else b""
        (tmp_path / name).write_bytes(content[:place] + damage + kept)
        try:
            records = sources.load(name, base_dir=tmp_path)
            found = records.read(0, len(records))
        except DataError as error:
            found = [error]
        for value in found:
            if isinstance(value, DataError):
                assert "\n" not in str(value) and len(str(value)) < 600
            else:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
