"""Every verb teaches in its help, answers a script in JSON, and ends with the code that it promises."""

import json
import shutil
import subprocess
import sys
import tempfile

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit import cli
from lora_kit.cli import app
from lora_kit.runs import resume
from lora_kit.runs.manifest import manifest_bytes
from lora_kit.supervise import zygote

VERBS = ("train", "check", "drill", "status", "verify", "generate", "eval", "push")


@pytest.fixture
def run(recipe_file, tmp_path):
    return lk.train(lk.load_recipe(recipe_file), tmp_path / "run")


def ask(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def test_help_names_every_verb_and_each_verb_has_help():
    told = ask("--help")
    assert all(verb in told for verb in VERBS)
    assert all(len(ask(verb, "--help")) > 200 for verb in VERBS)


def test_no_arguments_show_the_help_and_a_wrong_verb_is_an_error():
    assert "Usage" in CliRunner().invoke(app, []).output
    assert CliRunner().invoke(app, ["trian"]).exit_code == 2


@pytest.mark.quick
def test_the_version_is_shown():
    assert ask("--version") == f"lora_kit {lk.__version__}\n"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_an_import_says_on_which_system_it_was_made_to_run(platform):
    code = f"import sys, logging, warnings; sys.platform = {platform!r}; import lora_kit"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert ("is made for Linux" in said) == (platform != "linux")


def test_a_name_that_is_no_folder_is_told_before_the_hub_is_asked(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "mybase").mkdir()
    monkeypatch.setattr(zygote.Zygote, "__init__", lambda self: None)
    monkeypatch.setattr(zygote.Zygote, "end", lambda self: None)
    monkeypatch.setattr(resume, "take_over", lambda *arguments, **options: None)
    arguments = ["train", str(recipe_file), "--out", str(tmp_path / "run"), "--set"]
    told = CliRunner().invoke(app, [*arguments, "base.repo=mybas"]).stdout
    assert told.splitlines() == [
        f"lora_kit {lk.__version__}: {recipe_file} is trained in {tmp_path / 'run'}",
        "base mybas: no such folder here, so it is looked up on the Hub; did you mean mybase?",
    ]
    refused = CliRunner().invoke(app, [*arguments, "base.repo=./mybas"])
    assert refused.exit_code == 2 and "does not exist; did you mean mybase?" in refused.stderr


def test_where_no_temporary_folder_can_be_written_it_says_what_to_set(monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    result = CliRunner().invoke(app, ["check", "recipe.yaml"])
    assert result.exit_code == 2 and "mount one at /tmp (in Docker --tmpfs /tmp" in result.stderr
    assert "or set TMPDIR" in result.stderr


def test_status_shows_how_far_a_run_is(run):
    told = json.loads(ask("status", run.folder, "--json"))
    assert (told["state"], told["step"], told["steps"], told["starts"]) == ("finished", 8, 8, 1)
    assert (told["durable"]["step"], told["live"], told["interruptions"]) == (8, None, [])
    assert [entry["step"] for entry in told["checkpoints"]] == [8, 6, 3]
    assert all(entry["valid"] and entry["bytes"] > 0 for entry in told["checkpoints"])
    assert "step-00000008" in ask("status", run.folder)


def test_status_and_verify_name_a_damaged_checkpoint_and_move_nothing(run):
    damaged = run.latest / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    told = json.loads(ask("status", run.folder, "--json"))["checkpoints"]
    assert [entry["valid"] for entry in told] == [False, True, True]
    assert "BROKEN" in ask("verify", run.folder, code=1)
    assert ask("verify", run.folder / "checkpoints" / "step-00000006") == "step-00000006: valid\n"
    assert damaged.exists()


def test_status_of_something_else_says_so(tmp_path):
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert result.exit_code == 2 and "not a run's folder" in result.stderr


def test_generate_without_a_checkpoint_says_what_to_do(tmp_path):
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "hello"])
    assert result.exit_code == 1 and "train first" in result.stderr


def test_eval_prints_a_table(recipe_file, run):
    told = ask("eval", recipe_file, run.folder, "--set", "data.validation=0.2")
    assert "base" in told and "adapter" in told and "perplexity" in told


@pytest.mark.quick
def test_the_module_is_the_command(recipe_file):
    done = subprocess.run([sys.executable, "-m", "lora_kit", "--help"], capture_output=True, text=True, check=True)
    assert "lora-kit" in done.stdout


def test_every_argument_and_option_of_every_command_has_help():
    for name, command in get_command(app).commands.items():
        without = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
        assert command.help and not without, f"{name}: {without}"


@pytest.mark.parametrize(("quantization", "kept"), [("none", False), ("nf4", True)])
def test_bitsandbytes_is_imported_only_for_a_checkpoint_that_needs_it(
    quantization, kept, trained_run, tmp_path, monkeypatch
):
    checkpoint = shutil.copytree(lk.Run(trained_run).latest, tmp_path / "checkpoint")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["recipe"]["base"]["quantization"] = quantization
    (checkpoint / "manifest.json").write_bytes(manifest_bytes(manifest))
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", "here")
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    with cli.imports("loading", str(checkpoint)) as path:
        assert path == checkpoint and ("bitsandbytes" not in sys.modules) == kept
    with cli.imports("loading", str(trained_run)):
        assert "bitsandbytes" in sys.modules


def test_a_process_that_has_imported_peft_is_left_as_it_is(trained_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", sys)
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    with cli.imports("loading", str(trained_run)):
        assert sys.modules["bitsandbytes"] is sys


FIRST_LINE = """
import builtins, sys
import_module = builtins.__import__

def light(name, *rest, **named):
    if name.partition(".")[0] in ("torch", "numpy", "yaml", "huggingface_hub", "jinja2", "psutil"):
        sys.exit(9)
    return import_module(name, *rest, **named)

builtins.__import__ = light
from lora_kit.cli import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "r.yaml", "--out", "run"], "r.yaml is trained in run"),
        (["generate", "run", "hello"], "loading run ..."),
        (["merge", "run", "--out", "merged"], "merging run ..."),
        (["eval", "r.yaml", "run"], "evaluating run ..."),
    ],
)
def test_the_first_line_comes_before_anything_slow_is_imported(arguments, line, tmp_path):
    command = [sys.executable, "-c", FIRST_LINE, *arguments]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 9, "something slow is imported"
    assert said.stdout + said.stderr == f"lora_kit {lk.__version__}: {line}\n"


def test_a_current_folder_that_was_deleted_is_told(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; {sys.executable} -m lora_kit status run"
    said = subprocess.run(["bash", "-c", command], cwd=gone, capture_output=True, text=True, check=False)
    assert said.returncode == 2 and said.stderr == (
        "error: the current folder: No such file or directory; change to another folder\n"
    )
