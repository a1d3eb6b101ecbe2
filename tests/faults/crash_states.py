"""Every state in which a machine that went down may leave a run's folder: recorded from real commits, then enumerated.

The model is POSIX without any ordering of its own. What a file holds is certain only after its fsync: before, it is
whole, cut, zeros or nothing. An entry of a folder (made, renamed, removed) is certain only after that folder's fsync:
before, it happened or not, whatever came later.
`python tests/faults/crash_states.py --states 5000` says how many read back.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from manifests import files_of, run_facts, step_facts

from lora_kit.runs import store

NAMES = (store.ADAPTER, store.ADAPTER_CONFIG, store.OPTIMIZER)


@dataclass
class Recorder:
    """What was asked of the file system under a root: (operation, paths...), and which commits had returned by then."""

    root: Path
    on: bool = False
    trace: list = field(default_factory=list)
    written: dict = field(default_factory=dict)

    def __post_init__(self):
        fsync = os.fsync

        def synced(descriptor):
            fsync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if self.on and path.is_relative_to(self.root):
                self.settle()
                self.trace.append(("sync folder" if path.is_dir() else "sync", path))

        exchange = store._exchange

        def exchanged(one, other):
            done = exchange(one, other)
            if done and self.on:
                self.note("exchange", one, other)
            return done

        sys.addaudithook(self.hear)
        os.fsync, store._exchange = synced, exchanged

    def hear(self, event, arguments):
        if not self.on or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path = self.whole(arguments[0], arguments[-1] if event in ("os.remove", "os.rmdir") else -1)
        if path is None or not path.is_relative_to(self.root):
            return
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                self.settle()
                self.trace.append(("make", path))
                self.written[path] = len(self.trace)
            return
        self.settle()
        if event == "os.mkdir":
            self.trace.append(("mkdir", path))
        elif event == "os.rename":
            self.trace.append(("rename", path, self.whole(arguments[1], -1)))
        else:
            self.trace.append(("remove", path))

    def whole(self, path, folder):
        if isinstance(path, int):
            return None
        if isinstance(folder, int) and folder >= 0:
            return Path(f"/proc/self/fd/{folder}").readlink() / os.fspath(path)
        return Path(os.fspath(path)).absolute()

    def settle(self):
        """Note what the files that were opened hold by now."""
        for path in list(self.written):
            content = path.read_bytes() if path.exists() else b""
            self.trace.append(("write", path, content))
            del self.written[path]

    def note(self, *fact):
        self.settle()
        self.trace.append(fact)


def record(root):
    """Record commits, prunings and a repeated commit of a step on a new run."""
    recorder, run = Recorder(root), root / "run"
    run.mkdir()
    for step, version in ((1, 0), (2, 0), (3, 0), (3, 1), (4, 0)):
        recorder.on = True
        recorder.note("begin", step, version)
        content = files_of(step)  # a repeated commit has the same tensors, and knows more
        store.commit(run, content, run_facts(), step_facts(step, held_out_loss=0.5 if version else None))
        recorder.note("returned", step, version)
        store.prune(run, 2)
        recorder.note("pruned")
        recorder.on = False
    return recorder.trace


class Disk:
    """The folders and files of a state: what each folder's entries name."""

    def __init__(self, root):
        self.root, self.folders, self.data, self.count = root, {root: 0}, {}, 1
        self.entries = {0: {}}

    def folder(self, path):
        """Return which folder a path is, by what the running system sees; None if there is none."""
        at = 0
        for part in path.relative_to(self.root).parts:
            at = self.entries.get(at, {}).get(part)
        return at


def operations(trace, root):
    """Turn paths into folders and files that keep who they are when they are renamed."""
    disk, found = Disk(root), []
    disk.entries[0]["run"] = 1
    disk.entries[1], disk.count = {}, 2
    for kind, *rest in trace:
        if kind in ("begin", "returned", "pruned"):
            found.append((kind, *rest))
            continue
        if kind == "sync folder":
            found.append((kind, disk.folder(rest[0])))
            continue
        parent, name = disk.folder(rest[0].parent), rest[0].name
        if parent is None or (kind not in ("mkdir", "make") and name not in disk.entries[parent]):
            continue  # it was tried, and failed
        if kind in ("mkdir", "make"):
            if name in disk.entries[parent]:
                continue
            disk.entries[parent][name] = disk.count
            if kind == "mkdir":
                disk.entries[disk.count] = {}
            found.append(("link", parent, name, disk.count, kind == "mkdir"))
            disk.count += 1
        elif kind == "write":
            found.append(("write", disk.entries[parent][name], rest[1]))
        elif kind == "rename":
            target = disk.folder(rest[1].parent)
            inode = disk.entries[parent].pop(name)
            disk.entries[target][rest[1].name] = inode
            found.append(("rename", parent, name, target, rest[1].name, inode))
        elif kind == "exchange":
            entries, other = disk.entries[parent], rest[1].name
            found.append(("exchange", parent, name, entries[name], other, entries[other]))
            entries[name], entries[other] = entries[other], entries[name]
        elif kind == "remove":
            found.append(("unlink", parent, name, disk.entries[parent].pop(name)))
        else:
            found.append(("sync", disk.entries[parent][name]))
    return found


def certain(happened, at):
    """Return whether what an operation did is on the disk for sure."""
    one, later = happened[at], happened[at + 1 :]
    if one[0] == "write":
        return ("sync", one[1]) in later
    folders = {one[1], one[3]} if one[0] == "rename" else {one[1]}
    return all(("sync folder", folder) in later for folder in folders)


def crash(found, point, rng):
    """Return one legal state after a crash before operation `point`: entries of folders, and what files hold."""
    happened = found[:point]
    entries, data = {0: {"run": 1}, 1: {}}, {}
    lazy = rng.random()
    for at, one in enumerate(happened):
        if one[0] not in ("link", "write", "rename", "exchange", "unlink"):
            continue
        sure = certain(happened, at)
        if one[0] == "write":
            whole = one[2]
            lost = [b"", bytes(len(whole)), whole[: rng.randrange(len(whole) + 1)], whole]
            data[one[1]] = whole if sure else rng.choice(lost)
            continue
        if one[0] == "link":
            if one[4]:
                entries.setdefault(one[3], {})
            else:
                data.setdefault(one[3], b"")
        if not sure and rng.random() < lazy:
            continue
        if one[0] == "link":
            entries[one[1]][one[2]] = one[3]
        elif one[0] == "unlink":
            entries[one[1]].pop(one[2], None)
        elif one[0] == "exchange":
            inside = entries[one[1]]
            if (inside.get(one[2]), inside.get(one[4])) == (one[3], one[5]):
                inside[one[2]], inside[one[4]] = one[5], one[3]
        elif entries[one[1]].get(one[2]) == one[5] and not entries.get(entries[one[3]].get(one[4])):
            entries[one[3]][one[4]] = entries[one[1]].pop(one[2])
    return entries, data


def lay(entries, data, folder, at=0):
    """Write a state into a folder."""
    folder.mkdir()
    for name, inode in entries[at].items():
        if inode in entries:
            lay(entries, data, folder / name, inode)
        else:
            (folder / name).write_bytes(data[inode])


def allowed(happened):
    """Return the steps that may read back: the newest committed, and in a commit also the one that is being made."""
    done, making = [], None
    for kind, *rest in happened:
        if kind == "begin":
            making = tuple(rest)
        elif kind == "returned":
            done.append(tuple(rest))
            making = None
    newest = done[-1][0] if done else None
    return {newest} if making is None else {newest, making[0]}


def wrong(run, expected):
    """Return what is wrong with what reads back when the run is started again, None when all is well."""
    try:
        store.sweep(run)
        latest = store.find(run).latest
    except Exception as error:
        return f"reading raised {error!r}"
    step = latest.step if latest else None
    if step not in expected:
        return f"step {step} reads back, expected one of {expected}"
    if latest and any((latest.path / name).read_bytes() != b"".join(files_of(step)[name]) for name in NAMES):
        return f"step {step} has bytes of another"
    return None


def check(states, seed, folder):
    """Look at so many distinct states; return how many there were and what is wrong with the first bad one."""
    root = folder / "recorded"
    root.mkdir()
    found = operations(record(root), root)
    rng, seen, tries = random.Random(seed), set(), 0
    while len(seen) < states and tries < 200 * states:
        tries += 1
        point = rng.randrange(1, len(found) + 1)
        entries, data = crash(found, point, rng)
        expected = allowed(found[:point])
        key = hash((repr(entries), repr(sorted(data.items())), repr(expected)))
        if key in seen:
            continue
        seen.add(key)
        target = folder / "state"
        lay(entries, data, target)
        problem = wrong(target / "run", expected)
        shutil.rmtree(target)
        if problem:
            return len(seen), f"after {point} of {len(found)} operations ({found[point - 1][:2]}): {problem}"
    return len(seen), None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        count, problem = check(asked.states, asked.seed, Path(place).resolve())
    print(problem or f"{count} states, {count} read back")
    sys.exit(problem is not None)
