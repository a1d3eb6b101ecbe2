"""The keeper writes what is due exactly and the newest in between, whatever becomes of the trainer or the disk."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifests import run_facts, step_facts
from runs import WAIT_SECONDS

from lora_kit.runs import live, store
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import take
from lora_kit.runs.live import Header, JobFile, Phase, Word
from lora_kit.supervise import keeper as keeping
from lora_kit.supervise.keeper import Keeper

SHAPES = {"base_model.model.q.lora_A.weight": (2, 8), "base_model.model.q.lora_B.weight": (8, 2)}
SIZE = 32


class Trainer:
    """What a trainer does for its keeper, without one."""

    def __init__(self, run, *, every_seconds=1000.0, keep=20):
        run.mkdir()
        self.run, self.lease = run, take(run)
        Journal(run).event("started", step=0, run_id="r")
        self.region = live.create_region(run, 12 * SIZE)
        self.region.words[Word.TOKEN] = self.lease.token
        facts = run_facts(fencing_token=self.lease.token)
        live.write_job(self.region, JobFile(str(run), SHAPES, "{}\n", facts, every_seconds, keep, None, best=False))
        self.keeper = Keeper(run, self.lease)

    def publish(self, step, *, due=False):
        slot = self.region.acquire(lambda: self.keeper.poll())
        values = np.full(3 * SIZE, step, np.float32)
        seal = live.copy_hashed(self.region.payload(slot), [values.view(np.uint8).data])
        self.region.publish(slot, Header(self.lease.token, step, seal, due, step_facts(step)))

    def steps(self):
        return [int(path.name[5:]) for path in store.folders(self.run)][::-1]


@pytest.fixture
def trainer(tmp_path):
    yield (made := Trainer(tmp_path / "run"))
    live.discard(made.run)


def settle(keeper, turns=3):
    """Let the keeper look, and wait for what it writes."""
    for _ in range(turns):
        keeper.poll()
        if keeper._writing:
            keeper._writing.result()


def test_due_steps_are_written_exactly_and_others_are_not(trainer):
    for step in range(1, 13):
        trainer.publish(step, due=step % 4 == 0)
        settle(trainer.keeper)
    assert trainer.steps() == [4, 8, 12]
    assert all(np.all(store.open_checkpoint(path).state()[1][name] == int(path.name[5:]))
               for path in store.folders(trainer.run) for name in SHAPES)  # fmt: skip


def test_a_due_step_is_written_also_when_the_write_before_it_is_slow(trainer, monkeypatch):
    going_on, commit = threading.Event(), store.commit

    def slow(*arguments, **named):
        going_on.wait(10)
        return commit(*arguments, **named)

    monkeypatch.setattr(store, "commit", slow)
    trainer.publish(1, due=True)
    trainer.keeper.poll()
    for step in (2, 3):
        trainer.publish(step, due=step == 2)
        trainer.keeper.poll()  # one write at a time
    assert trainer.steps() == []
    going_on.set()
    trainer.keeper._writing.result()
    settle(trainer.keeper)
    assert trainer.steps() == [1, 2]


def test_in_between_the_newest_state_is_written_whenever_the_time_has_passed(trainer):
    trainer.keeper.poll()
    trainer.keeper._job = replace(trainer.keeper._job, every_seconds=0.0)
    for step in (1, 2):
        trainer.publish(step)
    settle(trainer.keeper)
    assert trainer.steps() == [2]
    trainer.keeper._job = replace(trainer.keeper._job, every_seconds=1000.0)
    trainer.publish(3)
    settle(trainer.keeper)
    assert trainer.steps() == [2]


@pytest.mark.quick
def test_a_failed_write_is_told_again_and_again_and_made_good(trainer, monkeypatch):
    monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.0)
    trainer.publish(1, due=True)
    settle(trainer.keeper)
    monkeypatch.setattr(store, "_write_synced", lambda path, pieces: Path("/dev/full").write_text("x"))
    for number in (2, 3, 4):
        trainer.publish(number, due=True)
        settle(trainer.keeper, turns=1)
        assert trainer.region.words[Word.FAULTS] == number - 1 and trainer.steps() == [1]
    assert (
        "No space left on device" in trainer.region.fault
        and "earlier checkpoints are unchanged" in trainer.region.fault
    )
    monkeypatch.undo()
    monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.0)
    settle(trainer.keeper, turns=1)
    assert trainer.steps() == [1, 4], "the newest, though its turn has passed"


def test_a_zombies_commit_is_refused(trainer, tmp_path):
    trainer.publish(1, due=True)
    settle(trainer.keeper)
    lease = json.loads((trainer.run / "lease.json").read_text())
    (trainer.run / "lease.json").write_text(json.dumps(lease | {"token": 9}))  # another has taken the run over
    trainer.publish(2, due=True)
    settle(trainer.keeper)
    assert trainer.steps() == [1] and "another process has taken over this run" in trainer.region.fault
    assert trainer.keeper.end() == 1 and trainer.region.path.exists(), "what is live may be the other's by now"
    assert not list((trainer.run / "checkpoints").glob(".tmp-*"))


def test_the_end_makes_the_newest_durable_and_its_line_too_and_the_region_goes(trainer):
    trainer.publish(1)
    trainer.publish(2)
    assert trainer.keeper.end() == 2
    assert trainer.steps() == [2] and Journal(trainer.run).last_step() == 2
    assert live.folder_of(trainer.run) is None


def test_a_keeper_whose_trainer_is_gone_before_it_has_looked_writes_and_leaves(trainer):
    trainer.publish(5)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "lora_kit.supervise.keeper", str(trainer.run), str(gone.pid)]
    subprocess.run(command, check=True, timeout=WAIT_SECONDS)
    assert trainer.steps() == [5] and live.folder_of(trainer.run) is None


def test_a_keeper_beside_a_trainer_leaves_when_it_has_ended(trainer):
    beside = keeping.start_keeper(trainer.run)
    trainer.publish(3)
    trainer.region.words[Word.PHASE] = Phase.ENDED
    assert beside.wait(timeout=WAIT_SECONDS) == 0 and trainer.steps() == [3]


def test_what_writes_checkpoints_knows_neither_torch_nor_the_network(tmp_path):
    code = "import sys, lora_kit.supervise.keeper; print(*{name.partition('.')[0] for name in sys.modules})"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "peft", "huggingface_hub", "requests", "httpx", "pickle5"} & set(known)
