"""A profile tells where a step's time goes, by our own parts, and changes no byte of the run."""

import json
import re
from time import perf_counter

import pytest
import torch
from runs import state_hash
from runs import train as run_command

from lora_kit.recipe.load import load_recipe
from lora_kit.training.loop import train
from lora_kit.training.profiling import LOOP, MODEL, OTHER, part, parts_of

ROW = re.compile(r"^(\w[\w ]*?) {2,}([\d,.]+) +([\d.]+)%$", re.M)


def rows_of(text):
    return {name: (float(ms.replace(",", "")), float(share)) for name, ms, share in ROW.findall(text)}


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_the_parts_add_up_and_the_bytes_are_the_same(recipe_file, tmp_path, reference, kernels, capsys):
    changes = [] if kernels == "auto" else [f"train.kernels={kernels}"]
    train(load_recipe(recipe_file, changes), tmp_path / "seen", profile=True)
    assert state_hash(reference(recipe_file, *changes), 8) == state_hash(tmp_path / "seen", 8)
    text = (tmp_path / "seen" / "profile" / "table.txt").read_text()
    assert text.startswith("steps 3 to 5 of process 0 of 1, on cpu: ")
    printed = capsys.readouterr()
    assert text.splitlines()[3] in printed.out + printed.err
    rows = rows_of(text)
    assert list(rows) == [*MODEL, *LOOP, OTHER]
    assert sum(share for _, share in rows.values()) == pytest.approx(100, abs=1)
    at_least = {name: rows[name][0] for name in MODEL + LOOP if name != "reduction"}
    assert all(ms > 0 for ms in at_least.values()), at_least
    whole = float(re.search(r": ([\d,.]+) ms a step", text)[1].replace(",", ""))
    assert sum(ms for ms, _ in rows.values()) == pytest.approx(whole, rel=0.02)
    names = {
        event.get("name") for event in json.loads((tmp_path / "seen/profile/trace.json").read_text())["traceEvents"]
    }
    assert {"part: step", "part: attention", "part: optimizer", "part: data"} <= names


def test_backward_operations_are_counted_for_the_part_of_their_forward_operation(recipe_file, tmp_path, jobs):
    """Backward takes about twice the time of forward, so little of it may be left without a part."""
    train(load_recipe(recipe_file), tmp_path / "run", profile=True)
    rows = rows_of((tmp_path / "run" / "profile" / "table.txt").read_text())
    assert rows["rest of backward"][1] < sum(rows[name][1] for name in MODEL) / 2
    parts = [name for _, name in parts_of(jobs[0].model)]
    assert parts.count("attention") == parts.count("MLP") == 2 and parts.count("norm") == 5
    assert parts.count("adapters and linear layers") == 8 and parts.count("loss") == 1
    assert not any(module._forward_hooks for module in jobs[0].model.modules())


def test_the_command_profiles_the_start_that_it_makes(recipe_file, tmp_path):
    run_command(recipe_file, tmp_path / "run", "--set", "train.steps=2")
    more = ("--set", "train.steps=4", "--accept", "train.steps", "--profile")
    printed = run_command(recipe_file, tmp_path / "run", *more, processes=2)
    assert "steps 3 to 4 of process 0 of 2" in printed and "adapters and linear layers" in printed
    assert "ui.perfetto.dev" in printed and rows_of(printed)["reduction"][0] > 0
    again = run_command(recipe_file, tmp_path / "run", *more)
    assert "nothing is left to do" in again and "ms a step" not in again


@pytest.mark.quick
def test_a_part_costs_nothing_while_nothing_is_profiled():
    assert part("data", perf_counter) is perf_counter
    with torch.profiler.profile() as profiler:
        part("data", perf_counter)()
    assert "part: data" in {event.name for event in profiler.events()}
