"""What other toolkits lose at a save or at a resume is not lost here: the cases that no other file has a test for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import files_of, run_facts, step_facts
from runs import go_on, state_hash, wait_until

from lora_kit.recipe.load import load_recipe
from lora_kit.runs import live, store
from lora_kit.runs.live import Phase, Word
from lora_kit.runs.manifest import FORMAT, MANIFEST
from lora_kit.supervise import launch as launching
from lora_kit.supervise.launch import Attempt, Launch
from lora_kit.training import loop
from lora_kit.training.objectives.sft import Sft


@pytest.mark.quick
def test_a_checkpoint_is_four_files_however_long_the_run_and_whoever_tokenises(recipe_file, tmp_path):
    sizes = []
    for steps in (4, 20):
        run = go_on(recipe_file, tmp_path / str(steps), f"train.steps={steps}", "checkpoint.every_steps=100")
        names = {path.name: path.stat().st_size for path in run.latest.iterdir()}
        assert sorted(names) == sorted([store.ADAPTER, store.ADAPTER_CONFIG, store.OPTIMIZER, MANIFEST])
        sizes.append(sum(names.values()))
    assert abs(sizes[0] - sizes[1]) < 200, "no history, no tokenizer and no model card travel with a checkpoint"


def test_a_writer_that_wrote_more_than_was_predicted_is_an_error(tmp_path, monkeypatch):
    write = store._write_synced
    monkeypatch.setattr(store, "_write_synced", lambda path, pieces: write(path, [*pieces, b"base"]))
    with pytest.raises(store.CheckpointError, match=r"bytes written, expected"):
        store.commit(tmp_path, files_of(), run_facts(), step_facts(1))
    assert not store.folders(tmp_path)


def test_checkpoints_are_thinned_out_by_their_steps_and_not_by_file_times(tmp_path):
    for step in range(1, 6):
        path = store.commit(tmp_path, files_of(), run_facts(), step_facts(step)).path
        for file in (path, *path.iterdir()):
            os.utime(file, (1e9 - step, 1e9 - step))  # the newest looks oldest
    store.prune(tmp_path, 2)
    assert [path.name[-1] for path in store.folders(tmp_path)] == ["5", "4"]


@pytest.mark.quick
def test_a_pinned_checkpoint_and_those_of_every_so_many_steps_stay(tmp_path):
    for step in range(1, 8):
        store.commit(tmp_path, files_of(), run_facts(), step_facts(step))
    (store.checkpoint_folder(tmp_path, 2) / store.PIN).touch()
    store.prune(tmp_path, 2, keep_every=3)
    assert [path.name[-1] for path in store.folders(tmp_path)] == ["7", "6", "3", "2"]


def test_a_run_that_was_moved_goes_on_to_the_same_bytes(recipe_file, tmp_path, copied):
    whole = copied(recipe_file)
    expected = state_hash(whole, 8)
    shutil.rmtree(store.checkpoint_folder(whole, 8))
    (whole / "result.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(whole, tmp_path / "elsewhere" / "there"))
    go_on(recipe_file, moved)
    assert state_hash(moved, 8) == expected
    written = [path for path in moved.rglob("*") if path.is_file() and path.name != "events.jsonl"]
    assert not any(str(whole).encode() in path.read_bytes() for path in written)


def test_a_run_behind_links_is_the_run_that_they_lead_to(recipe_file, tmp_path, reference):
    real, disk, link = tmp_path / "real", tmp_path / "disk", tmp_path / "link"
    real.mkdir()
    disk.mkdir()
    link.symlink_to(real)
    (real / "checkpoints").symlink_to(disk)
    go_on(recipe_file, link)
    assert {path.name for path in disk.iterdir()} >= {"step-00000006", "step-00000008"}
    shutil.rmtree(disk / "step-00000008")
    (real / "result.json").unlink()
    go_on(recipe_file, real)
    assert state_hash(link, 8) == state_hash(reference(recipe_file), 8)


def test_other_micro_batches_train_the_same_examples_at_the_same_rates(recipe_file, tmp_path):
    wanted = {}
    for tokens in (256, 512):
        out = tmp_path / str(tokens)
        go_on(recipe_file, out, "train.steps=8")
        shutil.rmtree(store.checkpoint_folder(out, 8))
        shutil.rmtree(store.checkpoint_folder(out, 6))
        (out / "result.json").unlink()
        loop.train(
            load_recipe(recipe_file, [f"train.micro_batch_tokens={tokens}"]), out, accept=["train.micro_batch_tokens"]
        )
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        wanted[tokens] = [(one["step"], one["examples"], one["tokens"], one["learning_rate"]) for one in metrics]
        assert [one["step"] for one in metrics] == list(range(1, 9))
    assert wanted[256] == wanted[512]


def test_a_manifest_names_its_format_and_holds_nothing_but_json(recipe_file, tmp_path):
    path = go_on(recipe_file, tmp_path / "run", "train.steps=1").latest
    assert json.loads((path / MANIFEST).read_text())["format"] == FORMAT
    assert not any(one.suffix in (".pt", ".bin", ".pth", ".pkl") for one in path.iterdir())


def test_a_keeper_beside_a_trainer_outlives_it_when_memory_runs_out(recipe_file, tmp_path, monkeypatch, fresh_keeper):
    scores, loss = [], Sft.loss
    mine, out = Path("/proc/self/oom_score_adj"), tmp_path / "run"

    def looked(*arguments):
        keeper = wait_until(lambda: live.open_region(out).keeper)
        scores.append((int(mine.read_text()), int(Path(f"/proc/{keeper.pid}/oom_score_adj").read_text())))
        return loss(*arguments)

    before = int(mine.read_text())
    monkeypatch.setattr(Sft, "loss", looked)
    go_on(recipe_file, out, "train.steps=2")
    assert scores and all(ours > theirs for ours, theirs in scores)
    assert int(mine.read_text()) == before


def test_the_work_of_a_process_includes_that_of_its_children():
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    before = launching._cpu_seconds(os.getpid())
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert launching._cpu_seconds(os.getpid()) - before > 0.15
        child.communicate(b"\n")
    assert launching._cpu_seconds(os.getpid()) - before > 0.15, "also that of children that have ended"


@pytest.fixture
def supervisor(monkeypatch):
    """The supervisor's clock alone: no process was started, and a tenth of a second is an hour."""
    monkeypatch.setattr(launching, "LOADING_TIMEOUT_SECONDS", 0.1)
    made = Launch.__new__(Launch)
    made.keeper = type("NoRegion", (), {"region": None})()
    made.attempt, made._step_timeout, made._life = Attempt(running={0: os.getpid()}), None, (0, 0, 0)
    made._silent = made._longest = made._cpu_seconds = 0.0
    made._looked = 0.0
    return made


def test_a_base_that_takes_long_to_load_is_no_hang_and_a_start_that_does_nothing_is(supervisor):
    assert not supervisor._hangs(), "this process has computed since it began"
    supervisor._looked -= 1.0
    assert supervisor._hangs(), "and has done nothing since"


def test_an_upload_at_the_end_is_no_hang(recipe_file, tmp_path, monkeypatch):
    phases = []
    region = lambda: live.open_region(tmp_path / "run")  # noqa: E731
    monkeypatch.setattr(loop, "push_finished", lambda *a, **k: phases.append(region().words[Word.PHASE]))
    go_on(recipe_file, tmp_path / "run", "train.steps=1")
    assert phases == [Phase.LOADING]
