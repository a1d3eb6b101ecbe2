"""What a tracker shows is metrics.jsonl: every step once, also after kills, failures and changes of the recipe."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import RECIPE, Faults, hold, make_records, write_jsonl
from runs import WAIT_SECONDS, start, train, wait_for_lines

import lora_kit as lk
from lora_kit.check import check
from lora_kit.errors import LaunchError
from lora_kit.runs import trackers
from lora_kit.runs.journal import Journal
from lora_kit.runs.status import status
from lora_kit.views.console import Console

SAME_AGAIN = ("examples", "tokens", "loss", "learning_rate", "grad_norm", "held_out_loss")  # what a resume repeats
NAMES = list(trackers.OPEN)
STEPS = 16


TOKEN = "c0ffee" * 6 + "beef"
CHANGES = ["evaluate.every_steps=4", "evaluate.generate=2", f"train.steps={STEPS}", "checkpoint.every_steps=5"]


@pytest.fixture(scope="module")
def home(shared):
    """Every tracker's data in one folder, with tokens about, nothing over a network."""
    folder = shared("trackers", lambda folder: write_jsonl(folder / "validation.jsonl", make_records(5, seed=5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN"):
            patch.setenv(name, TOKEN)
        yield folder


@pytest.fixture
def changes(home):
    """16 steps, checkpoints at 4, 5, 8, 10, 12, 15 and 16, two samples at 4, 8, 12 and 16."""
    return [f"data.validation={home}/validation.jsonl", *CHANGES]


@pytest.fixture(scope="module")
def interrupted(home, shared, base_folder, data_file):
    """A run that was killed before its first checkpoint, stopped, damaged, and ended on two processes."""
    return shared("tracked", lambda folder: interrupt(home, folder, base_folder, data_file)) / "run"


def interrupt(home, folder, base_folder, data_file):
    if trackers._installed("mlflow"):  # a kill in MLflow's migration leaves a database that nothing can open
        import mlflow

        mlflow.search_experiments()
    recipe, run = folder / "recipe.yaml", folder / "run"
    recipe.write_text(RECIPE.format(base=base_folder, data=data_file))
    names = [name for name in NAMES if trackers._installed(name)]
    wanted = [f"data.validation={home}/validation.jsonl", *CHANGES, f"track.names={names}", "checkpoint.keep=9"]
    options = [part for change in wanted for part in ("--set", change)]
    faults = Faults(folder / "faults")
    for turn, (lines, number, code) in enumerate(((2, signal.SIGKILL, -9), (7, signal.SIGTERM, 75))):
        process = start(recipe, run, *options, environment=os.environ | faults(hold(4), hold(9)))
        wait_for_lines(run / "metrics.jsonl", lines, process)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == code, printed
        faults.release(turn)
        if code == 75:  # all trackers are now ahead of the newest checkpoint
            (lk.Run(run).latest / "manifest.json").write_text("damaged")
    train(recipe, run, *options, processes=2, environment=os.environ)


# Each tracker's own reader: (step, curve, value) for every point that it holds.


def read_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

    (folder,) = (run / "tensorboard").iterdir()
    held = EventAccumulator(str(folder), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
    for tag in held.Tags()["scalars"]:
        yield from ((event.step, tag, event.value) for event in held.Scalars(tag))
    for tag in held.Tags()["tensors"]:
        for event in held.Tensors(tag):
            yield event.step, tag.removesuffix("/text_summary"), event.tensor_proto.string_val[0].decode()


def read_wandb(run):
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                item = record["history"]["item"]
                yield from ((item["_step"], key, value) for key, value in item.items() if key[0] != "_")


def read_trackio(run):
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (one,) = Api().runs("lora_kit")
    for row in SQLiteStorage.get_logs("lora_kit", one.name):
        step = row.pop("step")
        row.pop("timestamp")
        yield from ((step, key, value["_value"] if isinstance(value, dict) else value) for key, value in row.items())


def read_mlflow(run):
    import mlflow

    client = mlflow.MlflowClient()
    (one,) = mlflow.search_runs(experiment_names=["lora_kit"], output_format="list")
    for curve in one.data.metrics:
        yield from ((point.step, curve, point.value) for point in client.get_metric_history(one.info.run_id, curve))
    for file in client.list_artifacts(one.info.run_id, "samples"):
        text = mlflow.artifacts.load_text(f"{one.info.artifact_uri}/{file.path}")
        yield int(file.path[-11:-3]), "samples", text


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}


def assert_shows_the_run(name, run, steps=STEPS):
    """A tracker holds each curve of metrics.jsonl once a step, its values, and the samples."""
    points = [point for point in READ[name](run) if point[1] != "recipe"]
    records = {record["step"]: record for record in lk.Run(run).metrics}
    assert list(records) == list(range(1, steps + 1))
    expected = {(step, key) for step, record in records.items() for key in record if key not in ("step", "time")}
    expected |= {(event["step"], "samples") for event in lk.Run(run).events if event["kind"] == "sample"}
    assert sorted((step, curve) for step, curve, _ in points) == sorted(expected)
    for step, curve, value in points:
        if curve == "samples":
            answers = [event for event in lk.Run(run).events if event["kind"] == "sample" and event["step"] == step]
            shown = value.replace("\r", "\n")
            assert all(event["answer"].replace("\r", "\n") in shown for event in answers)
        elif curve in SAME_AGAIN:
            assert value == pytest.approx(records[step][curve], rel=1e-6 if name == "tensorboard" else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_in_every_way_a_tracker_shows_every_step_once(name, interrupted):
    if not trackers._installed(name):
        pytest.skip(f"{name} is not installed")
    resumed = [event for event in lk.Run(interrupted).events if event["kind"] == "resumed"]
    assert any(one["step"] < one["reached"] for one in resumed), "the trackers were never ahead"
    assert_shows_the_run(name, interrupted)


def test_no_tracker_failed_and_no_token_got_into_any_file(interrupted, home):
    kinds = [event["kind"] for event in lk.Run(interrupted).events]
    assert "fault" not in kinds[-kinds[::-1].index("resumed") :], "since the last start"
    written = [path for folder in (home, interrupted.parent) for path in folder.rglob("*") if path.is_file()]
    assert interrupted / "metrics.jsonl" in written
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


BOARD = "track.names=[tensorboard]"
needs_board = pytest.mark.skipif(not trackers._installed("tensorboard"), reason="tensorboard is not installed")


@needs_board
def test_a_tracker_added_to_a_finished_run_gets_all_of_it(recipe_file, tmp_path, changes):
    lk.train(lk.load_recipe(recipe_file, changes), tmp_path / "run")
    lk.train(lk.load_recipe(recipe_file, [*changes, BOARD]), tmp_path / "run")
    assert_shows_the_run("tensorboard", tmp_path / "run")


@needs_board
def test_a_longer_run_goes_on_under_its_name(recipe_file, tmp_path, changes):
    lk.train(lk.load_recipe(recipe_file, [*changes, BOARD]), tmp_path / "run")
    longer = lk.load_recipe(recipe_file, [*changes, BOARD, "train.steps=20"])
    lk.train(longer, tmp_path / "run", accept=["train.steps"])
    assert_shows_the_run("tensorboard", tmp_path / "run", steps=20)


def test_a_curve_of_other_values_gets_another_name(recipe_file, tmp_path):
    recipe = lk.load_recipe(recipe_file)
    other = lk.load_recipe(recipe_file, ["optim.learning_rate=1e-3"])

    def claim(recipe, **steps):
        return trackers.tracker_id(tmp_path, "first", recipe=recipe, fingerprints={}, **steps)

    assert claim(recipe, start=0, reached=0) == "first"
    assert claim(recipe, start=5, reached=7) == "first", "the same values again"
    second = claim(other, start=5, reached=5)
    assert second != "first", "it has steps 6 and 7 of the other rate, though the journal was cut to 5 since"
    assert claim(other, start=5, reached=6) == second
    assert claim(recipe, start=9, reached=9) == second, "nothing is ahead of step 9"


@pytest.mark.quick
def test_an_interrupted_log_call_leaves_no_gap_in_any_curve():
    sent = []
    opened = trackers.Opened({"loss": 2, "tokens": 1}.__getitem__, lambda *call: sent.append(call), lambda: None)
    trackers.follow(opened, iter([{"step": step, "loss": 0.5, "tokens": 9} for step in (1, 2, 3)]))
    assert sent == [({"tokens": 9}, 2), ({"loss": 0.5, "tokens": 9}, 3)]


@needs_board
def test_a_failing_tracker_is_told_once_and_ends_no_run(recipe_file, tmp_path, monkeypatch, capsys):
    def breaks(values, step):
        if step == 3:
            raise ConnectionError("cannot reach https://me:hunter2@host/api?token=s3cr3t with long-secret-value")

    def broken(curves):
        return trackers.Opened(lambda _: 0, breaks, lambda: None)

    monkeypatch.setenv("SOME_API_KEY", "long-secret-value")
    monkeypatch.setitem(trackers.OPEN, "mlflow", broken)
    run = lk.train(lk.load_recipe(recipe_file, ["track.names=[mlflow, tensorboard]"]), tmp_path / "run")
    (fault,) = [event["what"] for event in run.events if event["kind"] == "fault"]
    assert fault.startswith("mlflow failed: ConnectionError: cannot reach https://***@host/api?token=*** with ***;")
    assert "the next start sends the rest" in fault
    assert capsys.readouterr().out.count(fault) == 1
    assert_shows_the_run("tensorboard", tmp_path / "run", steps=8)
    assert status(run.folder).state == "finished"


def test_a_hanging_tracker_does_not_hold_up_the_end(tmp_path, monkeypatch):
    curves = trackers.Curves("project", "name", "id", tmp_path, {})
    monkeypatch.setattr(trackers, "END_SECONDS", 0.1)
    monkeypatch.setitem(trackers.OPEN, "mlflow", lambda _: signal.pause())
    with trackers.following(tmp_path, Console(silent=True)) as started:
        started.begin(["mlflow"], curves, Journal(tmp_path))
    (fault,) = Journal(tmp_path).read_events()
    assert "mlflow failed: it has not sent everything 0 s after the end; training continues" in fault["what"]


def test_a_missing_package_is_refused_before_anything_is_made(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_installed", lambda package: package == "wandb")
    recipe = lk.load_recipe(recipe_file, ["track.names=[wandb, trackio, mlflow]"])
    told = r"track\.names: trackio, mlflow not installed; pip install 'lora_kit\[trackers\]', or remove the name"
    with pytest.raises(LaunchError, match=told):
        lk.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert any("trackio, mlflow not installed" in problem for problem in check(recipe, offline=True).problems)
