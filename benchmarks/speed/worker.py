"""Measure one system with one setting, in this process: train, then the floor; a row of the result as JSON."""

import argparse
import json
import os
import sys
import warnings
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "resilience")]

import torch  # noqa: E402
from floor import measure_floor  # noqa: E402
from measured import Measured, Memory, limit_memory  # noqa: E402
from sizes import SIZES, WARM_UP_STEPS, Counts, Work  # noqa: E402
from systems import Setting, setting_of  # noqa: E402


def measure(work: Work, system: str, name: str, setting: Setting) -> dict[str, Any]:
    """Train, and return what a row says."""
    memory = Memory()
    memory.watch_loading()
    measured = _run(work, system, setting)
    peak, others = memory.above_base(), memory.others()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    floor = measure_floor(SIZES[work.size].config, device)
    timed = sum(measured.counts[WARM_UP_STEPS:], Counts((), 0))
    seconds = measured.ends[-1] - measured.ends[WARM_UP_STEPS - 1]
    supervised = [one.supervised for one in measured.counts]
    return {
        "system": system,
        "settings": name,
        "options": asdict(setting),
        "tokens_per_second": round(timed.tokens / seconds, 1),
        "supervised_tokens_per_second": round(timed.supervised / seconds, 1),
        "peak_bytes": peak,
        "floor_share": round(floor.seconds(timed) / seconds, 4),
        "floor_tokens_per_second": round(timed.tokens / floor.seconds(timed), 1),
        "loss": round(measured.losses[-1], 5),
        "losses": [round(loss, 5) for loss in measured.losses],
        "mean_loss": round(_mean(measured.losses, supervised), 5),
        "tokens": timed.tokens,
        "seconds": round(seconds, 3),
        "step_seconds": [round(later - sooner, 3) for sooner, later in pairwise([measured.began, *measured.ends])],
        "model_flops_share": round(
            floor.model_flops(timed, recomputed=setting.recomputes) / seconds / floor.flops_per_second, 4
        ),
        "stall_seconds": measured.stalls[WARM_UP_STEPS:],
        "flops_per_second": round(floor.flops_per_second),
        "threads": measured.threads,
        "others_share": round(others, 3),
        "note": SIZES[work.size].note,
    }


def _run(work: Work, system: str, setting: Setting) -> Measured:
    if system == "lora_kit":
        import ours

        return ours.run(work, setting)
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
    parser.add_argument("--gpu", action="store_true", help="the settings for a GPU")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    limit_memory()
    setting = setting_of(asked.system, asked.setting, asked.set, on_gpu=asked.gpu)
    work = Work(asked.folder, asked.size, asked.batch, asked.steps)
    row = measure(work, asked.system, asked.setting, setting)
    asked.row.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # compiled code and data loaders may take their time to leave
