"""What a remote costs: a resume from an S3-compatible store into an empty folder, and steps beside a slow store.

    python benchmarks/resilience/remote.py serve PORT LATENCY SHARE     # the store: moto's server, with faults

The steps are measured in one run whose uploading process is suspended in every other block, so that a machine whose
speed drifts slows both sides alike. The store answers every request after 10 s, and 30% of them with status 503.
"""

import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ground import ENVIRONMENT, kill_all, lines, make_base, make_data, make_recipe, median, ours, wait_for

RANK = 18  # 30 M base: 17 MB of weights and moments
LATENCY, SHARE = 10.0, 0.3
BLOCK_SECONDS, BLOCKS = 3.0, 40  # the store's answer to a suspended process must not come too late
ALTERNATING = """
import json, signal, sys, threading, time
import psutil
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop, publisher

recipe, out, seconds, blocks = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
publish, times, marks, busy = publisher.Publisher.publish, [], [], []

def stamped(self, facts, *, due):
    times.append(time.perf_counter())
    return publish(self, facts, due=due)

def uploader():
    for child in psutil.Process().children(recursive=True):
        if "lora_kit.artifacts.remotes" in child.cmdline():
            return child

def alternate():
    while uploader() is None:
        time.sleep(0.1)
    time.sleep(seconds)
    busy.append(sum(uploader().cpu_times()[:2]))
    for block in range(blocks):
        sending = block % 2 == 0
        uploader().send_signal(signal.SIGCONT if sending else signal.SIGSTOP)
        marks.append((time.perf_counter(), sending))
        time.sleep(seconds)
    marks.append((time.perf_counter(), None))
    busy.append(sum(uploader().cpu_times()[:2]))
    uploader().send_signal(signal.SIGCONT)
    signal.raise_signal(signal.SIGTERM)

publisher.Publisher.publish = stamped
threading.Thread(target=alternate, daemon=True).start()
try:
    loop.train(load_recipe(recipe), out)
except BaseException as error:
    print(type(error).__name__)
print(json.dumps([times, marks, busy]))
"""


def resume(folder: Path, *, trials: int = 5) -> dict:
    """Return the seconds from the command to the first step, with the checkpoint at the store and on local disk."""
    make_base(folder, "tiny")
    data = make_data(folder, 400)
    recipe = make_recipe(folder, "remote", "30M", data, steps=4, rank=RANK, batch=4, every=2)
    with _store(0.0, 0.0) as environment:
        more = ("--set", "checkpoint.remote=s3://bucket/run")
        first = folder / "remote-first"
        command = ours(recipe, first, *more, "--set", "train.steps=2")
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        size = sum(path.stat().st_size for path in first.rglob("step-00000002/*.safetensors"))
        seconds: dict[str, list[float]] = {"remote": [], "local": []}
        for number in range(trials):
            for how in seconds:
                out = folder / f"remote-{how}-{number}"
                if how == "local":
                    shutil.copytree(first / "checkpoints", out / "checkpoints")
                options = more if how == "remote" else ()
                command = ours(recipe, out, *options, "--accept", "train.steps")
                began = time.time()
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                assert wait_for(
                    lambda out=out: any(line["step"] == 3 for line in lines(out / "metrics.jsonl")), process
                )
                line = next(line for line in lines(out / "metrics.jsonl") if line["step"] == 3)
                seconds[how].append(round(line["time"] - line["tokens"] / line["tokens_per_second"] - began, 3))
                kill_all(process)
    differences = [remote - local for remote, local in zip(seconds["remote"], seconds["local"], strict=True)]
    medians = {how: round(median(each), 3) for how, each in seconds.items()}
    return {
        "bytes": size,
        "start_seconds": medians,
        "start_seconds_all": seconds,
        "resume_seconds_above_local": round(median(differences), 3),
    }


def steps(folder: Path, *, blocks: int = BLOCKS) -> dict:
    """Return the ratio of whole steps with uploads to a slow store and without."""
    make_base(folder, "tiny")
    data = make_data(folder, 400)
    recipe = make_recipe(folder, "slow", "30M", data, steps=100000, rank=RANK, batch=1, seconds=5)
    text = recipe.read_text().replace("keep: 2}", "keep: 2, remote: 's3://bucket/slow'}")
    recipe.write_text(text)
    with _store(LATENCY, SHARE) as environment:
        printed = subprocess.run(
            [sys.executable, "-c", ALTERNATING, str(recipe), str(folder / "slow"), str(BLOCK_SECONDS), str(blocks)],
            check=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout
    times, marks, busy = json.loads(printed.splitlines()[-1])
    found: dict[bool, list[float]] = {True: [], False: []}
    blocks_seconds: dict[bool, list[float]] = {True: [], False: []}
    for (begin, sending), (end, _) in itertools.pairwise(marks):
        inside = [moment for moment in times if begin <= moment < end]
        seconds = [later - sooner for sooner, later in itertools.pairwise(inside)]
        found[sending] += seconds
        blocks_seconds[sending].append(sum(seconds) / len(seconds) if seconds else 0.0)
    events = lines(folder / "slow" / "events.jsonl")
    ratios = [one / other for one, other in zip(*blocks_seconds.values(), strict=True) if one and other]
    sent = [event for event in events if event["kind"] == "uploaded"]
    return {
        "latency_seconds": LATENCY,
        "share_of_errors": SHARE,
        "steps": len(found[True]) + len(found[False]),
        "step_seconds": round(median(found[True]), 4),
        "step_with_over_without": round(median(ratios), 4),  # of neighbouring blocks
        "median_step_with_over_without": round(median(found[True]) / median(found[False]), 4),
        # of the time in which it was not suspended: what uploads can cost at most on a core that computes too
        "cpu_share_of_uploads": round((busy[1] - busy[0]) / ((marks[-1][0] - marks[0][0]) / 2), 4),
        "uploads": len(sent),
        "checkpoints": sum(event["kind"] == "checkpoint" for event in events),
        "upload_seconds": [event["seconds"] for event in sent],
    }


@contextmanager
def _store(latency: float, share: float) -> Iterator[dict[str, str]]:
    """Run the store in a process of its own; yield the environment that finds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = ENVIRONMENT | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, __file__, "serve", str(port), str(latency), str(share)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield environment
    finally:
        kill_all(process)


def serve(port: int, latency: float, share: float) -> None:
    """Serve S3 with one bucket; each request of a run takes `latency` seconds, and this share of them fails."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.test import Client

    os.nice(19)  # it stands for another machine
    store, chance = DomainDispatcherApplication(create_backend_app), random.Random(0)

    def answer(environ, start_response):  # type: ignore[no-untyped-def]
        time.sleep(latency)
        if chance.random() < share:
            start_response("503 as asked for", [("Content-Length", "0")])
            return [b""]
        return store(environ, start_response)

    Client(store).put("/bucket", headers={"Host": f"127.0.0.1:{port}"})
    server = make_server("127.0.0.1", port, answer, threaded=True)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
    else:
        print(json.dumps(resume(Path(sys.argv[1])) | steps(Path(sys.argv[1])), indent=1))
