"""The command line: verbs are the functions of the package, with the same names and arguments.

Importing this module imports nothing heavy, so `--help` answers at once. Exit codes: 0 done, 1 failed, 2 the input is
wrong or refused, 75 stopped by a signal and resumable.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console as RichConsole
from rich.table import Table

from lora_kit.errors import CheckpointError, LaunchError, LoraKitError

app = typer.Typer(
    name="lora-kit",
    help="LoRA fine-tuning that never loses a step.\n\n"
    "Start with: lora-kit train recipes/quickstart.yaml --out runs/first",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. optim.learning_rate=1e-4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


class Precision(StrEnum):
    """Of a merged model's weights."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn our own errors into a message and an exit code; anything else keeps its traceback."""
    try:
        yield
    except LoraKitError as error:
        process = os.environ.get("RANK", "0")
        if process == "0" or error.exit_code == 1:  # the others were told the same
            lines = str(error).splitlines() or [type(error).__name__]
            mark = "stopped" if error.exit_code == 75 else "error"
            RichConsole(stderr=True, highlight=False, soft_wrap=True).print(f"[bold]{mark}:[/]", end=" ")
            print("\n  ".join(lines), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


@app.command()
def train(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run's folder; goes on if it holds this run.")],
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start on this machine (default: one a GPU, or one)."),
    ] = None,
    set_: Overrides = [],  # noqa: B006
    accept: Annotated[
        list[str], typer.Option(metavar="KEY", help="Go on although this key of the resume contract changed.")
    ] = [],  # noqa: B006
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="PATH", help="Begin with this adapter, or go back to this run's checkpoint."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Show where a step's time goes: steps 3 to 5 of this start, as a table by part (also "
            "RUN/profile/table.txt) and as a trace for ui.perfetto.dev (RUN/profile/trace.json).",
        ),
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often a killed, crashed or hung process leads to another start.")
    ] = 10,
) -> None:
    """Train a recipe; the same command starts, resumes and, when all is done, says so."""
    with errors_told():
        from lora_kit.recipe.load import load_recipe
        from lora_kit.runs import store
        from lora_kit.runs.lease import KEEPER
        from lora_kit.runs.resume import is_own, take_over
        from lora_kit.supervise.launch import follow_launcher, launch

        loaded = load_recipe(recipe, set_)
        launched = any(name in os.environ for name in ("RANK", "ACCELERATE_MIXED_PRECISION", KEEPER))
        if launched and processes is not None:
            raise LaunchError(f"--processes {processes}: another launcher already started this process; leave one out")
        if launched:
            follow_launcher()
            from lora_kit.training import loop

            loop.train(loaded, out, accept=accept, start_from=start_from, profile=profile)
            return
        origin = store.open_checkpoint(newest(start_from)) if start_from else None
        lease, notices = take_over(out, origin)
        arguments = ["train", str(recipe), "--out", str(out)]
        arguments += [part for text in set_ for part in ("--set", text)]
        arguments += [part for text in accept for part in ("--accept", text)]
        arguments += ["--from", str(start_from)] if origin and not is_own(out, origin) else []
        arguments += ["--profile"] if profile else []
        for notice in notices:
            print(f"warning: {notice}", file=sys.stderr)
        raise typer.Exit(
            launch(
                arguments,
                processes=processes or _gpus(),
                run=out,
                lease=lease,
                max_restarts=max_restarts,
                step_timeout=loaded.train.step_timeout,
            )
        )


def _gpus() -> int:
    return max(1, len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))


@app.command()
def check(
    recipe: RecipeFile,
    set_: Overrides = [],  # noqa: B006
    offline: Annotated[bool, typer.Option(help="Use nothing from the network; say what could not be checked.")] = False,
    shapes: Annotated[
        Path | None, typer.Option(help="A folder of `<owner>--<name>.json` model configs, for --offline.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="For how many processes to estimate.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Validate a recipe, look at its data with trained tokens marked, and estimate memory and size."""
    with errors_told():
        from lora_kit import check as checking
        from lora_kit.recipe.load import load_recipe

        report = checking.check(load_recipe(recipe, set_), offline=offline, shapes=shapes, processes=processes)
        if as_json:
            _print_json(report.to_dict())
        else:
            RichConsole(highlight=False, soft_wrap=True).print(report)
        if report.problems:
            raise typer.Exit(2)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, what is safe, and what interrupted it at which cost. Live and afterwards; moves nothing."""
    with errors_told():
        from lora_kit.runs import status as reading

        state, found = reading.status(run), reading.checkpoints(run)
        if as_json:
            _print_json(state.to_dict() | {"checkpoints": found})
            return
        table = Table(title=str(run), show_header=False, title_justify="left")
        for name, value in state.rows():
            table.add_row(name, value)
        for entry in found:
            table.add_row(entry["path"], "valid" if entry["valid"] else entry["problem"])
        RichConsole(highlight=False).print(table)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run with all of its checkpoints.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint, or of all in a run, and compare it with the manifest. Moves nothing."""
    with errors_told():
        from lora_kit.runs import status as reading
        from lora_kit.runs import store
        from lora_kit.runs.manifest import MANIFEST

        found = [path] if (path / MANIFEST).exists() else store.folders(path)
        if not found:
            raise CheckpointError(f"{path}: no checkpoint here; give a run's folder or one of its checkpoints")
        results = [reading.validity(one) for one in found]
        if as_json:
            _print_json(results)
        else:
            for result in results:
                print(f"{result['path']}: {'valid' if result['valid'] else 'BROKEN: ' + result['problem']}")
        if not all(result["valid"] for result in results):
            raise typer.Exit(1)


Weights = Annotated[
    Path, typer.Argument(metavar="PATH", help="A checkpoint, a run for its newest valid one, or a Hub name.")
]


@app.command()
def generate(
    path: Weights,
    prompts: Annotated[list[str], typer.Argument(help="What to answer; each is one user message.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Switch the adapter off.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a trained adapter."""
    with errors_told():
        from lora_kit.artifacts import answering
        from lora_kit.artifacts.load import load

        model, tokenizer = load(newest(path))
        with model.disable_adapter() if base else nullcontext():
            answers = answering.generate(
                model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature
            )
        if as_json:
            _print_json([{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
        else:
            print("\n\n".join(answers))


def newest(path: str | Path) -> Path:
    """Return a checkpoint as it is, of a run its newest that verifies, of a Hub name its download."""
    from lora_kit.artifacts.locate import checkpoint_at

    return checkpoint_at(path)


@app.command()
def chat(
    path: Weights,
    system: Annotated[str | None, typer.Option(help="What the conversation begins with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
) -> None:
    """Talk to a trained adapter; `/adapter off` compares with the base, `/help` says what else there is."""
    with errors_told():
        from lora_kit.artifacts import chat as chatting
        from lora_kit.artifacts.load import load

        model, tokenizer = load(newest(path))
        print("/help for the commands, Ctrl-D to leave", file=sys.stderr)
        chatting.chat(
            model,
            tokenizer,
            _typed(),
            lambda piece: print(piece, end="", flush=True),
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )


def _typed() -> Iterator[str]:
    """Yield lines until Ctrl-D or Ctrl-C; a terminal gets a prompt and a history."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is there)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")


@app.command()
def merge(
    path: Weights,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new folder for the merged model.")],
    dtype: Annotated[Precision | None, typer.Option(help="Of the weights (default: as in training).")] = None,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base and say how far the merged model is from the two apart."""
    with errors_told():
        from lora_kit.artifacts import merging

        merged = merging.merge(newest(path), out, dtype=dtype and dtype.value)
        if as_json:
            _print_json(merged.to_dict())
            return
        print(
            f"{merged.folder}: merged in {merged.dtype}; over {merged.positions} positions the largest difference of a "
            f"logit is {merged.largest_difference:.3g} (of at most {merged.largest_logit:.3g}), and "
            f"{merged.top1_agreement:.2%} have the same likeliest token"
        )


@app.command("eval")
def evaluate(
    recipe: RecipeFile,
    path: Weights,
    set_: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Measure base and adapter on the recipe's validation data: loss, perplexity, exact match."""
    with errors_told():
        from lora_kit.recipe.load import load_recipe
        from lora_kit.training import evaluation

        scores = evaluation.evaluate(load_recipe(recipe, set_), newest(path))
        if as_json:
            _print_json(evaluation.plain(scores))
            return
        table = Table("", "loss", "perplexity", "exact match", "examples")
        for name, one in scores.items():
            match = "-" if one.exact_match is None else f"{one.exact_match:.1%}"
            table.add_row(name, f"{one.loss:.4f}", f"{one.perplexity:.2f}", match, str(one.examples))
        RichConsole(highlight=False).print(table)


@app.command()
def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run for its newest valid one.")],
    to: Annotated[str, typer.Option("--to", metavar="USER/NAME", help="The repository; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private; refused if it is public.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made if there is none.")] = None,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter on the Hub in one commit: weights, tokenizer, template, recipe and a model card."""
    with errors_told():
        from lora_kit.artifacts import hub

        pushed = hub.push(path, to, private=private, revision=revision)
        if as_json:
            _print_json(pushed.to_dict())
        else:
            print(f"{'pushed to' if pushed.made else 'is there already:'} {pushed.url} (commit {pushed.commit})")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))
