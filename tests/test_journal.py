"""The logs show every finished step once and survive a torn line."""

import errno
import json
import multiprocessing
import os

import pytest
from manifests import step_record
from runs import WAIT_SECONDS

from lora_kit.errors import CheckpointError
from lora_kit.runs import journal as module
from lora_kit.runs.journal import Journal
from lora_kit.runs.status import status


def write_many(folder, who):
    for number in range(200):
        Journal(folder).event("checkpoint", who=who, number=number, filler="x" * 500)


def test_lines_of_several_writers_stay_whole(tmp_path):
    writers = [multiprocessing.Process(target=write_many, args=(tmp_path, who)) for who in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(WAIT_SECONDS)
    events = Journal(tmp_path).read_events()
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == len(events) == 600


def test_a_torn_last_line_is_skipped(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.metrics(step_record(step))
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-20])
    assert journal.last_step() == 2


def test_after_a_cut_an_event_is_not_lost_with_the_torn_one_before_it(tmp_path):
    journal = Journal(tmp_path)
    journal.event("started", step=0, steps=9, run_id="r")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01", "ki')
    journal.cut(0, samples=0)
    journal.event("resumed", step=0, steps=9)
    assert [event["kind"] for event in journal.read_events()] == ["started", "resumed"]


@pytest.mark.quick
def test_a_cut_drops_later_steps_and_torn_lines(tmp_path):
    journal = Journal(tmp_path)
    for step in range(1, 6):
        journal.metrics(step_record(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    journal.cut(3, samples=3)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_what_a_full_disk_does_not_take_waits_for_the_next_line(tmp_path, monkeypatch):
    journal, write = Journal(tmp_path), os.write
    journal.metrics(step_record(1))

    def full(descriptor, data):
        return write(descriptor, data[:7])  # there is room for a part of the line

    monkeypatch.setattr(os, "write", full)
    journal.metrics(step_record(2))
    journal.event("checkpoint", step=2)
    assert "No space left on device; 2 line(s) wait in memory" in journal.trouble
    monkeypatch.undo()
    assert journal.last_step() == 1 and not journal.read_events()
    journal.metrics(step_record(3))
    assert not journal.trouble and [one["step"] for one in journal.read_metrics()] == [1, 2, 3]
    assert [one["kind"] for one in journal.read_events()] == ["checkpoint"]


def test_a_log_that_cannot_be_written_keeps_no_line_from_the_other(tmp_path, monkeypatch):
    journal, append = Journal(tmp_path), module._append

    def denied(path, line):
        if path.name == "events.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        append(path, line)

    monkeypatch.setattr(module, "_append", denied)
    journal.event("resumed", step=0, steps=3)
    journal.metrics(step_record(1))
    journal.event("fault", what="x")
    journal.metrics(step_record(2))
    assert journal.last_step() == 2
    assert journal.trouble.endswith("events.jsonl: Permission denied; 2 line(s) wait in memory")
    monkeypatch.undo()
    journal.metrics(step_record(3))
    assert [event["kind"] for event in journal.read_events()] == ["resumed", "fault"] and not journal.late
    assert [record["step"] for record in journal.read_metrics()] == [1, 2, 3]


def test_a_cut_that_changes_nothing_writes_nothing(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.metrics(step_record(1))
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    journal.cut(1, samples=1)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


NOT_VALID = [
    "",
    "7",
    "[" * 1000,
    '{"time": "2026-01-01T00:00:00+00:00"}',
    '{"kind": "checkpoint", "step": 1}',
    '{"time": "yesterday", "kind": "checkpoint"}',
    '{"time": "2026-01-01T00:00:00", "kind": "checkpoint"}',
    '{"time": "2026-01-01T00:00:00+00:00", "kind": "resumed"}',
    '{"time": "2026-01-01T00:00:00+00:00", "kind": "started", "step": "0", "steps": 9, "run_id": "r"}',
    '{"time": "2026-01-01T00:00:00+00:00", "kind": "fault"}',
    json.dumps(step_record(4) | {"step": -1}),
    json.dumps(step_record(4) | {"tokens_per_second": "fast"}),
    json.dumps({key: value for key, value in step_record(4).items() if key != "tokens"}),
]


@pytest.mark.quick
@pytest.mark.parametrize("line", NOT_VALID)
def test_a_line_that_is_not_valid_is_skipped_and_cut(tmp_path, line):
    journal = Journal(tmp_path)
    journal.event("started", step=0, steps=9, run_id="r")
    journal.metrics(step_record(1))
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(line + "\n")
    journal.metrics(step_record(2))
    assert [record["step"] for record in journal.read_metrics()] == [1, 2] and journal.last_step() == 2
    assert [event["kind"] for event in journal.read_events()] == ["started"] and journal.run_id() == "r"
    assert not journal.skipped_after(0) and status(tmp_path).step == 2
    journal.cut(2, samples=2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1


def test_a_cut_leaves_the_lines_that_stay_as_they_are(tmp_path):
    line = json.dumps(step_record(1) | {"note": "ü", "tokens": 7}, ensure_ascii=False, separators=(",", ":"))
    (tmp_path / "metrics.jsonl").write_text(line + "\n" + json.dumps(step_record(2)) + "\n")
    Journal(tmp_path).cut(1, samples=0)
    assert (tmp_path / "metrics.jsonl").read_text() == line + "\n"


def test_a_number_that_is_not_finite_reads_as_none(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(step_record(1, loss=float("nan"), grad_norm=float("inf"), own=float("nan")))
    (record,) = journal.read_metrics()
    assert (record["loss"], record["grad_norm"], record["own"]) == (None, None, None)
    journal.event("started", step=0, steps=9, run_id="r")
    assert json.dumps(status(tmp_path).to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_log_that_is_no_regular_file_is_not_waited_for(tmp_path, name):
    Journal(tmp_path).event("started", step=0, steps=9, run_id="r")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: not a regular file"):
        status(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_what_is_put_in_the_place_of_a_log_keeps_nobody_waiting_and_loses_no_line(make, tmp_path):
    journal, path = Journal(tmp_path), tmp_path / "metrics.jsonl"
    make(path)
    journal.metrics(step_record(1))
    assert str(path) in journal.trouble and len(journal.late) == 1 and not (tmp_path / "elsewhere").exists()
    path.rename(tmp_path / "moved")
    journal.metrics(step_record(2))
    assert [record["step"] for record in journal.read_metrics()] == [1, 2] and not journal.trouble
