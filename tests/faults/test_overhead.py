"""A snapshot is one copy a step, in another thread, while the next step computes.

How long the loop waits, and what the copy costs a whole step, is measured by benchmarks/resilience/stall.py.
"""

import threading

import pytest
from runs import WAIT_SECONDS, go_on

from lora_kit.runs import live
from lora_kit.training import loop
from lora_kit.training.objectives.sft import Sft

STEPS = 8


@pytest.mark.quick
def test_every_step_is_copied_once_and_not_by_the_thread_that_trains(recipe_file, tmp_path, monkeypatch):
    threads, copy = [], live.copy_hashed

    def noted(target, sources):
        threads.append(threading.current_thread())
        return copy(target, sources)

    monkeypatch.setattr(live, "copy_hashed", noted)
    go_on(recipe_file, tmp_path / "run")
    assert len(threads) == STEPS
    assert threading.current_thread() not in threads and len(set(threads)) == 1


def test_the_next_step_computes_while_the_copy_has_not_ended(recipe_file, tmp_path, monkeypatch):
    computing, overlapped, copy, loss = threading.Event(), [], live.copy_hashed, Sft.loss

    def late(target, sources):
        if len(overlapped) < STEPS - 1:  # after the last step nothing computes
            overlapped.append(computing.wait(WAIT_SECONDS))
            computing.clear()
        return copy(target, sources)

    def forward(*arguments):
        if live_steps:
            computing.set()
        return loss(*arguments)

    live_steps = []
    publish = loop.Publisher.publish

    def begun(self, *arguments, **named):
        computing.clear()
        live_steps.append(True)
        publish(self, *arguments, **named)

    monkeypatch.setattr(live, "copy_hashed", late)
    monkeypatch.setattr(Sft, "loss", forward)
    monkeypatch.setattr(loop.Publisher, "publish", begun)
    go_on(recipe_file, tmp_path / "run")
    assert overlapped == [True] * (STEPS - 1)
