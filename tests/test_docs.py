"""What the documentation says is true: commands run as typed, links lead somewhere, figures are those measured."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_loop import program_of
from runs import ENVIRONMENT, WAIT_SECONDS
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.data.formats import FORMATS
from lora_kit.data.packing import collate
from lora_kit.data.rendering import TEXT_CHARACTERS
from lora_kit.data.sandbox import MEMORY_BYTES, SECONDS
from lora_kit.data.tokens import Tokens
from lora_kit.errors import DataError
from lora_kit.recipe.load import load_recipe
from lora_kit.training.objectives.sft import Sft

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
GATED = "meta-llama/"  # a block with this name needs a base that has to be asked for
SHORT = ("steps: 50", "steps: 3")
RESULTS = ROOT / "benchmarks" / "results"
RELIABILITY = ROOT / "docs" / "reliability.md"


def blocks_of(page, *languages):
    """Return the fenced blocks of a page in these languages as (language, text)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [(language, text) for language, text in found if language in languages]


def calls_of(script, folder):
    """Run a shell script in a folder with `lora-kit` and `python` replaced; return the arguments of their calls."""
    record = 'record() { for one; do printf "%s\\0" "$one"; done; printf "\\n"; }\n'
    replaced = 'lora-kit() { record lora-kit "$@"; }\npython() { record python "$@"; }\n'
    ended = subprocess.run(
        ["bash", "-euc", record + replaced + script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_SECONDS,
    )
    return [call.split("\0")[:-1] for call in ended.stdout.splitlines()]


def without_numbers(line):
    """Return a line of output with its numbers and units replaced, and blanks collapsed."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]+(e[+-]\d+)?( [kMG]?B\b)?", "#", line)).strip()


@pytest.mark.slow
def test_the_blocks_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher does: this process trains
    monkeypatch.chdir(tmp_path)
    printed = []
    for language, text in blocks_of(README, "sh", "python"):
        text = text.replace(*SHORT)
        if GATED in text:
            compile(text, README, "exec")
            continue
        calls = calls_of(text, tmp_path) if language == "sh" else [["python", "-c", text]]
        for program, *arguments in calls:
            if program == "lora-kit":
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, (arguments, result.output, result.exception)
                printed.append(result.output)
            else:
                assert arguments[0] == "-c"
                exec(arguments[1], {})
                printed.append(capsys.readouterr().out)
    assert len(printed) == 6
    shown = [line for _, text in blocks_of(README, "text") for line in text.splitlines() if "[...]" not in line]
    screens = [line for line in shown if not re.match(r" |runs/first/$", line)]
    lines = {without_numbers(line) for text in printed for line in text.splitlines()}
    assert len(screens) > 8 and not [line for line in screens if without_numbers(line) not in lines]
    assert "the recipe can start" in printed[0] and "runs/first: 3 steps done" in printed[1]
    assert (tmp_path / "runs" / "first" / "checkpoints" / "step-00000003").is_dir()
    assert "merged in float32" in printed[4] and int(printed[5]) > 800_000


def test_the_folder_in_the_readme_is_that_of_a_run(trained_run):
    shown = next(text for _, text in blocks_of(README, "text") if text.startswith("runs/first/\n"))
    names = set(re.findall(r"[\w.]+\.(?:yaml|jsonl|json|safetensors)", shown))
    present = {path.name for path in trained_run.rglob("*") if path.is_file()} - {"lease.json"}
    assert names == present


def test_the_page_on_checkpoints_names_every_key_of_a_manifest(trained_run):
    section = (ROOT / "docs" / "checkpoint-format.md").read_text().split("\n## manifest.json\n")[1].split("\n## ")[0]
    named = {key for row in re.findall(r"^\| (`.*?) \|", section, re.M) for key in re.findall(r"`(\w+)`", row)}
    manifest = json.loads(next(trained_run.rglob("manifest.json")).read_text())
    assert named == manifest.keys()
    (resolved,) = re.findall(r"^\| `resolved` \|(.*)$", section, re.M)
    assert manifest["resolved"].keys() <= set(re.findall(r"`(\w+)`", resolved))


@pytest.mark.slow
def test_an_installed_wheel_trains_the_first_run_of_the_readme_outside_a_checkout(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "lora_kit", source / "lora_kit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True, timeout=WAIT_SECONDS
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", site, wheel], check=True, timeout=WAIT_SECONDS
    )
    installed = {path.relative_to(site) for path in (site / "lora_kit").rglob("*") if path.is_file()}
    assert installed == {path.relative_to(source) for path in (source / "lora_kit").rglob("*") if path.is_file()}
    _, script = blocks_of(README, "sh")[0]
    (tmp_path / "elsewhere").mkdir()
    train = calls_of(script.replace(*SHORT), tmp_path / "elsewhere")[1]
    assert train[1] == "train"
    code = f"import lora_kit; assert lora_kit.__file__.startswith({str(site)!r}); from lora_kit.cli import app; app()"
    ended = subprocess.run(
        [sys.executable, "-c", code, *train[1:]],
        cwd=tmp_path / "elsewhere",
        env=ENVIRONMENT | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )
    assert ended.returncode == 0 and "runs/first: 3 steps done" in ended.stdout, ended.stdout + ended.stderr


def test_the_readme_has_a_record_of_every_format_and_it_is_detected(tmp_path):
    section = README.read_text().split("\n## Data\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\w-]+) \| `(\{.*?\})` \|", section, re.M))
    assert rows.keys() == FORMATS.keys()
    for name, record in rows.items():
        (tmp_path / "train.jsonl").write_text(record + "\n")
        recipe = "base: {repo: builtin:base}\ndata: {train: train.jsonl}\ntrain: {steps: 1}\n"
        recipe += f"objective: {{kind: {FORMATS[name].kinds[-1]}}}\n"
        (tmp_path / "recipe.yaml").write_text(recipe)
        result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml"), "--json"])
        report = json.loads(result.output)
        assert result.exit_code == 0 and report["data"]["train"]["format"] == name
        assert "⟦" in report["preview"] and "4<|end|>⟧" in report["preview"].replace('"', "")


@pytest.mark.quick
def test_every_recipe_on_a_page_is_valid(tmp_path):
    found = [(page, text) for page in PAGES for _, text in blocks_of(page, "yaml") if "\ntrain:" in text]
    found += [(README, blocks_of(README, "sh")[0][1].split("<<'END'\n")[1].split("END\n")[0])]
    for page, text in found:
        (tmp_path / "recipe.yaml").write_text(text)
        assert load_recipe(tmp_path / "recipe.yaml"), page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    def anchors(path):
        heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}

    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)):
        name, _, anchor = target.partition("#")
        if name.startswith("http"):
            continue
        path = page.parent / name if name else page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_of_the_package_that_a_page_names_exist(page):
    rooms = "|".join(path.name for path in (ROOT / "lora_kit").iterdir() if path.is_dir())
    for name in re.findall(rf"`((?:{rooms}|benchmarks|tests)/[\w/.-]*)`", page.read_text()):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "lora_kit")), f"{page}: {name}"


def test_python_on_every_page_compiles():
    for page in PAGES:
        compile(program_of(page), page, "exec")


def test_the_sketches_on_extending_work(base_folder):
    blocks = [text for _, text in blocks_of(ROOT / "docs" / "extending.md", "python")]
    sketches = {}
    for text in blocks:
        exec(text, sketches)
    tokens = Tokens.of([(np.arange(5, 25), np.arange(20) > 8), (np.arange(30, 42), np.arange(12) > 3)])
    batch, model = collate(tokens, [0, 1], padded=False), AutoModelForCausalLM.from_pretrained(base_folder)
    objective = sketches["SftWithAccuracy"]()
    total, weight, (right,) = objective.loss(model, batch, torch.device("cpu"))
    expected = Sft().loss(model, batch, torch.device("cpu"))
    torch.testing.assert_close(total, expected.total)
    assert weight == expected.weight == objective.weight(tokens, [0, 1]) and 0 <= right <= weight
    example = sketches["from_question_answer"]({"question": "2 + 2?", "answer": "4"})
    assert [message["content"] for message in example.messages] == ["2 + 2?", "4"] and example.answers == [1]
    with pytest.raises(DataError, match="answer"):
        sketches["from_question_answer"]({"question": "2 + 2?", "answer": None})


def test_the_readme_says_which_base_fits_on_which_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from memory_table import table

    assert table() in README.read_text(), "run python benchmarks/memory_table.py"


def test_the_shapes_beside_the_tests_have_the_published_numbers_of_parameters():
    from lora_kit.model.sizes import read_config

    published = {"3.2-1B": 1_235_814_400, "3.2-3B": 3_212_749_824, "3.1-8B": 8_030_261_248, "3.1-70B": 70_553_706_496}
    for name, parameters in published.items():
        shape = read_config(ROOT / "tests" / "shapes" / f"meta-llama--Llama-{name}-Instruct.json")
        assert shape.parameters == parameters


def rows_of(name, **wanted):
    rows = json.loads((RESULTS / name).read_text())
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_the_figures_of_speed_are_those_that_were_measured():
    readme, peak = README.read_text(), 989e12
    for system in ("lora_kit", "trainer"):
        row = max(rows_of("gpu_h200.json", system=system, size="llama-8b"), key=lambda row: row["tokens_per_second"])
        utilisation = row["model_flops_share"] * row["flops_per_second"] / peak
        figures = f"{row['tokens_per_second']:,.0f} | {row['floor_share']:.0%} | {utilisation:.0%} | "
        assert figures + f"{row['peak_bytes'] / 1e9:.1f} GB |" in readme
    for system, settings in (("lora_kit", "default"), ("trainer", "best"), ("trl", "best")):
        speeds = []
        for size in ("30m", "160m", "1.2b"):
            rows = rows_of(f"throughput_{size}.json", system=system, settings=settings)
            speeds.append(sum(row["tokens_per_second"] for row in rows) / len(rows) if rows else None)
        assert "| " + " | ".join(f"{speed:,.0f}" for speed in speeds if speed) + " |" in readme


def test_the_figures_of_preference_tuning_are_those_that_were_measured():
    page, best = (ROOT / "docs" / "performance.md").read_text(), []
    for size in ("30m", "160m"):
        rows = [row for row in rows_of("preferences.json") if row["machine"]["size"] == size]
        ours = next(row for row in rows if row["system"] == "lora_kit")
        peers = [row["pairs_per_second"] for row in rows if row["system"] != "lora_kit"]
        best.append(f"{ours['pairs_per_second'] / max(peers):.2f}")
        assert f"{ours['pairs_per_second']:.2f}" in page and all(f"{speed:.2f}" in page for speed in peers)
    assert f"lora_kit is {' and '.join(best)} times as fast as the best setting of TRL" in page


def test_every_test_that_a_page_names_exists():
    files = list((ROOT / "tests").rglob("test_*.py"))
    text = "\n".join(path.read_text() for path in files)
    known = {*re.findall(r"^def (test_\w+)\(", text, re.M), *(path.stem for path in files)}
    for page in PAGES:
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert not named - known, page
    assert len(set(re.findall(r"`(test_\w+)`", RELIABILITY.read_text()))) > 50


def test_every_statement_about_security_names_its_test():
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "security.md").read_text(), re.M)
    statements = [row for row in rows if not re.match(r"---|it cannot|they cannot|promise", row)]
    assert len(statements) > 15 and not [row for row in statements if not re.search(r"`test_\w+`", row)]


def test_the_page_on_security_names_the_limits_of_a_template():
    page = (ROOT / "docs" / "security.md").read_text()
    limits = (f"{SECONDS} s of processor time", f"{MEMORY_BYTES >> 30} GB of memory", f"{TEXT_CHARACTERS:,} characters")
    assert all(limit in page for limit in limits)


def test_the_page_on_reliability_quotes_what_was_measured():
    found = json.loads((RESULTS / "resilience.json").read_text())["measures"]
    kills, stall, sizes = found["kills"], found["stall"], [found["resume_time"][size] for size in ("30M", "160M")]
    own, restart = kills["ours"], found["restart"]
    resumed = own["kills"] - own["resumes_that_failed"]
    waits = [wait["median"] for wait in found["hosts"]["kills"]["seconds"].values()]
    quoted = [
        f"{resumed} of {own['kills']} resumes, {own['finished_steps_lost']} finished steps lost",
        f"{kills['trainer']['resumes_that_failed']} of {kills['trainer']['kills']} resumes fail",
        f"{restart['ours']['final_bytes_equal']} of {restart['ours']['trials']} continue by themselves",
        f"{restart['trainer']['went_on_by_themselves']} of {restart['trainer']['trials']} continue",
        " and ".join(f"{size['ours_seconds']} s" for size in sizes),
        " and ".join(f"{size['trainer_seconds']} s" for size in sizes),
        f"{stall['ours_stall_share']:.3%} of the step; the whole step x {stall['ours_step_with_over_without']:.3f}",
        f"durable and exited in {found['sigterm']['ours_median_seconds']} s",
        f"{found['damage']['ours']['final_bytes_equal']} of {found['damage']['ours']['trials']} noticed",
        found["crash_states"]["said"],
        found["writer_kills"]["said"],
        found["mutated_files"]["said"],
        f"{found['pairs']['ran']} pairs: {found['pairs']['two_writers']} with two writers, "
        f"{found['pairs']['finished_steps_lost']} finished steps lost, "
        f"{found['pairs']['finished_steps_repeated']} repeated",
        f"{found['hosts']['kills']['went_on_by_themselves']} of {found['hosts']['kills']['asked']} kills of a host",
        " to ".join(f"{seconds} s" for seconds in (min(waits), max(waits))),
        f"{found['hosts']['cuts']['went_on_by_themselves']} of {found['hosts']['cuts']['asked']} cuts",
    ]
    page = RELIABILITY.read_text()
    assert all(measure["reached"] for measure in found.values()) and not [text for text in quoted if text not in page]


@pytest.mark.parametrize("name", ["variants", "estimate"])
def test_the_tables_of_measurements_are_those_of_the_benchmarks(name, monkeypatch):
    for folder in ("", "resilience", "speed"):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / folder))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    assert benchmark.markdown(rows) in (ROOT / "docs" / f"{name}.md").read_text()
