"""A claim to the bit is for what computed the run: another compiler, processor or limit of instructions ends it."""

import shutil
import socket
from dataclasses import replace

import pytest
import torch
from conftest import need_c
from manifests import run_facts
from runs import go_on, started, state_hash, train

from lora_kit.errors import LaunchError
from lora_kit.kernels import fusing
from lora_kit.kernels.identity import identity
from lora_kit.recipe.load import load_recipe
from lora_kit.runs.manifest import MANIFEST, Environment, Machine, read_manifest
from lora_kit.runs.resume import contract, still_bitwise
from lora_kit.runs.store import checkpoint_folder
from lora_kit.training.processes import Processes

STEPS, HALF = 8, 4
OFTEN = f"checkpoint.every_steps={HALF}"


def facts_of(run, step=STEPS):
    return read_manifest(checkpoint_folder(run, step) / MANIFEST).run


@pytest.fixture
def begun(recipe_file, tmp_path, reference):
    """Train a run to its end, and return a function that resumes a copy of it from the middle."""

    def begin(*changes, environment=None):
        options = [part for change in (OFTEN, *changes) for part in ("--set", change)]
        whole = tmp_path / "whole"
        if environment:
            train(recipe_file, whole, *options, environment=environment)
        else:
            whole = reference(recipe_file, OFTEN, *changes)
        shutil.copytree(whole, tmp_path / "half")
        shutil.rmtree(checkpoint_folder(tmp_path / "half", STEPS))
        (tmp_path / "half" / "result.json").unlink()

        def resume(environment=None):
            return tmp_path / "half", train(recipe_file, tmp_path / "half", *options, environment=environment)

        return whole, resume

    return begin


@pytest.mark.quick
def test_a_run_records_what_computes_it_and_goes_on_to_the_bit(begun):
    whole, resume = begun()
    half, printed = resume()
    assert "same recipe, base, data, versions and machine" in printed and "exact to the bit" in printed
    assert facts_of(half).computed_by == identity(torch.device("cpu"), torch.float32)
    assert facts_of(half).claim.level == "bitwise" and state_hash(half, STEPS) == state_hash(whole, STEPS)


def test_other_instructions_are_shown_and_end_the_claim(begun):
    _, resume = begun()
    half, printed = resume({"ATEN_CPU_CAPABILITY": "default"})
    assert "harmless        computed_by.aten: " in printed
    assert "exact to rounding" in printed and "exact to the bit" not in printed
    assert facts_of(half, HALF).claim.level == "bitwise" and facts_of(half).claim.level == "rounding"


@pytest.mark.parametrize("first", ["with a compiler", "without"])
def test_a_run_begun_with_a_compiler_and_resumed_without_one_or_the_reverse_claims_no_bits(begun, first, tmp_path):
    need_c()
    with_c, without = {}, {"CC": "/nonexistent/cc", "LORA_KIT_CACHE": str(tmp_path / "cache")}
    then, now = (with_c, without) if first == "with a compiler" else (without, with_c)
    whole, resume = begun("base.dtype=bfloat16", environment=then)
    assert facts_of(whole).claim.level == "bitwise", "a run of one kind has the bytes of any other of that kind"
    half, printed = resume(now)
    backends = [facts_of(run).computed_by["backend"] for run in (whole, half)]
    assert backends == (["c", "plain"] if first == "with a compiler" else ["plain", "c"])
    assert f"harmless        computed_by.backend: {backends[0]} -> {backends[1]}" in printed
    assert "exact to rounding" in printed and facts_of(half).claim.level == "rounding"


COMPUTED_BY = {"backend": "c", "library": "0f", "compiler": "gcc 12", "products": "amx", "cpu": "a", "aten": "AVX2"}


@pytest.mark.parametrize("key", [*COMPUTED_BY, "ONEDNN_MAX_CPU_ISA"])
def test_every_part_of_what_computes_is_a_harmless_row_that_ends_the_claim(recipe_file, key):
    recipe = load_recipe(recipe_file)
    recorded = run_facts(recipe=recipe.model_dump(mode="json"), computed_by=COMPUTED_BY)
    now = Environment(recorded.fingerprints, recorded.versions, recorded.machine, COMPUTED_BY)
    assert contract(recorded, recipe, now) == []
    (row,) = contract(recorded, recipe, replace(now, computed_by=COMPUTED_BY | {key: "other"}))
    assert (row.key, row.verdict) == (f"computed_by.{key}", "harmless") and not still_bitwise([row])
    (row,) = contract(recorded, recipe, replace(now, machine=Machine(2, "cpu")))
    assert row.verdict == "harmless" and still_bitwise([row]), "the number of processes changes no bit"


def test_a_checkpoint_from_before_this_was_recorded_claims_no_bits_after_a_resume(recipe_file):
    recipe = load_recipe(recipe_file)
    recorded = run_facts(recipe=recipe.model_dump(mode="json"))
    now = Environment(recorded.fingerprints, recorded.versions, recorded.machine, COMPUTED_BY)
    rows = contract(recorded, recipe, now)
    assert len(rows) == len(COMPUTED_BY) and not still_bitwise(rows)


# several processes

LIMIT_ONE = {"ATEN_CPU_CAPABILITY": "default"}
BREAK_ONE = {"CC": "/nonexistent/cc"}


def launched(processes):
    """Return the variables that torchrun and `accelerate launch` give to each of several processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [meeting | sizes | {"RANK": str(index), "LOCAL_RANK": str(index)} for index in range(processes)]


@pytest.mark.parametrize(
    ("of_one", "dtype", "found"),
    [
        (LIMIT_ONE, "float32", "process 1 has ATEN_CPU_CAPABILITY 'default', process 0 has 'absent'"),
        (BREAK_ONE, "bfloat16", "process 1 has backend 'plain', process 0 has 'c'"),
    ],
    ids=["instructions", "compiler"],
)
def test_processes_that_compute_differently_are_refused_before_the_first_step(
    recipe_file, tmp_path, of_one, dtype, found
):
    if dtype == "bfloat16":
        need_c()
    arguments = ["train", recipe_file, "--out", tmp_path / "run", "--set", f"base.dtype={dtype}"]
    first, second = launched(2)
    processes = [started(arguments, first), started(arguments, second | of_one)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert found in said[0] and "compute with different kernels" in said[0] and found not in said[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not list(tmp_path.glob("run/checkpoints/*"))


def test_every_process_that_differs_is_named_with_each_difference():
    facts = [{"cpu": "a", "aten": "x"}, {"cpu": "a", "aten": "x"}, {"cpu": "b"}]
    processes = Processes.__new__(Processes)
    object.__setattr__(processes, "gather", lambda mine: facts)
    with pytest.raises(LaunchError) as refused:
        processes.require_same(facts[0])
    assert "process 1 has" not in str(refused.value)
    assert "process 2 has aten 'absent', process 0 has 'x'\nprocess 2 has cpu 'b'" in str(refused.value)


# the choice of kernels


def test_the_choice_of_no_kernels_is_recorded_and_kept(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(fusing, "use_kernels", lambda model, wanted, inputs=None: list(wanted or ()))
    go_on(recipe_file, tmp_path / "run", "train.steps=4")
    assert facts_of(tmp_path / "run", 4).resolved.kernels == (), "nothing fitted"
    monkeypatch.undo()
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 4))
    (tmp_path / "run" / "result.json").unlink()
    go_on(recipe_file, tmp_path / "run", "train.steps=4")
    assert facts_of(tmp_path / "run", 4).resolved.kernels == (), "and it is not chosen again"
