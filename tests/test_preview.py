"""The preview shows which tokens are trained, where an example is from and how it is packed; and no text breaks out."""

import html
import io
import json
import re

import pytest
from conftest import make_records, write_jsonl
from rich.console import Console
from typer.testing import CliRunner

from lora_kit.check import check, preview
from lora_kit.cli import app
from lora_kit.recipe.load import load_recipe
from lora_kit.views.console import printable
from lora_kit.views.preview import Example, Piece, Preview, Row, visible

EVIL = "[bold]x[/bold] <script>alert(1)</script> \x1b[31mred\x07 \u202etxt.exe &amp; \ud800 :smile: '\"\r"


def shown(what, *, colours=None):
    console = Console(file=io.StringIO(), color_system=colours, force_terminal=True, no_color=False, soft_wrap=True,
                      markup=False, emoji=False, highlight=False)  # fmt: skip
    console.print(what)
    return console.file.getvalue()


def evil_preview(*, ids):
    piece = Piece(EVIL, True, (7, 8), (EVIL, "\n"))
    return Preview((Example(0, EVIL, (piece,)),), ((Row(EVIL, 2),),), 4, ids=ids)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_a_terminal_gets_text_and_no_commands(ids, colours):
    text = shown(evil_preview(ids=ids), colours=colours)
    own = re.sub(r"\x1b\[[\d;]*m", "", text)  # the colours of the preview itself
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", own)
    for part in ("[bold]x[/bold]", "<script>", r"\x1b[31m", r"\x07", r"\u202e", r"\ud800", ":smile:"):
        assert part.replace(" ", "·" if ids else " ") in own


@pytest.mark.parametrize("ids", [False, True])
def test_a_page_gets_text_and_no_elements(ids):
    markup = evil_preview(ids=ids)._repr_html_()
    markup.encode()
    assert "<script" not in markup and "\x1b" not in markup and "\u202e" not in markup
    assert "&amp;amp;" in markup and html.escape("[bold]x[/bold]") in markup
    assert set(re.findall(r"</?([a-z]+)", markup)) <= {
        "div", "pre", "span", "details", "summary", "table", "tr", "td"
    }  # fmt: skip
    assert markup.count("<div") == markup.count("</div") and markup.count("<pre") == markup.count("</pre")


def test_ids_are_shown_when_asked_for(recipe_file):
    recipe = load_recipe(recipe_file)
    plain, with_ids = preview(recipe, n=1), preview(recipe, n=1, ids=True)
    (example,) = with_ids.examples
    expected = [
        (f"⟦{visible(token)}⟧" if piece.trained else visible(token)) + f" {number}"
        for piece in example.pieces
        for token, number in zip(piece.tokens, piece.ids, strict=True)
    ]
    assert shown(with_ids).splitlines()[1 : 1 + len(expected)] == expected
    assert "token ids" in with_ids._repr_html_() and "token ids" not in plain._repr_html_()
    assert str(plain) == str(with_ids)


def test_the_packing_is_that_of_the_first_step(recipe_file):
    recipe = load_recipe(recipe_file)
    report = check(recipe)
    places = [row.place for rows in report.preview.batches for row in rows]
    assert len(set(places)) == 5 and all(re.fullmatch(r".*train\.jsonl:\d+", place) for place in places)
    assert len(report.preview.batches) == report.schedule["micro_batches_of_the_first_step"]
    sizes = [sum(row.tokens for row in rows) for rows in report.preview.batches]
    text = shown(report.preview)
    assert "step 1: 5 examples, packed into" in text
    assert all(f"{size} of 256 tokens" in text for size in sizes) and all(place in text for place in places)


def test_many_micro_batches_and_rows_are_counted():
    text = shown(Preview((), tuple(tuple(Row(f"f:{row}", 1) for row in range(9)) for _ in range(6)), 16))
    assert text.count("and 1 more of 9 examples") == 4 and "and 2 more of 6 micro-batches" in text
    assert "micro-batch 5" not in text


def test_the_command_shows_as_many_examples_as_asked_and_writes_a_page(recipe_file, data_file, tmp_path):
    page = tmp_path / "page.html"
    told = CliRunner().invoke(app, ["check", str(recipe_file), "--show", "3", "--ids", "--html", str(page)])
    assert told.exit_code == 0, told.output
    titles = re.findall(r"^example (\d) · (\S+) · \d+ tokens, \d+ trained$", told.stdout, re.MULTILINE)
    assert titles == [(str(number), f"{data_file}:{number + 1}") for number in range(3)]
    assert f"note: the page is {page}" in told.stderr
    written = page.read_text()
    assert written.startswith("<!doctype html>") and "the recipe can start" in written
    assert written.count("<details>") == 3 and f"{data_file}:3" in written
    told = CliRunner().invoke(app, ["check", str(recipe_file), "--show", "0", "--html", str(tmp_path / "no" / "x")])
    assert told.exit_code == 2 and "not written: No such file or directory" in told.stderr


def test_the_report_shows_lengths_and_the_preflight(recipe_file, tmp_path):
    records = make_records(6)
    data = write_jsonl(tmp_path / "data.jsonl", [*records, records[1], *records[:3]])
    changes = [f"data.train={data}", f"data.validation={data}"]
    report = check(load_recipe(recipe_file, changes))
    assert sum(count for _, _, count in report.lengths) == 10
    for beginning in (
        f"{data}:7 (as {data}:2): the first of 4 training examples (40.0%)",
        f"{data}:1 (as {data}:1): the first of 10 validation examples (100.0%)",
    ):
        assert any(note.startswith(beginning) for note in report.notes), beginning
    text = shown(report)
    assert "tokens of an example:" in text and re.search(r"^ +\d+ to +\d+ #{40} +\d$", text, re.MULTILINE)
    told = CliRunner().invoke(app, ["check", str(recipe_file), "--set", f"data.train={data}",
                                    "--set", "preflight.duplicates=0.3", "--json"])  # fmt: skip
    assert told.exit_code == 2
    (problem,) = json.loads(told.stdout)["problems"]
    assert problem.endswith("(preflight.duplicates allows 0.3 of the examples)")


def test_characters_that_a_terminal_obeys_are_escaped():
    assert printable("a\tb\nc\x1b\u2067\ud83d\ude00") == "a\tb\nc\\x1b\\u2067\\ud83d\\ude00"
    assert printable("\U0001f600é") == "\U0001f600é"


def test_pieces_of_a_text_are_numbered(recipe_file, tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [{"text": "a"}, {"text": "b" * 9}])
    second = write_jsonl(tmp_path / "second.jsonl", [{"text": "c" * 9}])
    changes = [f"data.train=[{first}, {second}]", "data.overlong=split", "data.sequence_length=6"]
    report = check(load_recipe(recipe_file, changes), show=9)
    assert [example.place for example in report.preview.examples] == [
        f"{first}:1",
        *(f"{first}:2, piece {number} of 2" for number in (1, 2)),
        *(f"{second}:1, piece {number} of 2" for number in (1, 2)),
    ]


def test_an_example_keeps_its_line_where_records_before_it_are_left_out(recipe_file, tmp_path):
    """On a first preparation and from the cache."""
    long, records = "a" * 300, make_records(8)
    records[1]["messages"][0]["content"] = records[4]["messages"][0]["content"] = long
    data = write_jsonl(tmp_path / "data.jsonl", [*records, records[6]])
    changes = [f"data.train={data}", "data.overlong=drop", f"data.validation={data}"]
    for _ in range(2):
        report = check(load_recipe(recipe_file, changes), show=9)
        lines = [int(example.place.rpartition(":")[2]) for example in report.preview.examples]
        assert lines == [1, 3, 4, 6, 7, 8, 9]
        assert any(note.startswith(f"{data}:9 (as {data}:7): the only training example") for note in report.notes)
