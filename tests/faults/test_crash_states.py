"""Whenever the machine goes down, the newest committed checkpoint or the one being made reads back, whole."""

import subprocess
import sys
from pathlib import Path

import pytest
from crash_states import certain, operations
from runs import WAIT_SECONDS

SCRIPT = Path(__file__).parent / "crash_states.py"


def look(states, *, without="pass"):
    """Look at states in a process of its own, for audit hooks stay; `without` is what a broken writer leaves out."""
    broken = f"import sys, runpy; from lora_kit.runs import store; {without}; "
    broken += f"sys.argv[1:] = ['--states', '{states}']; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
    broken += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, timeout=WAIT_SECONDS)


@pytest.mark.quick
def test_every_state_of_the_disk_reads_back():
    done = look(600)
    assert done.returncode == 0 and done.stdout == "600 states, 600 read back\n", done.stdout + done.stderr


def test_every_state_reads_back_where_two_folders_cannot_be_exchanged():
    done = look(400, without="store._exchange = lambda one, other: False")
    assert done.returncode == 0 and done.stdout == "400 states, 400 read back\n", done.stdout + done.stderr


def test_a_writer_that_does_not_sync_is_found_out():
    assert "reads back, expected" in look(600, without="store.sync_folder = lambda folder: None").stdout


def test_what_is_certain_is_what_was_synced_afterwards(tmp_path):
    trace = [("mkdir", tmp_path / "run" / "a"), ("make", tmp_path / "run" / "a" / "f")]
    trace += [("write", tmp_path / "run" / "a" / "f", b"x"), ("sync", tmp_path / "run" / "a" / "f")]
    trace += [("rename", tmp_path / "run" / "a", tmp_path / "run" / "b"), ("sync folder", tmp_path / "run")]
    found = operations(trace, tmp_path)
    assert [certain(found, at) for at in (0, 1, 2, 4)] == [True, False, True, True]
