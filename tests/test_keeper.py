"""The keeper writes what is due exactly and the newest in between, whatever becomes of the trainer or the disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifests import run_facts, step_facts
from runs import WAIT_SECONDS, wait_until

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import lease, live, store
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import take
from lora_kit.runs.live import Header, JobFile, Phase, Word
from lora_kit.supervise import keeper as keeping
from lora_kit.supervise.keeper import Keeper, run_standby
from lora_kit.supervise.stopping import STOP_SIGNALS
from lora_kit.training import loop, publisher

SHAPES = {"base_model.model.q.lora_A.weight": (2, 8), "base_model.model.q.lora_B.weight": (8, 2)}
SIZE = 32
CONFIG = '{"base_model_name_or_path": "base"}\n'


class Trainer:
    """What a trainer does for its keeper, without one."""

    def __init__(self, run, *, every_seconds=1000.0, keep=20):
        run.mkdir()
        self.run, self.lease = run, take(run, run_id="r")
        Journal(run).event("started", step=0, steps=100, run_id="r")
        self.region = live.create_region(self.lease, 12 * SIZE)
        self.region.words[Word.TOKEN] = self.lease.token
        facts = run_facts(fencing_token=self.lease.token)
        live.write_job(self.region, JobFile(SHAPES, CONFIG, facts, every_seconds, keep, None, best=False))
        self.keeper = Keeper(self.lease)

    def publish(self, step, *, due=False):
        slot = self.region.acquire(lambda: self.keeper.poll())
        values = np.full(3 * SIZE, step, np.float32)
        seal = live.copy_hashed(self.region.payload(slot), [values.view(np.uint8).data])
        self.region.publish(slot, Header(self.lease.token, step, seal, due, step_facts(step)))

    def steps(self):
        return [int(path.name[5:]) for path in store.folders(self.run)][::-1]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "LOOK_SECONDS", 0.0)
    yield (made := Trainer(tmp_path / "run"))
    live.discard(made.region)


def events(trainer, *kinds):
    return [event for event in Journal(trainer.run).read_events() if not kinds or event["kind"] in kinds]


def settle(keeper, turns=3):
    """Let the keeper look, and wait for what it writes."""
    for _ in range(turns):
        keeper.poll()
        if keeper._writer:
            keeper._writer.join()


def test_due_steps_are_written_exactly_and_others_are_not(trainer):
    for step in range(1, 13):
        trainer.publish(step, due=step % 4 == 0)
        settle(trainer.keeper)
    assert trainer.steps() == [4, 8, 12]
    assert all(np.all(store.open_checkpoint(path).state().moments["exp_avg"] == int(path.name[5:]))
               for path in store.folders(trainer.run))  # fmt: skip


def test_a_due_step_is_written_also_when_the_write_before_it_is_slow(trainer, monkeypatch):
    going_on, commit = threading.Event(), store.commit

    def slow(*arguments, **named):
        going_on.wait(WAIT_SECONDS)
        return commit(*arguments, **named)

    monkeypatch.setattr(store, "commit", slow)
    trainer.publish(1, due=True)
    trainer.keeper.poll()
    for step in (2, 3):
        trainer.publish(step, due=step == 2)
        trainer.keeper.poll()  # one write at a time
    assert trainer.steps() == []
    going_on.set()
    trainer.keeper._writer.join()
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


def test_a_zombies_commit_is_refused_and_ends_the_keeper(trainer, tmp_path, monkeypatch):
    """The heartbeat's thread, which reads the lease now and then, has noticed nothing yet."""
    trainer.publish(1, due=True)
    settle(trainer.keeper)
    monkeypatch.setattr(trainer.keeper._heart, "loss", "")
    held = json.loads((trainer.run / "lease.json").read_text())
    (trainer.run / "lease.json").write_text(json.dumps(held | {"token": 9}))  # another has taken the run over
    before = events(trainer)
    trainer.publish(2, due=True)
    with pytest.raises(LeaseError, match="has taken over this run; this start ends and writes nothing more"):
        settle(trainer.keeper)
    with pytest.raises(LeaseError):
        trainer.keeper.end()
    assert trainer.steps() == [1] and events(trainer) == before
    assert trainer.region.path.exists(), "what is live may be the other's by now"
    assert not list((trainer.run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("content", [None, b"", bytes(200), b"{}", b"\xff\x00garbage"])
def test_a_lease_that_is_deleted_or_destroyed_ends_the_keeper_within_a_few_beats(trainer, content, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    keeper = Keeper(trainer.lease)
    trainer.publish(1)
    if content is None:
        shutil.rmtree(trainer.run)
    else:
        (trainer.run / "lease.json").write_bytes(content)
    wait_until(lambda: keeper._heart.loss)
    with pytest.raises(LeaseError, match=r"the lease of this start is lost: .*lease\.json( was deleted|: not valid)"):
        keeper.poll()
    assert content is not None or not trainer.run.exists(), "nothing is written again"


def test_the_heartbeat_goes_on_while_a_write_hangs(trainer, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    going_on, write = threading.Event(), store._write_synced
    monkeypatch.setattr(store, "_write_synced", lambda *given: (going_on.wait(WAIT_SECONDS), write(*given))[1])
    keeper = Keeper(trainer.lease)
    trainer.publish(1, due=True)
    keeper.poll()
    ending = threading.Thread(target=keeper.end)
    ending.start()
    for _ in range(3):
        before = lease._heartbeat(trainer.run, 1)
        wait_until(lambda: lease._heartbeat(trainer.run, 1) != before)  # noqa: B023
    going_on.set()
    ending.join()
    assert trainer.steps() == [1]


@pytest.mark.quick
def test_a_region_that_is_removed_is_told_and_still_written_from(trainer):
    trainer.publish(1)
    settle(trainer.keeper)
    shutil.rmtree(trainer.region.path.parent)
    trainer.publish(2, due=True)
    settle(trainer.keeper)
    assert "removed while the run uses it" in trainer.region.fault
    assert [event["what"].partition(": ")[2][:7] for event in events(trainer, "fault")] == ["removed"], "told once"
    trainer.publish(3)
    assert trainer.keeper.end() == 3 and trainer.steps() == [2, 3]


def test_before_a_restart_the_keeper_writes_what_new_processes_cannot_find(trainer):
    trainer.publish(1)
    trainer.keeper.prepare_restart()
    assert trainer.steps() == [], "the region is there"
    shutil.rmtree(trainer.region.path.parent)
    trainer.keeper.prepare_restart()
    assert trainer.steps() == [1]


def test_an_error_that_nobody_expected_is_told_and_does_not_end_the_writing(trainer, monkeypatch):
    monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.0)

    def unexpected(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(store, "_write_synced", unexpected)
    trainer.publish(1, due=True)
    settle(trainer.keeper, turns=1)
    assert trainer.region.fault == "TypeError: a mistake"
    assert [event["what"] for event in events(trainer, "fault")] == ["TypeError: a mistake"]
    monkeypatch.undo()
    trainer.publish(2, due=True)
    settle(trainer.keeper)
    assert trainer.steps() == [2]


def test_a_job_file_with_a_flipped_bit_is_told_and_never_becomes_a_checkpoint(trainer):
    trainer.publish(1, due=True)
    path = trainer.region.path.with_name(live.JOB)
    path.write_bytes(path.read_bytes().replace(b"{}", b"[]"))
    keeper = Keeper(trainer.lease)
    settle(keeper)
    assert trainer.steps() == [] and "its checksum does not match" in trainer.region.fault
    trainer.region.words[Word.PHASE] = Phase.TRAINING
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        keeper.poll()
    keeper.end()
    assert trainer.steps() == [] and trainer.region.path.exists()


def test_the_end_makes_the_newest_durable_and_its_line_too_and_the_region_goes(trainer):
    trainer.publish(1)
    trainer.publish(2)
    assert trainer.keeper.end() == 2
    assert trainer.steps() == [2] and Journal(trainer.run).last_step() == 2
    assert live.open_region(trainer.run) is None


def test_a_keeper_whose_trainer_is_gone_before_it_has_looked_writes_and_leaves(trainer):
    trainer.publish(5)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "lora_kit.supervise.keeper", trainer.lease.to_json(), str(gone.pid)]
    subprocess.run(command, check=True, timeout=WAIT_SECONDS)
    assert trainer.steps() == [5] and live.open_region(trainer.run) is None


def test_a_keeper_beside_a_trainer_leaves_when_it_has_ended(trainer):
    beside = keeping.start_keeper(trainer.lease)
    trainer.publish(3)
    trainer.region.words[Word.PHASE] = Phase.ENDED
    assert beside.wait(timeout=WAIT_SECONDS) == 0 and trainer.steps() == [3]


def test_what_writes_checkpoints_knows_neither_torch_nor_the_network(tmp_path):
    code = "import sys, lora_kit.supervise.keeper; print(*{name.partition('.')[0] for name in sys.modules})"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "peft", "huggingface_hub", "requests", "httpx", "pickle5"} & set(known)


def test_a_trainer_does_not_wait_for_a_snapshot_that_no_keeper_can_see(recipe_file, tmp_path, monkeypatch):
    publish = live.Region.publish
    monkeypatch.setattr(live.Region, "publish", lambda *given: None if given[2].due else publish(*given))
    with pytest.raises(CheckpointError, match="the header of the newest live snapshot is damaged"):
        loop.train(load_recipe(recipe_file, ["train.steps=2"]), tmp_path / "run")


ENDING = {
    "raises": ("import sys; raise SystemExit(1)", "exit code 1"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
}


@pytest.mark.parametrize("ending", ENDING)
def test_a_keeper_that_ends_again_and_again_ends_the_run_with_the_cause(ending, recipe_file, tmp_path, monkeypatch):
    code, how = ENDING[ending]
    started = []

    def start_keeper(lease):
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1]

    monkeypatch.setattr(publisher, "start_keeper", start_keeper)
    with pytest.raises(CheckpointError, match=rf"keeper, .* has ended 3 times without a checkpoint, .*\({how}") as told:
        loop.train(load_recipe(recipe_file, ["checkpoint.every_steps=1"]), tmp_path / "run")
    assert told.value.exit_code == 1 and len(started) == 3
    monkeypatch.undo()
    run = loop.train(load_recipe(recipe_file, ["checkpoint.every_steps=1"]), tmp_path / "run")
    assert next(event["step"] for event in run.events if event["kind"] == "resumed") >= 1


def test_a_keeper_that_fails_tells_its_trainer_why(trainer, monkeypatch):
    monkeypatch.setattr(Keeper, "poll", lambda self: 1 / 0)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        with pytest.raises(ZeroDivisionError):
            keeping.run_keeper(trainer.lease, 1)
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert trainer.region.fault == "ZeroDivisionError: division by zero"


def test_a_keeper_that_finds_no_region_says_so(trainer):
    trainer.region.path.parent.chmod(0o777)  # others could exchange its files, so it is not used
    with pytest.raises(SystemExit, match="the live region of this run cannot be found"):
        keeping.run_keeper(trainer.lease, 1)
    trainer.region.path.parent.chmod(0o700)


def test_a_keeper_that_is_stopped_keeps_nobody_waiting(recipe_file, tmp_path, monkeypatch):
    keepers, start_keeper = [], publisher.start_keeper

    def start_and_stop(lease):
        keepers.append(start_keeper(lease))
        if len(keepers) == 1:
            keepers[0].send_signal(signal.SIGSTOP)
        return keepers[-1]

    monkeypatch.setattr(publisher, "start_keeper", start_and_stop)
    run = loop.train(load_recipe(recipe_file, ["checkpoint.every_steps=1"]), tmp_path / "run")
    assert len(keepers) == 2 and "killed by SIGKILL" in next(e["what"] for e in run.events if e["kind"] == "fault")


@pytest.fixture
def standby(trainer, monkeypatch):
    """A function that runs the standby keeper of a trainer that has ended, which holds the lease on another machine."""
    monkeypatch.setattr(keeping, "signals_to_hear", list)
    monkeypatch.setattr(keeping, "STANDBY_SECONDS", 0.0)
    monkeypatch.setattr(keeping, "STANDBY_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 0.5)
    content = json.loads((trainer.run / "lease.json").read_text())
    content["holder"] |= {"host": "another"}
    (trainer.run / "lease.json").write_text(json.dumps(content))
    wait_until(lambda: trainer.keeper._heart.loss)
    return lambda: run_standby(trainer.lease, trainer=0)


def test_a_standby_keeper_saves_what_nobody_else_has_saved(trainer, standby):
    trainer.publish(3)
    standby()
    assert trainer.steps() == [3]
    record = lease.read(trainer.run / "lease.json")
    assert record.holder is None and record.token == trainer.lease.token + 1
    assert [json.loads(line)["step"] for line in (trainer.run / "metrics.jsonl").read_text().splitlines()] == [3]


def test_a_standby_keeper_leaves_a_snapshot_to_a_start_that_has_been_announced(trainer, standby, monkeypatch):
    trainer.publish(3)
    live.announce_start(trainer.run)
    looks, unsaved = iter([True, True, False]), keeping._has_unsaved
    monkeypatch.setattr(keeping, "_has_unsaved", lambda held: unsaved(held) and next(looks))
    standby()
    assert trainer.steps() == [] and lease.read(trainer.run / "lease.json").token == trainer.lease.token
    announced = trainer.region.path.with_name(live.START)
    announced.write_text(announced.read_text().replace(f'"pid":{os.getpid()}', '"pid":2147483647'))
    monkeypatch.setattr(keeping, "_has_unsaved", unsaved)
    standby()
    assert trainer.steps() == [3], "the process that announced it is dead"


def test_a_standby_keeper_ends_when_another_start_has_the_lease_or_all_is_written(trainer, standby, monkeypatch):
    monkeypatch.setattr(keeping, "take", lambda *_, **__: pytest.fail("it competes for the lease"))
    trainer.publish(3)
    facts = run_facts(fencing_token=trainer.lease.token)
    files = live.files_of(live.read_job(trainer.region), trainer.region.payload(0))
    store.commit(trainer.run, files, facts, step_facts(3))
    standby()
    assert not trainer.region.path.exists(), "nothing in it is needed"
    made = Trainer(trainer.run.with_name("other"))
    made.publish(3)
    made.lease.release()
    take(made.run, run_id="r")
    run_standby(made.lease, trainer=0)
    assert made.region.path.exists() and made.steps() == [], "the start finds it there"
    live.discard(made.region)
