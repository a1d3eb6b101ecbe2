"""Set up a job from a recipe, in functions that each return the arguments of the next function.

    open_folder     acquire the lease of the run's folder and find the state to resume from
    read_inputs     the files of the base, the tokenizer and the tokens
    check_contract  compare the inputs with the checkpoint that the run resumes from
    check_tokens    look for what the tokens of a new run would train unintentionally
    build_model     load the base, inject the adapter, choose what the recipe leaves open
    add_reference   the log-probabilities of the reference, for DPO and KTO
    add_text        the base's loss on the text of `evaluate.forgetting`
    make_job        combine all of them with the facts that every manifest records

Threads, packed or padded rows, micro-batches and kernels are chosen once for a run. They go into the manifest under
`resolved`, and a resume takes them from there.
"""

import hashlib
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from lora_kit.artifacts.locate import checkpoint_at
from lora_kit.artifacts.remotes import restorer
from lora_kit.data import cache
from lora_kit.data.arrays import spill_file
from lora_kit.data.packing import IGNORE, collate
from lora_kit.data.places import places
from lora_kit.data.plan import Plan, prepare_data
from lora_kit.data.preflight import preflight
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Prepared, check_context
from lora_kit.data.vocabulary import check_tokenizer_fits, untrained_labels, untrained_notes
from lora_kit.errors import CheckpointError, ContractError, LaunchError, LeaseError
from lora_kit.kernels import fusing
from lora_kit.kernels.attention import use_attention
from lora_kit.kernels.gathered import gathered
from lora_kit.kernels.identity import identity
from lora_kit.model.adapter import inject, saved_weights
from lora_kit.model.base import load_base, require_quantization
from lora_kit.model.forward import model_inputs
from lora_kit.model.probe import refuse_unfit
from lora_kit.model.sizes import context_of
from lora_kit.model.source import Source, locate
from lora_kit.model.state import flatten
from lora_kit.model.targets import find_targets
from lora_kit.model.tokenizer import for_objective, load_renderer
from lora_kit.model.variants import Call, attach_constants, start_from_inputs, start_from_weights
from lora_kit.model.weights import published_quantization, read_json
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import live
from lora_kit.runs.journal import METRICS, Journal, StepRecord
from lora_kit.runs.layout import WITH_CONSTANTS
from lora_kit.runs.lease import Fence, Lease
from lora_kit.runs.manifest import (
    Claim,
    Environment,
    Fingerprints,
    LineageEntry,
    Machine,
    Origin,
    Resolved,
    RunFacts,
)
from lora_kit.runs.origin import describe, enforce_origin
from lora_kit.runs.resume import (
    Candidate,
    HeldRun,
    OpenRun,
    Row,
    choose_state,
    contract,
    enforce,
    go_back,
    hold_run,
    no_remote,
    refuse_fewer_steps,
    still_bitwise,
)
from lora_kit.runs.trackers import Trackers
from lora_kit.supervise.stopping import StopRequest
from lora_kit.training import choices
from lora_kit.training.evaluation import HeldOut, text_recipe
from lora_kit.training.job import AdaptedModel, Inputs, Job
from lora_kit.training.objectives.objective import Computing, Objective
from lora_kit.training.processes import Processes
from lora_kit.training.reference import Reference, as_reference, facts_of
from lora_kit.version import VERSION
from lora_kit.views.console import Console

_OPEN_RUN, _SOURCE, _HELD_RUN = TypeAdapter(OpenRun), TypeAdapter(Source), TypeAdapter(HeldRun)
_CANDIDATES = TypeAdapter(list[Candidate])
VISIBLE_SECONDS = 10.0  # for a file that process 0 has written to a network file system
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers")


@contextmanager
def open_folder(
    processes: Processes, folder: Path, recipe: Recipe | None, start_from: str | Path | None, console: Console
) -> Iterator[OpenRun]:
    """Hold the lease of a run's folder until the block ends, then restore the settings of the processes.

    Process 0 holds the lease. One process of every machine publishes snapshots, so any machine may have the newest.

    Args:
        processes: The processes of the run.
        folder: The run's folder.
        recipe: None for the run of a script.
        start_from: A checkpoint to go back to or to begin with.
        console: Where messages go.

    Raises:
        LaunchError: A machine does not see the run's folder.
    """
    restore = restorer(recipe, folder, tell=console.say) if recipe else no_remote
    if processes.publishes:
        live.announce_start(folder)

    def hold() -> HeldRun:
        origin = checkpoint_at(start_from, plain=True) if start_from else None
        return hold_when_free(folder, origin, processes, console, restore)

    held = processes.main_decides(hold, _HELD_RUN.dump_json, _HELD_RUN.validate_json)
    try:
        require_shared(held.lease, processes)
        mine = list[Candidate]()
        if processes.publishes:
            if not processes.is_main:
                live.adopt(held.lease)
                live.delete_orphans()
            mine = [Candidate.of(held.lease, processes.index)]
        candidates = _CANDIDATES.validate_python(processes.gather(_CANDIDATES.dump_python(mine, mode="json")))
        run = processes.main_decides(
            lambda: choose_state(held, candidates, script=recipe is None), _OPEN_RUN.dump_json, _OPEN_RUN.validate_json
        )
        for notice in run.notices:
            console.warn(notice)
        yield run
    finally:
        console.end()
        if processes.is_main:
            held.lease.release()
        processes.leave()


def hold_when_free(
    folder: Path, start_from: Path | None, processes: Processes, console: Console, restore: Callable[[], None]
) -> HeldRun:
    """Acquire a run's lease. On several machines, wait for an earlier start that is only about to notice its end.

    Its processes that were cut off from the others end after `launch.collective_timeout`.

    Raises:
        LeaseError: Another process is training there.
    """
    patience = time.monotonic() + (processes.launch.collective_timeout if processes.machines > 1 else 0.0)
    while True:
        try:
            return hold_run(folder, start_from, restore=restore, tell=console.warn)
        except LeaseError as error:
            if time.monotonic() > patience:
                raise
            console.tick(f"waiting: {error}")
            time.sleep(1.0)


def require_shared(lease: Lease, processes: Processes) -> None:
    """Check that every process sees the run's folder of process 0.

    Raises:
        LaunchError: A process sees another folder or none; all processes raise it.
    """
    if processes.machines == 1:
        return
    patience = time.monotonic() + VISIBLE_SECONDS
    while (unseen := _unseen(lease)) and time.monotonic() < patience:
        time.sleep(0.1)
    told = processes.gather([unseen and f"process {processes.index} on {socket.gethostname()}: {unseen}"])
    if problems := [problem for problem in told if problem]:
        raise LaunchError(
            "\n".join([f"{lease.run}: not the same folder on all machines:", *problems])
            + "\nLet --out name a folder on storage that all machines share"
        )


def _unseen(lease: Lease) -> str:
    """Return why this process does not see the folder of a lease that is held; empty if it does."""
    try:
        return lease.loss()
    except OSError as error:
        return f"{lease.path}: {error.strerror}"


def read_inputs(recipe: Recipe, processes: Processes, console: Console) -> Inputs:
    """Find the base's files, load its tokenizer, and tokenise the data or take the tokens from the cache.

    Raises:
        InputError: The base, the tokenizer, the template or the data cannot be used, or the processes compute with
            different kernels.
    """
    require_quantization(recipe.base)
    console.tick("base: fingerprint")
    source = find_base(recipe, processes)
    published_quantization(source.folder, recipe.base)  # raises before the data is read
    renderer = load_renderer(source, recipe)
    data = read_data(recipe, renderer, processes, console)
    found = environment(recipe, source, renderer, data, processes)
    processes.require_same(found.versions | found.computed_by)
    return Inputs(source, renderer, data, found)


def find_base(recipe: Recipe, processes: Processes) -> Source:
    """Return the base's files on this machine. Machines may have them in different folders, or must download them.

    Raises:
        InputError: The base cannot be used, or machines have different files.
    """
    folder = resolve_path(recipe, recipe.base.repo)
    source = processes.main_decides(lambda: locate(recipe.base, folder), _SOURCE.dump_json, _SOURCE.validate_json)
    if processes.machines == 1:
        return source
    own = locate(recipe.base, folder) if processes.publishes and not processes.is_main else source
    found = [_SOURCE.validate_python(one) for one in processes.gather([_SOURCE.dump_python(own, mode="json")])]
    here = found[processes.publisher]
    if others := [process for process, one in enumerate(found) if one.files != source.files]:
        raise LaunchError(
            f"base.repo: process {others[0]} has other files of {source.name} than process 0; give all machines the "
            "same files, for a base on the Hub by base.revision"
        )
    return here


def read_data(recipe: Recipe, renderer: Renderer, processes: Processes, console: Console) -> Prepared:
    """Return the data, which the main process prepares or finds in the cache.

    The other processes map the same file of the cache. If they cannot, as on another machine, each gets a copy of it in
    an unnamed file of its own.

    Raises:
        DataError: The data has problems.
    """
    activity = "data: render and tokenise"
    console.tick(activity)

    def decide() -> Prepared | None:
        return prepare_data(recipe, renderer, partial(console.count, activity))

    data = processes.main_decides(decide, cache.name_entry, cache.open_entry)
    missing = processes.gather([data is None])
    if data is not None and not any(missing):
        return data
    with spill_file() as file:
        if processes.is_main and data is not None:
            cache.save(file, data)
        processes.copy_to_all(file)
        return data or cache.load(file)


def environment(
    recipe: Recipe, source: Source, renderer: Renderer, data: Prepared, processes: Processes
) -> Environment:
    """Return what a resume compares in addition to the recipe: fingerprints, versions, the machine and its backend."""
    cuda = processes.device.type == "cuda"
    template = str(renderer.template or renderer.tokenizer.chat_template or "")  # empty for raw text
    packages = [*PACKAGES, *(["bitsandbytes"] if recipe.base.by_bitsandbytes else [])]
    return Environment(
        Fingerprints(
            base=source.fingerprint,
            template=hashlib.sha256(template.encode()).hexdigest(),
            train=train_fingerprint(data),
            validation=data.validation.fingerprint if data.validation else None,
        ),
        versions={"lora_kit": VERSION} | {name: version(name) for name in packages},
        machine=Machine(
            processes.count,
            torch.cuda.get_device_name(processes.device) if cuda else f"cpu {platform.machine()}",
        ),
        computed_by=identity(processes.device, getattr(torch, recipe.base.dtype)),
    )


def train_fingerprint(data: Prepared) -> str:
    """Return the SHA-256 of the training examples and, for a mixture, of the number of examples of each source."""
    tokens, sizes = data.train.fingerprint, data.counts.sizes
    return hashlib.sha256(f"{tokens} {sizes}".encode()).hexdigest() if len(sizes) > 1 else tokens


def check_contract(
    recipe: Recipe, run: OpenRun, inputs: Inputs, processes: Processes, accept: Sequence[str], console: Console
) -> tuple[Row, ...]:
    """Return the differences between a resume and its checkpoint, all of them permitted; empty for a new run.

    If the run goes back to an older checkpoint, the newer ones are set aside here, after everything is permitted.

    Raises:
        ContractError: A difference is not permitted, or the run cannot begin with the given adapter.
    """
    rows = contract(run.latest.manifest.run, recipe, inputs.environment) if run.latest else []
    plan = Plan(recipe, inputs.data.train, 1, padded=False, sizes=inputs.data.counts.sizes)
    finished, steps = run.latest.step if run.latest else 0, plan.steps

    def refuse() -> None:
        refuse_fewer_steps(run.folder, finished, steps)
        enforce(rows, accept, run.folder)

    processes.main_decides(refuse)
    if run.origin is not None:
        enforce_origin(run.origin, recipe, inputs.source.fingerprint)
    if run.goes_back:
        for notice in processes.main_decides(lambda: go_back(run)):
            console.warn(notice)
    return tuple(rows)


def check_tokens(recipe: Recipe, run: OpenRun, inputs: Inputs, processes: Processes, console: Console) -> None:
    """Warn of what the tokens of a new run would train unintentionally.

    Raises:
        DataError: An example is longer than the base's context, or more examples than the recipe allows have a finding.
    """
    if run.latest is not None:
        return
    # raises before the base is loaded
    check_context(inputs.data, context_of(read_json(inputs.source.folder / "config.json")))
    console.tick("data: preflight")
    data, where = inputs.data, places(recipe, inputs.data)
    for warning in processes.main_decides(lambda: preflight(recipe, data, inputs.renderer, where)):
        console.warn(warning)


def build_model(
    recipe: Recipe,
    run: OpenRun,
    inputs: Inputs,
    changed: Set[str],
    objective: Objective,
    processes: Processes,
    console: Console,
) -> AdaptedModel:
    """Load the base, inject the adapter, and load the state that the run resumes from.

    Args:
        recipe: What the user asked for.
        run: The opened run, with the state that it resumes from.
        inputs: The files of the base, the tokenizer and the data.
        changed: The keys that a resume changes; what the run chose for them is chosen again.
        objective: The loss.
        processes: The processes that train together.
        console: Shows what is being done.
    """
    if same := sorted(StepRecord.__annotations__.keys() & set(objective.metrics)):
        raise ValueError(
            f"{type(objective).__name__}: metrics: {METRICS} has another number named {', '.join(same)}; "
            "choose other names"
        )
    before = run.latest.manifest.run.resolved if run.latest else None
    placed = choices.placement(recipe, inputs.source, processes)
    if processes.count > 1:
        console.say(f"base {placed}")
    micro_batches = choices.micro_batches(recipe, before, changed, inputs.source, processes, placed.shards)
    threads = before.threads if before else choices.threads(inputs.source, processes)
    if threads:
        torch.set_num_threads(threads)
    console.tick("base: load")
    mesh = processes.mesh() if placed.shards > 1 else None
    base = load_base(inputs.source, recipe.base, processes.device, mesh)
    check_base_fits(base, inputs)
    if before is None:
        refuse_unfit(base, inputs.source.name, processes.device)
        warn_about_untrained(base, recipe, inputs, console)
    attention, layout = choices.attention(base, recipe, before, changed, processes)
    use_attention(base, attention)
    if micro_batches.activation_checkpointing:
        fusing.checkpoint_activations(base)
    console.tick("adapter: inject")
    source = inputs.source
    model = inject(base, recipe.adapter, seed=recipe.train.seed, name=source.name, revision=source.commit)
    constants = recipe.adapter.init in WITH_CONSTANTS
    eight_bit = recipe.optim.name == "adamw-8bit"
    state = flatten(model.train(), metrics=len(objective.metrics), eight_bit=eight_bit, constants=constants)
    attach_constants(model, state)
    fresh = run.latest is None and run.origin is None
    if fresh and recipe.adapter.init == "eva":  # before kernels are fused, since layers are no longer called then
        console.tick("adapter: start from the inputs of the first step")
        plan = plan_of(recipe, inputs, objective, micro_batches.micro_batch_tokens, layout)
        start_from_inputs(model, first_calls(plan, model, inputs, processes))
        processes.broadcast([state.weights])  # the other processes may have rounded otherwise
    kernels = choices.kernels(model, recipe, before, changed, processes)
    if run.latest is not None:
        console.tick("state: load")
        latest = run.latest
        processes.main_decides(lambda: state.load(latest.state()), main=run.loaded_by)
        processes.broadcast(state.kept, run.loaded_by)
    elif run.origin is not None:
        try:
            state.load_adapter(saved_weights(run.origin.path))
        except CheckpointError as error:
            raise ContractError(f"{run.origin.path}: this run cannot begin with it: {error}") from error
    elif state.constants is not None:
        console.tick(f"adapter: start from the base's weights ({recipe.adapter.init})")
        start_from_weights(model, recipe.adapter, computes=processes.is_main)
        processes.broadcast([state.weights, state.constants])
    resolved = Resolved(
        threads=threads,
        attention=attention,
        layout=layout,
        micro_batch_tokens=micro_batches.micro_batch_tokens,
        activation_checkpointing=micro_batches.activation_checkpointing,
        kernels=kernels,
        placement=placed.placement,
    )
    return AdaptedModel(model, state, resolved)


def plan_of(recipe: Recipe, inputs: Inputs, objective: Objective, tokens: int, layout: str) -> Plan:
    """Return which examples each step trains on, in which micro-batches."""
    data = inputs.data
    return Plan(recipe, data.train, tokens, layout == "padded", objective.split, data.counts.sizes)


def first_calls(plan: Plan, model: PeftModel, inputs: Inputs, processes: Processes) -> Iterator[Call]:
    """Yield the calls of the model in the first step, all micro-batches on every process."""
    for members in plan.micro_batches(0):
        batch = collate(inputs.data.train, members, padded=plan.padded)
        trained = torch.from_numpy(batch.labels != IGNORE).to(processes.device)
        yield model_inputs(model, batch, processes.device), trained


def add_reference(
    recipe: Recipe,
    run: OpenRun,
    inputs: Inputs,
    adapted: AdaptedModel,
    objective: Objective,
    processes: Processes,
    console: Console,
    stop: StopRequest,
) -> Inputs:
    """Return the inputs in the layout of the run, with the log-probabilities of the reference if there is one.

    Raises:
        ContractError: The run has begun with an adapter, which is its reference, and `--from` does not name it again.
        Stopped: A stop signal came.
    """
    inputs = replace(inputs, data=inputs.data.sharing(adapted.resolved.layout == "shared"))
    if not objective.columns:
        return inputs
    resolved, began = adapted.resolved, origin(run)
    assert resolved.micro_batch_tokens is not None
    if began and run.origin is None:
        raise ContractError(
            f"{run.folder}: the reference of this run is the adapter that it began with; repeat the --from of its "
            "first start"
        )
    computing = Computing(adapted.model, resolved.micro_batch_tokens, resolved.layout == "padded", processes)
    facts, limit = facts_of(recipe, inputs.environment, resolved, began), recipe.data.sequence_length
    reference, activity = (
        Reference(computing, objective.columns, limit, facts, stop.is_set),
        "reference: log-probabilities",
    )
    console.tick(activity)
    with as_reference(adapted.model, adapted.state, run.origin.path if run.origin else None):
        return replace(inputs, data=reference.added_to(inputs.data, partial(console.count, activity)))


def add_text(
    recipe: Recipe,
    inputs: Inputs,
    adapted: AdaptedModel,
    objective: Objective,
    processes: Processes,
    console: Console,
    tick: Callable[[str], None],
) -> Inputs:
    """Return the inputs with the text of `evaluate.forgetting` and the base's loss on it, if the recipe names one.

    Raises:
        InputError: The text cannot be read.
    """
    if not recipe.evaluate.forgetting:
        return inputs
    resolved = adapted.resolved
    assert resolved.micro_batch_tokens is not None
    text = text_recipe(recipe, context_of(adapted.model.config.to_dict()))
    tokens = read_data(text, for_objective(inputs.renderer, text), processes, console).train
    console.tick("forgetting: loss of the base")
    plan = plan_of(recipe, inputs, objective, resolved.micro_batch_tokens, resolved.layout)
    settings = recipe.evaluate
    measured = (adapted.model, inputs.renderer, inputs.data, plan, objective, processes, settings)
    held_out = HeldOut(*measured, state=adapted.state)
    return replace(inputs, text=held_out.with_text(tokens, tick).text)


def check_base_fits(base: PreTrainedModel, inputs: Inputs) -> None:
    """Check that the tokenizer and the longest example fit the base.

    Raises:
        InputError: The tokenizer or an example does not fit.
    """
    embedding = cast(torch.Tensor, base.get_input_embeddings().weight)
    check_tokenizer_fits(inputs.renderer.tokenizer, len(embedding), used=inputs.data.train)
    check_context(inputs.data, context_of(base.config.to_dict()))


def warn_about_untrained(base: PreTrainedModel, recipe: Recipe, inputs: Inputs, console: Console) -> None:
    """Warn about linear layers that all-linear leaves out, and about labels whose tokens the base never trained.

    LoRA on linear layers cannot teach the base to write a token whose row in the head was never trained.
    """
    head = base.get_output_embeddings() or base.get_input_embeddings()
    with gathered(head):
        labels = untrained_labels(inputs.data.train, cast(torch.Tensor, head.weight))
    notes = untrained_notes(labels, inputs.renderer, raw=inputs.data.counts.train.is_raw)
    for note in [*find_targets(base, recipe.adapter).notes, *notes]:
        console.warn(note)


def make_job(
    recipe: Recipe,
    run: OpenRun,
    inputs: Inputs,
    rows: Sequence[Row],
    adapted: AdaptedModel,
    objective: Objective,
    processes: Processes,
    trackers: Trackers,
) -> Job:
    """Combine everything into a job, with the facts that every manifest of this process records."""
    latest, data, resolved = run.latest, inputs.data, adapted.resolved
    journal = Journal(run.folder, Fence(run.lease))
    assert resolved.micro_batch_tokens is not None
    finished = latest.step if latest else 0
    skipped = processes.main_decides(lambda: sorted(journal.skipped_after(finished)) if latest else [])
    facts = RunFacts(
        run_id=run.run_id,
        fencing_token=run.lease.token,
        recipe=recipe.model_dump(mode="json"),
        template=inputs.renderer.template,
        fingerprints=inputs.environment.fingerprints,
        data=data.counts,
        versions=inputs.environment.versions,
        machine=inputs.environment.machine,
        computed_by=inputs.environment.computed_by,
        resolved=resolved,
        lineage=lineage(run, rows),
        claim=claim(run, rows, processes),
        origin=origin(run),
    )
    return Job(
        recipe=recipe,
        run=run,
        processes=processes,
        inputs=inputs,
        model=adapted.model,
        state=adapted.state,
        objective=objective,
        plan=plan_of(recipe, inputs, objective, resolved.micro_batch_tokens, resolved.layout),
        facts=facts,
        resumed=latest.manifest.progress if latest else None,
        replayed=frozenset(skipped),
        journal=journal,
        trackers=trackers,
    )


def origin(run: OpenRun) -> Origin | None:
    """Return the checkpoint whose adapter the run began with, now or when it was new."""
    if run.latest is not None:
        return run.latest.manifest.run.origin
    return describe(run.origin) if run.origin else None


def claim(run: OpenRun, rows: Sequence[Row], processes: Processes) -> Claim:
    """Return what a checkpoint promises: the bytes of an uninterrupted run, or its values to rounding, and for what."""
    power_of_two = processes.count & (processes.count - 1) == 0
    bitwise_so_far = run.latest is None or run.latest.manifest.run.claim.level == "bitwise"
    if bitwise_so_far and power_of_two and still_bitwise(rows) and processes.device.type == "cpu":
        return Claim("bitwise", "1, 2, 4, 8, ... processes with these versions, this compiler and this processor")
    return Claim("rounding", "any number of processes, any device")


def lineage(run: OpenRun, rows: Sequence[Row]) -> tuple[LineageEntry, ...]:
    """Return every change that was accepted in the run's life, with the step at which it was accepted."""
    if run.latest is None:
        return ()
    accepted = [row for row in rows if row.verdict == "accept"]
    new = (LineageEntry(run.latest.step, row.key, row.then, row.now) for row in accepted)
    return (*run.latest.manifest.run.lineage, *new)
