"""Two hosts train a run together; one is killed, or the network is cut, again and again: does the run go on, and where?

The hosts are namespaces of this machine (tests/network.py). Network, processes, host name and shared memory are their
own, and the disk is common. The store of the rendezvous is on neither host. torchrun runs on both and is never touched:
a killed host is replaced by a new one, where the same command is started. No checkpoint is due before the last step. So
after the loss of the holder of the lease a run can only go on from the shared memory of the host that is left; if that
one holds the lease, its keeper has also written a checkpoint.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ground import finish, lines, make_base, make_data, make_recipe, ours, state_hash

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from network import Host, Network, NotPossible, torchrun
from runs import with_faults

from lora_kit.runs import lease

STEPS = 400
STEP_SECONDS = 0.1  # how much longer a step takes, so that kills hit different steps
COLLECTIVE_SECONDS = 10
DEAD_SECONDS = 12.0  # without a heartbeat, instead of 60
LIMIT_SECONDS = 300.0  # a guard against hangs
SET = ["--set", f"launch.collective_timeout={COLLECTIVE_SECONDS}", "--set", "launch.rendezvous_timeout=60"]


class Stuck(Exception):
    """The run does not go on."""


def measure(folder: Path, *, kills: int = 20, cuts: int = 5, seed: int = 0) -> dict[str, Any]:
    """Return how many kills of a host and how many cuts of the network a run survived by itself, and what was lost."""
    make_base(folder, "tiny")
    data = make_data(folder, 200)
    recipe = make_recipe(folder, "hosts", "tiny", data, steps=STEPS, every=1000000, seconds=1e6)
    assert finish(ours(recipe, folder / "hosts-undisturbed", processes=2)) == 0
    expected, rng = state_hash(folder / "hosts-undisturbed", STEPS), random.Random(seed)
    try:
        network = Network(folder)
    except NotPossible as why:
        return {"skipped": str(why)}
    try:
        killed = Run(network, folder, recipe, "kills", 2, rng).survive(Run.kill_a_host, kills, expected)
        cut = Run(network, folder, recipe, "cuts", "1:2", rng).survive(Run.cut_the_network, cuts, expected)
    finally:
        network.close()
    limits = {"collective_timeout": COLLECTIVE_SECONDS, "seconds_without_a_heartbeat": DEAD_SECONDS}
    return {"kills": killed, "cuts": cut} | limits | {"cores": os.cpu_count()}


class Run:
    """A run on two hosts, and what is done to them.

    Args:
        network: Where the hosts are.
        folder: The folder of the measurement.
        recipe: The recipe.
        name: The name of the run.
        hosts: How many hosts torchrun needs.
        rng: Decides the moments and the victims.
    """

    def __init__(
        self, network: Network, folder: Path, recipe: Path, name: str, hosts: int | str, rng: random.Random
    ) -> None:
        self.network, self.log, self.out, self.rng = network, folder / f"{name}.log", folder / name, rng
        self.alone = ["-m", "lora_kit", "train", recipe, "--out", self.out, *SET]
        self.together = torchrun(recipe, self.out, *SET, hosts=hosts, identity=name)
        self.hosts = [self.network.host(), self.network.host()]
        for host in self.hosts:
            self.start(host, self.together)

    def start(self, host: Host, command: Sequence[object]) -> Any:
        """Start a command on a host and return the process."""
        faults = {"FAULTS_SLEEP": str(STEP_SECONDS), "FAULTS_DEAD": str(DEAD_SECONDS), "PYTHONPATH": with_faults()}
        return host.start(*command, log=self.log, environment={"OMP_NUM_THREADS": "1"} | faults, fresh=True)

    def shown(self) -> int:
        """Return how many lines metrics.jsonl has."""
        return len(lines(self.out / "metrics.jsonl"))

    def starts(self) -> list[dict[str, Any]]:
        """Return the events of all starts."""
        return [event for event in lines(self.out / "events.jsonl") if event["kind"] in ("started", "resumed")]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a function returns True.

        Raises:
            Stuck: That takes too long.
        """
        end = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise Stuck
            time.sleep(0.02)

    def victim(self) -> tuple[Host, str]:
        """Wait for a random moment of a random step; return a random host and whether it holds the lease."""
        after = self.shown() + self.rng.randrange(1, 8)
        self.wait(lambda: self.shown() >= after)
        time.sleep(self.rng.uniform(0, 2 * STEP_SECONDS))
        held, host = lease.read(self.out / lease.FILE), self.rng.choice(self.hosts)
        holds = held is not None and held.holder is not None and held.holder.host == host.name
        return host, "holds the lease" if holds else "does not hold the lease"

    def has_gone_on(self, starts: int) -> bool:
        """Return whether the run has finished a step after a start that followed so many others."""
        made = self.starts()
        return len(made) > starts and self.shown() > made[-1]["step"]

    def kill_a_host(self) -> Iterator[str]:
        """Kill a host, start another, wait for the next step; yield what was done, when it is done and at the end."""
        host, holds = self.victim()
        silent = self.rng.random() < 0.5
        if silent:
            host.cut_off()
        host.kill()
        starts = len(self.starts())
        yield f"{holds}, {'cut off before' if silent else 'connected'}"
        self.hosts[self.hosts.index(host)] = new = self.network.host()
        self.start(new, self.together)
        self.wait(lambda: self.has_gone_on(starts))

    def cut_the_network(self) -> Iterator[str]:
        """Cut a host off until the other has gone on without it and what is started on it was refused; then plug it in.

        It yields what was done, when it is done.
        """
        host, holds = self.victim()
        starts = len(self.starts())
        host.cut_off()
        yield holds
        self.wait(lambda: self.has_gone_on(starts))
        refused = self.start(host, self.alone)
        host.jobs.remove(refused)
        if refused.wait(LIMIT_SECONDS) != 2:
            raise Stuck
        host.plug_in()
        self.wait(lambda: len(self.starts()) >= starts + 2 and self.starts()[-1]["processes"] == 2)

    def survive(self, blow: Callable[["Run"], Iterator[str]], blows: int, expected: str) -> dict[str, Any]:
        """Strike so many times, let the run end, and return what was seen."""
        seconds, codes = dict[str, list[float]](), list[int]()
        try:
            self.wait(lambda: self.shown() >= 3)
            for _ in range(blows):
                doing = blow(self)
                what, began = next(doing), time.monotonic()
                for _ in doing:
                    pass
                seconds.setdefault(what, []).append(time.monotonic() - began)
            self.wait(lambda: self.shown() >= STEPS)
            codes = [host.jobs[-1].wait(LIMIT_SECONDS) for host in self.hosts]
        except Stuck:
            print(self.log.read_text()[-5000:], file=sys.stderr)
        resumed = [event for event in self.starts() if event["kind"] == "resumed"]
        return {
            "asked": blows,
            "went_on_by_themselves": sum(map(len, seconds.values())),
            "finished_steps_lost": sum(max(0, event["reached"] - event["step"]) for event in resumed),
            "resumes": len(resumed),
            "resumes_from_a_live_snapshot": sum(event["from_live"] for event in resumed),
            "each_step_once": [line["step"] for line in lines(self.out / "metrics.jsonl")] == [*range(1, STEPS + 1)],
            "final_bytes_equal": codes == [0, 0] and state_hash(self.out, STEPS) == expected,
            "seconds": {
                what: {"times": len(those), "median": round(statistics.median(those), 1)}
                for what, those in sorted(seconds.items())
            },
        }
