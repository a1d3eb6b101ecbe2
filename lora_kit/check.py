"""Check a recipe before training: its problems, a preview of the data, and an estimate of memory and sizes.

The data is read and tokenised as for training. No weights are loaded: sizes are computed from the base's configuration.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from lora_kit.artifacts.hub import push_notes
from lora_kit.artifacts.remotes import require_remote
from lora_kit.data.counts import TRAINING, VALIDATION
from lora_kit.data.files import SUFFIXES, suffix_of
from lora_kit.data.near_duplicates import LIKE, near_duplicates
from lora_kit.data.places import Where, places
from lora_kit.data.plan import Plan, SourceShare, prepare_data
from lora_kit.data.preflight import (
    Cost,
    Inspection,
    costs,
    findings,
    headers_of,
    histogram,
    inspect_all,
    judge,
    roles,
    sources_of,
)
from lora_kit.data.preview import make_preview
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Prepared, Tell, check_context, silent
from lora_kit.data.urls import is_url
from lora_kit.data.vocabulary import check_tokenizer_fits, untrained_labels, untrained_notes
from lora_kit.errors import BaseError, InputError, RecipeError
from lora_kit.files import path_in
from lora_kit.host import host_cores
from lora_kit.model.sizes import BYTES, Shape, context_of, format_bytes, read_config
from lora_kit.model.source import Source, base_folder
from lora_kit.model.tokenizer import load_renderer
from lora_kit.model.weights import check_weights, head_rows, published_quantization, read_json
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import Base, Recipe
from lora_kit.runs.serving import serving
from lora_kit.runs.trackers import require
from lora_kit.training.answer_metrics import require_packages
from lora_kit.training.estimate import Contents, RunEstimate, contents_of, estimate_run, memory_of
from lora_kit.training.micro_batches import Machine, MicroBatches, Placed, choose, place, this_machine
from lora_kit.training.speed import Rates, Speed, threads_for
from lora_kit.views import html
from lora_kit.views.console import grouped, printable
from lora_kit.views.preview import Preview

BAR = 40  # characters of the longest bar of a histogram
HTML = '<pre style="white-space:pre-wrap;word-break:normal;font-family:monospace">{code}</pre>'


def preview(recipe: Recipe, n: int = 2, *, ids: bool = False) -> Preview:
    """Return the first `n` training examples with the trained tokens marked, and the micro-batches of the first step.

    Args:
        recipe: The recipe.
        n: The number of examples.
        ids: Whether to show each token with its id.

    Raises:
        InputError: The base's tokenizer or the data cannot be read, or the data has problems.
    """
    source = _source_without_weights(recipe, offline=False)
    renderer = load_renderer(source, recipe)
    data = prepare_data(recipe, renderer)
    shape = None
    with suppress(BaseError):  # an unknown family: the size of a micro-batch is then a guess
        shape = read_config(source.folder / "config.json")
    plan = _plan(recipe, data, choose(recipe, shape, this_machine()))
    return make_preview(plan, renderer, places(recipe, data), n, ids=ids)


def estimate(
    recipe: Recipe,
    *,
    processes: int = 1,
    time: bool = False,
    price_per_hour: float | None = None,
    shapes: Path | None = None,
    offline: bool = False,
) -> RunEstimate:
    """Estimate what a recipe takes on this machine: memory, disk and, on request, time and money.

    Args:
        recipe: The recipe.
        processes: The number of processes that will train together on this machine.
        time: Whether to read the data and to measure this machine, which takes a few seconds and imports torch.
        price_per_hour: The price of the machine, for the cost of the run; implies `time`.
        shapes: A folder with model configurations `<owner>--<name>.json`. Other bases are looked up on the
            Hub or in their folder.
        offline: Whether to use only local files.

    Raises:
        BaseError: The configuration is not available, its model type is not supported, or it cannot be placed as the
            recipe says.
        InputError: `time` is wanted, and the data cannot be read.
    """
    shape, machine = read_config(_config_path(recipe, shapes, offline=offline)), this_machine(processes)
    shards = place(recipe, shape, machine, 0).shards
    micro_batches = choose(recipe, shape, machine, shards)
    contents: Contents | None = None
    rates: Rates | None = None
    if time or price_per_hour is not None:
        contents = _contents(recipe, micro_batches, offline=offline)
        rates = measured_rates(shape, recipe, machine, contents, processes)
    return estimate_run(
        shape,
        recipe,
        micro_batches,
        machine,
        contents=contents,
        rates=rates,
        price_per_hour=price_per_hour,
        processes=processes,
        shards=shards,
    )


def estimate_parts(recipe: Recipe) -> tuple[Contents, Speed]:
    """Return what the examples of a run of one process contain, and a `Speed` with rates that are measured now."""
    shape, machine = read_config(_config_path(recipe, None, offline=True)), this_machine()
    micro_batches = choose(recipe, shape, machine)
    contents = _contents(recipe, micro_batches, offline=True)
    memory = memory_of(shape, recipe, micro_batches, machine, contents=contents)
    rates = measured_rates(shape, recipe, machine, contents, processes=1)
    return contents, Speed(shape, recipe, memory, rates, machine.device)


def _contents(recipe: Recipe, micro_batches: MicroBatches, *, offline: bool) -> Contents:
    data = prepare_data(recipe, load_renderer(_source_without_weights(recipe, offline=offline), recipe))
    return contents_of(_plan(recipe, data, micro_batches), data)


def measured_rates(shape: Shape, recipe: Recipe, machine: Machine, contents: Contents, processes: int) -> Rates:
    """Measure the speed of this machine with the threads of one of several processes. This imports torch."""
    import torch

    from lora_kit.training.rates import measure

    cores, weight_bytes = host_cores() // processes, shape.parameters * BYTES[recipe.base.dtype]
    return measure(
        shape,
        recipe,
        torch.device(machine.device),
        tokens=contents.usual.tokens,
        longest=contents.longest,
        threads=threads_for(cores, weight_bytes) if machine.device == "cpu" else None,
    )


def _plan(recipe: Recipe, data: Prepared, micro_batches: MicroBatches) -> Plan:
    return Plan(recipe, data.train, micro_batches.micro_batch_tokens, padded=False, sizes=data.counts.sizes)


def _config_path(recipe: Recipe, shapes: Path | None, *, offline: bool) -> Path:
    path = shapes / f"{recipe.base.repo.replace('/', '--')}.json" if shapes else None
    if path is not None and path.is_file():
        return path
    return _source_without_weights(recipe, offline=offline).folder / "config.json"


def _source_without_weights(recipe: Recipe, *, offline: bool) -> Source:
    """Find or download the base's configuration and tokenizer, without weights and hashes.

    Raises:
        InputError: The base does not exist or cannot be downloaded.
    """
    folder = resolve_path(recipe, recipe.base.repo)
    return Source(recipe.base.repo, base_folder(recipe.base, folder, weights=False, offline=offline), None, {})


@dataclass(repr=False)
class Report:
    """The result of `check`.

    Attributes:
        machine: The device that a run on this machine would compute on.
        problems: Errors that would stop the run; empty if it can start.
        unchecked: Parts that could not be checked, with the reason.
        notes: Notes for the user.
        data: Statistics of the training and validation data.
        lengths: Ranges of lengths of the training examples (shortest, longest, number of examples).
        roles: The number of tokens and of trained tokens in the training messages of each role.
        costs: What each source contributes to an epoch.
        schedule: Steps, examples and tokens of the run.
        placed: Where the weights of the base will be; None if they cannot be placed as the recipe says.
        micro_batches: The size of micro-batches and whether activations are recomputed: the recipe's settings, or for
            `auto` the values that a run on this machine would choose.
        estimate: Memory, disk, time and money; None if the sizes of the base are not known.
        serving: Which programs read the adapter.
        preview: The first training examples.
    """

    machine: Machine
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    schedule: dict[str, Any] = field(default_factory=dict)
    placed: Placed | None = None
    micro_batches: MicroBatches | None = None
    estimate: RunEstimate | None = None
    serving: str = ""
    preview: Preview | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        estimated = self.estimate.to_dict() if self.estimate else None
        return asdict(self) | {"estimate": estimated, "preview": str(self.preview) if self.preview else None}

    def page(self, title: str) -> str:
        """Return the report as an HTML page."""
        return html.page(f"lora-kit check {title}", self._repr_html_())

    def _repr_html_(self) -> str:
        console = Console(
            record=True, file=io.StringIO(), force_terminal=True, force_jupyter=False, color_system="truecolor"
        )
        console.print(Group(*self._findings()), soft_wrap=True)
        examples = self.preview._repr_html_() if self.preview else ""
        return examples + console.export_html(inline_styles=True, code_format=HTML)

    def __rich__(self) -> RenderableType:
        return Group(*self._parts())

    def __repr__(self) -> str:
        return "\n".join(str(part) for part in self._parts())

    def _parts(self) -> Iterator[RenderableType]:
        if self.preview is not None:
            yield self.preview
        yield from self._findings()

    def _findings(self) -> Iterator[RenderableType]:
        for name, counts in self.data.items():
            yield _line(name, {key: value for key, value in counts.items() if value})
        if self.roles:
            shares = (f"{role} {trained:,} of {count:,}" for role, (count, trained) in self.roles.items() if count)
            yield Text(f"trained tokens by role: {', '.join(shares)}")
        yield from (Text(line) for line in _bars(self.lengths))
        if len(self.costs) > 1:
            yield Text("cost by source:")
        for cost in self.costs if len(self.costs) > 1 else ():
            yield Text(
                f"  {cost.source}: {cost.examples:,} examples, {cost.tokens:,} tokens, {cost.trained:,} of them "
                f"trained, {cost.share:.1%} of the run's time"
            )
        if self.schedule:
            yield _line("schedule", self.schedule)
        if self.placed is not None and self.machine.processes > 1:
            yield Text(f"base {self.placed}")
        if self.micro_batches is not None:
            device, memory = self.machine.device, format_bytes(self.machine.memory)
            yield Text(f"micro-batches: {self.micro_batches} ({device} with {memory})")
        if self.estimate is not None:
            yield from (Text(line) for line in self.estimate.lines())
        if self.serving:
            yield Text(f"serve: {self.serving}")
        yield from (Text(f"note: {printable(note)}", style="yellow") for note in self.notes)
        yield from (Text(f"not checked: {printable(part)}", style="yellow") for part in self.unchecked)
        yield from (Text(f"problem: {printable(problem)}", style="red") for problem in grouped(self.problems))
        yield Text("the recipe cannot start" if self.problems else "the recipe can start", style="bold")


def _bars(lengths: list[tuple[int, int, int]]) -> Iterator[str]:
    """Yield a histogram of lengths, a line for each range."""
    most, width = max((count for _, _, count in lengths), default=0), len(f"{lengths[-1][1]:,}") if lengths else 0
    if lengths:
        yield "tokens of an example:"
    for shortest, longest, count in lengths:
        bar = "#" * -(-BAR * count // most)
        end = f"to {longest:>{width},} " if longest > shortest else ""
        yield f"  {shortest:>{width},} {end}{bar:{BAR}} {count:,}".rstrip()


def _line(name: str, values: Mapping[str, Any]) -> Text:
    texts = {key: f"{value:,}" if isinstance(value, int) else str(value) for key, value in values.items()}
    return Text(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in texts.items()))


def check(
    recipe: Recipe,
    *,
    offline: bool = False,
    shapes: Path | None = None,
    processes: int = 1,
    show: int = 2,
    ids: bool = False,
    time: bool = False,
    price_per_hour: float | None = None,
    tell: Tell = silent,
) -> Report:
    """Check everything about a recipe that can be checked without the base's weights.

    Args:
        recipe: The recipe, whose fields `load_recipe` has checked.
        offline: Whether to use only local files; other parts are reported as unchecked.
        shapes: A folder with model configurations `<owner>--<name>.json`, for sizes of bases that are not local.
        processes: The number of processes that will train together on this machine.
        show: The number of examples in the preview.
        ids: Whether the preview shows each token with its id.
        time: Whether to measure this machine and to estimate the time, which takes a few seconds and imports torch.
        price_per_hour: The price of the machine, for the cost of the run; implies `time`.
        tell: Called with the number of tokenised records and the number of all records.
    """
    report = Report(this_machine(processes), serving=serving(recipe.adapter))
    for checked in (
        lambda: require(recipe.track.names),
        lambda: require_packages(recipe.evaluate),
        lambda: require_remote(recipe),
    ):
        try:
            checked()
        except InputError as error:
            report.problems.append(str(error))
    if recipe.evaluate.forgetting and not path_in(recipe.folder, recipe.evaluate.forgetting).is_file():
        report.problems.append(f"evaluate.forgetting: {recipe.evaluate.forgetting} is not a file; expected a text file")
    shape: Shape | None = None
    try:
        path = _config_path(recipe, shapes, offline=offline)
    except InputError as error:
        report.unchecked.append(f"sizes and memory: {error}")
    else:
        shape = _check_layers(path, recipe, report)
    try:
        report.placed = place(recipe, shape, report.machine, 0)
    except BaseError as error:
        report.problems.append(str(error))
    shards = report.placed.shards if report.placed else 1
    micro_batches = report.micro_batches = choose(recipe, shape, report.machine, shards)
    if shape is not None:
        report.estimate = estimate_run(shape, recipe, micro_batches, report.machine, processes=processes, shards=shards)
    try:
        source = _source_without_weights(recipe, offline=offline)
    except InputError as error:
        is_unchecked = offline and _is_hub_name(recipe, recipe.base.repo)
        message = f"data: needs the base's tokenizer: {error}"
        (report.unchecked if is_unchecked else report.problems).append(message)
        return report
    report.problems += _file_problems(source, recipe.base, is_local=not _is_hub_name(recipe, recipe.base.repo))
    try:
        renderer = load_renderer(source, recipe)
        if offline and any(
            is_url(source.source) or _is_hub_name(recipe, source.source) for source in recipe.data.sources
        ):
            report.unchecked.append("data: a Hub dataset or a URL, not read with --offline")
        else:
            data = prepare_data(recipe, renderer, tell)
            plan, where = _plan(recipe, data, micro_batches), places(recipe, data)
            report.preview = make_preview(plan, renderer, where, show, ids=ids)
            _check_data(plan, data, source, renderer, where, report, processes)
            if shape is not None:
                contents = contents_of(plan, data)
                wanted = time or price_per_hour is not None
                report.estimate = estimate_run(
                    shape,
                    recipe,
                    micro_batches,
                    report.machine,
                    contents=contents,
                    rates=measured_rates(shape, recipe, report.machine, contents, processes) if wanted else None,
                    price_per_hour=price_per_hour,
                    processes=processes,
                    shards=shards,
                )
    except InputError as error:
        report.problems += str(error).splitlines()
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _check_layers(path: Path, recipe: Recipe, report: Report) -> Shape | None:
    """Return the shape of a base of a known family, and add problems and notes about the layers to adapt.

    A base of another family is built without weights, which takes torch and a few seconds, and its layers are looked up
    as in training.

    Args:
        path: The base's config.json.
        recipe: The recipe.
        report: The report.
    """
    try:
        read_json(path)
    except BaseError as error:
        report.problems.append(str(error))
        return None
    try:
        shape = read_config(path)
    except BaseError as error:
        report.unchecked.append(f"sizes and memory: {error}")
        try:
            report.notes += _layers(path, recipe)
        except InputError as problem:
            report.problems.append(str(problem))
        return None
    try:
        shape.selected(recipe.adapter)
    except RecipeError as error:
        report.problems.append(str(error))
        return None
    return shape


def _layers(path: Path, recipe: Recipe) -> list[str]:
    """Return notes about the layers of a base that get no adapter.

    Raises:
        InputError: The base is not a causal language model, or `adapter.targets` names none of its layers.
    """
    from lora_kit.model.base import empty_base
    from lora_kit.model.targets import find_targets

    return find_targets(empty_base(path, recipe.base), recipe.adapter).notes


def _file_problems(source: Source, base: Base, *, is_local: bool) -> Iterator[str]:
    """Yield the problem of a base's files that would prevent loading it."""
    try:
        if is_local:
            check_weights(source.folder)
        published_quantization(source.folder, base)
    except BaseError as error:
        yield str(error)


def _is_hub_name(recipe: Recipe, source: str) -> bool:
    """Return whether a source can only be a Hub name. A missing file is not; reading it will report the error."""
    name = source.partition("[")[0]
    try:
        return resolve_path(recipe, name) is None and suffix_of(name) not in SUFFIXES
    except RecipeError:
        return False


def _tokens_of_run(plan: Plan, data: Prepared) -> int:
    """Return about how many tokens the whole run computes."""
    mixture = plan.mixed(data.counts.sources) or {"": SourceShare(data.counts.train, plan.total, 1.0)}
    return round(sum(share.seen * share.counts.tokens / share.counts.examples for share in mixture.values()))


def _check_data(
    plan: Plan, data: Prepared, source: Source, renderer: Renderer, where: Where, report: Report, processes: int
) -> None:
    """Add data statistics, schedule, preflight, and problems of the data with this base to the report."""
    recipe = plan.recipe
    totals = {"train": data.counts.train, "validation": data.counts.validation}
    report.data = {name: asdict(counts) for name, counts in totals.items() if counts}
    report.data |= {f"train, {name}": share.to_dict() for name, share in plan.mixed(data.counts.sources).items()}
    report.data |= {f"validation, {name}": asdict(counts) for name, counts in data.counts.sets.items()}
    report.notes += [*plan.unseen_notes(data.counts.sources), *data.notes, *push_notes(recipe)]
    report.schedule = {
        "steps": plan.steps,
        "examples": plan.total,
        "tokens": _tokens_of_run(plan, data),
        "micro_batches_of_the_first_step": len(plan.micro_batches(0)),
        "idle_share": round(plan.idle_share(processes), 3),
    }
    if idleness := plan.idleness_note(processes):
        report.notes.append(idleness)
    _check_tokens(plan, data, renderer, where, report)
    if report.estimate is not None:
        check_tokenizer_fits(renderer.tokenizer, report.estimate.memory.vocabulary, used=data.train)
    context = context_of(read_json(source.folder / "config.json"))
    check_context(data, context)
    if context and (too_long := sum(len(prompt.ids) >= context for prompt in data.prompts)):
        report.notes.append(
            f"evaluate.generate: {too_long} of {len(data.prompts)} prompts leave none of the base's {context:,} "
            "positions for an answer and will count as no match"
        )
    with suppress(BaseError):  # the problem of the weights is reported already
        rows = head_rows(source.folder, check_weights(source.folder))
        if rows is not None:
            labels = untrained_labels(data.train, rows)
            report.notes += untrained_notes(labels, renderer, raw=data.counts.train.is_raw)


def _check_tokens(plan: Plan, data: Prepared, renderer: Renderer, where: Where, report: Report) -> None:
    """Add what the preflight finds, the lengths, and near duplicates to the report."""
    recipe = plan.recipe
    epochs = {name: source.epochs for name, source in plan.mixed(data.counts.sources).items()}
    sources = sources_of(recipe, data, renderer)
    train, validation = inspect_all(data, sources)
    errors, warnings = judge(findings(train, validation), recipe.preflight, where)
    report.problems += errors
    report.notes += warnings
    renderers, signs, sizes = sources[TRAINING]
    headers = [headers_of(own) if each.prompt else () for own, each in zip(renderers, signs, strict=True)]
    report.roles = roles(data.train, headers, sizes)
    report.lengths = histogram(data.train.lengths)
    report.costs = costs(data.train, train.weights, _ranges(recipe, data), epochs)
    try:
        report.notes += _near_duplicates(data, train, validation, where)
    except InputError as error:
        report.unchecked.append(f"near duplicates: {error}")


def _ranges(recipe: Recipe, data: Prepared) -> dict[str, tuple[int, int]]:
    """Return the names of the sources, each with the first of its training examples and the first after them."""
    if not data.counts.sizes:
        return dict.fromkeys([str(recipe.data.train)], (0, len(data.train)))
    ends = np.cumsum([0, *data.counts.sizes]).tolist()
    return dict(zip(data.counts.sources, pairwise(ends), strict=True))


def _near_duplicates(data: Prepared, train: Inspection, validation: Inspection | None, where: Where) -> Iterator[str]:
    """Yield a note about near duplicates, if there are any."""
    parts = [data.train, *([data.validation] if data.validation else [])]
    hashes = np.concatenate([train.hashes, *([validation.hashes] if validation else [])])
    found = near_duplicates(parts, hashes)
    if not found.pairs:
        return

    def place(index: int) -> str:
        inside = index - len(data.train)
        return where(TRAINING, index) if inside < 0 else where(VALIDATION, inside)

    (earlier, first), count = found.pairs[0], len(found.pairs)
    leaked = sum(earlier < len(data.train) <= later for earlier, later in found.pairs)
    yield (
        f"{place(first)} (as {place(earlier)}): {count:,} of {found.sampled:,} compared examples share at least "
        f"{LIKE:.0%} of their token sequences with an earlier example (validation examples that resemble a training "
        f"example: {leaked:,}); remove them, if the repetition is not intended"
    )
