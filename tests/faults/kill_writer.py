"""The writer of live snapshots alone, killed in the middle of its work again and again; a reader marks slots meanwhile.

`python tests/faults/kill_writer.py --kills 500` says how many slots were torn and what was recovered. The writer is a
fork of this light process and does nothing but claim, copy and publish; every number that it copies says which snapshot
it belongs to, so that a torn slot is seen as one.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from manifests import step_facts

from lora_kit.runs import live
from lora_kit.runs.identity import own_identity
from lora_kit.runs.lease import take
from lora_kit.runs.live import Header, Region, Word

NUMBERS = 400_000  # fp32: copied in about as long as everything else takes


def write_for_ever(path, first, told):
    """Publish snapshot after snapshot, and tell each one's number once it is published."""
    region = Region(path)
    for number in range(first, 1 << 24):
        slot = region.acquire(lambda: None)
        parts = [np.full(NUMBERS // 3, number, np.float32).view(np.uint8).data for _ in range(3)]
        seal = live.copy_hashed(region.payload(slot), parts)
        region.publish(slot, Header(0, number, seal, due=False, progress=step_facts(number)))
        os.write(told, number.to_bytes(8, "little"))


def numbers_in(region, slot):
    return np.unique(np.frombuffer(region.payload(slot), np.float32))


def read_one(region):
    """Read the newest snapshot as the keeper does; return whether it was whole, None when it was gone already."""
    published = region.snapshots()
    if not published:
        return None
    region.words[Word.READING] = published[0].slot + 1
    try:
        if published[0] not in region.snapshots():
            return None
        same = numbers_in(region, published[0].slot)
        return region.is_valid(published[0]) and len(same) == 1 and same[0] == published[0].step
    finally:
        region.words[Word.READING] = 0


def kill(region, rng, first):
    """Start a writer, read beside it, kill it; return the number that it told last and what the reads found."""
    reading, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(region.path, first, told)
        finally:
            os._exit(1)
    os.close(told)
    acknowledged = int.from_bytes(os.read(reading, 8), "little")  # it is at work
    reads = []
    for _ in range(rng.randrange(20)):
        if rng.random() < 0.2:
            reads.append(read_one(region))
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while rest := os.read(reading, 1 << 16):
        acknowledged = int.from_bytes(rest[-8:], "little")
    os.close(reading)
    return acknowledged, reads


def storm(kills, seed, folder):
    """Return the counts of torn slots, reads beside the writer, wrong recoveries and acknowledged snapshots lost."""
    held, rng = take(folder, run_id="r"), random.Random(seed)
    region = live.create_region(held, 4 * (NUMBERS // 3) * 3)
    region.keeper = own_identity()
    torn = wrong = lost = reads = 0
    newest = 0
    try:
        for _ in range(kills):
            acknowledged, read = kill(region, rng, newest + 1)
            reads += sum(one is not None for one in read)
            found = region.snapshots()
            torn += sum(
                len(numbers_in(region, slot)) > 1 for slot in set(range(live.SLOTS)) - {one.slot for one in found}
            )
            valid = next((one for one in found if region.is_valid(one)), None)
            newest = valid.step if valid else 0
            wrong += valid is None or set(numbers_in(region, valid.slot)) != {float(newest)} or False in read
            lost += newest < acknowledged
            wrong += newest > acknowledged + 1
    finally:
        live.discard(region)
    return {"torn": torn, "reads": reads, "wrong": wrong, "lost": lost}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        counts = storm(asked.kills, asked.seed, Path(place))
    print(f"{asked.kills} kills: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    sys.exit(counts["wrong"] > 0 or counts["lost"] > 0)
