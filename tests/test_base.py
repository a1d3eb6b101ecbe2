"""A base is named by its bytes, loaded without live dropouts, and asked itself whether it can train packed examples."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_base
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kit.errors import BaseError
from lora_kit.kernels.attention import SEGMENT, use_attention
from lora_kit.model import probe
from lora_kit.model import source as bases
from lora_kit.model.base import load_base
from lora_kit.model.probe import leaks_when_packed
from lora_kit.model.source import file_hash, locate
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Base
from lora_kit.training import loop

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": ({}, False),
    "mistral": ({"sliding_window": 8}, False),
    "qwen3": ({"head_dim": 8}, False),
    "gpt_neox": ({}, False),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, False),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, True),
    "bloom": ({"n_layer": 2, "n_head": 4}, True),
    "mamba": ({"state_size": 4}, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_knows_which_models_leak_between_packed_examples(family, dtype):
    changes, leaks = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | changes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.config.use_cache = False
    assert leaks_when_packed(model, 64, torch.device("cpu")) is leaks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_is_not_fooled_by_rounding(base_folder, dtype):
    source = locate(Base(repo="x"), base_folder)
    model = load_base(source, Base(repo="x", dtype=dtype), torch.device("cpu"))
    assert model.dtype == getattr(torch, dtype)
    assert not leaks_when_packed(model, model.config.vocab_size, torch.device("cpu"))


def test_the_probe_is_not_fooled_where_rounding_grows_through_many_layers(monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 40, "initializer_range": 0.1}
    config = AutoConfig.for_model("llama", **SMALL | shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    differences, original = [], probe._relative_difference
    monkeypatch.setattr(probe, "_relative_difference", lambda *a: differences.append(original(*a)) or differences[-1])
    assert use_attention(model, SEGMENT) and not leaks_when_packed(model, 64, torch.device("cpu"))
    assert max(differences) > 1.5 * probe.PROBE_TOLERANCE[torch.bfloat16]


def test_a_leaking_model_trains_on_padded_rows_and_the_log_says_so(recipe_file, tmp_path, base_folder, capsys):
    torch.manual_seed(0)
    folder = tmp_path / "bloom"
    shutil.copytree(base_folder, folder)
    (folder / "config.json").unlink()
    config = AutoConfig.for_model("bloom", vocab_size=106, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    run = loop.train(load_recipe(recipe_file, [f"base.repo={folder}", "train.steps=2"]), tmp_path / "run")
    assert json.loads((run.latest / "manifest.json").read_text())["resolved"]["layout"] == "padded"
    assert capsys.readouterr().out.count("trains on padded rows") == 1


def test_a_bases_own_dropouts_are_off(tmp_path):
    folder = make_base(tmp_path / "base", attention_dropout=0.5)
    model = load_base(locate(Base(repo="x"), folder), Base(repo="x", dtype="float32"), torch.device("cpu")).train()
    ids = torch.arange(30)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.quick
def test_the_fingerprint_follows_the_bytes(tmp_path):
    folder = make_base(tmp_path / "base")
    first = locate(Base(repo="x"), folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert locate(Base(repo="x"), tmp_path / "copy").fingerprint == first
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert locate(Base(repo="x"), folder).fingerprint != first


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = file_hash(path)
    monkeypatch.setattr(bases, "sha256_of", lambda *_: pytest.fail("read again"))
    assert file_hash(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    assert file_hash(path) != first


def test_a_file_of_the_hubs_cache_is_named_by_its_hash(tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"large")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_hash(tmp_path / "model.safetensors") == "ab" * 32


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BaseError, match=r"has no config\.json"):
        locate(Base(repo="here"), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BaseError, match=r"no \.safetensors weights; convert it, pickled weights are not loaded"):
        locate(Base(repo="here"), tmp_path)


def test_a_name_that_is_nowhere_says_what_to_check():
    with pytest.raises(BaseError, match=r"nobody/nothing .* is not a local folder and cannot be downloaded"):
        locate(Base(repo="nobody/nothing"), None)
