"""The command line. Each command calls the function of the package that has its name.

Importing this module imports nothing heavy, so `--help` answers at once. Exit codes: 0 done, 1 failed, 2 wrong or
refused input, 75 stopped by a signal and resumable.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from io import TextIOWrapper
from itertools import takewhile
from math import exp
from pathlib import Path
from runpy import run_path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from lora_kit.errors import CheckpointError, InputError, LaunchError, LoraKitError, scrub
from lora_kit.version import VERSION
from lora_kit.views.console import Console, number, print_error, printable, rich_console
from lora_kit.views.output import make_output_safe

app = typer.Typer(
    name="lora-kit",
    help="LoRA fine-tuning that never loses a step.\n\n"
    "Start with: lora-kit check RECIPE, then lora-kit train RECIPE --out RUN. The README has a first recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# environment variable: a file for the exit code, because launchers such as torchrun turn every code into 1
EXIT_CODE = "LORA_KIT_EXIT_CODE"
NO_THREAD = "can't start new thread"  # text of Python's RuntimeError where the kernel allows no more threads
GPUS = Path("/proc/driver/nvidia/gpus")  # the driver's folder for each GPU

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe field, e.g. optim.learning_rate=1e-4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def error_messages() -> Iterator[None]:
    """Turn lora_kit's errors and those of files into a message and an exit code; others keep their traceback."""
    try:
        yield
    except LoraKitError as error:
        if launched_by_another() and (path := os.environ.get(EXIT_CODE)):
            with suppress(OSError):  # without the file the launcher's own exit code stays
                Path(path).write_text(f"{error.exit_code}\n")
        # an error with exit code 1 may be that of one process; all processes raise the others, so process 0 prints them
        if not launched_by_another() or os.environ.get("RANK", "0") == "0" or error.exit_code == 1:
            print_error(str(error) or type(error).__name__, "stopped" if error.exit_code == 75 else "error")
        raise SystemExit(error.exit_code) from None
    except RuntimeError as error:
        if str(error) != NO_THREAD:
            raise
        print_error(f"{NO_THREAD}: the limit of processes (ulimit -u) or of memory is too low for this command")
        raise SystemExit(1) from None
    except OSError as error:  # a file or a folder that cannot be read or written, or a name that is too long
        if error.filename is None:
            raise
        print_error(f"{error.filename}: {error.strerror}")
        raise SystemExit(1) from None


def launched_by_another() -> bool:
    """Return whether torchrun or `accelerate launch` has started this process; a single variable proves nothing."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or (
        "ACCELERATE_MIXED_PRECISION" in os.environ
    )


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """LoRA fine-tuning that never loses a step."""
    make_output_safe()
    with error_messages():
        try:
            Path.cwd()
        except OSError as error:
            raise InputError(f"the current folder: {error.strerror}; change to another folder") from None
        try:
            tempfile.gettempdir()  # packages that lora_kit imports need it
        except FileNotFoundError:
            raise InputError(
                "temporary folder: none can be written; mount one at /tmp (in Docker --tmpfs /tmp, in Kubernetes an "
                "emptyDir), or set TMPDIR to a folder that can be written"
            ) from None
    if version:
        print(f"lora_kit {VERSION}")
        raise typer.Exit


@contextmanager
def imports(what: str, named: str | Path) -> Iterator[Path]:
    """Print on stderr what is starting, then import as in `quickly`. Yields the folder of the checkpoint `named`."""
    print(f"lora_kit {VERSION}: {what} {scrub(str(named))} ...", file=sys.stderr, flush=True)
    from lora_kit.artifacts.locate import checkpoint_at
    from lora_kit.runs.manifest import MANIFEST, read_manifest

    path = checkpoint_at(named)
    base = read_manifest(path / MANIFEST).run.recipe.get("base", {})
    with quickly(bitsandbytes=base.get("quantization") != "none"):
        yield path


@contextmanager
def quickly(*, bitsandbytes: bool) -> Iterator[None]:
    """Import faster: without garbage collections, and without bitsandbytes unless it is needed.

    Collections take a third of the time. bitsandbytes, which peft imports if it is installed, takes a quarter.
    """
    if not bitsandbytes and "peft" not in sys.modules:
        # the import of bitsandbytes then fails, as if it were not installed
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def note(text: str) -> None:
    """Print a note to stderr."""
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function as the command of its name, with `error_messages`."""
    return app.command()(error_messages()(function))


@command
def train(
    recipe: RecipeFile,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="RUN", help="The run's folder. If it holds an earlier start of this run, training resumes."
        ),
    ],
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Training processes on this machine. [default: one per GPU, or one]"),
    ] = None,
    set_: Overrides = [],  # noqa: B006
    accept: Annotated[
        list[str],
        typer.Option(
            metavar="KEY",
            help="Resume although this key differs from the run's checkpoint, e.g. optim.learning_rate. Without this "
            "option such a resume is refused, with a table of all differences.",
        ),
    ] = [],  # noqa: B006
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="PATH",
            help="Another run or checkpoint, a PEFT adapter, a Hub name, a URL: begin a new run with its adapter. One "
            "of this run's own checkpoints: go back to it; newer checkpoints are set aside, not deleted.",
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Measure where the time of steps 3 to 5 goes: a table by part (also in RUN/profile/table.txt) and a "
            "trace for ui.perfetto.dev (RUN/profile/trace.json).",
        ),
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often to start again after a process was killed, crashed or hung.")
    ] = 10,
) -> None:
    """Train a recipe. The same command starts a run, resumes it and, when it is finished, shows the result."""
    from lora_kit.supervise.stopping import stop_before_training
    from lora_kit.supervise.zygote import Zygote

    print(f"lora_kit {VERSION}: {recipe} is trained in {out}", flush=True)
    if launched_by_another():
        from lora_kit.recipe.load import load_recipe
        from lora_kit.supervise.launch import follow_launcher

        loaded = load_recipe(recipe, set_)
        if processes is not None:
            raise LaunchError(f"--processes {processes}: another launcher already started this process; leave one out")
        follow_launcher()
        with quickly(bitsandbytes=loaded.base.by_bitsandbytes):
            from lora_kit.training import loop

        loop.train(loaded, out, accept=accept, start_from=start_from, profile=profile)
        return
    stop_before_training()
    with ExitStack() as stack:
        zygote = Zygote()  # imports torch while this process does the rest
        stack.callback(zygote.end)
        from lora_kit.recipe.load import load_recipe, resolve_path, similar_path
        from lora_kit.runs.origin import open_origin
        from lora_kit.runs.resume import no_remote, take_over
        from lora_kit.supervise.launch import Program
        from lora_kit.supervise.launch import launch as start
        from lora_kit.training.request import TrainRequest

        loaded = load_recipe(recipe, set_)
        base = loaded.base.repo
        if resolve_path(loaded, base) is None:
            similar = similar_path(loaded, base)
            meant = f"; did you mean {similar}?" if similar else ""
            print(f"base {base}: no such folder here, so it is looked up on the Hub{meant}", flush=True)
        origin = None
        if start_from:
            from lora_kit.artifacts.locate import checkpoint_at  # slow to import, and most starts do not need it

            origin = open_origin(checkpoint_at(start_from, plain=True))
        restore = no_remote
        if loaded.checkpoint.remote is not None:
            from lora_kit.artifacts.remotes import require_remote, restorer  # as above

            require_remote(loaded)
            restore = restorer(loaded, out, tell=lambda text: print(text, flush=True))
        lease, notices = take_over(out, restore=restore, tell=lambda text: print(f"warning: {text}", file=sys.stderr))
        for notice in notices:
            print(f"warning: {notice}", file=sys.stderr)
        request = TrainRequest(
            loaded, out, accept=tuple(accept), start_from=origin.path if origin else None, profile=profile
        )
        program = Program.of_recipe(
            request.to_json(),
            absent=() if loaded.base.by_bitsandbytes else ("bitsandbytes",),
            step_timeout=loaded.train.step_timeout,
        )
        raise typer.Exit(
            start(
                program,
                zygote=zygote,
                processes=processes or _gpus(),
                run=out,
                lease=lease,
                max_restarts=max_restarts,
            )
        )


def train_worker(request: str) -> None:
    """Train as one of the processes that `launch` starts; `request` is a `TrainRequest` as JSON."""
    from lora_kit.training import loop
    from lora_kit.training.request import TrainRequest

    parsed = TrainRequest.from_json(request)
    loop.train(parsed.recipe, parsed.out, accept=parsed.accept, start_from=parsed.start_from, profile=parsed.profile)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
@error_messages()
def launch(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="A Python script that calls `Trainer.train()`.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGS...", help="The script's own arguments."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="RUN",
            help="The run's folder. If it holds an earlier start of this run, training resumes. [default: runs/NAME "
            "for NAME.py]",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Training processes on this machine, which train together as under torchrun.")
    ] = 1,
    every_seconds: Annotated[
        float, typer.Option(min=0, help="The longest time between two checkpoints on disk.")
    ] = 30.0,
    keep: Annotated[int, typer.Option(min=2, help="How many of the newest checkpoints stay on disk.")] = 3,
    step_timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds without a sign of life that count as a hang. [default: 10 times the longest step, and at "
            "least 10 minutes]",
        ),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often to start again after a process was killed, crashed or hung.")
    ] = 10,
) -> None:
    """Run a script with a transformers Trainer, or one of TRL, so that it never loses a step. It needs no change.

    After every step the whole state of training is copied to shared memory, from which checkpoints are written to
    RUN/checkpoints. If the process is killed, crashes or hangs, it starts again from its last finished step. After
    SIGTERM the last finished step is written and the exit code is 75; the same command resumes it, also after a crash
    of the machine. A resume gives the bytes of an undisturbed run: weights, optimizer, scheduler, random generators,
    position in the data. Options of this command stand before SCRIPT, those of the script after it:

    lora-kit launch --out runs/first train.py --learning_rate 1e-4
    """
    from lora_kit.integrations.script import WORKER, ScriptRequest, default_run
    from lora_kit.runs.resume import take_over
    from lora_kit.supervise.launch import LOADING_TIMEOUT_SECONDS, Program
    from lora_kit.supervise.launch import launch as start
    from lora_kit.supervise.zygote import Zygote

    if launched_by_another():
        raise LaunchError(
            "lora-kit launch: another launcher has started this process; use --processes instead of it, or keep it and "
            "add the line LiveCheckpoint(trainer, run=...) of lora_kit.integrations.transformers to the script"
        )
    if not script.is_file():
        raise InputError(f"{script}: no such file; give a Python script")
    run = out or default_run(script)
    print(f"lora_kit {VERSION}: {script} is trained in {run}", file=sys.stderr, flush=True)
    lease, notices = take_over(run, tell=lambda text: print(f"warning: {text}", file=sys.stderr))
    for notice in notices:
        print(f"warning: {notice}", file=sys.stderr)
    request = ScriptRequest(script, tuple(arguments or ()), run, every_seconds, keep)
    with ExitStack() as stack:
        zygote = Zygote(fresh=True)
        stack.callback(zygote.end)
        program = Program(
            WORKER,
            request.to_json(),
            step_timeout=step_timeout,
            least_timeout=LOADING_TIMEOUT_SECONDS,  # a callback of the script may do anything between two steps
        )
        raise typer.Exit(
            start(
                program,
                zygote=zygote,
                processes=processes,
                run=run,
                lease=lease,
                max_restarts=max_restarts,
            )
        )


@command
def drill(
    recipe: RecipeFile,
    faults: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="What happens to the run: kill (a training process), keeper (the process of the command), both (all "
            "processes at once), write (the keeper, while it writes a checkpoint), sigterm, hang (a suspended "
            "process), corrupt (a flipped bit in the newest checkpoint), processes (another number of them), placement "
            "(a sharded base, then whole again). [default: all that the recipe and the machine allow]",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="The step after which the runs are compared. [default: 12, or enough for all faults]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the moments and the order of the faults.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Training processes on this machine.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="The drill's folder; an earlier drill in it is replaced. [default: runs/NAME/drill for the recipe "
            "NAME.yaml. The model card of a run shows a drill of its recipe in RUN/drill]",
        ),
    ] = None,
    set_: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Prove on this machine that a recipe survives faults: train its first steps twice, once with faults, and compare.

    Both runs are real. `lora-kit train` starts the second run too; its processes are killed, stopped and suspended at
    random moments, its newest checkpoint is damaged, and the same command resumes it each time. Then adapter and
    moments of both runs must have the same bytes, or be equal up to rounding where the runs claim no more (on a GPU),
    and metrics.jsonl must have each step once. The certificate (certificate.txt, certificate.json) names every fault
    with the step it hit, what was lost and how long the resume took, the bytes and hashes, versions and machine.

    Nothing is evaluated, tracked or pushed. Exit code 0 only if every fault was done and everything is equal.

    Example: lora-kit drill recipes/quickstart.yaml --faults kill,corrupt --steps 12
    """
    from lora_kit.recipe.load import load_recipe
    from lora_kit.runs.certificate import FOLDER
    from lora_kit.supervise.drill import Drill
    from lora_kit.supervise.faults import FAULTS

    names = tuple(dict.fromkeys(faults.split(","))) if faults is not None else None
    if unknown := [name for name in names or () if name not in FAULTS]:
        known = [f"{name}: {fault.about}" for name, fault in FAULTS.items()]
        raise InputError("\n".join([f"--faults {faults}: {unknown[0]!r} is no fault; the faults are", *known]))
    folder, console = out or Path("runs") / recipe.stem / FOLDER, Console(silent=as_json)
    asked = Drill(
        recipe, tuple(set_), load_recipe(recipe, set_), folder, steps, seed, names, processes=processes, gpus=_gpus()
    )
    console.say(f"lora_kit {VERSION}: {recipe} is trained twice in {folder}, the second time with faults")
    certificate = asked.run(console.say)
    if as_json:
        _print_json(asdict(certificate))
    else:
        print(certificate.text(), end="")
    if not certificate.equal:
        raise typer.Exit(1)


def _gpus() -> int:
    """Return how many processes to start: one for each GPU that torch will see, and at least one. Imports no torch."""
    torch = find_spec("torch")
    about_torch = run_path(str(Path(torch.origin).with_name("version.py"))) if torch and torch.origin else {}
    if about_torch.get("cuda") is None:
        return 1
    gpus = len(list(GPUS.glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA ignores the first entry that names no GPU and all that follow
        known = {str(number) for number in range(gpus)}
        names = [name.strip() for name in visible.split(",")]
        shown = takewhile(lambda name: name in known or name.startswith(("GPU-", "MIG-")), names)
        gpus = min(gpus, len(list(shown)))
    return max(1, gpus)


@command
def check(
    recipe: RecipeFile,
    set_: Overrides = [],  # noqa: B006
    offline: Annotated[bool, typer.Option(help="Do not use the network; list what could not be checked.")] = False,
    shapes: Annotated[
        Path | None, typer.Option(help="With --offline: a folder of model configs named `<owner>--<name>.json`.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="The number of training processes to estimate for.")] = 1,
    show: Annotated[int, typer.Option(min=0, metavar="N", help="The number of examples to show.")] = 2,
    ids: Annotated[bool, typer.Option("--ids", help="Show each token with its id.")] = False,
    time: Annotated[
        bool,
        typer.Option(
            "--time", help="Measure this machine for a few seconds and estimate the seconds of a step and of the run."
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0, metavar="PRICE", help="The price of this machine: estimate the cost of the run. [--time]"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as a page for a browser.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a recipe and its data, show examples with the trained tokens marked, and estimate what a run takes.

    The estimate has memory by category, disk, the GPUs that the recipe fits on and, with --time, seconds and cost.
    """
    from lora_kit import check as checking
    from lora_kit.recipe.load import load_recipe

    checked, console = load_recipe(recipe, set_), Console(silent=as_json)
    tell = partial(console.count, "data: render and tokenise")
    try:
        report = checking.check(
            checked,
            offline=offline,
            shapes=shapes,
            processes=processes,
            show=show,
            ids=ids,
            time=time,
            price_per_hour=price_per_hour,
            tell=tell,
        )
    finally:
        console.end()
    if html is not None:
        try:
            html.write_text(report.page(str(recipe)), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--html {html}: not written: {error.strerror}") from error
        note(f"the page is {html}")
    if as_json:
        _print_json(report.to_dict())
    else:
        rich_console().print(report)
    if report.problems:
        raise typer.Exit(2)


@command
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Show a run's progress, its newest safe step, and every interruption with its cost. Changes nothing."""
    from lora_kit.runs import status as run_status

    state, checkpoints = run_status.status(run), run_status.checkpoints(run)
    if as_json:
        _print_json(state.to_dict() | {"checkpoints": checkpoints})
        return
    validity = [(entry["path"], "valid" if entry["valid"] else entry["problem"]) for entry in checkpoints]
    Console(silent=False).table(str(run), [*state.rows(), *validity])


@command
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run: all its checkpoints.")],
    as_json: AsJson = False,
) -> None:
    """Compare every byte of a checkpoint, or of all checkpoints of a run, with its manifest. Changes nothing."""
    from lora_kit.runs import status as run_status
    from lora_kit.runs.manifest import MANIFEST

    results = [run_status.validity(path)] if (path / MANIFEST).exists() else run_status.checkpoints(path)
    if not results:
        raise CheckpointError(f"{path}: no checkpoint here; give a run's folder or one of its checkpoints")
    if as_json:
        _print_json(results)
    else:
        for result in results:
            print(f"{result['path']}: {'valid' if result['valid'] else 'BROKEN: ' + result['problem']}")
    if not all(result["valid"] for result in results):
        raise typer.Exit(1)


@command
def goodput(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A run's folder, or a drill's: its times are taken for what --step, --stall and --resume do not say.",
        ),
    ] = None,
    step: Annotated[float | None, typer.Option(min=1e-6, help="Seconds of a step.")] = None,
    stall: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds that a step waits for its snapshot. [default: of RUN, or 0]")
    ] = None,
    resume: Annotated[
        list[float] | None,
        typer.Option(min=0.0, help="Seconds from a failure until lora_kit computes again; repeat it to compare."),
    ] = None,
    save_steps: Annotated[int, typer.Option(min=1, help="Periodic saving: the steps between two saves.")] = 500,
    save_stall: Annotated[float, typer.Option(min=1e-6, help="Periodic saving: seconds that a save takes.")] = 2.0,
    restart: Annotated[
        float, typer.Option(min=0.0, help="Periodic saving: seconds from a failure until training computes again.")
    ] = 180.0,
    devices: Annotated[str, typer.Option(metavar="N,...", help="The numbers of GPUs.")] = (
        "8,64,256,1024,2048,4096,8192,16384"
    ),
    mtbf: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            metavar="HOURS",
            help="Mean time between failures of one GPU with its share of the machine. [default: published for large "
            "clusters: a job of 1,024 GPUs fails every 7.9 hours, one of 16,384 every 1.8]",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw a plot. Needs matplotlib.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate which share of a job's time goes into steps it keeps, on 8 to 16,384 GPUs that fail at random.

    Compares saving every step, as lora_kit does in shared memory, with saving periodically and with saving at the
    interval that loses least (Young). docs/scale.md has the model and what it was compared with.

    Example: lora-kit goodput runs/quickstart --resume 5 --resume 20 --mtbf 8000
    """
    from lora_kit.runs import goodput as model

    measured = model.measured(run) if run else model.Measured(None, None, None)
    step = step or measured.step
    if step is None:
        raise InputError("--step: give the seconds of a step, or the folder of a run that has finished steps")
    resumes = resume or ([measured.resume] if measured.resume is not None else [])
    if not resumes:
        raise InputError("--resume: give the seconds from a failure to the next step, or the folder of a drill")
    try:
        counts = [int(count) for count in devices.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise InputError(f"--devices {devices}: not whole numbers of GPUs with commas between them")
    waits = measured.stall or 0.0 if stall is None else stall
    live = [model.Policy(f"every step, back in {each:g} s", step, waits, each) for each in map(_three_digits, resumes)]
    periodic = model.Policy(f"every {save_steps:,} steps", save_steps * step, save_stall, restart)
    rows = model.table(live, periodic, counts, mtbf)
    if plot:
        from lora_kit.views.plots import goodput_plot

        try:
            goodput_plot(plot, rows)
        except ImportError:
            raise InputError("--plot needs matplotlib; install it with: pip install 'lora_kit[plot]'") from None
    if as_json:
        _print_json({"step_seconds": step, "stall_seconds": waits, "rows": rows})
        return
    shown = Table(
        title=f"goodput; a step takes {step:.3g} s, its snapshot {waits:.2g} s; a periodic save {save_stall:g} s, a "
        f"restart {restart:g} s",
        title_justify="left",
    )
    for column in ("GPUs", "a failure every", *list(rows[0])[2:]):
        shown.add_column(column, justify="right")
    for row in rows:
        count, hours, *shares = row.values()
        shown.add_row(f"{count:,.0f}", _hours(hours), *(f"{share:.2%}" for share in shares))
    rich_console().print(shown)


def _hours(value: float) -> str:
    return f"{value:,.0f} h" if value >= 100 else f"{value:.3g} h"


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


Weights = Annotated[
    str,  # a Path would take the second slash from a URL
    typer.Argument(metavar="PATH", help="A checkpoint, a run (its newest valid checkpoint), a Hub name, or a URL."),
]


Messages = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Conversations to continue, with their tools: a JSON or JSONL file of records of the format messages.",
    ),
]
BasePath = Annotated[
    Path | None,
    typer.Option("--base-path", metavar="FOLDER", help="The base's folder, if it is not where it was in training."),
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Continue texts without the chat template. A run on raw text alone needs no option."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let transformers run the Python files of the checkpoint's base."),
]


@command
def generate(
    path: Weights,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...", help="Prompts; each is a user message or, for a run on raw text, a text to continue."
        ),
    ] = None,
    messages: Messages = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Answer with the base model, without the adapter.")] = False,
    raw: Raw = False,
    base_path: BasePath = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a trained adapter."""
    with imports("loading", path) as folder:
        from lora_kit.artifacts import answering
        from lora_kit.artifacts.load import load

    questions: list[Any] = [*map(_as_utf_8, prompts or []), *(answering.read_questions(messages) if messages else [])]
    if not questions:
        raise InputError("no prompt: give a PROMPT, or --messages FILE")
    model, tokenizer = load(folder, base=base_path, trust_remote_code=trust_remote_code)
    if raw:
        tokenizer.chat_template = None
    elif tokenizer.chat_template is None:
        note("prompts are continued as text: the run was trained on raw text, or its tokenizer has no chat template")
    with model.disable_adapter() if base else nullcontext():
        answers = answering.generate(
            model, tokenizer, questions, max_new_tokens=max_new_tokens, temperature=temperature
        )
    if as_json:
        texts = [question if isinstance(question, str) else question.messages for question in questions]
        _print_json([{"prompt": p, "answer": a} for p, a in zip(texts, answers, strict=True)])
    else:
        print("\n\n".join(answers))


@command
def chat(
    path: Weights,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    messages: Messages = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    raw: Raw = False,
    base_path: BasePath = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a trained adapter. `/adapter off` switches to the base model, `/help` lists the commands."""
    with imports("loading", path) as folder:
        from lora_kit.artifacts import chat as chatting
        from lora_kit.artifacts.answering import read_questions
        from lora_kit.artifacts.load import load

    beginning = read_questions(messages) if messages else [None]
    if len(beginning) > 1:
        raise InputError(f"{messages}: {len(beginning)} conversations; chat begins with one")
    model, tokenizer = load(folder, base=base_path, trust_remote_code=trust_remote_code)
    if raw:
        tokenizer.chat_template = None
    elif tokenizer.chat_template is None:
        note(chatting.RAW)
    print("/help for the commands, Ctrl-D to leave", file=sys.stderr)
    chatting.chat(
        model,
        tokenizer,
        _typed(),
        lambda piece: print(piece, end="", flush=True),
        system=system and _as_utf_8(system),
        beginning=beginning[0],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


def _as_utf_8(text: str) -> str:
    """Return text of the command line with U+FFFD in place of bytes that are not UTF-8: tokenizers take only UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _typed() -> Iterator[str]:
    """Yield what the user enters until Ctrl-D or a second Ctrl-C; in a terminal with a prompt and a history.

    A pasted text of several lines is one message (bracketed paste).
    """
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # once imported, input() uses it

        readline.parse_and_bind("set enable-bracketed-paste on")
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            print("\nCtrl-C again, or Ctrl-D, leaves the conversation", file=sys.stderr)
            continue
        interrupted = False
        yield line


@command
def merge(
    path: Weights,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new folder, for the merged model.")],
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option(help="Precision of the weights. [default: as in training]")
    ] = None,
    base_path: BasePath = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base model and report how much the merged model's logits differ."""
    with imports("merging", path) as folder:
        from lora_kit.artifacts import merging

    merged = merging.merge(folder, out, base=base_path, dtype=dtype, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(merged.to_dict())
    else:
        print(
            f"{merged.folder}: merged in {merged.dtype}; compared with base and adapter at {merged.positions} "
            f"positions: logits differ by at most {merged.largest_difference:.3g} (the largest logit is "
            f"{merged.largest_logit:.3g}), the most likely token is the same at {merged.top1_agreement:.2%}"
        )
    if not merged.agrees:
        raise CheckpointError(
            f"{merged.folder}: the merged model predicts other tokens than base and adapter; do not use it: merge with "
            "--dtype float32, or use the adapter with its base"
        )


@command
def export(
    path: Weights,
    to: Annotated[Literal["vllm"], typer.Option("--to", help="The engine that will serve the adapter.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new folder, for the adapter.")],
    base_path: BasePath = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the layout that an engine reads: for a mixture of experts, an adapter for each expert."""
    with imports("exporting", path) as folder:
        from lora_kit.artifacts import export as exporting

    made = exporting.export(folder, out, base=base_path, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(made.to_dict())
    else:
        print(f"{made.folder}: {made.tensors} tensors for {to}" + (f", {made.experts} experts" if made.experts else ""))


@app.command("eval")
@error_messages()
def evaluate(
    recipe: RecipeFile,
    path: Weights,
    set_: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Evaluate the base and the adapter on the recipe's validation data: loss, preferences, answers, forgetting."""
    with imports("evaluating", path) as folder:
        from lora_kit.recipe.load import load_recipe
        from lora_kit.training import evaluation

    scores = evaluation.evaluate(load_recipe(recipe, set_), folder, tell=note)
    if as_json:
        _print_json(evaluation.plain(scores))
        return
    rates = (("accuracies", ".1%"), ("margins", ".4f"))
    preferences = any("rewards/margins" in score.metrics for score in scores.values())
    columns = ("preference accuracy", "margin") if preferences else ("perplexity",)
    table = Table("", "loss", *columns, "exact match", "examples")
    for name, score in scores.items():
        match = "-" if score.exact_match is None else f"{score.exact_match:.1%} of {score.answered}"
        figures = [f"{score.perplexity:.2f}"] if score.perplexity is not None else []
        figures += [number(score.metrics[f"rewards/{key}"], spec) for key, spec in rates if preferences]
        table.add_row(name, f"{score.loss:.4f}", *figures, match, str(score.examples))
        for each, loss in score.sets.items():
            table.add_row(f"{name}, {each}", f"{loss:.4f}", "" if preferences else f"{exp(min(loss, 700)):.2f}")
    rich_console().print(table)
    for name, score in scores.items():
        others = {key: value for key, value in score.metrics.items() if not key.startswith("rewards/")}
        for key, value in others.items():
            print(f"{name}, {key}: {number(value, '.4f')}")
    if score.too_long:
        note(f"{score.too_long} of {score.answered} prompts left no position for an answer and count as no match")


@command
def push(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or a run (its newest valid checkpoint).")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="USER/NAME",
            help="The Hub repository; created if it does not exist. Without it, the newest checkpoint of a run is "
            "uploaded to its `checkpoint.remote`, complete, so that the run can go on from there.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository; refused if it exists and is public.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch; created if it does not exist. [default: main]")
    ] = None,
    base_path: BasePath = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter on the Hub in one commit: weights, tokenizer, chat template, recipe and model card.

    Without --to: upload what a run could not upload to its `checkpoint.remote` before it ended.
    """
    if to is None:
        from lora_kit.artifacts.remotes import send

        if private or revision or base_path or trust_remote_code:
            raise InputError("push: --private, --revision, --base-path and --trust-remote-code need --to USER/NAME")
        sent = send(Path(path), tell=note)
        if as_json:
            _print_json(asdict(sent))
        else:
            print(f"{'uploaded' if sent.made else 'already at'} {sent.url} (step {sent.step})")
        return
    from lora_kit.artifacts import hub

    pushed = hub.push(path, to, private=private, revision=revision, base=base_path, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(pushed.to_dict())
    else:
        print(f"{'pushed to' if pushed.made else 'already at'} {pushed.url} (commit {pushed.commit})")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))
