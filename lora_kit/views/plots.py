"""Plots as SVG files, by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def goodput_plot(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write a plot of the time that is lost, which is what goodput lacks to 100%, against the number of devices.

    Args:
        path: The SVG file.
        rows: For each number of devices `devices`, `mttf_hours`, and the goodput of each policy by its name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    devices = [row["devices"] for row in rows]
    for name in (name for name in rows[0] if name not in ("devices", "mttf_hours")):
        axes.plot(devices, [100 - 100 * row[name] for row in rows], marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.set_xticks(devices, [f"{count:,}" for count in devices], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel="GPUs", ylabel="time lost (100% - goodput)")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
