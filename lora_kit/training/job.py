"""Set a run up: everything it needs between its first and its last step.

What is chosen here by looking at the machine or the model (threads, packed or padded) is chosen once per run: it goes
into the manifest under `resolved`, and a resume takes it from there.
"""

import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from lora_kit.artifacts.hub import unready
from lora_kit.data.plan import Plan, prepare_data
from lora_kit.data.template import Renderer
from lora_kit.data.tokens import Prepared
from lora_kit.data.vocabulary import check_tokenizer_fits, untrained_labels
from lora_kit.errors import DataError
from lora_kit.files import write_whole
from lora_kit.kernels import fusing
from lora_kit.kernels.attention import use_attention
from lora_kit.kernels.identity import identity
from lora_kit.model.adapter import inject
from lora_kit.model.base import load_base, require_quantization
from lora_kit.model.probe import choose_attention
from lora_kit.model.source import Source, locate
from lora_kit.model.state import FlatState, flatten
from lora_kit.model.targets import find_targets
from lora_kit.model.tokenizer import load_renderer
from lora_kit.recipe.load import dump, resolve_path
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import ORDERED
from lora_kit.runs.live import Live
from lora_kit.runs.manifest import (
    Claim,
    Counts,
    DataCounts,
    Environment,
    Fingerprints,
    LineageEntry,
    Machine,
    Origin,
    Resolved,
    RunFacts,
    StepFacts,
)
from lora_kit.runs.resume import OpenRun, Row, contract, describe, enforce, enforce_origin, still_bitwise, table
from lora_kit.runs.store import Checkpoint
from lora_kit.runs.trackers import STATE, Curves, Trackers, claim_id
from lora_kit.training.choices import choices, fast_parts, measured_threads, threads_for
from lora_kit.training.micro_batches import MicroBatches
from lora_kit.training.objectives.objective import Objective
from lora_kit.training.objectives.sft import Sft
from lora_kit.training.processes import Processes
from lora_kit.version import VERSION
from lora_kit.views.console import Console

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers")


@dataclass(frozen=True)
class Job:
    """Everything a run needs between its first and its last step.

    Attributes:
        start: How many steps are finished.
        skipped: The steps that left the adapter as it was, since they were poisoned.
        replayed: Steps after `start` that were skipped before an interruption, and so are skipped again.
        facts: The part of every manifest that does not change while this process lives.
        progress: The other part, of the step that the run resumes from; None for a new run.
    """

    recipe: Recipe
    run: OpenRun
    processes: Processes
    source: Source
    renderer: Renderer
    data: Prepared
    model: PeftModel
    state: FlatState
    plan: Plan
    objective: Objective
    start: int
    journal: Journal
    skipped: list[int]
    replayed: frozenset[int]
    facts: RunFacts
    progress: StepFacts | None
    trackers: Trackers


def prepare_job(
    recipe: Recipe,
    run: OpenRun,
    processes: Processes,
    console: Console,
    trackers: Trackers,
    *,
    accept: Sequence[str] = (),
) -> Job:
    """Load data, base and adapter, check the resume contract, and go to where the run stopped.

    Raises:
        InputError: Something that the user gave cannot work, or would change what the run is.
    """
    require_quantization(recipe.base)
    objective = Sft()
    console.tick("base: fingerprint")
    source = processes.main_decides(lambda: locate(recipe.base, resolve_path(recipe, recipe.base.repo)))
    renderer = load_renderer(source, recipe)
    console.tick("data: render and tokenise")
    data = processes.main_decides(lambda: prepare_data(recipe, renderer))
    environment = observed(recipe, source, renderer, data, processes)
    processes.require_same(environment.versions | environment.computed_by)
    latest = run.latest
    rows = [] if latest is None else contract(latest.manifest.run, recipe, environment)
    processes.main_decides(lambda: enforce(rows, accept, run.folder))
    if run.origin is not None:
        enforce_origin(run.origin, recipe, source.fingerprint)
    before = latest.manifest.run.resolved if latest else None
    changed = {row.key for row in rows}
    micro_batches = choices(recipe, before, changed, source, processes)
    threads = before.threads if before else threads_for(source, processes)
    if threads:
        torch.set_num_threads(threads)
    base = fitted_base(recipe, source, data, renderer, processes, console)
    if before is None:
        warn_of_what_stays(base, recipe, data, renderer, console)
    if before is None or "base.attention" in changed:
        attention, layout = choose_attention(base, recipe.base, processes.device)
    else:
        attention, layout = before.attention, before.layout
    use_attention(base, attention)
    if micro_batches.activation_checkpointing:
        fusing.compute_twice(base)
    console.tick("adapter: inject")
    model = inject(base, recipe.adapter, seed=recipe.train.seed, name=source.name, revision=source.commit)
    state = flatten(model.train(), metrics=len(objective.metrics))
    recorded = before.kernels if before and "train.kernels" not in changed else None
    kernels = fast_parts(model, recipe, recorded, processes)
    if threads == 0:
        threads = measured_threads(model, objective, state, processes)
    fill(state, run)
    plan = Plan(recipe, data.train, micro_batches.micro_batch_tokens, layout == "padded", objective.split)
    facts = RunFacts(
        run_id=run.run_id,
        fencing_token=run.lease.token,
        recipe=recipe.model_dump(mode="json"),
        template=renderer.template,
        fingerprints=environment.fingerprints,
        data=DataCounts(counts_of(data, "train"), counts_of(data, "validation") if data.validation else None),
        versions=environment.versions,
        machine=environment.machine,
        computed_by=environment.computed_by,
        resolved=Resolved(
            threads=threads,
            attention=attention,
            layout=layout,
            micro_batch_tokens=micro_batches.micro_batch_tokens,
            activation_checkpointing=micro_batches.activation_checkpointing,
            kernels=kernels,
        ),
        lineage=lineage(latest, rows),
        claim=claim(latest, rows, processes),
        origin=origin_of(run),
    )
    start = latest.step if latest else 0
    progress = latest.manifest.progress if latest else None
    journal = Journal(run.folder)
    job = Job(
        recipe,
        run,
        processes,
        source,
        renderer,
        data,
        model,
        state,
        plan,
        objective,
        start,
        journal,
        skipped=list(progress.skipped_steps) if progress else [],
        replayed=journal.skipped_after(start) if latest else frozenset(),
        facts=facts,
        progress=progress,
        trackers=trackers,
    )
    if processes.is_main:
        announce(job, rows, accept, console)
    return job


def fitted_base(
    recipe: Recipe, source: Source, data: Prepared, renderer: Renderer, processes: Processes, console: Console
) -> PreTrainedModel:
    """Load the base and check that tokenizer and data fit it."""
    console.tick("base: load")
    base = load_base(source, recipe.base, processes.device)
    embedding = cast(torch.Tensor, base.get_input_embeddings().weight)
    check_tokenizer_fits(renderer.tokenizer, len(embedding), used=data.train)
    check_context(data, base.config)
    return base


def origin_of(run: OpenRun) -> Origin | None:
    """Return the checkpoint that the run began with, now or when it was new."""
    if run.latest is not None:
        return run.latest.manifest.run.origin
    return describe(run.origin) if run.origin else None


def fill(state: FlatState, run: OpenRun) -> None:
    """Give the adapter what the run goes on from, or begins with."""
    if run.latest is not None:
        state.load(*run.latest.state())
    elif run.origin is not None:
        state.load_weights(run.origin.state()[0])


def counts_of(data: Prepared, name: str) -> Counts:
    """Return the counts of the training or the validation data."""
    return Counts(**data.summary[name])


def observed(recipe: Recipe, source: Source, renderer: Renderer, data: Prepared, processes: Processes) -> Environment:
    """Return what a resume compares beside the recipe: fingerprints, versions and the machine."""
    cuda = processes.device.type == "cuda"
    quantizer = {"bitsandbytes": version("bitsandbytes")} if recipe.base.quantization != "none" else {}
    device = torch.cuda.get_device_name(processes.device) if cuda else f"cpu {platform.machine()}"
    return Environment(
        Fingerprints(
            base=source.fingerprint,
            template=hashlib.sha256(template_of(renderer).encode()).hexdigest(),
            train=data.train.fingerprint,
            validation=data.validation.fingerprint if data.validation else None,
        ),
        versions={"lora_kit": VERSION} | {name: version(name) for name in PACKAGES} | quantizer,
        machine=Machine(processes.count, device),
        computed_by=identity(processes.device, getattr(torch, recipe.base.dtype)),
    )


def warn_of_what_stays(
    base: PreTrainedModel, recipe: Recipe, data: Prepared, renderer: Renderer, console: Console
) -> None:
    """Say which linear maps all-linear does not adapt, and which labels no adapter on linear layers can learn to write:
    the base never trained their tokens."""
    targets = find_targets(base, recipe.adapter)
    if targets.left_out:
        console.warn(
            f"adapter.targets: all-linear leaves out {', '.join(targets.left_out)}; routers stay as they are, experts "
            "are trained when adapter.targets names them"
        )
    head = cast(torch.Tensor, (base.get_output_embeddings() or base.get_input_embeddings()).weight)
    labels = untrained_labels(data.train, head)
    if labels:
        names = ", ".join(repr(renderer.tokenizer.convert_ids_to_tokens(label)) for label in labels[:5])
        console.warn(
            f"{len(labels)} label token(s) look untrained in the base ({names}): LoRA on linear layers cannot teach "
            "them; if the stop token is among them, name one that the base knows with base.stop_token"
        )


def check_context(data: Prepared, config: PretrainedConfig) -> None:
    """Refuse examples that have more positions than the base was made for.

    Raises:
        DataError: Names the longest example and the limit.
    """
    longest = max(int(tokens.lengths.max()) for tokens in (data.train, data.validation) if tokens)
    context = config.to_dict().get("max_position_embeddings")
    if context and longest > context:
        raise DataError(
            f"data.sequence_length: the longest example has {longest:,} tokens, the base was made for {context:,}; "
            f"set data.sequence_length={context} and data.overlong to drop or truncate"
        )


def template_of(renderer: Renderer) -> str:
    """Return the chat template in use; empty when there is none, as for raw text."""
    return str(renderer.template or renderer.tokenizer.chat_template or "")


def claim(latest: Checkpoint | Live | None, rows: Sequence[Row], processes: Processes) -> Claim:
    """Return what a checkpoint promises: the bits of an undisturbed run, or its values to rounding, and for what."""
    power_of_two = processes.count & (processes.count - 1) == 0
    so_far = latest is None or latest.manifest.run.claim.level == "bitwise"
    if so_far and power_of_two and still_bitwise(rows) and processes.device.type == "cpu":
        return Claim("bitwise", "1, 2, 4, 8, ... processes with these versions, this compiler and this processor")
    return Claim("rounding", "any number of processes, any device")


def lineage(latest: Checkpoint | Live | None, rows: Sequence[Row]) -> tuple[LineageEntry, ...]:
    """Return every accepted change of the run's life, with the step it came at."""
    if latest is None:
        return ()
    accepted = [row for row in rows if row.verdict == "accept"]
    new = (LineageEntry(latest.step, row.key, row.then, row.now) for row in accepted)
    return (*latest.manifest.run.lineage, *new)


def announce(job: Job, rows: Sequence[Row], accept: Sequence[str], console: Console) -> None:
    """Write the run's beginning to its logs and say what will be trained."""
    run, plan, train, origin = job.run, job.plan, job.data.train, job.facts.origin
    track(job)
    kept, text = run.folder / "recipe.yaml", dump(job.recipe)
    if not (kept.is_file() and kept.read_text() == text):  # a full disk would not take it
        write_whole(kept, text)
    facts: dict[str, Any] = {
        "step": job.start,
        "steps": plan.steps,
        "processes": job.processes.count,
        "launched": run.lease.taken,
    }
    facts["seconds"] = seconds_of(console.began)
    if run.latest is None:
        job.journal.event("started", **facts, run_id=run.run_id, origin=origin and asdict(origin))
    else:
        job.journal.event("resumed", **facts, reached=run.reached, run_id=run.run_id)
        console.say(f"resuming {run.folder} after step {job.start} of {plan.steps}; compared with its checkpoint:")
        console.say(table(rows, accept))
    if run.latest is None and run.origin is not None:
        console.say(f"begins with the adapter of {run.origin.path}, its moments and steps start anew")
    share = job.state.size / job.model.get_nb_trainable_parameters()[1]  # which counts what is packed into 4 bits
    console.say(f"base {job.recipe.base.repo}: {job.state.size:,} trainable parameters ({share:.2%})")
    counts = job.facts.data.train
    console.say(
        f"data: {len(train):,} examples ({counts.format}), {counts.tokens:,} tokens, {counts.trained_share:.0%} of "
        "them trained"
    )
    for note in [*job.data.summary["notes"], *unready(job.recipe)]:
        console.warn(note)
    if plan.padded:
        console.warn("this model mixes examples that are packed into one row, so it trains on padded rows: slower")
    if idleness := plan.idleness_note(job.processes.count):
        console.warn(idleness)
    resolved, exact = job.facts.resolved, job.facts.claim.level == "bitwise"
    threads = f", {resolved.threads} thread(s) each" if resolved.threads else ""
    console.say(
        f"{job.processes.count} process(es) on {job.processes.device.type}{threads}; {resolved.layout} rows, "
        f"{resolved.attention} attention; a resume is exact {'to the bit' if exact else 'to rounding'}"
    )
    micro_batches = MicroBatches(plan.micro_batch_tokens, bool(resolved.activation_checkpointing))
    console.say(f"micro-batches: {micro_batches}; fast path: {fusing.about(job.model, resolved.kernels or ())}")


def seconds_of(began: Mapping[str, float]) -> dict[str, float]:
    """Return how long each part of the start took; `start` ends where the first begins, and has fork or imports."""
    marks = {"start": float(os.environ[ORDERED])} if ORDERED in os.environ else {}
    marks |= began
    ends = [*list(marks.values())[1:], time.time()]
    return {name: round(end - begin, 3) for (name, begin), end in zip(marks.items(), ends, strict=True)}


def track(job: Job) -> None:
    """Cut the journal back to where the run goes on, and let the trackers follow it from there."""
    run, settings, fingerprints = job.run, job.recipe.track, asdict(job.facts.fingerprints)
    known = run.run_id
    if settings.names or (run.folder / STATE).is_file():
        known = claim_id(
            run.folder, run.run_id, start=job.start, reached=run.reached, recipe=job.recipe, fingerprints=fingerprints
        )
    measured = job.progress is not None and job.progress.held_out_loss is not None
    job.journal.cut(job.start, samples=job.start if measured else job.start - 1)
    sections = job.facts.recipe | {"fingerprints": fingerprints, "versions": job.facts.versions}
    facts = {
        f"{section}.{key}": str(value) if isinstance(value, (list, dict)) else value
        for section, fields in sections.items()
        for key, value in fields.items()
    }
    name = settings.run or run.folder.resolve().name
    job.trackers.begin(settings.names, Curves(settings.project, name, known, run.folder, facts), job.journal)
