"""Plots as SVG files, by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_kit.errors import InputError


def goodput_plot(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write a plot of goodput against the number of devices.

    Args:
        path: The SVG file.
        rows: For each number of devices `devices`, `mttf_hours`, and the goodput of each policy by its name.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib; install it with: pip install 'lora_kit[plot]'") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    devices = [row["devices"] for row in rows]
    for name in (name for name in rows[0] if name not in ("devices", "mttf_hours")):
        axes.plot(devices, [100 * row[name] for row in rows], marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [f"{count:,}" for count in devices], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel="GPUs", ylabel="goodput, %", ylim=(0, 101))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, format="svg", metadata={"Date": None})
