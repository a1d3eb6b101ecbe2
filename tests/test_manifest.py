"""A manifest reads back as it was written, an older one of the same format too, and a wrong one names its fields."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
from manifests import run_facts, step_facts

from lora_kit.errors import CheckpointError
from lora_kit.runs import formats
from lora_kit.runs.manifest import (
    MANIFEST,
    FileEntry,
    LineageEntry,
    Manifest,
    Origin,
    Resolved,
    Watch,
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
    step_facts(7, skipped_steps=(2, 7), held_out_loss=0.25, watch=Watch("loss", 0.25, 7, 0)),
    {"adapter_model.safetensors": FileEntry(12, "c" * 64)},
)
OPTIONAL = ("origin", "computed_by", "held_out_loss", "watch")


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
        (["run_id"], None, r"manifest\.json: not valid: run_id: Input should be a valid string"),
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
        (["format"], "1\n\x1b[2J", r"format 1\\n\\x1b\[2J, this lora_kit reads 1"),
        (["fencing_token"], 10**30, "fencing_token: Input should be "),
        (["fencing_token"], -1, "fencing_token: Input should be greater than or equal to 0"),
        (["step"], 2**63, "step: Input should be less than"),
        (["skipped_steps"], [-1], r"skipped_steps\.0: "),
        (["run_id"], "../x", "run_id: String should match pattern"),
        (["resolved", "attention"], "weird", r"resolved\.attention: String should match pattern"),
        (["resolved", "layout"], "stacked", r"resolved\.layout: String should match pattern"),
        (["resolved", "kernels"], ["rm"], r"resolved\.kernels\.0: String should match pattern"),
        (["resolved", "threads"], 0, r"resolved\.threads: "),
        (["machine", "processes"], 0, r"machine\.processes: "),
        (["line"], "{}", r"line: Value error, metrics\.jsonl: not valid: step: Field required"),
        (["line"], "[" * 100_000, "line: Value error, .*recursion limit"),
        (["template"], [[[]]] * 1000, "template: Input should be a valid string"),
        (["files", "adapter_model.safetensors"], {"size": -1, "sha256": "c" * 64}, r"safetensors\.size: "),
        (["files", "adapter_model.safetensors"], {"size": 1, "sha256": "../x"}, r"safetensors\.sha256: "),
        (["files"], {"a/b": {"size": 1, "sha256": "c" * 64}}, "not the name of a file in this folder"),
        (["files"], {str(number): 1 for number in range(9)}, r"files\.2: .*; 6 more$"),
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


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused_or_null(tmp_path, number):
    def sealed(text):
        plain = text.rpartition(',\n "sha256": "')[0]
        digest = hashlib.sha256(f"{plain}\n}}\n".encode()).hexdigest()
        (tmp_path / MANIFEST).write_text(f'{plain},\n "sha256": "{digest}"\n}}\n')
        return tmp_path / MANIFEST

    text = manifest_bytes(WHOLE.to_dict()).decode()
    with pytest.raises(CheckpointError, match="held_out_loss: Input should be a finite number"):
        read_manifest(sealed(text.replace("0.25", number)))
    found = read_manifest(sealed(text.replace("0.99", number)))
    assert found.run.lineage[1].then == [0.9, None] and manifest_bytes(found.to_dict())


def test_a_manifest_with_a_number_that_is_not_finite_is_not_written():
    with pytest.raises(CheckpointError, match="cannot be stored as JSON"):
        manifest_bytes({"loss": float("nan")})


def test_a_very_large_manifest_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MOST_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read: more than 100 bytes"):
        read_manifest(write(tmp_path, WHOLE.to_dict()))


def test_a_folder_in_its_place_is_a_checkpoint_error(tmp_path):
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read: not a regular file"):
        read_manifest(tmp_path / MANIFEST)
