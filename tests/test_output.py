"""Printing never ends a run: a closed pipe, a full disk, closed descriptors, an encoding that lacks a character."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENVIRONMENT, WAIT_SECONDS, run_code, state_hash, train
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.views.console import Console, grouped, print_error, printable
from lora_kit.views.output import SafeStream

COMMANDS = [
    ["check", "{}"],
    ["check", "{}", "--offline", "--shapes", "{}"],
    ["train", "{}", "--out", "run"],
    ["status", "{}"],
    ["verify", "{}"],
    ["generate", "{}", "hello"],
    ["chat", "{}"],
    ["merge", "{}", "--out", "merged"],
    ["eval", "{}", "{}"],
    ["push", "{}", "--to", "user/name"],
]


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise OSError(28, "No space left on device")


def sent(command, environment=None):
    """Run a command and return what became of it."""
    together = ENVIRONMENT | (environment or {})
    return subprocess.run(command, env=together, capture_output=True, text=True, timeout=WAIT_SECONDS)


@pytest.mark.quick
def test_a_console_whose_stream_fails_raises_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    console = Console(silent=False)
    console.say("a line")
    console.warn("a warning")
    console.table("title", [("name", "value")])
    console.tick("load")
    console.begin(3, 0)
    console.step({"step": 1, "loss": 1.0, "tokens_per_second": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}, 3)
    console.end()
    monkeypatch.setattr(sys, "stderr", Broken())
    print_error("two\nlines")


@pytest.mark.quick
def test_counting_tells_the_time_that_is_left_and_nothing_of_short_work(monkeypatch, capsys):
    from lora_kit.views import console as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console(silent=False)
    for done in range(0, 101, 10):
        console.count("data", done, 1000)
        now[0] += 3
    console.count("data", 1000, 1000)
    assert capsys.readouterr().out.splitlines() == [
        "data 20/1,000, 294 s left",
        "data 40/1,000, 288 s left",
        "data 60/1,000, 282 s left",
        "data 80/1,000, 276 s left",
        "data 100/1,000, 270 s left",
    ]
    for done in (0, 50, 100):
        now[0] += 1
        console.count("short", done, 100)
    console.end()
    assert not capsys.readouterr().out


def test_a_closed_stream_and_a_character_that_it_lacks_raise_nothing():
    closed = io.StringIO()
    closed.close()
    SafeStream(closed).write("text")
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding="ascii"))
    assert stream.write("│é") == 2 and stream.encoding == "ascii"
    stream.flush()
    assert raw.getvalue() == rb"\u2502\xe9"


# the command with another stdout; stderr is that of the test
INTO = """
import os, sys
place, tests = sys.argv[1:3]
sys.path.insert(0, tests)
from fork_server import fork_the_zygote
from lora_kit.cli import app
if place == "head -n 1":
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    os.dup2(writing, 1)
elif place == "ascii":
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="ascii", closefd=False)
else:
    os.dup2(os.open(place, os.O_WRONLY), 1)
fork_the_zygote()
app(["train", *sys.argv[3:]])
"""


def train_into(place, recipe, out):
    """Train with stdout in a place; return what was printed to stderr, and to stdout if the test can read that."""
    return run_code(INTO, place, Path(__file__).parent, recipe, "--out", out)


@pytest.mark.parametrize("place", ["head -n 1", "/dev/full"])
def test_a_run_ends_well_wherever_its_output_goes(recipe_file, tmp_path, reference, place):
    told = train_into(place, recipe_file, tmp_path / "run")
    assert "Traceback" not in told and "BrokenPipe" not in told
    assert state_hash(tmp_path / "run", 8) == state_hash(reference(recipe_file), 8)


def test_a_run_that_starts_with_closed_descriptors_ends_well(recipe_file, tmp_path, reference):
    command = f"{sys.executable} -m lora_kit train {recipe_file} --out {tmp_path / 'run'} <&- >&- 2>&-"
    assert sent(["bash", "-c", command]).returncode == 0
    assert state_hash(tmp_path / "run", 8) == state_hash(reference(recipe_file), 8)


def test_a_finished_run_shows_its_table_in_ascii(recipe_file, copied):
    told = train_into("ascii", recipe_file, copied(recipe_file))
    assert "lora-kit status" in told and told.isascii()


@pytest.mark.quick
def test_a_table_shows_markup_emoji_and_control_characters_literally(capsys):
    Console(silent=False).table("[bold]x[/bold]", [("[red]a", ":cat: \x1b[31m[/b]")])
    Console(silent=False).say("[bold]y[/bold] :cat: \x1b[2J")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[bold]x[/bold]", "[red]a", ":cat: \\x1b[31m[/b]", "[bold]y[/bold] :cat: "))
    assert "\x1b" not in shown and printable("a\tb\n") == "a\tb\n"


@pytest.mark.quick
def test_a_terminal_gets_whole_words_and_a_file_whole_lines(monkeypatch, capsys):
    text = "several words that are longer than the forty columns of this narrow terminal"
    Console(silent=False).say(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setenv("COLUMNS", "40")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    Console(silent=False).say(text)
    lines = re.sub(r"\r|\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()
    assert len(lines) == 2 and " ".join(line.strip() for line in lines) == text
    assert terminal.getvalue().startswith("\r\x1b[2K"), "the bar of another process may be on this line"


@pytest.mark.quick
def test_many_lines_of_one_kind_are_grouped():
    lines = [f"data.jsonl:{number}: role 'bot{number}' is unknown" for number in range(252)]
    other = "train.steps: missing"
    shown = grouped([*lines[:100], other, *lines[100:]])
    assert shown == [*lines[:3], "... and 249 more like these 3", other]
    assert grouped(lines[:4]) == lines[:4]


def test_what_stands_on_closed_descriptors_is_not_overwritten(tmp_path):
    """A file that is opened where stdout was closed would get its number, and everything that is printed."""
    code = "from lora_kit.views.output import make_output_safe; import os, sys; make_output_safe()\n"
    code += f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'printed'); print('more')\n"
    code += "sys.stdout.flush(); file.write(str(file.fileno() > 2)); file.close()"
    ended = sent(["bash", "-c", f'{sys.executable} -c "$CODE" <&- >&- 2>&-'], {"CODE": code})
    assert ended.returncode == 0 and (tmp_path / "file").read_text() == "True"
    assert os.fstat(1)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("path", ["x" * 3000, "y/" * 1500 + "z" * 300, "a\nb", "[bold]x[/bold]"], ids=len)
def test_a_path_that_cannot_be_used_is_an_error_and_no_traceback(arguments, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, [argument.format(path) for argument in arguments])
    assert told.exit_code in (1, 2) and isinstance(told.exception, SystemExit), told.exception
    assert told.stderr.splitlines()[-1 - path.count("\n") :], told.stderr


@pytest.mark.slow
def test_a_home_and_caches_that_cannot_be_written_end_no_run(recipe_file, tmp_path, reference):
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "below")  # root could write to a folder without permissions
    caches = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LORA_KIT_CACHE", "HF_HOME"), nowhere)
    printed = train(recipe_file, tmp_path / "run", environment=caches)
    assert "hashes of large files are not remembered" in printed and "Traceback" not in printed
    assert state_hash(tmp_path / "run", 8) == state_hash(reference(recipe_file), 8)
