"""The share of a job's time that goes into steps it keeps, if devices fail at random.

The time between two failures is exponentially distributed. A failure loses what was computed since the last save; then
the job needs some time until it computes again, in which it may fail again. The expected time from one save to the next
is then known in closed form (Daly, 2006, "A higher order estimate of the optimum checkpoint interval for restart
dumps", equation 20).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, expm1, log, sqrt
from pathlib import Path

from lora_kit.errors import InputError
from lora_kit.runs.certificate import FILE, FOLDER, Certificate, read_certificate
from lora_kit.runs.journal import Journal

# Mean hours between failures of jobs on 1,024 and 16,384 GPUs (Kokolis et al., 2024, "Revisiting Reliability in
# Large-Scale Machine Learning Research Clusters"; the second is their projection)
PUBLISHED = ((1_024, 7.9), (16_384, 1.8))
LARGEST_EXPONENT = 700.0  # of exp; beyond, the goodput is zero in every printed digit
SUDDEN = {"kill", "keeper", "both", "write"}  # the faults of a drill in which processes die at once


@dataclass(frozen=True)
class Policy:
    """How a job saves and recovers. All times are in seconds.

    Attributes:
        name: The name in tables.
        interval: The time of computing between two saves.
        stall: The time that training waits for a save.
        resume: The time from a failure until training computes again.
    """

    name: str
    interval: float
    stall: float
    resume: float


@dataclass(frozen=True)
class Measured:
    """What a run measured, in seconds; None where it did not.

    Attributes:
        step: The median time of a step.
        stall: The mean time that a step waited for its save.
        resume: The median time from a kill in the run's drill to the next step, less that step.
    """

    step: float | None
    stall: float | None
    resume: float | None


def goodput(policy: Policy, mttf: float) -> float:
    """Return the expected share of the time that is computing which is kept, from 0 to 1.

    Args:
        policy: How the job saves and recovers.
        mttf: The mean time between failures of the whole job, in seconds.
    """
    exponent = (policy.interval + policy.stall) / mttf
    if exponent + policy.resume / mttf > LARGEST_EXPONENT:
        return 0.0
    return policy.interval / (mttf * exp(policy.resume / mttf) * expm1(exponent))


def best_interval(stall: float, mttf: float) -> float:
    """Return the time of computing between two saves that loses least, in seconds (Young, 1974)."""
    return sqrt(2 * stall * mttf)


def job_mttf(devices: int, hours_of_a_device: float | None = None) -> float:
    """Return the mean time between failures of a job, in seconds.

    Args:
        devices: The number of GPUs of the job.
        hours_of_a_device: The mean time between failures of one GPU with its share of the machine. None takes the
            published figures of large clusters: between them on a straight line of the logarithms, below the smaller
            and above the larger job in inverse proportion to the number of GPUs.
    """
    if hours_of_a_device is not None:
        return 3600 * hours_of_a_device / devices
    (small, most), (large, least) = PUBLISHED
    if devices <= small:
        return 3600 * most * small / devices
    if devices >= large:
        return 3600 * least * large / devices
    return 3600 * most * (devices / small) ** (log(least / most) / log(large / small))


def measured(run: Path) -> Measured:
    """Return what a run has measured, and its drill if there is one.

    Raises:
        InputError: The folder has no finished step and no certificate of a drill.
        CheckpointError: A log or the certificate cannot be read.
    """
    steps = Journal(run).read_metrics()
    certificate = read_certificate(run / FOLDER / FILE) or read_certificate(run / FILE)
    if not steps and certificate is None:
        raise InputError(f"{run}: no finished step and no certificate; give the folder of a run or of a drill")
    seconds = [record["tokens"] / record["tokens_per_second"] for record in steps if record["tokens_per_second"]]
    return Measured(
        statistics.median(seconds) if seconds else None,
        statistics.fmean(record["stall_seconds"] for record in steps) if steps else None,
        _resume(certificate) if certificate else None,
    )


def _resume(certificate: Certificate) -> float | None:
    """Return the median time from a kill to the next step, without that step, in seconds; None without a kill."""
    times = [each.seconds - each.parts.get("step", 0.0) for each in certificate.faults if each.fault in SUDDEN]
    return statistics.median(times) if times else None


def table(
    live: Sequence[Policy],
    periodic: Policy,
    devices: Sequence[int],
    hours_of_a_device: float | None,
) -> list[dict[str, float]]:
    """Return a row for each number of devices: `devices`, `mttf_hours`, and the goodput of each policy by its name.

    Args:
        live: Policies that save every step.
        periodic: The policy to compare with, as it is and with the interval that loses least.
        devices: The numbers of devices.
        hours_of_a_device: As in `job_mttf`.
    """
    rows = []
    for count in devices:
        mttf = job_mttf(count, hours_of_a_device)
        best = replace(periodic, name="at the best interval", interval=best_interval(periodic.stall, mttf))
        shares = {policy.name: goodput(policy, mttf) for policy in (*live, periodic, best)}
        rows.append({"devices": count, "mttf_hours": mttf / 3600} | shares)
    return rows
