"""What a tracker shows is metrics.jsonl: every step once, also after kills, failures and changes of the recipe."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from conftest import make_records, write_jsonl
from runs import start, train, wait_for_lines

import lora_kit as lk
from lora_kit import trackers
from lora_kit.check import check
from lora_kit.console import Console
from lora_kit.errors import LaunchError
from lora_kit.journal import Journal, summary

SAME_AGAIN = ("examples", "tokens", "loss", "learning_rate", "grad_norm", "held_out_loss")  # what a resume repeats
NAMES = list(trackers.PACKAGES)
STEPS = 12


def need(name):
    if not any(installed(package) for package in trackers.PACKAGES[name]):
        pytest.skip(f"{name} is not installed")


def installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Every tracker's data in a folder of this test, nothing over a network."""
    home = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_ARTIFACT_ROOT": str(tmp_path / "artifacts"),
    }
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture
def options(tmp_path):
    """A run of 12 steps with checkpoints at 5 and 10 and two samples at steps 4, 8 and 12."""
    held_out = write_jsonl(tmp_path / "validation.jsonl", make_records(5, seed=5))
    return [
        f"data.validation={held_out}",
        *("evaluate.every_steps=4", "evaluate.generate=2", f"train.steps={STEPS}", "checkpoint.every_steps=5"),
    ]


def flags(changes):
    return [part for change in changes for part in ("--set", change)]


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
    expected = {(step, key) for step, record in records.items() for key in record if key != "step"}
    expected |= {(event["step"], "samples") for event in lk.Run(run).events if event["kind"] == "sample"}
    assert sorted((step, curve) for step, curve, _ in points) == sorted(expected)
    for step, curve, value in points:
        if curve == "samples":
            answers = [event for event in lk.Run(run).events if event["kind"] == "sample" and event["step"] == step]
            assert all(event["expected"] in value and event["answer"] in value for event in answers)
        elif curve in SAME_AGAIN:
            assert value == pytest.approx(records[step][curve], rel=1e-6 if name == "tensorboard" else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_killed_anywhere_and_resumed_a_tracker_shows_every_step_once(name, recipe_file, tmp_path, places, options):
    need(name)
    run = tmp_path / "run"
    wanted = flags([*options, f"track.names=[{name}]"])
    for lines in (2, 8):  # before the first checkpoint, and between two
        process = start(recipe_file, run, *wanted, environment=places)
        wait_for_lines(run / "metrics.jsonl", lines, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    train(recipe_file, run, *wanted, environment=places)
    assert_shows_the_run(name, run)


def test_all_together_on_two_processes_show_what_one_shows(recipe_file, tmp_path, places, options):
    for name in NAMES:
        need(name)
    wanted = flags([*options, f"track.names={NAMES}", "track.run=both"])
    printed = train(recipe_file, tmp_path / "run", *wanted, processes=2, environment=places)
    assert "failed" not in printed
    for name in NAMES:
        assert_shows_the_run(name, tmp_path / "run")


@pytest.fixture
def board(places):
    need("tensorboard")
    return "track.names=[tensorboard]"


def test_a_tracker_that_is_ahead_of_the_checkpoint_gets_no_step_twice(recipe_file, tmp_path, options, board):
    run = tmp_path / "run"
    lk.train(lk.load_recipe(recipe_file, [*options, board]), run)
    for folder in lk.Run(run).checkpoints:
        if folder.name > "step-00000005":
            (folder / "manifest.json").write_text("damaged")
    (run / "result.json").unlink()
    lk.train(lk.load_recipe(recipe_file, [*options, board]), run)
    assert [event["step"] for event in lk.Run(run).events if event["kind"] == "resumed"] == [5]
    assert_shows_the_run("tensorboard", run)


def test_a_tracker_added_to_a_finished_run_gets_all_of_it(recipe_file, tmp_path, options, board):
    lk.train(lk.load_recipe(recipe_file, options), tmp_path / "run")
    lk.train(lk.load_recipe(recipe_file, [*options, board]), tmp_path / "run")
    assert_shows_the_run("tensorboard", tmp_path / "run")


def test_a_longer_run_goes_on_under_its_name(recipe_file, tmp_path, options, board):
    lk.train(lk.load_recipe(recipe_file, [*options, board]), tmp_path / "run")
    longer = lk.load_recipe(recipe_file, [*options, board, "train.steps=16"])
    lk.train(longer, tmp_path / "run", accept=["train.steps"])
    assert_shows_the_run("tensorboard", tmp_path / "run", steps=16)


def test_a_curve_of_other_values_gets_another_name(recipe_file, tmp_path):
    recipe = lk.load_recipe(recipe_file)
    other = lk.load_recipe(recipe_file, ["optim.learning_rate=1e-3"])

    def claim(recipe, **steps):
        return trackers.claim_id(tmp_path, "first", recipe=recipe, fingerprints={}, **steps)

    assert claim(recipe, start=0, reached=0) == "first"
    assert claim(recipe, start=5, reached=7) == "first", "the same values again"
    second = claim(other, start=5, reached=5)
    assert second != "first", "it has steps 6 and 7 of the other rate, though the journal was cut to 5 since"
    assert claim(other, start=5, reached=6) == second
    assert claim(recipe, start=9, reached=9) == second, "nothing is ahead of step 9"


def test_an_interrupted_log_call_leaves_no_gap_in_any_curve():
    sent = []
    opened = trackers.Opened({"loss": 2, "tokens": 1}.__getitem__, lambda *call: sent.append(call), lambda: None)
    trackers.follow(opened, iter([{"step": step, "loss": 0.5, "tokens": 9} for step in (1, 2, 3)]))
    assert sent == [({"tokens": 9}, 2), ({"loss": 0.5, "tokens": 9}, 3)]


def test_a_failing_tracker_is_told_once_and_ends_no_run(recipe_file, tmp_path, board, monkeypatch, capsys):
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
    assert "the next start sends what is missing" in fault
    assert capsys.readouterr().out.count(fault) == 1
    assert_shows_the_run("tensorboard", tmp_path / "run", steps=8)
    assert summary(run.folder).state == "finished"


def test_a_hanging_tracker_does_not_hold_up_the_end(tmp_path, monkeypatch):
    curves = trackers.Curves("project", "name", "id", tmp_path, {})
    monkeypatch.setattr(trackers, "END_SECONDS", 0.1)
    monkeypatch.setitem(trackers.OPEN, "mlflow", lambda _: signal.pause())
    with trackers.following(tmp_path, Console(silent=True)) as started:
        started.begin(["mlflow"], curves, Journal(tmp_path))
    (fault,) = Journal(tmp_path).read_events()
    assert "mlflow failed: it has not taken everything after 0 s" in fault["what"]


def test_a_missing_package_is_refused_before_anything_is_made(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_installed", lambda package: package == "wandb")
    recipe = lk.load_recipe(recipe_file, ["track.names=[wandb, trackio, mlflow]"])
    told = r"track\.names: trackio, mlflow not installed; pip install 'lora_kit\[trackers\]', or take the name out"
    with pytest.raises(LaunchError, match=told):
        lk.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert any("trackio, mlflow not installed" in problem for problem in check(recipe, offline=True).problems)


def test_no_token_gets_into_any_file(recipe_file, tmp_path, places, options):
    for name in NAMES:
        need(name)
    token = "c0ffee" * 6 + "beef"
    secret = {"WANDB_API_KEY": token, "HF_TOKEN": token, "MLFLOW_TRACKING_TOKEN": token}
    train(recipe_file, tmp_path / "run", *flags([f"track.names={NAMES}"]), environment=places | secret)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "metrics.jsonl"} < {path.name for path in written}
    assert not [path for path in written if token.encode() in path.read_bytes()]
