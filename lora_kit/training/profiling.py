"""How the time of a step divides into parts: a few steps under the profiler of torch, summed by part.

A part is a named range of time. `part` labels functions that the loop calls, and hooks label modules of the model, both
only while the profiler runs. Operations of the backward pass have no label: each carries the sequence number of its
forward operation and is counted for the same part.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from lora_kit.kernels.attention import inner_of
from lora_kit.training.job import Job
from lora_kit.views.console import Console

WARM_UP, PROFILED = 2, 3  # steps after a start: the first steps are slower and are not profiled
# the prefix of lora_kit's ranges in the trace, and the name of the range that contains them
PREFIX, STEP = "part: ", "step"
BACKWARD = "autograd::engine::evaluate_function: "  # the prefix of backward operations in the trace
MODEL = ("attention", "adapters and linear layers", "MLP", "norm", "rest of the model")
LOOP = ("loss", "rest of backward", "reduction", "optimizer", "publishing", "data")
OTHER = "other"

Call = TypeVar("Call", bound=Callable[..., Any])


def part(name: str, function: Call) -> Call:
    """Return the function, labelled as a part while the profiler runs."""
    if not torch.autograd._profiler_enabled():
        return function
    labelled: Call = record_function(PREFIX + name)(function)
    return labelled


def profiled(steps: range, job: Job, console: Console, *, wanted: bool) -> Iterator[int]:
    """Yield the steps. If `wanted`, profile a few steps on the main process and write a table and a trace."""
    first = min(WARM_UP, max(0, len(steps) - PROFILED))
    chosen = steps[first : first + PROFILED]
    if not wanted or not job.processes.is_main or not chosen:
        yield from steps
        return
    yield from steps[:first]
    cuda = job.processes.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler, labelled_modules(job.model):
        for step in chosen:
            with record_function(PREFIX + STEP):
                yield step
    folder = job.run.folder / "profile"
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    about = (
        f"steps {chosen.start + 1} to {chosen.stop} of process 0 of {job.processes.count}, on {job.processes.device}"
    )
    text = table(times(profiler.events() or [], cuda=cuda), len(chosen), about)
    (folder / "table.txt").write_text(text + "\n")
    console.say(f"{text}\nthe whole trace, for chrome://tracing or ui.perfetto.dev: {folder / 'trace.json'}")
    yield from steps[first + PROFILED :]


@contextmanager
def labelled_modules(model: nn.Module) -> Iterator[None]:
    """Label the forward calls of a model's modules with their parts."""
    with ExitStack() as hooks:
        for module, name in parts_of(model):
            label = record_function(PREFIX + name)
            hooks.callback(module.register_forward_pre_hook(partial(_enter, label), prepend=True).remove)
            hooks.callback(module.register_forward_hook(partial(_leave, label), always_call=True).remove)
        yield


def _enter(label: record_function, *_: Any) -> None:
    label.__enter__()


def _leave(label: record_function, *_: Any) -> None:
    label.__exit__(None, None, None)


def parts_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules that begin a part, with its name; an MLP or an adapted layer includes all its submodules."""
    inner, closed = inner_of(model), list[str]()
    yield inner.base_model, "rest of the model"
    for path, module in inner.named_modules():
        if any(path.startswith(f"{parent}.") for parent in closed):
            continue
        name = "loss" if module is inner.get_output_embeddings() else _part_of(path, module)
        if name is not None:
            yield module, name
        if name in ("MLP", "adapters and linear layers"):
            closed.append(path)


def _part_of(path: str, module: nn.Module) -> str | None:
    kind, own = type(module).__name__, path.rpartition(".")[2]
    if own == "mlp" or any(word in kind for word in ("MLP", "Mlp", "Experts")):
        return "MLP"
    if isinstance(module, nn.Linear) or "lora_A" in module._modules:
        return "adapters and linear layers"
    if "Norm" in kind:
        return "norm"
    return "attention" if "Attention" in kind else None


def times(events: Sequence[Any], *, cuda: bool) -> dict[str, float]:
    """Return the milliseconds of every part, summed over the profiled steps.

    Args:
        events: The events of torch.profiler.
        cuda: Count GPU time instead of CPU time; the time that the GPU waits for the host is part of `other`.
    """
    # an event of the CPU has the GPU time of its kernels
    events = [event for event in events if event.device_type == DeviceType.CPU]
    ordered = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
    forward: dict[int, str] = {}  # sequence number -> part of the forward operation that made the backward node
    part_of_event: dict[int, str] = {}
    total: dict[str, float] = defaultdict(float)
    for event in ordered:
        name = _part_of_event(event, part_of_event, forward)
        part_of_event[id(event)] = name
        if event.sequence_nr >= 0 and "Backward" not in event.name:
            forward[event.sequence_nr] = name
        total[name] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
    steps = sum(event.cpu_time_total for event in events if event.name == PREFIX + STEP) / 1000
    named = {name: total[name] for name in (*MODEL, *LOOP)}
    return named | {OTHER: max(0.0, steps - sum(named.values()))}


def _part_of_event(event: Any, known: Mapping[int, str], forward: Mapping[int, str]) -> str:
    if event.name.startswith(PREFIX):
        return str(event.name.removeprefix(PREFIX))
    if event.name.startswith(BACKWARD) and event.sequence_nr in forward:
        return forward[event.sequence_nr]
    parent = event.cpu_parent
    return known.get(id(parent), OTHER) if parent is not None else OTHER


def table(milliseconds: Mapping[str, float], steps: int, about: str) -> str:
    """Return a table of the parts: milliseconds of a step and share of the whole."""
    total = sum(milliseconds.values())
    lines = [f"{about}: {total / steps:,.1f} ms a step, with the cost of the profiler"]
    lines.append(f"{'part':<28}{'ms a step':>12}{'share':>9}")
    lines += [f"{name:<28}{time / steps:>12,.2f}{time / max(total, 1e-9):>9.1%}" for name, time in milliseconds.items()]
    return "\n".join(lines)
