"""Whatever is damaged, changed or left out of a checkpoint is noticed: by its name, or by the bytes that come of it.

The proof that a resume is exact compares the final bytes with an undisturbed run's. Here it must fail for every part of
the state that is dropped: a proof that cannot fail proves nothing.
"""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import RECIPE, make_base, make_records, write_jsonl
from runs import go_on, state_hash

from lora_kit.cli import error_messages
from lora_kit.data.plan import Plan
from lora_kit.runs import layout, store
from lora_kit.runs.journal import Journal
from lora_kit.runs.status import status
from lora_kit.training import loop, optim

STEPS, HALF = 8, 5
FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder, data_file):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.format(base=base_folder, data=data_file).replace("every_steps: 3", f"every_steps: {HALF}"))
    return path


@pytest.fixture(scope="module")
def whole(recipe, reference):
    """A finished run with the checkpoints of steps 5 and 8."""
    return reference(recipe)


@pytest.fixture(scope="module")
def undisturbed(whole):
    return state_hash(whole, STEPS)


def halfway(whole, out):
    """Copy a run as it was after step 5."""
    shutil.copytree(whole, out)
    shutil.rmtree(store.checkpoint_folder(out, STEPS))
    (out / "result.json").unlink()
    return store.checkpoint_folder(out, HALF)


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path, rng):
    path.unlink()


# every flip, truncation and absence of each file is found: tests/test_store.py
@pytest.mark.parametrize(("name", "damage"), zip(FILES, [flip, cut, delete, flip], strict=True))
def test_a_damaged_file_is_named_and_the_run_ends_with_the_same_bytes(
    recipe, whole, undisturbed, tmp_path, name, damage
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    damage(store.checkpoint_folder(out, STEPS) / name, random.Random(f"{name} {damage.__name__}"))
    go_on(recipe, out)
    (reason,) = (out / "checkpoints" / ".quarantine").glob("*.reason.txt")
    assert name in reason.read_text()
    assert state_hash(out, STEPS) == undisturbed


def test_a_start_at_an_earlier_step_than_the_log_shows_says_how_many_steps_are_lost_and_why(
    recipe, whole, undisturbed, tmp_path, capsys
):
    halfway(whole, tmp_path / "run")
    go_on(recipe, tmp_path / "run")
    told = capsys.readouterr().out
    assert "3 finished step(s) are lost and computed again: the logs reach step 8, the newest state" in told
    assert "used is of step 5; shared memory has no newer state of this run" in told
    assert status(tmp_path / "run").steps_lost == 3
    assert state_hash(tmp_path / "run", STEPS) == undisturbed
    go_on(recipe, tmp_path / "run")
    assert "are lost" not in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_gone_starts_again_and_says_so(recipe, whole, undisturbed, tmp_path, capsys):
    halfway(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    go_on(recipe, tmp_path / "run")
    assert "8 finished step(s) are lost and computed again" in capsys.readouterr().out
    assert status(tmp_path / "run").steps_lost == 8 and state_hash(tmp_path / "run", STEPS) == undisturbed


def zeroed(tensors):
    return {name: np.zeros_like(one) for name, one in tensors.items()}


STATE = {  # what a broken checkpoint would not hold: weights, first and second moments, the step
    "nothing": lambda weights, first, second, step: (weights, first, second, step),
    "the weights": lambda weights, first, second, step: (zeroed(weights), first, second, step),
    "the first moment": lambda weights, first, second, step: (weights, zeroed(first), second, step),
    "the second moment": lambda weights, first, second, step: (weights, first, zeroed(second), step),
    "the newest step": lambda weights, first, second, step: (weights, first, second, step - 1),
}


@pytest.mark.parametrize("dropped", STATE)
def test_the_proof_fails_without_any_part_of_the_state(recipe, whole, undisturbed, tmp_path, dropped):
    path = halfway(whole, tmp_path / "run")
    found = store.open_checkpoint(path)
    whole = found.state()
    shapes = {name: one.shape for name, one in whole.weights.items()}
    moments = (layout.cut(whole.moments[name], shapes) for name in layout.MOMENTS)
    *state, step = STATE[dropped](whole.weights, *moments, found.step)
    pieces = [[np.concatenate([one.ravel() for one in part.values()]).tobytes()] for part in state]
    headers = store.headers_of(layout.Layout(shapes))
    files = {
        store.ADAPTER: [headers[store.ADAPTER], *pieces[0]],
        store.ADAPTER_CONFIG: [(path / store.ADAPTER_CONFIG).read_bytes()],
        store.OPTIMIZER: [headers[store.OPTIMIZER], *pieces[1], *pieces[2]],
    }
    shutil.rmtree(path)
    store.commit(tmp_path / "run", files, found.manifest.run, replace(found.manifest.progress, step=step))
    go_on(recipe, tmp_path / "run")
    assert (state_hash(tmp_path / "run", STEPS) == undisturbed) == (dropped == "nothing")


def from_the_start(monkeypatch, what):
    """Let one thing begin anew at the resume, as where it is a counter that nobody saved."""
    batches, rate, adamw, seed = Plan.micro_batches, optim.learning_rate, optim.adamw, loop.micro_batch_seed
    seen = 5 * HALF
    if what == "order":
        monkeypatch.setattr(Plan, "micro_batches", lambda self, step: batches(self, step - HALF))
    elif what == "random numbers":
        monkeypatch.setattr(loop, "micro_batch_seed", lambda one, step, number: seed(one, step - HALF, number))
    elif what == "learning rate":
        monkeypatch.setattr(optim, "learning_rate", lambda settings, done, total: rate(settings, done - seen, total))
    elif what == "AdamW's t":
        monkeypatch.setattr(optim, "adamw", lambda *a, step, **named: adamw(*a, step=step - HALF, **named))


@pytest.mark.parametrize("what", ["nothing", "order", "random numbers", "learning rate", "AdamW's t"])
def test_the_proof_fails_when_a_counter_begins_anew(recipe, whole, undisturbed, tmp_path, monkeypatch, what):
    halfway(whole, tmp_path / "run")
    from_the_start(monkeypatch, what)
    go_on(recipe, tmp_path / "run")
    assert (state_hash(tmp_path / "run", STEPS) == undisturbed) == (what == "nothing")


@pytest.mark.parametrize("remembered", [True, False])
def test_the_proof_fails_when_a_skipped_step_is_forgotten(recipe, tmp_path, monkeypatch, remembered):
    update = loop.update

    def poisoned(job, step):
        if step == HALF + 1:
            job.state.gradient[3] = float("nan")
        return update(job, step)

    monkeypatch.setattr(loop, "update", poisoned)
    skipping = go_on(recipe, tmp_path / "skipping").folder
    monkeypatch.setattr(loop, "update", update)
    halfway(skipping, tmp_path / "run")
    if not remembered:
        monkeypatch.setattr(Journal, "skipped_after", lambda self, step: frozenset())
    go_on(recipe, tmp_path / "run")
    assert (state_hash(tmp_path / "run", STEPS) == state_hash(skipping, STEPS)) == remembered


@pytest.fixture
def own(tmp_path):
    """A run of its own base and data, and a function that goes on with it; it returns the exit code."""
    base = make_base(tmp_path / "base")
    data = write_jsonl(tmp_path / "train.jsonl", make_records(23))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=base, data=data).replace("steps: 8", "steps: 3"))
    go_on(tmp_path / "recipe.yaml", tmp_path / "run")

    def again(*changes):
        try:
            with error_messages():
                go_on(tmp_path / "recipe.yaml", tmp_path / "run", *changes)
        except SystemExit as error:
            return error.code
        return 0

    return tmp_path, again


def test_whatever_would_make_it_another_run_is_refused_with_its_name(own, capsys):
    folder, again = own
    data, weights, tokenizer = (
        folder / name for name in ("train.jsonl", "base/model.safetensors", "base/tokenizer.json")
    )
    (folder / "other.jinja").write_text("{% for message in messages %}{{ message.content }}</s>{% endfor %}")
    changed = {
        "fingerprints.train": (data, lambda old: old.replace(b'"content": "', b'"content": "!', 1)),
        "fingerprints.base.files.model.safetensors": (weights, lambda old: old[:-1] + bytes([old[-1] ^ 1])),
        "fingerprints.base.files.tokenizer.json": (tokenizer, lambda old: old.replace(b'"x"', b'"~~"', 1)),
    }
    for key, (path, change) in changed.items():
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert again() == 2 and f"REFUSED         {key}:" in capsys.readouterr().err
        path.write_bytes(before)
    for key, change in {
        "fingerprints.template": "data.template=other.jinja",
        "adapter.rank": "adapter.rank=8",
        "train.batch_size": "train.batch_size=4",
    }.items():
        assert again(change) == 2 and f"REFUSED         {key}:" in capsys.readouterr().err
    assert again() == 0


def test_another_version_is_a_harmless_row_and_ends_the_claim_to_the_bit(own, capsys, monkeypatch):
    from lora_kit.training import setup

    folder, _ = own
    go_on(folder / "recipe.yaml", folder / "early", "checkpoint.every_steps=2")
    shutil.rmtree(store.checkpoint_folder(folder / "early", 3))
    known = setup.version
    monkeypatch.setattr(setup, "version", lambda name: "99.0" if name == "peft" else known(name))
    go_on(folder / "recipe.yaml", folder / "early")
    assert "harmless        versions.peft: " in capsys.readouterr().out
    assert store.find(folder / "early").latest.manifest.run.claim.level == "rounding"
