"""Every value of a file arrives as it stands there, and what cannot be read is named by file and line."""

import json

import pytest

from lora_kit.data.files import open_file
from lora_kit.errors import DataError

ODD = [
    {"text": "2020-01-01", "when": "2020-01-01T00:00:00"},  # typed readers make datetimes of these
    {"text": "a", "tools": [{"a": {"type": "string"}}]},
    {"text": "b", "tools": [{"a": {"type": "string", "enum": [None, 1, "x"]}, "b": {}}]},
    {"text": [{"type": "text", "text": "line\u2028separator \u00e9 \U0001f44d"}]},
    {"text": 5, "deep": {"x": {"y": [1, [2.5, None]]}}},
]


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def records(path):
    part = open_file(path, path.name)
    return part.read(range(len(part)))


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


@pytest.mark.quick
def test_one_odd_record_changes_no_other(write):
    values = [{"m": [{"role": "user", "content": "x" * 1000}]}] * 12_000
    values.append({"m": [{"role": "user", "content": [{"type": "text"}]}]})
    assert records(write("late.jsonl", lines(values))) == values


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_records(write):
    part = open_file(write("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n  \n{"text": "b"}'), "a.jsonl")
    assert part.read([0, 1]) == [{"text": "a"}, {"text": "b"}]
    assert [part.where(number) for number in (0, 1)] == ["a.jsonl:1", "a.jsonl:4"]


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


def test_csv_fields_stay_strings(write):
    path = write("a.csv", 'instruction,output\nadd,007\n"a, b",\n\n"two\nlines",NA\n')
    assert records(path) == [
        {"instruction": "add", "output": "007"},
        {"instruction": "a, b", "output": ""},
        {"instruction": "two\nlines", "output": "NA"},
    ]
    part = open_file(path, "a.csv")
    assert [part.where(number) for number in range(3)] == ["a.csv:2", "a.csv:3", "a.csv:5"]


def test_a_csv_file_with_only_a_header_has_no_records(write):
    part = open_file(write("a.csv", "text,n\n"), "a.csv")
    assert not len(part)


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


def test_a_real_latin_1_file_is_recognised(shared_data):
    found = refusal(shared_data / "snips" / "train_PlayMusic_full.json")
    assert "byte 0xed is not UTF-8, maybe windows-1252; convert the file with `iconv -f windows-1252" in found
