"""A manifest reads back as it was written, an older one of the same format too, and a wrong one names its fields."""

import json
import random
from dataclasses import replace

import pytest
from manifests import run_facts, step_facts

from lora_kit.errors import CheckpointError
from lora_kit.runs.manifest import (
    MANIFEST,
    FileEntry,
    LineageEntry,
    Manifest,
    Origin,
    Resolved,
    manifest_bytes,
    read_manifest,
)

WHOLE = Manifest(
    run_facts(
        origin=Origin("o", 4, "a" * 64),
        lineage=(LineageEntry(3, "train.steps", 3, 6), LineageEntry(3, "optim.betas", [0.9, 0.99], None)),
        resolved=Resolved(None, "sdpa", "padded", 2048, True, ("lora", "mlp")),
        template="{{ messages }} ü",
        computed_by={"backend": "c", "compiler": "gcc 12"},
    ),
    step_facts(7, skipped_steps=(2, 7), held_out_loss=0.25),
    {"adapter_model.safetensors": FileEntry(12, "c" * 64)},
)
OPTIONAL = ("origin", "computed_by", "held_out_loss")


def write(folder, content):
    """Write a manifest with a checksum that fits, whatever it says."""
    (folder / MANIFEST).write_bytes(manifest_bytes(content))
    return folder / MANIFEST


@pytest.mark.quick
def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    assert read_manifest(write(tmp_path, WHOLE.to_dict())) == WHOLE


def test_every_float_reads_back_to_the_bit(tmp_path):
    rng = random.Random(0)
    for _ in range(200):
        loss = rng.uniform(0, 10) * 10 ** rng.randrange(-300, 300)
        recipe = {"optim": {"learning_rate": loss}}
        written = replace(WHOLE, run=run_facts(recipe=recipe), progress=step_facts(1, held_out_loss=loss))
        assert read_manifest(write(tmp_path, written.to_dict())) == written


def test_fields_that_came_later_are_unknown_in_an_older_manifest(tmp_path):
    content = WHOLE.to_dict()
    del content["origin"], content["computed_by"]
    for name in ("micro_batch_tokens", "activation_checkpointing", "kernels"):
        del content["resolved"][name]
    older = read_manifest(write(tmp_path, content)).run
    assert (older.origin, older.computed_by) == (None, {})
    assert older.resolved == Resolved(None, "sdpa", "padded")


def test_fields_of_a_later_version_are_ignored(tmp_path):
    content = WHOLE.to_dict() | {"colour": "red"}
    content["machine"] = content["machine"] | {"weather": "fine"}
    assert read_manifest(write(tmp_path, content)) == WHOLE


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["run_id"], None, r"manifest\.json: not a manifest of this format: run_id: Input should be a valid string"),
        (["step"], "7", r"step: Input should be a valid integer"),
        (["step"], True, r"step: Input should be a valid integer"),
        (["recipe"], [], r"recipe: Input should be an object|recipe: Input should be a valid dictionary"),
        (
            ["recipe", "optim"],
            1,
            r"recipe\.optim: Input should be an object|recipe\.optim: Input should be a valid dict",
        ),
        (["fingerprints", "base"], "x", r"fingerprints\.base: "),
        (["claim", "level"], "surely", r"claim\.level: Input should be 'bitwise' or 'rounding'"),
        (["files", "adapter_model.safetensors"], {"size": 1}, r"files\.adapter_model\.safetensors\.sha256: Field requ"),
        (["lineage"], [1], r"lineage\.0: "),
        (["format"], None, "format None, this lora_kit reads 1"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, path, value, message):
    content = json.loads(json.dumps(WHOLE.to_dict()))
    section = content
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("key", [key for key in WHOLE.to_dict() if key not in OPTIONAL])
def test_a_missing_key_is_a_checkpoint_error(tmp_path, key):
    content = WHOLE.to_dict()
    del content[key]
    with pytest.raises(CheckpointError, match=rf"manifest\.json: .*{key}"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"7", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_a_checkpoint_error(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        read_manifest(tmp_path / MANIFEST)


def test_a_folder_in_its_place_is_a_checkpoint_error(tmp_path):
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest"):
        read_manifest(tmp_path / MANIFEST)
