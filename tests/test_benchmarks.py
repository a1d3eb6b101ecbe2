"""The benchmark of throughput runs, and its systems train the same thing."""

import json
import sys
from pathlib import Path

import pytest
from runs import run_code

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "throughput.py"
FORKING = """
import subprocess, sys
from runpy import run_path
tests, *sys.argv = sys.argv[1:]
sys.path.append(tests)
from runs import started

SCRIPT = "import sys; from runpy import run_path; del sys.argv[0]; run_path(sys.argv[0], run_name='__main__')"

def forked(command, *, env, stdout, stderr, check):
    # everything is imported, so the checkout need not be found
    environment = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    process = started(command[1:], environment, code=SCRIPT)
    stdout.write(process.communicate()[0])
    return subprocess.CompletedProcess(command, process.returncode)

subprocess.run = forked
run_path(sys.argv[0], run_name="__main__")
"""


def run_benchmark(path, *options):
    """Run a benchmark whose measuring processes are forked, not started; return what it printed."""
    return run_code(FORKING, Path(__file__).parent, path, *options)


@pytest.mark.slow
def test_systems_have_the_same_losses_and_are_told_apart_by_speed_and_memory(tmp_path):
    rows_file = tmp_path / "rows.json"
    options = ["--size", "tiny", "--steps", "2", "--rounds", "1", "--json", rows_file]
    options += ["--only", "lora_kit", "trainer", "--settings", "default", "--anyway"]
    printed = run_benchmark(BENCHMARK, *options)
    ours, theirs = json.loads(rows_file.read_text())
    assert [ours["system"], theirs["system"]] == ["lora_kit", "trainer"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-2)
    assert ours["tokens"] == theirs["tokens"]
    for row in (ours, theirs):
        assert row["peak_bytes"] > 0 and 0 < row["supervised_tokens_per_second"] < row["tokens_per_second"]
        assert row["floor_share"] > 0 and row["round"] == 1 and row["machine"]["torch"]
    assert "the best peer, trainer default" in printed


def test_rows_that_trained_something_else_are_named(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the benchmark adds to it
    from throughput import differences

    def row(name, *losses, own_order=False):
        mean = sum(losses) / len(losses)
        options = {"own_order": own_order}
        return {"system": name, "settings": "x", "losses": losses, "mean_loss": mean, "options": options}

    first, near = row("ours", 10.0, 8.0), row("near", 10.009, 8.007)
    shuffled = row("shuffled", 8.0, 10.04, own_order=True)
    assert differences([first, near, shuffled]) == []
    apart, none = row("apart", 10.0, 8.01), row("none", 10.0, float("nan"))
    assert [one.split(" did")[0] for one in differences([first, apart, near, none])] == ["apart x", "none x"]


def test_a_row_of_variants_replaces_the_old_one_and_the_best_rate_has_the_lowest_mean_loss(tmp_path, monkeypatch):
    for folder in ("", "resilience"):
        monkeypatch.syspath_prepend(str(BENCHMARK.parent / folder))
    import variants

    file = tmp_path / "rows.json"
    losses = {(1e-3, 0): 5.0, (1e-3, 1): 5.0, (3e-3, 0): 3.0, (3e-3, 1): 4.0, (6e-3, 0): 1.0, (6e-3, 1): 7.0}
    for (rate, seed), loss in [((3e-3, 0), 9.0), *losses.items()]:
        row = {"variant": "lora", "learning_rate": rate, "seed": seed, "loss": loss, "exact_match": 0.5}
        variants.write(file, row | {"tokens_per_second": 10.0}, steps=2)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6 and [row["loss"] for row in rows] == [*losses.values()]
    found = variants.best(rows)["lora"]
    assert (found["learning_rate"], found["loss"], found["spread"], found["seeds"]) == (3e-3, 3.5, 1.0, 2)
    assert variants.markdown(rows).splitlines()[2] == "| lora | 0.003 | 3.5000 | 1.0000 | 50.0% | 2 |"


@pytest.mark.slow
def test_the_benchmark_of_preferences_trains_the_same_pairs_with_both_systems(tmp_path):
    pytest.importorskip("trl", reason="`pip install 'lora_kit[dev]'` installs TRL")
    options = ["--size", "tiny", "--steps", "1", "--only", "lora_kit", "trl-best", "--json", tmp_path / "rows.json"]
    printed = run_benchmark(BENCHMARK.with_name("preferences.py"), *options)
    ours, theirs = json.loads((tmp_path / "rows.json").read_text())
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-2) and len(ours["step_seconds"]) == 2
    assert all(row["peak_bytes"] > 0 and row["reference_seconds"] > 0 for row in (ours, theirs))
    assert "times as fast" in printed
