"""Measure one system with one setting, in this process: train, then the floor; a row of the result as JSON.

With --paired the floor is measured before every step as well: where the rate of a machine changes within minutes,
it changes both, and only their ratio says something. The floor's matrices then count as memory.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
FLOOR_TRIES = 2  # of every shape, before a step
sys.path[:0] = [str(HERE), str(HERE.parent / "resilience")]

import torch  # noqa: E402
from floor import Floor, measure_floor  # noqa: E402
from measured import Measured, Memory, limit_memory  # noqa: E402
from sizes import SIZES, WARM_UP_STEPS, Counts, Work  # noqa: E402
from systems import Setting, setting_of  # noqa: E402


def measure(work: Work, system: str, name: str, setting: Setting, *, paired: bool = False) -> dict[str, Any]:
    """Train, and return what a row says."""
    memory = Memory()
    memory.watch_loading()
    device, floors = torch.device("cuda" if torch.cuda.is_available() else "cpu"), list[Floor]()
    floor_now = partial(measure_floor, SIZES[work.size].config, device)
    between = (lambda: floors.append(floor_now(best_of=FLOOR_TRIES))) if paired else None
    measured = _run(work, system, setting, between)
    peak, others = memory.above_base(), memory.others()
    floor = floor_now()
    timed = sum(measured.counts[WARM_UP_STEPS:], Counts((), 0))
    steps = measured.seconds
    seconds = sum(steps[WARM_UP_STEPS:])
    shares = [one.seconds(count) / took for one, count, took in zip(floors, measured.counts, steps, strict=False)]
    shares = shares[WARM_UP_STEPS:]
    supervised = [one.supervised for one in measured.counts]
    return {
        "system": system,
        "settings": name,
        "options": asdict(setting),
        "tokens_per_second": round(timed.tokens / seconds, 1),
        "supervised_tokens_per_second": round(timed.supervised / seconds, 1),
        "peak_bytes": peak,
        "floor_share": round(median(shares) if shares else floor.seconds(timed) / seconds, 4),
        "floor_share_of_each_step": [round(share, 4) for share in shares],
        "floor_tokens_per_second_before_each_step": [
            round(count.tokens / one.seconds(count), 1)
            for one, count in zip(floors[WARM_UP_STEPS:], measured.counts[WARM_UP_STEPS:], strict=False)
        ],
        "floor_tokens_per_second": round(timed.tokens / floor.seconds(timed), 1),
        "loss": round(measured.losses[-1], 5),
        "losses": [round(loss, 5) for loss in measured.losses],
        "mean_loss": round(_mean(measured.losses, supervised), 5),
        "tokens": timed.tokens,
        "seconds": round(seconds, 3),
        "step_seconds": [round(took, 3) for took in steps],
        "model_flops_share": round(
            floor.model_flops(timed, recomputed=setting.recomputes) / seconds / floor.flops_per_second, 4
        ),
        "stall_seconds": measured.stalls[WARM_UP_STEPS:],
        "flops_per_second": round(floor.flops_per_second),
        "threads": measured.threads,
        "others_share": round(others, 3),
        "note": SIZES[work.size].note,
    }


def _run(work: Work, system: str, setting: Setting, between: Callable[[], Any] | None) -> Measured:
    if system == "lora_kit":
        import ours

        return ours.run(work, setting, between)
    import peers

    return {"trl": peers.run_trl, "trainer": peers.run_trainer, "unsloth": peers.run_unsloth}[system](work, setting)


def _mean(losses: list[float], weights: list[int]) -> float:
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def main() -> None:
    """Measure what the command line asks for and write the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("size")
    parser.add_argument("batch", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("system")
    parser.add_argument("setting")
    parser.add_argument("row", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--paired", action="store_true", help="measure the floor before every step too; lora_kit only")
    parser.add_argument("--gpu", action="store_true", help="the settings for a GPU")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    limit_memory()
    setting = setting_of(asked.system, asked.setting, asked.set, on_gpu=asked.gpu)
    work = Work(asked.folder, asked.size, asked.batch, asked.steps)
    row = measure(work, asked.system, asked.setting, setting, paired=asked.paired)
    asked.row.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # compiled code and data loaders may take their time to leave
