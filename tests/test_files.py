"""Every value of a file arrives as it stands there, and what cannot be read is named by file and line."""

import json
import os

import pytest

from lora_kit.data import sources
from lora_kit.data.files import load_rows, open_file
from lora_kit.errors import DataError

ODD = [
    {"text": "2020-01-01", "when": "2020-01-01T00:00:00"},  # typed readers make datetimes of these
    {"text": "a", "tools": [{"a": {"type": "string"}}]},
    {"text": "b", "tools": [{"a": {"type": "string", "enum": [None, 1, "x"]}, "b": {}}]},
    {"text": [{"type": "text", "text": "line\u2028separator \u00e9 \U0001f44d"}]},
    {"text": 5, "deep": {"x": {"y": [1, [2.5, None]]}}},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def records(path):
    part = open_file(path, path.name)
    return part.read(part.numbers().tolist())


def refusal(path):
    with pytest.raises(DataError) as error:
        open_file(path, path.name)
    return str(error.value)


def lines(values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("shape", [lines, json.dumps], ids=["lines", "list"])
def test_json_comes_back_equal_whatever_it_is_called(write, name, shape):
    assert records(write(name, shape(ODD))) == ODD


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_the_cache_of_datasets_need_not_be_writable(write, monkeypatch, name):
    import datasets
    import pandas

    path = write(name, b"text\nvalue\n" if name.endswith("csv") else b'{"text": "value"}\n')
    if name.endswith("parquet"):
        pandas.DataFrame({"text": ["value"]}).to_parquet(path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "below a file")
    assert records(path) == [{"text": "value"}]


@pytest.mark.quick
def test_one_odd_record_changes_no_other(write):
    values = [{"m": [{"role": "user", "content": "x" * 1000}]}] * 12_000
    values.append({"m": [{"role": "user", "content": [{"type": "text"}]}]})
    assert records(write("late.jsonl", lines(values))) == values


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_records(write):
    part = open_file(write("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n  \n{"text": "b"}'), "a.jsonl")
    numbers = part.numbers().tolist()
    assert part.read(numbers) == [{"text": "a"}, {"text": "b"}]
    assert [part.where(number) for number in numbers] == ["a.jsonl:1", "a.jsonl:4"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("not json", "not JSON: Expecting value (column 1): 'not json'"),
        ('{"text": "b"', "not JSON: Expecting ',' delimiter (column 13)"),
        ('["x"]', "the record is a list; expected an object"),
        ("null", "the record is null; expected an object"),
    ],
)
def test_a_bad_line_is_an_error_of_that_line_only(write, line, expected):
    first, second, third = records(write("a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "c"}}\n'))
    assert (first, third) == ({"text": "a"}, {"text": "c"})
    assert isinstance(second, DataError) and expected in str(second)


def test_a_list_that_is_not_json_is_named_by_line(write):
    assert refusal(write("a.json", '[{"text": "a"},\n{"text": "b" "c"}]')).startswith("a.json:2: not JSON: ")


def test_one_object_is_no_list_of_records(write):
    found = refusal(write("a.json", json.dumps({"data": [{"text": "a"}], "version": 1}, indent=1)))
    assert found == "a.json: the file is one object (data, version); expected a list of records, or one record per line"


def test_csv_fields_stay_strings(write):
    path = write("a.csv", 'instruction,output\nadd,007\n"a, b",\n\n"two\nlines",NA\n')
    assert records(path) == [
        {"instruction": "add", "output": "007"},
        {"instruction": "a, b", "output": ""},
        {"instruction": "two\nlines", "output": "NA"},
    ]
    part = open_file(path, "a.csv")
    assert [part.where(number) for number in range(3)] == ["a.csv:2", "a.csv:3", "a.csv:5"]


def test_a_csv_row_with_too_many_fields_is_named_by_line(write):
    found = refusal(write("a.csv", 'text,n\na,1\n"x\ny",2\nb,2,3\nc,1,2,3\n'))
    assert found.splitlines() == [
        "a.csv:5: 3 fields, the header has 2; quote fields that contain commas",
        "a.csv:6: 4 fields, the header has 2; quote fields that contain commas",
    ]


def test_a_csv_file_with_only_a_header_has_no_records(write):
    part = open_file(write("a.csv", "text,n\n"), "a.csv")
    assert not len(part.rows) and not part.numbers().tolist()


def test_a_csv_header_with_a_repeated_name_is_refused(write):
    assert (
        refusal(write("a.csv", "text,text\na,b\n")) == "a.csv:1: the header has an empty or repeated name: text, text"
    )


def test_parquet_drops_the_nulls_that_fill_up_its_tables(tmp_path):
    import datasets

    values = [{"m": [{"role": "user", "name": "Ann"}, {"role": "tool"}]}, {"m": [], "text": "x"}]
    datasets.Dataset.from_list([{"m": value["m"], "text": value.get("text")} for value in values]).to_parquet(
        tmp_path / "a.parquet"
    )
    assert records(tmp_path / "a.parquet") == values
    assert open_file(tmp_path / "a.parquet", "a.parquet").where(1) == "a.parquet, record 2"


def test_a_folder_s_name_is_no_pattern(write, tmp_path):
    (tmp_path / "a[1] *").mkdir()
    assert records(write("a[1] */x.jsonl", '{"text": "a"}\n')) == [{"text": "a"}]


def test_a_file_that_is_rewritten_is_read_again(write):
    assert records(write("a.jsonl", '{"text": "a"}\n')) == [{"text": "a"}]
    assert records(write("a.jsonl", '{"text": "b"}\n')) == [{"text": "b"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "caf\u00e9"}'.encode("latin-1"), "a.jsonl:1: byte 0xe9 is not UTF-8, maybe windows-1252"),
        ('{"text": "x"}'.encode("utf-16"), "a.jsonl:1: byte 0xff is not UTF-8, maybe utf-16"),
        (b"", "a.jsonl: the file is empty"),
    ],
)  # fmt: skip
def test_bytes_that_are_not_utf8_are_named_with_a_remedy(write, content, expected):
    found = refusal(write("a.jsonl", content))
    assert found.startswith(expected)
    assert "iconv -f" in found or not content


def test_a_real_latin_1_file_is_recognised(shared_data):
    found = refusal(shared_data / "snips" / "train_PlayMusic_full.json")
    assert "byte 0xed is not UTF-8, maybe windows-1252; convert the file: `iconv -f windows-1252" in found


@pytest.mark.parametrize(("name", "found"), [("a.txt", "has the suffix '.txt'"), ("data", "has no suffix")])
def test_another_kind_of_file_is_refused_with_those_that_are_read(write, name, found):
    assert refusal(write(name, "x")) == f"{name}: the file {found}; expected one of .json, .jsonl, .csv, .parquet"


def test_a_broken_parquet_file_is_told_by_name(write):
    assert refusal(write("a.parquet", "not parquet")).startswith("a.parquet: cannot be read: ")


def test_a_reader_that_fails_says_why_in_one_line(monkeypatch):
    import datasets

    def fail(name):
        raise OSError("disk\ngone")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"^x: cannot be read: disk$"):
        load_rows("x", "name")


@pytest.mark.parametrize(
    ("value", "problem"),
    [("[" * 100_000, "nested too deeply"), (r'{"text": "\ud800 x"}', r"'\ud800' is no character")],
)
def test_json_that_no_tokenizer_takes_is_a_problem_of_that_record(write, value, problem):
    first, second = records(write("a.jsonl", '{"text": "a"}\n' + value + "\n"))
    assert first == {"text": "a"} and str(second).startswith(f"not JSON: {problem}")
    assert refusal(write("a.json", f'[{{"text": "a"}},\n{value}]')).startswith(f"a.json:1: not JSON: {problem}")
    pair = json.dumps({"text": "\U0001f44d"})
    assert "\\ud83d" in pair and records(write("b.jsonl", pair)) == [{"text": "\U0001f44d"}]


def test_a_pipe_is_refused_because_data_is_read_more_than_once(tmp_path):
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match=r"data\.jsonl: not a regular file; .* write it to a file first"):
        sources.files(str(tmp_path / "data.jsonl"), tmp_path)
