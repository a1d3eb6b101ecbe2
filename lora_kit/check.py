"""What is wrong with a recipe, what it will look like and what it will cost, before anything is trained.

Nothing here loads a weight: the data is read as training would read it, and memory is counted from the base's
configuration.
"""

import html
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from lora_kit.artifacts.hub import unready
from lora_kit.data.files import SUFFIXES
from lora_kit.data.plan import Plan, prepare_data
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Prepared, Tokens
from lora_kit.data.vocabulary import check_tokenizer_fits
from lora_kit.errors import InputError, RecipeError
from lora_kit.model.sizes import Estimate, Shape, estimate_memory, read_config
from lora_kit.model.source import Source, base_folder
from lora_kit.model.tokenizer import load_renderer
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.trackers import require
from lora_kit.training.micro_batches import Machine, MicroBatches, choose, description, this_machine


@dataclass(frozen=True, repr=False)
class Preview:
    """Rendered examples, each in runs of text with whether they are trained."""

    examples: tuple[tuple[tuple[str, bool], ...], ...]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n\n".join("".join(f"⟦{text}⟧" if on else text for text, on in one) for one in self.examples)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = console.no_color or console.color_system is None  # a pipe shows no colours
        for number, one in enumerate(self.examples):
            yield Text(f"example {number}", style="dim")
            runs = ((f"⟦{text}⟧" if on and plain else text, "black on green" if on else "") for text, on in one)
            yield Text.assemble(*runs)

    def _repr_html_(self) -> str:
        mark = '<span style="background:#b7e4c7;color:#000">{}</span>'
        runs = (
            "".join(mark.format(html.escape(text)) if on else html.escape(text) for text, on in one)
            for one in self.examples
        )
        return "".join(
            '<pre style="white-space:pre-wrap;font-family:monospace;border-left:3px solid #999;padding-left:8px;'
            f'margin:8px 0">{one}</pre>'
            for one in runs
        )


def preview(recipe: Recipe, n: int = 2) -> Preview:
    """Return the first `n` training examples as the model will see them, trained tokens marked.

    Raises:
        InputError: The base's tokenizer or the data cannot be read.
    """
    renderer = load_renderer(_light_source(recipe, offline=False), recipe)
    return _preview(prepare_data(recipe, renderer).train, renderer, n)


def _preview(tokens: Tokens, renderer: Renderer, n: int) -> Preview:
    return Preview(tuple(tuple(_runs(tokens, index, renderer)) for index in range(min(n, len(tokens)))))


def _runs(tokens: Tokens, index: int, renderer: Renderer) -> Iterator[tuple[str, bool]]:
    ids, trained = tokens.example(index)
    start, shown = 0, ""
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            # from the beginning each time: many tokenizers drop a blank that begins what they decode
            text = str(renderer.tokenizer.decode(ids[:end].tolist(), skip_special_tokens=False))
            yield text[len(shown) :], bool(trained[start])
            start, shown = end, text


def estimate(recipe: Recipe, *, shapes: Path | None = None, offline: bool = False) -> Estimate:
    """Return what a recipe's base and adapter weigh on this machine, counted from the base's configuration.

    Args:
        recipe: From `load_recipe`.
        shapes: A folder of `<owner>--<name>.json` configurations to look in first.
        offline: Use nothing from the network.

    Raises:
        BaseError: The configuration cannot be had, or is of a family that is not counted.
    """
    shape = read_config(_config_path(recipe, shapes, offline=offline))
    machine = this_machine()
    return _estimate(recipe, shape, choose(recipe, shape, machine), machine)


def _estimate(recipe: Recipe, shape: Shape, portions: MicroBatches, machine: Machine) -> Estimate:
    tokens, recompute = portions.micro_batch_tokens, portions.activation_checkpointing
    return estimate_memory(shape, recipe, tokens=tokens, recompute=recompute, device=machine.device)


def _config_path(recipe: Recipe, shapes: Path | None, *, offline: bool) -> Path:
    named = shapes / f"{recipe.base.repo.replace('/', '--')}.json" if shapes else None
    if named is not None and named.is_file():
        return named
    return _light_source(recipe, offline=offline).folder / "config.json"


def _light_source(recipe: Recipe, *, offline: bool) -> Source:
    """Find a base's configuration and tokenizer without its weights."""
    folder = resolve_path(recipe, recipe.base.repo)
    return Source(recipe.base.repo, base_folder(recipe.base, folder, weights=False, offline=offline), None, {})


COLOURS = {"red": "color:#c1121f", "yellow": "color:#b07d00", "bold": "font-weight:600"}


@dataclass(repr=False)
class Report:
    """What a check found.

    Attributes:
        machine: What a run would compute on.
        problems: What would stop the run; empty when it can start.
        unchecked: What could not be looked at, and why.
        notes: What a person should know.
        data: Counts of the training and validation data.
        schedule: Steps, examples and tokens of the run.
        portions: How many tokens are computed at once, and what of them is kept: as the recipe says, or as a run that
            began here would choose.
        estimate: Sizes and memory.
        preview: The first examples.
    """

    machine: Machine
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    portions: MicroBatches | None = None
    estimate: Estimate | None = None
    preview: Preview | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        sizes = asdict(self.estimate) | {"device_bytes": self.estimate.device_bytes} if self.estimate else None
        return asdict(self) | {"estimate": sizes, "preview": str(self.preview) if self.preview else None}

    def __rich__(self) -> RenderableType:
        return Group(*self._parts())

    def __repr__(self) -> str:
        return "\n".join(str(part) for part in self._parts())

    def _repr_html_(self) -> str:
        first = self.preview._repr_html_() if self.preview else ""
        lines = (
            f'<span style="{COLOURS.get(str(part.style), "")}">{html.escape(part.plain)}</span>'
            for part in self._parts()
            if isinstance(part, Text)
        )
        return (
            first
            + '<pre style="white-space:pre-wrap;word-break:normal;font-family:monospace">'
            + "\n".join(lines)
            + "</pre>"
        )

    def _parts(self) -> Iterator[RenderableType]:
        if self.preview is not None:
            yield self.preview
        for name, counts in self.data.items():
            yield Text(f"{name}: " + ", ".join(f"{key} {_plain(value)}" for key, value in counts.items() if value))
        if self.schedule:
            yield Text("schedule: " + ", ".join(f"{key} {_plain(value)}" for key, value in self.schedule.items()))
        if self.portions is not None:
            yield Text(description(self.portions, self.machine))
        if self.estimate is not None:
            yield from (Text(line) for line in self.estimate.lines())
        yield from (Text(f"note: {note}", style="yellow") for note in self.notes)
        yield from (Text(f"not checked: {what}", style="yellow") for what in self.unchecked)
        yield from (Text(f"problem: {problem}", style="red") for problem in self.problems)
        yield Text("the recipe cannot start" if self.problems else "the recipe can start", style="bold")


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def check(recipe: Recipe, *, offline: bool = False, shapes: Path | None = None, processes: int = 1) -> Report:
    """Look at everything that can be looked at without the base's weights.

    Args:
        recipe: From `load_recipe`, which has checked its fields.
        offline: Use nothing from the network; what is not on this machine is listed as unchecked.
        shapes: A folder of `<owner>--<name>.json` configurations, for sizes of bases that are not here.
        processes: How many will train together.
    """
    report = Report(this_machine(processes))
    try:
        require(recipe.track.names)
    except InputError as error:
        report.problems.append(str(error))
    shape: Shape | None = None
    try:
        shape = read_config(_config_path(recipe, shapes, offline=offline))
        _check_targets(shape, recipe, report)
    except InputError as error:
        report.unchecked.append(f"sizes and memory: {error}")
    portions = report.portions = choose(recipe, shape, report.machine)
    report.estimate = _estimate(recipe, shape, portions, report.machine) if shape else None
    try:
        source = _light_source(recipe, offline=offline)
    except InputError as error:
        absent = offline and _on_the_hub(recipe, recipe.base.repo)
        what = f"data: it takes the base's tokenizer: {error}"
        (report.unchecked if absent else report.problems).append(what)
        return report
    report.problems += _wrong_files(source, local=not _on_the_hub(recipe, recipe.base.repo))
    try:
        renderer = load_renderer(source, recipe)
        if offline and any(_on_the_hub(recipe, one) for one in (recipe.data.train, recipe.data.validation)):
            report.unchecked.append("data: a Hub dataset, and --offline was asked for")
        else:
            data = prepare_data(recipe, renderer)
            plan = Plan(recipe, data.train, portions.micro_batch_tokens, padded=False)
            _check_data(plan, data, renderer, report, processes)
    except InputError as error:
        report.problems += str(error).splitlines()
    return report


def _check_targets(shape: Shape, recipe: Recipe, report: Report) -> None:
    names, targets = [one.name for one in shape.linears], recipe.adapter.targets
    unknown = [] if isinstance(targets, str) else [target for target in targets if target not in names]
    told = f"adapter.targets: {', '.join(unknown)} not among the layers that are counted: {', '.join(names)}"
    if unknown and len(unknown) == len(targets) and not any("." in name or name == "lm_head" for name in unknown):
        report.problems.append(told)
    elif unknown:
        report.notes.append(f"{told}; a name that the base does not have is refused")


def _wrong_files(source: Source, *, local: bool) -> Iterator[str]:
    """Say what keeps a base that is here from being loaded, as far as its files show it."""
    try:
        json.loads((source.folder / "config.json").read_text())
    except ValueError as error:
        yield f"base.repo: {source.folder / 'config.json'} is not JSON: {error}; fetch the base again"
    if local and not any(source.folder.glob("*.safetensors")):
        yield f"base.repo: {source.name} has no .safetensors weights; lora_kit opens no pickled ones"


def _on_the_hub(recipe: Recipe, source: str | float | None) -> bool:
    """Return whether a source can only be a Hub name; a missing file is none, so that reading it tells."""
    if not isinstance(source, str):
        return False
    name = source.partition("[")[0]
    try:
        return resolve_path(recipe, name) is None and Path(name).suffix not in SUFFIXES
    except RecipeError:
        return False


def _check_data(plan: Plan, data: Prepared, renderer: Renderer, report: Report, processes: int) -> None:
    recipe = plan.recipe
    report.data = {name: data.summary[name] for name in ("train", "validation") if data.summary[name]}
    report.notes += [*data.summary["notes"], *unready(recipe)]
    report.preview = _preview(data.train, renderer, 2)
    report.schedule = {
        "steps": plan.steps,
        "examples": plan.total,
        "tokens": round(plan.total / len(data.train) * data.summary["train"]["tokens"]),
        "micro_batches_of_the_first_step": len(plan.micro_batches(0)),
        "idle_share": round(plan.idle_share(processes), 3),
    }
    if idleness := plan.idleness_note(processes):
        report.notes.append(idleness)
    if report.estimate is not None:
        check_tokenizer_fits(renderer.tokenizer, report.estimate.vocabulary, used=data.train)
        if recipe.data.sequence_length > report.estimate.context < max(data.train.lengths):
            report.problems.append(
                f"data.sequence_length: the longest example has {max(data.train.lengths):,} tokens, the base was made "
                f"for {report.estimate.context:,}; lower data.sequence_length and set data.overlong"
            )
