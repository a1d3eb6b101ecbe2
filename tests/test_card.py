"""A card says what the records say, leaves out what they do not, and is the same for the same checkpoint."""

from dataclasses import replace

import pytest
from conftest import RECIPE
from huggingface_hub import ModelCard

import lora_kit as lk
from lora_kit.artifacts.card import model_card
from lora_kit.artifacts.hub import CARD, publication
from lora_kit.runs import store
from lora_kit.runs.certificate import FOLDER, Certificate, Resumption, hash_of
from lora_kit.runs.manifest import MANIFEST, LineageEntry, Origin, read_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_folder, data_file):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base_folder, data=data_file))
    changes = ["train.steps=2", "checkpoint.every_steps=1", "data.validation=0.2", "evaluate.generate=2"]
    changes += ["evaluate.every_steps=1", "hub.licence=apache-2.0"]
    return lk.train(lk.load_recipe(folder / "recipe.yaml", changes), folder / "run")


@pytest.fixture(scope="module")
def manifest(run, tmp_path_factory):
    """The manifest that is published of the last checkpoint."""
    path = tmp_path_factory.mktemp("published") / MANIFEST
    path.write_bytes(published(run.latest)[MANIFEST])
    return read_manifest(path)


def published(path):
    checkpoint = store.open_checkpoint(path)
    return publication(checkpoint, checkpoint.recipe, "me/x")


def with_recipe(manifest, section, **changes):
    """Return a manifest whose recipe has other values in a section."""
    recipe = manifest.run.recipe | {section: manifest.run.recipe[section] | changes}
    return replace(manifest, run=replace(manifest.run, recipe=recipe))


def card_of(path):
    return published(path)[CARD].decode()


@pytest.mark.quick
def test_the_front_matter_is_what_the_hub_reads(manifest):
    data = ModelCard(model_card("me/x", manifest)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "apache-2.0")
    assert "lora" in data.tags and data.base_model is None


def test_a_hub_base_is_named_with_its_revision(manifest):
    facts = with_recipe(manifest, "base", repo="them/base").run
    fingerprints = replace(facts.fingerprints, base=replace(facts.fingerprints.base, commit="c0ffee"))
    card = model_card("me/x", replace(manifest, run=replace(facts, fingerprints=fingerprints)))
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == ("them/base", "adapter")
    assert 'from_pretrained("them/base", revision="c0ffee", dtype="float32")' in card
    assert 'lk.load("me/x")' in card


def test_a_local_base_is_said_to_be_one_without_its_place(run, base_folder):
    card = card_of(run.latest)
    assert f"a base from a local folder, `{base_folder.name}`" in card and str(base_folder.parent) not in card
    assert 'lk.load("me/x", base="path/to/the/base")' in card
    assert "| revision | none: a local folder |" in card


def test_a_shipped_base_needs_no_place(manifest):
    card = model_card("me/x", with_recipe(manifest, "base", repo="builtin:base"), revision="new")
    assert "the tiny base that ships with lora_kit" in card
    assert 'lk.load("me/x@new")' in card and '"me/x", revision="new")' in card


def test_data_scores_settings_and_versions_are_those_of_the_records(run, manifest):
    card, scores = card_of(run.latest), run.result["metrics"]
    facts = manifest.run
    for fact in (
        f"| tokens | {facts.data.train.tokens:,} | {facts.data.validation.tokens:,} |",
        facts.fingerprints.train,
        f"| base | {scores['base']['loss']:.4f} | {scores['base']['perplexity']:.2f} | ",
        f"| adapter | {scores['adapter']['loss']:.4f} |",
        "of 2 | 5 |",
        "| `adapter.rank` | 4 |",
        "| `optim.learning_rate` | 0.01 |",
        f"| peft | {facts.versions['peft']} |",
        "after step 2",
    ):
        assert fact in card, fact


def test_an_earlier_checkpoint_has_its_own_loss_and_not_the_runs(run):
    card = card_of(run.checkpoints[0])
    own = store.open_checkpoint(run.checkpoints[0]).manifest.progress.held_out_loss
    assert f"| adapter | {own:.4f} | - | - | 5 |" in card and "| base | " not in card.split("## Validation")[1]


def test_what_is_not_known_is_left_out(manifest):
    bare = replace(manifest, progress=replace(manifest.progress, held_out_loss=None))
    card = model_card("me/x", with_recipe(bare, "hub", licence=None))
    assert "## Validation" not in card and "license" not in card and "None" not in card


def test_a_card_says_where_the_run_began_and_what_changed(manifest):
    assert "## Lineage" not in model_card("me/x", manifest)
    run = replace(manifest.run, lineage=(LineageEntry(3, "optim.learning_rate", 0.1, 0.2),))
    card = model_card("me/x", replace(manifest, run=replace(run, origin=Origin("ab" * 8, 40, "c" * 64, "me/y@1234"))))
    began = f"The run began with the adapter of run `{'ab' * 8}` after step 40, `me/y@1234` on the Hub (SHA-256 of "
    assert began in card and "c" * 64 in card and "| 3 | `optim.learning_rate` | 0.1 | 0.2 |" in card
    card = model_card("me/x", replace(manifest, run=replace(run, origin=Origin(None, None, "c" * 64))))
    assert "The run began with an adapter that lora_kit did not train (SHA-256 of " in card


def test_a_card_says_what_a_drill_of_the_recipe_has_shown(run, manifest):
    assert "lora-kit drill" not in card_of(run.latest)
    times = {"seconds": 0.5, "parts": {"found": 0.1}}
    drill = Certificate(
        equal=True,
        problems=(),
        command="lora-kit drill recipe.yaml",
        recipe=hash_of(store.open_checkpoint(run.latest).recipe),
        changed=(),
        steps=12,
        seed=0,
        faults=(Resumption("kill", "SIGKILL", 3, 3, 0, **times), Resumption("corrupt", "a bit", 7, 6, 1, **times)),
        left_out={},
        comparison=None,
        versions={},
        machine={},
        time="2026-01-02T03:04:05+00:00",
    )
    (run.folder / FOLDER).mkdir()
    drill.write(run.folder / FOLDER)
    told = "`lora-kit drill` of this recipe, 2026-01-02: a run of 12 steps with kill, corrupt equals an undisturbed run"
    assert told in card_of(run.latest)
    replace(drill, recipe="0" * 64).write(run.folder / FOLDER)
    assert "lora-kit drill" not in card_of(run.latest), "a drill of another recipe"


def test_a_manifest_that_anyone_may_have_sealed_has_a_card(manifest):
    """Its types are checked, but nobody has checked that what belongs together is there."""
    run = replace(manifest.run, origin=Origin("ab" * 8, None, "c" * 64), versions={}, template=None)
    progress = replace(manifest.progress, held_out_loss=1.0)
    for data in (run.data, replace(run.data, validation=None)):
        card = model_card("me/x", replace(manifest, run=replace(run, data=data), progress=progress))
        assert "The run began with the adapter of run" in card and "Trained with lora_kit;" in card


def test_equal_checkpoints_have_equal_cards(run):
    assert card_of(run.latest) == card_of(run.latest)
