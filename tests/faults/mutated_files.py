"""Every file of a run, changed at random: its reader gives a value or says why the file is not valid, nothing else.

`python tests/faults/mutated_files.py --mutations 100000` changes each file so often and says what the readers did.
Bytes are flipped, cut, inserted and zeroed; JSON values are deleted, replaced, nested and renamed. A file with a
checksum of its own is also sealed again after the change, as a stranger can. A value that a reader accepts must keep
the promises that the program relies on, which are written down here once more, and read back as it was written.
"""

import argparse
import hashlib
import io
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from manifests import files_of, run_facts, step_facts, step_record

from lora_kit.errors import CheckpointError
from lora_kit.runs import formats
from lora_kit.runs.identity import own_identity
from lora_kit.runs.journal import EVENT, STEP_RECORD
from lora_kit.runs.lease import RECORD, Record
from lora_kit.runs.live import JOB_FILE, JobFile
from lora_kit.runs.manifest import (
    FileEntry,
    LineageEntry,
    Manifest,
    Origin,
    Resolved,
    Watch,
    manifest_bytes,
    parse_manifest,
)
from lora_kit.runs.run import RESULT_FILE

DIGEST = "0123456789abcdef" * 4
NUMBERS = (0, -1, 1, 0.5, -0.0, 1e308, 10**30, 2**63, 2**63 - 1, -(2**63), 10**4000, math.nan, math.inf, -math.inf)
TEXTS = ("", "0", "weird", "\x00", "../../etc/passwd", "/proc/self/environ", "..", "a/b", "x" * 300, "\ud800", "é\n")
OTHERS = (None, True, False, [], {}, [[]], {"": {}}, [None] * 50)
PIECES = (b"", b"\x00" * 40, b"[" * 300, b'{"a":' * 300, b"NaN", b"1e999", b"9" * 5000, b"\xff\xfe", b"\n", b'"', b"}")


@dataclass(frozen=True)
class File:
    """A file of a run.

    Attributes:
        samples: Contents that are valid.
        read: Reads a content.
        write: Serialises what `read` returns.
        promise: Checks what the rest of the program relies on.
        sealed: Whether the content ends with its own checksum.
        lines: Whether the content is a log: JSON in each line, of which invalid lines are skipped.
    """

    samples: tuple[bytes, ...]
    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    promise: Callable[[Any], None]
    sealed: bool = False
    lines: bool = False


def count(value: Any) -> None:
    assert type(value) is int and 0 <= value < 2**63, str(value)[:40]


def finite(value: Any) -> None:
    assert type(value) is float and math.isfinite(value), value


def figure(value: Any) -> None:
    if value is not None:
        finite(value)


def step_of(record: Any) -> None:
    for key in ("step", "examples", "tokens"):
        count(record[key])
    for key in ("loss", "learning_rate", "grad_norm"):
        figure(record[key])
    for key in ("tokens_per_second", "stall_seconds", "time"):
        finite(record[key])
        assert record[key] >= 0
    figure(record.get("held_out_loss"))


def manifest_of(value: Manifest) -> None:
    run, progress = value.run, value.progress
    for number in (2 * run.fencing_token, progress.step, progress.examples_seen, *progress.skipped_steps):
        count(number)
    assert value.order == (run.fencing_token, progress.step)
    figure(progress.held_out_loss)
    if progress.watch is not None:
        figure(progress.watch.best)
        count(progress.watch.step)
        count(progress.watch.waited)
    step_of(formats.parse(STEP_RECORD, progress.line.encode(), "line"))
    assert re.fullmatch(r"[0-9a-z]{1,32}", run.run_id) and run.claim.level in ("bitwise", "rounding")
    for name, entry in value.files.items():
        assert Path("folder", name).parent == Path("folder") and name not in ("", ".", "..") and "\0" not in name
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        count(entry.size)
    resolved = run.resolved
    assert resolved.layout in ("packed", "padded") and "weird" not in (resolved.attention, *(resolved.kernels or ()))
    assert all(1 <= number < 2**31 for number in (run.machine.processes, resolved.threads or 1))
    json.dumps(value.to_dict(), allow_nan=False)


def result_of(value: Any) -> None:
    for key in ("step", "checkpoint_bytes", "base_bytes"):
        count(value[key])
    finite(value["tokens_per_second"])
    for scores in value["metrics"].values():
        figure(scores["loss"])
        figure(scores["perplexity"])
        assert scores["exact_match"] is None or 0 <= scores["exact_match"] <= 1
        count(scores["examples"])
        count(scores["answered"])
    assert value["adapter"].startswith("checkpoints/step-") and ".." not in value["adapter"]


def lease_of(value: Record) -> None:
    assert type(value.token) is int and 0 <= value.token < 2**62 and re.fullmatch("[0-9a-z]{1,32}", value.run_id)
    finite(value.taken)
    if value.holder is not None:
        assert 1 <= value.holder.pid < 2**31 and type(value.holder.host) is str
        count(value.holder.started)


def job_of(value: JobFile) -> None:
    for number in (value.keep, value.keep_every or 1, *(side for shape in value.shapes.values() for side in shape)):
        count(number)
    finite(value.every_seconds)
    assert type(value.adapter_config) is str and value.keep_every != 0
    manifest_of(Manifest(value.facts, step_facts(1), {}))


def event_of(event: Any) -> None:
    assert math.isfinite(datetime.fromisoformat(event["time"]).timestamp()) and type(event["kind"]) is str
    for key in ("step", "steps", "reached"):
        count(event.get(key, 0))
    if event["kind"] in ("started", "resumed"):
        count(event["step"])
        count(event["steps"])
    if event["kind"] in ("restart", "failed"):
        assert type(event["cause"]) is str
    if event["kind"] == "fault":
        assert type(event["what"]) is str


def log_of(lines: tuple[dict[str, Any], ...], expected: Any, promise: Callable[[Any], None]) -> File:
    """Return a log; its reader returns the valid lines."""
    return File(
        samples=(b"".join(json.dumps(line).encode() + b"\n" for line in lines),),
        read=lambda data: [value for _, value in formats.valid_lines(expected, io.BytesIO(data))],
        write=lambda values: b"".join(json.dumps(value).encode() + b"\n" for value in values),
        promise=lambda values: [promise(value) for value in values] and None,
        lines=True,
    )


def json_of(samples: tuple[Any, ...], expected: Any, promise: Callable[[Any], None]) -> File:
    """Return a file of one JSON object."""
    return File(
        samples=tuple(json.dumps(sample, indent=1).encode() + b"\n" for sample in samples),
        read=lambda data: formats.parse(expected, data, "file"),
        write=expected.dump_json,
        promise=promise,
    )


WHOLE = Manifest(
    run_facts(
        origin=Origin("0123456789abcdef", 4, DIGEST),
        lineage=(LineageEntry(3, "train.steps", 3, 6), LineageEntry(3, "optim.betas", [0.9, 0.99], None)),
        resolved=Resolved(2, "sdpa", "padded", 2048, True, ("lora", "mlp")),
        template="{{ messages }} ü",
        computed_by={"backend": "c"},
    ),
    step_facts(7, skipped_steps=(2, 7), held_out_loss=0.25, watch=Watch("loss", 0.25, 7, 0)),
    {name: FileEntry(len(b"".join(pieces)), DIGEST) for name, pieces in files_of().items()},
)
SCORES = {"loss": 1.5, "perplexity": 4.5, "exact_match": None, "examples": 9, "answered": 0}
RESULT = {"step": 8, "metrics": {"base": SCORES, "adapter": SCORES | {"exact_match": 0.5, "answered": 4}}}
RESULT |= {"tokens_per_second": 50.5, "checkpoint_bytes": 9000, "base_bytes": 90000}
RESULT |= {"adapter": "checkpoints/step-00000008", "best": None}
AT = {"time": "2026-01-01T00:00:00.000+00:00"}
EVENTS = (
    AT | {"kind": "started", "step": 0, "steps": 8, "run_id": "0123456789abcdef", "launched": 1000.0, "reached": 0},
    AT | {"kind": "sample", "step": 2, "prompt": "a", "expected": "b", "answer": "c"},
    AT | {"kind": "skipped", "step": 3, "loss": "nan", "examples": [1, 2]},
    AT | {"kind": "estimate", "step": 3, "memory_measured_bytes": 9000, "seconds_per_step_measured": None},
    AT | {"kind": "restart", "step": 4, "cause": "process 0: killed by SIGKILL"},
    AT | {"kind": "fault", "step": 4, "what": "disk full"},
    AT | {"kind": "resumed", "step": 4, "steps": 8, "reached": 4},
)
LEASE = {"token": 3, "run_id": "0123456789abcdef", "taken": 1000.5, "holder": asdict(own_identity())}
JOB = asdict(JobFile({"A": (2, 10)}, "{}", WHOLE.run, 30.0, 3, None, best=False))
FILES = {
    "lease.json": json_of((LEASE, LEASE | {"holder": None}), RECORD, lease_of),
    "job.json": json_of((JOB, JOB | {"keep_every": 5}), JOB_FILE, job_of),
    "manifest.json": File(
        samples=(manifest_bytes(WHOLE.to_dict()), manifest_bytes(Manifest(run_facts(), step_facts(1), {}).to_dict())),
        read=lambda data: parse_manifest(data, "file"),
        write=lambda value: manifest_bytes(value.to_dict()),
        promise=manifest_of,
        sealed=True,
    ),
    "result.json": json_of((RESULT, RESULT | {"metrics": {}}), RESULT_FILE, result_of),
    "metrics.jsonl": log_of(
        (step_record(1), step_record(2, loss=math.nan), step_record(3, held_out_loss=0.5, own=1)), STEP_RECORD, step_of
    ),
    "events.jsonl": log_of(EVENTS, EVENT, event_of),
}


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return a content with a change somewhere in its bytes."""
    begin, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    kind = rng.randrange(6)
    if kind == 0 and data:
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:begin]
    if kind == 2:
        return data[:begin] + rng.choice(PIECES) + data[begin:]
    if kind == 3:
        return data[:begin] + bytes(end - begin) + data[end:]
    if kind == 4:
        return data[:begin] + data[end:]
    return data[:begin] + rng.randbytes(rng.randrange(20)) + data[begin:]


def changed_value(value: Any, rng: random.Random) -> Any:
    """Change a JSON value somewhere inside; return it, or another value in its place."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if inner and rng.random() < 0.85:
        key, kind = rng.choice(inner), rng.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice(TEXTS)] = value.pop(key)
        else:
            value[key] = changed_value(value[key], rng)
        return value
    kind = rng.randrange(6)
    if kind == 0:
        return [value]
    if kind == 1:
        return str(value) if isinstance(value, (int, float)) else 7
    if kind == 2:
        for _ in range(rng.choice((1, 5, 150))):
            value = {"a": value}
        return value
    return rng.choice((NUMBERS, TEXTS, OTHERS)[rng.randrange(3)])


def sealed(text: bytes) -> bytes:
    """Return a text with the checksum that belongs to it, whatever the text is."""
    digest = hashlib.sha256(text).hexdigest().encode()
    return text.removesuffix(b"\n}\n") + b',\n "sha256": "' + digest + b'"\n}\n'


def mutation(file: File, rng: random.Random) -> bytes:
    """Return a changed content of a file."""
    data, as_bytes = rng.choice(file.samples), rng.random() < 0.3
    if file.sealed and rng.random() < 0.9:
        plain = re.sub(rb',\n "sha256": "[0-9a-f]{64}"\n\}\n$', b"\n}\n", data)
        if as_bytes:
            return sealed(changed_bytes(plain, rng))
        return sealed(json.dumps(changed_value(json.loads(plain), rng), indent=1).encode() + b"\n")
    if as_bytes or file.sealed:
        return changed_bytes(data, rng)
    texts = data.splitlines() if file.lines else [data]
    place = rng.randrange(len(texts))
    texts[place] = json.dumps(changed_value(json.loads(texts[place]), rng)).encode()
    return b"\n".join(texts) + b"\n"


def try_reader(name: str, mutations: int, seed: int) -> Counter[str]:
    """Read so many changed contents of a file; return how often the reader did what.

    Raises:
        AssertionError: The reader did neither of the two things that it may do.
    """
    file, rng, told = FILES[name], random.Random(f"{name} {seed}"), Counter[str]()
    for _ in range(mutations):
        data = mutation(file, rng)
        began = time.perf_counter()
        try:
            value = file.read(data)
        except CheckpointError as error:
            told["refused"] += 1
            assert str(error).isprintable() and len(str(error)) < 1000, error
            continue
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}: {data[:2000]!r}") from error
        finally:
            told["slowest, ms"] = max(told["slowest, ms"], math.ceil(1000 * (time.perf_counter() - began)))
        told["accepted"] += 1
        try:
            file.promise(value)
            again = file.read(file.write(value))
            assert again == value, "it reads back as another value"
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}: accepted {data[:2000]!r}") from error
    return told


def main() -> int:
    """Try all readers, say what they did, and return 1 if one did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000, help="of each file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    wrong, total = [], Counter[str]()
    for name in FILES:
        try:
            total += try_reader(name, asked.mutations, asked.seed)
        except AssertionError as error:
            wrong.append(name)
            print(error, file=sys.stderr)
    mutated = asked.mutations * len(FILES)
    print(f"{len(wrong)} of {len(FILES)} readers failed on {mutated:,} changed files; {total['refused']:,} refused")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
