"""However often the writer of snapshots is killed in the middle of its work, the newest published one is whole."""

import re
import subprocess
import sys
from pathlib import Path

from runs import WAIT_SECONDS

SCRIPT = Path(__file__).parent / "kill_writer.py"


def storm(kills, *, without="pass"):
    """Kill a writer so often, in a process without torch; `without` is what a broken one leaves out."""
    broken = f"import sys, runpy; from lora_kit.runs import live; {without}; "
    broken += f"sys.argv[1:] = ['--kills', '{kills}']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, timeout=WAIT_SECONDS)


def test_no_kill_of_the_writer_loses_or_spoils_a_published_snapshot():
    done = storm(200)
    torn, reads, wrong, lost = map(int, re.findall(r"(\d+) (?:torn|reads|wrong|lost)", done.stdout))
    assert done.returncode == 0 and (wrong, lost) == (0, 0), done.stdout + done.stderr
    assert torn >= 40 and reads >= 100, "too few were caught in the middle for this to prove anything"


def test_a_writer_that_overwrites_the_newest_slot_is_found_out():
    done = storm(40, without="live.Region._free_slot = lambda self: 0")
    assert done.returncode == 1 and " 0 wrong" not in done.stdout, done.stdout + done.stderr
