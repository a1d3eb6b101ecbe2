"""Another number of processes in the middle of an epoch, nothing else changed: which examples, which bytes?"""

from collections import Counter
from itertools import chain
from pathlib import Path

from ground import finish, kill_all, lines, make_base, make_data, make_recipe, ours, peer, start, state_hash, wait_for

EXAMPLES, BATCH, STEPS = 160, 8, 20  # one epoch
CHANGES = ((2, 1), (1, 2), (1, 4))


def measure(folder: Path) -> dict:
    """Return how many examples of an epoch were repeated and missed, and whether the bytes are the same."""
    base, data = make_base(folder, "tiny"), make_data(folder, EXAMPLES)
    recipe = make_recipe(folder, "elastic", "tiny", data, steps=STEPS, batch=BATCH)
    assert finish(ours(recipe, folder / "elastic-undisturbed")) == 0
    expected, found = state_hash(folder / "elastic-undisturbed", STEPS), {}
    for before, after in CHANGES:
        out = folder / f"elastic-{before}-{after}"
        process = start(ours(recipe, out, processes=before), folder / "elastic.log")
        assert wait_for(lambda out=out: len(lines(out / "metrics.jsonl")) >= STEPS // 2, process)
        process.terminate()
        assert process.wait(60) == 75
        reached = len(lines(out / "metrics.jsonl"))
        assert finish(ours(recipe, out, processes=after), folder / "elastic.log") == 0
        seen = [one["examples"] for one in lines(out / "metrics.jsonl")]
        found[f"{before} to {after}"] = {
            "ours": {
                "changed_after_step": reached,
                "examples_after_each_step_as_planned": seen == list(range(BATCH, EXAMPLES + 1, BATCH)),
                "final_bytes_equal": state_hash(out, STEPS) == expected,
            },
            "trainer": _peer(folder, base, data, before, after),
        }
    return found


def _peer(folder: Path, base: Path, data: Path, before: int, after: int) -> dict:
    out = folder / f"elastic-peer-{before}-{after}"
    arguments = ("--epochs", 1, "--batch", 4, "--save-steps", 5)
    process = start(peer(base, data, out, *arguments, processes=before), folder / "elastic-peer.log")
    assert wait_for(lambda: (out / "checkpoint-10" / "trainer_state.json").is_file(), process)
    kill_all(process)
    saved = max(
        int(path.name.split("-")[1])
        for path in out.glob("checkpoint-*")
        if (path / "rng_state.pth").is_file() or (path / "rng_state_0.pth").is_file()
    )
    first = [lines(path)[:saved] for path in out.glob("seen.*.jsonl")]
    for path in out.glob("seen.*.jsonl"):
        path.unlink()
    code = finish(peer(base, data, out, *arguments, processes=after), folder / "elastic-peer.log")
    second = [lines(path) for path in out.glob("seen.*.jsonl")]
    counts = Counter(chain.from_iterable(chain.from_iterable([*first, *second])))
    return {
        "checkpoint": saved,
        "examples": EXAMPLES,
        "repeated": sum(times > 1 for times in counts.values()),
        "never_seen": EXAMPLES - len(counts),
        "exit_code": code,
    }
