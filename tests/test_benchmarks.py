"""The benchmark of throughput runs, and its systems train the same thing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import WAIT_SECONDS

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "throughput.py"


@pytest.mark.slow
def test_systems_have_the_same_losses_and_are_told_apart_by_speed_and_memory(tmp_path):
    rows_file = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(BENCHMARK),
        "--size",
        "tiny",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--json",
        str(rows_file),
    ]
    command += ["--only", "lora_kit", "trainer", "--settings", "default", "--anyway"]
    ended = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=WAIT_SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ours, theirs = json.loads(rows_file.read_text())
    assert [ours["system"], theirs["system"]] == ["lora_kit", "trainer"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-2)
    assert ours["tokens"] == theirs["tokens"]
    for row in (ours, theirs):
        assert row["peak_bytes"] > 0 and 0 < row["supervised_tokens_per_second"] < row["tokens_per_second"]
        assert row["floor_share"] > 0 and row["round"] == 1 and row["machine"]["torch"]
    assert "the best peer, trainer default" in ended.stdout


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
    command = [sys.executable, str(BENCHMARK.with_name("preferences.py")), "--size", "tiny", "--steps", "1"]
    command += ["--only", "lora_kit", "trl-best", "--json", str(tmp_path / "rows.json")]
    ended = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=WAIT_SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ours, theirs = json.loads((tmp_path / "rows.json").read_text())
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-2) and len(ours["step_seconds"]) == 2
    assert all(row["peak_bytes"] > 0 and row["reference_seconds"] > 0 for row in (ours, theirs))
    assert "times as fast" in ended.stdout
