"""The logs show every finished step once and survive a torn line."""

import json
import multiprocessing
import os

import pytest
from runs import WAIT_SECONDS

from lora_kit.runs.journal import Journal


def record(step, **more):
    base = {"step": step, "tokens": 100, "tokens_per_second": 50.0, "stall_seconds": 0.0, "loss": 1.0 / step}
    return base | more


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
        journal.metrics(record(step))
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-20])
    assert journal.last_step() == 2


def test_after_a_cut_an_event_is_not_lost_with_the_torn_one_before_it(tmp_path):
    journal = Journal(tmp_path)
    journal.event("started", step=0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01", "ki')
    journal.cut(0, samples=0)
    journal.event("resumed", step=0)
    assert [event["kind"] for event in journal.read_events()] == ["started", "resumed"]


@pytest.mark.quick
def test_a_cut_drops_later_steps_and_torn_lines(tmp_path):
    journal = Journal(tmp_path)
    for step in range(1, 6):
        journal.metrics(record(step))
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
    journal.metrics(record(1))

    def full(descriptor, data):
        return write(descriptor, data[:7])  # there is room for a part of the line

    monkeypatch.setattr(os, "write", full)
    journal.metrics(record(2))
    journal.event("checkpoint", step=2)
    assert "No space left on device; 2 line(s) wait in memory" in journal.trouble
    monkeypatch.undo()
    assert journal.last_step() == 1 and not journal.read_events()
    journal.metrics(record(3))
    assert not journal.trouble and [one["step"] for one in journal.read_metrics()] == [1, 2, 3]
    assert [one["kind"] for one in journal.read_events()] == ["checkpoint"]


def test_a_cut_that_changes_nothing_writes_nothing(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.metrics(record(1))
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    journal.cut(1, samples=1)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before
