"""Never lose a step of a transformers `Trainer`, or of TRL's trainers, which are subclasses of it.

    trainer = SFTTrainer(...)
    LiveCheckpoint(trainer, run="runs/first")  # this line
    trainer.train()

`lora-kit launch script.py` needs no line in the script. After every step the state is copied to shared memory while the
next step computes, and a keeper writes checkpoints from there. The same command resumes: a new process gets back the
trained weights, the optimizer, the scheduler, the scaler, the random generators, the position in the data and
`TrainerState`, so it computes the bytes of an undisturbed run on the same number of processes. Nothing is pickled.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from lora_kit.errors import ContractError, LaunchError, LeaseError, LoraKitError, Stopped
from lora_kit.integrations import capture, contract, plain
from lora_kit.integrations.closed_world import ClosedWorld
from lora_kit.integrations.fetching import Fetching
from lora_kit.integrations.saved import Saved, StateFolder, load_saved_here
from lora_kit.runs import formats, live
from lora_kit.runs.journal import Journal, short_cause
from lora_kit.runs.lease import Fence
from lora_kit.runs.live import Live
from lora_kit.runs.manifest import ScriptFacts, StepFacts
from lora_kit.runs.resume import OpenRun
from lora_kit.runs.scripts import ScriptJob
from lora_kit.supervise.stopping import StopRequest, stop_signals
from lora_kit.training.processes import Processes
from lora_kit.training.publisher import Publisher, forwarding_signals
from lora_kit.training.setup import open_folder
from lora_kit.views.console import Console, print_error

EVERY_SECONDS, KEEP = 30.0, 3  # defaults of a recipe's checkpoint.every_seconds and checkpoint.keep
HOOKS = (  # methods of the trainer that are wrapped
    *("train", "training_step", "get_batch_samples", "_run_epoch", "_maybe_log_save_evaluate", "_finalize_training"),
    *("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state"),
)


class LiveCheckpoint(TrainerCallback):
    """Attaches a run's folder to a trainer, before `trainer.train()` is called.

    Args:
        trainer: The trainer, or a trainer of a subclass. Its methods are wrapped, and this callback is added to it.
        run: The run's folder. If it holds an earlier start of this run, `trainer.train()` resumes it.
        every_seconds: The longest time between two checkpoints on disk.
        keep: How many of the newest checkpoints stay.
        train: What trains; None for the trainer's own method.

    Raises:
        LaunchError: The trainer is trained in a way that cannot be resumed exactly; the message says which.

    Example:
        >>> LiveCheckpoint(trainer, run="runs/first")
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        run: str | Path,
        *,
        every_seconds: float = EVERY_SECONDS,
        keep: int = KEEP,
        train: Callable[..., Any] | None = None,
    ) -> None:
        refuse(trainer)
        self._trainer: Any = trainer
        self._folder = Path(run)
        self._every_seconds, self._keep = every_seconds, keep
        self._is_done = False
        self._original: dict[str, Callable[..., Any]] = {name: getattr(trainer, name) for name in HOOKS}
        if train is not None:
            self._original["train"] = train
        for name in HOOKS:
            setattr(trainer, name, getattr(self, name))
        trainer.add_callback(self)

    # ---- one call of trainer.train() ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **named: Any) -> Any:
        """Train as `Trainer.train` does, resuming the run in the folder.

        Raises:
            SystemExit: With code 75 after a stop signal: the last finished step is durable, the same command resumes.
            LoraKitError: The run cannot be resumed, or a checkpoint could not be written.
        """
        if self._is_done:
            raise LaunchError(
                f"{self._folder}: this run has trained already; a second call of trainer.train() needs a "
                "LiveCheckpoint with a folder of its own, and under `lora-kit launch` a script of its own"
            )
        states = plain.random_states()  # what follows may import modules that draw random numbers
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.append(self)  # the last, so that it sees what the others have set
        processes = _processes(self._trainer)
        console = Console(silent=not processes.is_main)
        try:
            with ExitStack() as stack:
                stop = stack.enter_context(stop_signals())
                run = stack.enter_context(open_folder(processes, self._folder, None, None, console))
                self._begin(processes, run, stop, load_saved_here(run))
                stack.enter_context(forwarding_signals(stop, run, self._region))
                stack.callback(self._end)
                folder = stack.enter_context(self._state_folder()) if self._saved else resume_from_checkpoint
                if self._saved:  # the first start has evaluated
                    stack.callback(setattr, self._trainer.args, "eval_on_start", self._trainer.args.eval_on_start)
                    self._trainer.args.eval_on_start = False
                plain.set_random_states(states)
                with self._logged_failures():
                    result = self._original["train"](resume_from_checkpoint=folder, **named)
                if processes.is_main:
                    self._journal.event("finished", step=self._trainer.state.global_step)
                self._is_done = True
                return result
        except Stopped as stopped:
            if processes.is_main:
                print_error(str(stopped), "stopped")
            raise SystemExit(stopped.exit_code) from None

    def _begin(self, processes: Processes, run: OpenRun, stop: StopRequest, saved: Saved | None) -> None:
        self._processes, self._run, self._stop, self._saved = processes, run, stop, saved
        self._journal = Journal(run.folder, Fence(run.lease))
        self._publisher: Publisher | None = None
        self._buffers: capture.Buffers | None = None
        self._facts_of_run: ScriptFacts | None = None
        self._attributes: capture.Attributes | None = None
        self._world: ClosedWorld | None = None
        self._unlogged: StepFacts | None = None
        self._documents = capture.Documents()
        self._parameters, self._parameters_of = dict[str, torch.nn.Parameter](), list[int]()
        self._resumed_folder, self._resuming, self._epoch_ended = "", saved is not None, False
        self._logged, self._published = saved.step if saved else 0, False
        if saved is not None and (count := len(saved.document["processes"])) != processes.count:
            raise ContractError(
                f"{run.folder}: {count} process(es) have trained here, not {processes.count}; resume with as many, or "
                "use another folder for a new run"
            )
        self._epoch_states: dict[str, Any] | None = None
        self._fetched, self._drawn, self._told_of_drawn = False, "", False
        self._positions, self._stall, self._last = 0, 0.0, time.perf_counter()
        own = self._own_document if saved else {}
        self._fetching = Fetching((own["ahead"], own["random"]) if own.get("ahead") else None)
        self._of_stream = isinstance(self._trainer.train_dataset, IterableDataset)
        self._seconds_before = saved.document["seconds"] if saved else 0.0
        self._began = time.time()

    @contextmanager
    def _logged_failures(self) -> Iterator[None]:
        """Write an error that ends the run to events.jsonl, unless `lora-kit launch` is the keeper, which does that."""
        try:
            yield
        except (Stopped, LeaseError):
            raise
        except Exception as error:
            if self._processes.is_main and not self._run.lease.borrowed:
                with suppress(LoraKitError):
                    kind = "" if isinstance(error, LoraKitError) else f"{type(error).__name__}: "
                    self._journal.event("failed", step=self._logged, cause=short_cause(f"{kind}{error}"))
            raise

    def _region(self) -> live.Region | None:
        return self._publisher.region if self._publisher is not None else None

    def _end(self) -> None:
        if self._publisher is not None:
            self._publisher.end()

    def _state_folder(self) -> StateFolder:
        """Return a folder with the one file that `Trainer.train` reads itself, until the block ends."""
        assert self._saved is not None
        state = self._saved.document["state"]
        folder = StateFolder(json.dumps(state))
        self._resumed_folder = folder.name
        return folder

    # ---- what a resume gets back ---------------------------------------------------------------------------------

    def _is_ours(self, checkpoint: Any) -> bool:
        return self._saved is not None and checkpoint == self._resumed_folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_ours(resume_from_checkpoint):
            return self._original["_load_from_checkpoint"](resume_from_checkpoint, model)
        assert self._saved is not None
        capture.load_weights(self._trainer.model, self._saved.weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            return self._original["_load_optimizer_and_scheduler"](checkpoint)
        assert self._saved is not None
        document = self._saved.document
        self._trainer.optimizer.load_state_dict(plain.unpack(document["optimizer"], self._saved.optimizer))
        self._trainer.lr_scheduler.load_state_dict(plain.unpack(document["scheduler"]))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._is_ours(checkpoint):
            return self._original["_load_scaler"](checkpoint)
        assert self._saved is not None
        if self._saved.document["scaler"] is not None:
            self._trainer.accelerator.scaler.load_state_dict(plain.unpack(self._saved.document["scaler"]))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the generators: at the begin of an epoch, or once the first batch of the next step has been fetched."""
        if not self._is_ours(checkpoint):
            return self._original["_load_rng_state"](checkpoint)
        if self._own_document["ahead"] is None:  # else they were set when the batch had been fetched
            plain.set_random_states(self._own_document["random"])

    @property
    def _own_document(self) -> dict[str, Any]:
        """The part of the document of this process."""
        assert self._saved is not None
        found: dict[str, Any] = self._saved.document["processes"][self._processes.index]
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Compare the run's settings, and give trainer and callbacks their attributes back."""
        trainer, saved = self._trainer, self._saved
        self._attributes = capture.Attributes(trainer, self)
        facts = contract.facts_of(trainer, self._run)
        if saved is not None:
            for warning in contract.check(self._run.folder, saved.facts, facts):
                self._warn(warning)
            missing = self._attributes.restore(self._own_document["attributes"])
            if missing:
                self._warn(f"{', '.join(missing)}: no longer in the trainer, so the saved attributes are lost")
            if saved.facts.uncaptured:
                self._warn(f"this resume is not exact: {'; '.join(saved.facts.uncaptured)}")
            self._saved = replace(saved, weights={}, optimizer={})  # they are loaded
        self._facts_of_run = facts
        if self._processes.is_main:
            step = saved.step if saved else 0
            self._journal.cut(step, samples=step)
            if saved and self._journal.last_step() < step:
                self._journal.metrics(json.loads(saved.progress.line))
            event = {"step": step, "steps": state.max_steps, "processes": self._processes.count}
            event |= {"launched": self._run.lease.record.taken, "reached": self._run.reached}
            self._journal.event("resumed" if saved else "started", **event, run_id=self._run.run_id)
            after = f"resumes after step {step} of {state.max_steps}" if saved else f"{state.max_steps} steps"
            self._tell(f"{self._run.folder}: {after}; every finished step is kept")
        self._world = ClosedWorld(trainer, self, self._attributes)
        self._last = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Note the random generators, from which the order of the epoch may be drawn."""
        if self._resuming:
            own, self._resuming = self._own_document, False
            plain.set_random_states(own["epoch"] or own["random"])
        self._epoch_states, self._fetched = plain.random_states(), False

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        if self._saved is not None and self._trainer.control.should_training_stop:
            return  # the run had reached its end
        self._original["_run_epoch"](*arguments, **named)

    # ---- signs of life --------------------------------------------------------------------------------------------

    def _heartbeat(self, *arguments: Any, **named: Any) -> None:
        if self._publisher is not None:
            self._publisher.heartbeat()

    on_step_begin = on_substep_end = on_prediction_step = _heartbeat

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """Count the positions of a batch, and train on it."""
        first = next((each for each in inputs.values() if isinstance(each, Tensor)), None) if inputs else None
        self._positions += first.numel() if first is not None else 0
        return self._original["training_step"](model, inputs, *arguments, **named)

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        """Fetch the batches of a step, as before the interruption; name generators that a stream of rows draws from.

        The first batches of an epoch are not compared: there torch draws the seed of its workers, which changes
        nothing.
        """
        compares = self._of_stream and self._fetched and self._world is not None and self._world.is_due
        before = plain.random_states() if compares else {}
        with self._fetching.watching():
            batches = self._original["get_batch_samples"](*arguments, **named)
        self._fetched = True
        after = plain.random_states() if compares else {}
        drawn = [name for name, state in after.items() if before.get(name) != state]
        if drawn and not self._drawn:
            self._drawn = f"the random generator of {' and '.join(drawn)}, from which batches of a stream are drawn"
        return batches

    # ---- a finished step ------------------------------------------------------------------------------------------

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Wait until the state of the step before is copied, since the optimizer changes it now."""
        if self._publisher is not None:
            self._stall += self._publisher.wait_copied()

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        """Log, evaluate and save as the trainer does; then the step is finished.

        The trainer calls this after every step, and again at the end of an epoch. The last step of an epoch is finished
        after the second call, because a resume after it begins with the next epoch.
        """
        if self._publisher is not None:
            self._publisher.expect_no_steps()  # an evaluation may take long
        self._original["_maybe_log_save_evaluate"](*self._with_earlier_seconds(arguments, 6), **named)
        trainer, epoch = self._trainer, arguments[4]
        ends_epoch = trainer.state.epoch >= epoch + 1 or trainer.control.should_training_stop
        if not ends_epoch or self._epoch_ended:
            self._finish_step()
        self._epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Note that the next call of `_maybe_log_save_evaluate` is that of the epoch."""
        self._epoch_ended = True

    def _finalize_training(self, *arguments: Any, **named: Any) -> Any:
        """Make the last step durable, then end training as the trainer does."""
        if self._resuming:  # no epoch was left, so nothing has set the generators
            plain.set_random_states(self._own_document["random"])
        if self._published or isinstance(self._run.latest, Live):
            self._publish(due=True)
        if self._publisher is not None:
            self._publisher.wait_durable()
            self._log_line()
            self._publisher.expect_no_steps()
        return self._original["_finalize_training"](*self._with_earlier_seconds(arguments, 2), **named)

    def _with_earlier_seconds(self, arguments: tuple[Any, ...], place: int) -> tuple[Any, ...]:
        """Return arguments in which the training has begun earlier by the seconds of the earlier starts."""
        return (*arguments[:place], arguments[place] - self._seconds_before, *arguments[place + 1 :])

    def _finish_step(self) -> None:
        """Publish the state after a step, and end the run if a signal asks for that."""
        trainer = self._trainer
        assert self._world is not None
        found = self._world.look(trainer.state.global_step) if self._processes.is_main else []
        if self._drawn and not self._told_of_drawn:
            found, self._told_of_drawn = [*found, self._drawn], True
        if found:
            self._report_uncaptured(found)
        if self._epoch_ended:
            self._epoch_states = None
            self._fetching.forget()
        wants = self._stop.is_set() or (self._publisher is not None and self._publisher.stop_requested)
        stopping = self._publish(due=False, wants_to_stop=wants)
        if stopping:
            self._publish(due=True)
            step = trainer.state.global_step
            if self._publisher is not None:
                self._publisher.wait_durable()
                self._log_line()
                self._journal.event("stopped", step=step)
            if self._processes.count > 1:
                dist.barrier()
            raise Stopped(
                f"{self._run.folder}: stopped by a signal after step {step} of {trainer.state.max_steps}, which is "
                "durable; the same command resumes it"
            )

    def _publish(self, *, due: bool, wants_to_stop: bool = False) -> bool:
        """Publish the state as it is; return whether a process wants to stop."""
        began = time.perf_counter()
        trainer, processes = self._trainer, self._processes
        assert self._attributes is not None
        states = plain.random_states()
        own = {
            "random": states,
            "epoch": self._epoch_states,
            "ahead": None if self._of_stream else self._fetching.ahead(),
            "attributes": self._attributes.changed(),
            "stop": wants_to_stop,
        }
        each, self._published = processes.gather([own]), True
        stopping = any(document.pop("stop") for document in each)
        if processes.is_main:
            packed, optimizer = capture.optimizer_state(trainer)
            document = capture.shared_document(trainer, packed)
            document |= {"processes": each, "seconds": self._seconds_before + time.time() - self._began}
            text, weights = self._documents.encode(document, trainer.state.log_history), self._weights()
            if self._publisher is None:
                self._open(text, weights, optimizer)
                plain.set_random_states(states)
            assert self._publisher is not None and self._buffers is not None
            self._publisher.wait_published()
            self._log_line()
            if not self._buffers.takes(text):
                self._grow(text, [*weights.values(), *optimizer.values()])
            self._buffers.set(text, [*weights.values(), *optimizer.values()])
            self._stall += time.perf_counter() - began
            facts = self._step_facts()
            self._publisher.publish(lambda: facts, due=due)
            self._unlogged = facts
            if fault := self._publisher.new_fault():
                self._warn(fault)
        return stopping

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters; their names are looked up again if the optimizer has got others."""
        groups = self._trainer.optimizer.param_groups
        key = [id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad]
        if key != self._parameters_of:
            self._parameters, self._parameters_of = capture.trainable(self._trainer.model), key
        return self._parameters

    def _open(self, text: bytes, weights: dict[str, torch.nn.Parameter], optimizer: dict[str, Tensor]) -> None:
        """Open the live region, whose layout is known once the optimizer has a state."""
        assert self._facts_of_run is not None
        tensors = [*weights.values(), *optimizer.values()]
        self._buffers = capture.Buffers(tensors, self._space(text))
        self._job = ScriptJob(
            document_bytes=self._buffers.space,
            weights=capture.layout_of(weights),  # type: ignore[arg-type]
            optimizer=capture.layout_of(optimizer),
            adapter_config=capture.adapter_config_of(self._trainer.model),
            facts=self._facts_of_run,
            every_seconds=self._every_seconds,
            keep=self._keep,
        )
        resumes_live, is_main = isinstance(self._run.latest, Live), self._processes.is_main
        self._publisher = Publisher(self._run.lease, self._buffers, self._job, keep=resumes_live, is_main=is_main)
        self._publisher.heartbeat()

    def _grow(self, text: bytes, tensors: list[Tensor]) -> None:
        """Go on in a larger live region, since the log has become too long for this one."""
        assert self._publisher is not None
        self._buffers = capture.Buffers(tensors, capture.space_for(text))
        self._job = replace(self._job, document_bytes=self._buffers.space)
        self._publisher.grow(self._buffers, self._job)

    def _space(self, text: bytes) -> int:
        """Return the document's space: that of the region that is there, if it is enough, so that the region stays."""
        region = live.open_region(self._run.folder, run_id=self._run.run_id, most=self._run.lease.token)
        job = live.read_job(region) if region else None
        least = capture.space_for(text)
        return max(job.document_bytes, least) if isinstance(job, ScriptJob) else least

    def _step_facts(self) -> StepFacts:
        """Return the step's part of the manifest; the line has what the trainer has logged after this step."""
        trainer, now = self._trainer, time.perf_counter()
        step = trainer.state.global_step
        history = trainer.state.log_history
        logged = history[-1] if history and history[-1].get("step") == step else {}
        examples = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * self._processes.count
        unlogged = self._unlogged
        if unlogged is not None and unlogged.step == step:
            return unlogged
        seconds, self._last = max(now - self._last, 1e-9), now
        line = {
            "step": step,
            "examples": examples,
            "tokens": self._positions,
            "loss": logged.get("loss"),
            "learning_rate": logged.get("learning_rate"),
            "grad_norm": logged.get("grad_norm"),
            "tokens_per_second": round(self._positions / seconds, 1),
            "stall_seconds": round(self._stall, 6),
            "time": round(time.time(), 3),
        }
        self._positions, self._stall = 0, 0.0
        return StepFacts(step, step * examples, (), json.dumps(formats.finite(line)))

    def _log_line(self) -> None:
        """Write the line of the published step, which can no longer be lost with this process."""
        if self._unlogged is not None and self._publisher is not None:
            self._publisher.wait_published()
            if self._unlogged.step > self._logged:
                self._journal.metrics(json.loads(self._unlogged.line))
                self._logged = self._unlogged.step

    # ---- what is recorded and said ----------------------------------------------------------------------------------

    def _report_uncaptured(self, found: list[str]) -> None:
        """Say what would be lost by a resume, and record it in the log and in every following checkpoint."""
        assert self._facts_of_run is not None
        facts = replace(self._facts_of_run, uncaptured=(*self._facts_of_run.uncaptured, *found))
        self._facts_of_run = facts
        text = (
            "these change from step to step and are not part of the saved state, so a resume will not be exact: "
            f"{'; '.join(found)}. Keep such values as attributes of a TrainerCallback or of the trainer (numbers, "
            "text, lists, dicts, small tensors), which are saved"
        )
        self._warn(text)
        if self._processes.is_main:
            self._journal.event("fault", step=self._trainer.state.global_step, what=text)
        if self._publisher is not None:
            self._job = replace(self._job, facts=facts)
            self._publisher.change_job(self._job)

    def _tell(self, text: str) -> None:
        if self._processes.is_main:
            print(f"lora_kit: {text}", file=sys.stderr, flush=True)

    def _warn(self, text: str) -> None:
        self._tell(f"warning: {text}")


def refuse(trainer: Trainer) -> None:
    """Refuse a trainer whose state cannot be captured or that this module cannot drive.

    Raises:
        LaunchError: See the message.
    """
    missing = [name for name in HOOKS if not callable(getattr(trainer, name, None))]
    if missing:
        raise LaunchError(
            f"transformers {version('transformers')}: its Trainer has no {', '.join(missing)}; use a version that "
            "lora_kit supports (pyproject.toml)"
        )
    reasons = {
        "FSDP shards weights and optimizer over processes": trainer.is_fsdp_enabled,
        "DeepSpeed keeps the optimizer to itself": trainer.is_deepspeed_enabled,
        "the weights were sharded when the model was loaded": trainer.is_distributed_loading_by_transformers,
        "auto_find_batch_size may change the batch size": trainer.args.auto_find_batch_size,
        "ignore_data_skip begins an epoch again after a resume": trainer.args.ignore_data_skip,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise LaunchError(f"{type(trainer).__name__}: an exact resume is not possible: {'; '.join(found)}")


def _processes(trainer: Trainer) -> Processes:
    """Return the processes of a trainer; they exchange their small states over gloo."""
    count = trainer.args.world_size
    group = dist.new_group(backend="gloo") if count > 1 and dist.get_backend() != "gloo" else None
    return Processes(trainer.args.process_index, count, torch.device("cpu"), ExitStack(), group=group)
