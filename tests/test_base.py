"""A base is named by its bytes, loaded without live dropouts, and asked itself whether it can train packed examples."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import make_base, make_tokenizer
from runs import run_code
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lora_kit import files
from lora_kit.check import check
from lora_kit.errors import BaseError
from lora_kit.kernels.attention import SEGMENT, use_attention
from lora_kit.model import probe
from lora_kit.model import source as bases
from lora_kit.model.base import load_base, read_config
from lora_kit.model.probe import leaks_when_packed
from lora_kit.model.source import file_hash, locate
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Base
from lora_kit.runs.manifest import ONCE_RECORDED
from lora_kit.runs.run import Run
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
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
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


def save_as(folder, family, **changes):
    """Save a tiny random base of a family, with a tokenizer, and return its folder."""
    vocabulary = make_tokenizer(folder)
    shape = SMALL | {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0} | changes
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(folder)
    return folder


def loaded(folder):
    """Return the base in a folder as training loads it."""
    return load_base(locate(Base(repo="x"), folder), Base(repo="x", dtype="float32"), torch.device("cpu"))


NESTED = SMALL | {"vocab_size": 106, "head_dim": 8, "attention_dropout": 0.5}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
RANDOM = {
    "llama": {"attention_dropout": 0.5},
    "phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "num_local_experts": 4},
    "mixtral": {"router_jitter_noise": 0.3, "num_local_experts": 4},
    "opt": {"layerdrop": 0.5, "dropout": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma3": {"text_config": NESTED, "vision_config": VISION},
}


@pytest.mark.parametrize("family", RANDOM)
def test_a_base_draws_no_random_numbers_in_training(family, tmp_path):
    model = loaded(save_as(tmp_path / "base", family, **RANDOM[family])).train()
    ids = torch.arange(30)[None]
    seen = []
    for seed in range(4):
        torch.manual_seed(seed)
        seen.append(model(ids).logits)
    assert all(torch.equal(seen[0], logits) for logits in seen)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_no_configuration_switches_off_is_refused(base_folder, monkeypatch):
    model = loaded(base_folder)
    norm = model.model.norm
    noisy = lambda hidden: type(norm).forward(norm, hidden) * (1 + 0.1 * norm.training * torch.rand(1))  # noqa: E731
    monkeypatch.setattr(norm, "forward", noisy)
    with pytest.raises(BaseError, match=r"base.repo: mine \(LlamaForCausalLM\) draws random numbers in training"):
        probe.refuse_unfit(model, "mine", torch.device("cpu"))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_a_base_that_is_not_causal_is_refused(family, tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(BaseError, match=r"is not causal.*choose a causal language model"):
        probe.refuse_unfit(loaded(save_as(tmp_path / "base", family)), "mine", cpu)
    probe.refuse_unfit(loaded(save_as(tmp_path / "decoder", family, is_decoder=True)), "mine", cpu)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_logit_that_is_not_finite_hides_and_proves_nothing(family, tmp_path):
    model = loaded(save_as(tmp_path / "base", family, **({"is_decoder": False} if family == "bert" else {})))
    with torch.no_grad():  # a token that the probe does not read, for its embedding may be the same tensor
        model.get_output_embeddings().weight[2] = torch.nan
    if family == "bert":
        with pytest.raises(BaseError, match="is not causal"):
            probe.refuse_unfit(model, "mine", torch.device("cpu"))
    else:
        probe.refuse_unfit(model, "mine", torch.device("cpu"))


def test_bert_trains_no_step(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, [f"base.repo={save_as(tmp_path / 'base', 'bert', max_position_embeddings=512)}"])
    assert any("is not causal" in problem for problem in check(recipe).problems)
    with pytest.raises(BaseError, match="is not causal"):
        loop.train(recipe, tmp_path / "run")


def change_weights(folder, change):
    """Change the tensors of a base in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_base_that_lacks_a_tensor_is_refused(name, tmp_path, recipe_file):
    folder = make_base(tmp_path / "base")
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(BaseError, match=rf"{folder}: the weights lack 1 tensor.*\({name}\).*random"):
        loop.train(load_recipe(recipe_file, [f"base.repo={folder}"]), tmp_path / "run")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    folder = make_base(tmp_path / "base")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(4, 32)}))
    told = r"/model.safetensors: lm_head.weight has the shape \[4, 32\], and \[106, 32\] in the model of config.json"
    with pytest.raises(BaseError, match=told):
        loaded(folder)


def test_a_tied_head_is_not_missing(tmp_path):
    folder = make_base(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded(folder)


@pytest.mark.parametrize("change", [{"num_attention_heads": "many"}, {"model_type": "t5"}, {"hidden_size": -1}])
def test_a_configuration_that_makes_no_model_is_told(change, tmp_path):
    folder = make_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BaseError, match=f"base.repo: {folder} cannot be loaded: "):
        loaded(folder)


@pytest.mark.parametrize("content", [POINTER, b"", b"{}"])
def test_a_tokenizer_that_cannot_be_read_is_told(content, tmp_path, recipe_file):
    folder = make_base(tmp_path / "base")
    (folder / "tokenizer.json").write_bytes(content)
    told = (
        f"{folder}/tokenizer.json: a pointer of git-lfs" if content == POINTER else f"tokenizer in {folder} cannot be"
    )
    with pytest.raises(BaseError, match=told):
        loop.train(load_recipe(recipe_file, [f"base.repo={folder}"]), tmp_path / "run")


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
    monkeypatch.setattr(files, "sha256_of", lambda *_: pytest.fail("read again"))
    assert file_hash(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    assert file_hash(path) != first


def test_a_file_of_the_hubs_cache_is_named_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    files = []
    for place in ("hub", "elsewhere"):
        blob = tmp_path / place / "blobs" / ("ab" * 32)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"large")
        files.append(tmp_path / place / "model.safetensors")
        files[-1].symlink_to(blob)
    assert file_hash(files[0]) == "ab" * 32 != file_hash(files[1])
    (tmp_path / "hub" / "blobs" / ("ab" * 32)).chmod(0o666)
    assert file_hash(files[0]) == file_hash(files[1])


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BaseError, match=r"has no config\.json"):
        locate(Base(repo="here"), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BaseError, match=r"only pytorch_model\.bin, and pickled weights are not loaded; .*convert"):
        locate(Base(repo="here"), tmp_path)


def in_shards(folder):
    """Write the weights of a base again, in several files with an index; return the names of the files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20kB")
    return sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))


def test_the_fingerprint_covers_what_is_loaded_and_nothing_else(tmp_path):
    folder = make_base(tmp_path / "base")
    shards = in_shards(folder)
    fingerprint = locate(Base(repo="x"), folder).fingerprint
    assert len(shards) > 2 and {*shards, "model.safetensors.index.json", "config.json"} <= set(fingerprint.files)
    others = ["LICENSE.txt", "README.md", "generation_config.json", "consolidated.safetensors", "pytorch_model.bin"]
    for name in [*others, "convert.py"]:
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    assert locate(Base(repo="x"), folder).fingerprint == fingerprint
    (folder / "added_tokens.json").write_text("{}")
    assert locate(Base(repo="x"), folder).fingerprint != fingerprint
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "convert.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "convert.py" in locate(Base(repo="x", trust_remote_code=True), folder).files
    assert "convert.py" not in locate(Base(repo="x"), folder).files


def test_pickled_weights_beside_others_are_not_read(tmp_path):
    folder = make_base(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BaseError, match=r"has other\.safetensors, but transformers loads only model\.safetensors"):
        locate(Base(repo="x"), folder)


PICKLED = "pytorch_model-00001-of-00002.bin"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (PICKLED, "index.json: it names .*bin, and pickled weights are not loaded; .*convert"),
        ("../model.safetensors", "index.json: it names ../model.safetensors, which is not a file of this folder"),
        ("model-00009-of-00009.safetensors", "00009.safetensors: missing, but .*index.json names it; download"),
    ],
)
def test_an_index_names_only_safetensors_of_its_folder(name, message, tmp_path):
    folder = make_base(tmp_path / "base")
    in_shards(folder)
    (folder / PICKLED).write_bytes(b"pickle")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(BaseError, match=message):
        locate(Base(repo="x"), folder)


BROKEN = {
    "pointer": (lambda data: POINTER, "a pointer of git-lfs.*pull"),
    "empty": (lambda data: b"", "empty; download or copy model.safetensors again"),
    "cut": (lambda data: data[:-100], "not a whole safetensors file .*; download or copy model.safetensors again"),
    "longer": (lambda data: data + bytes(8), "not a whole safetensors file"),
    "cut in its header": (lambda data: data[:100], "not a whole safetensors file"),
    "a few bytes": (lambda data: data[:5], "not a whole safetensors file"),
    "a web page": (lambda data: b"<!DOCTYPE html><html>" * 100, "not a whole safetensors file"),
    "zeros": (lambda data: bytes(len(data)), "not a whole safetensors file"),
    "another shape": (lambda data: data.replace(b"[106,32]", b"[106,31]"), "not a whole safetensors file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_are_not_whole_are_named_by_check_and_train(kind, tmp_path, recipe_file):
    folder = make_base(tmp_path / "base")
    damage, message = BROKEN[kind]
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    recipe = load_recipe(recipe_file, [f"base.repo={folder}"])
    with pytest.raises(BaseError, match=f"{path}: {message}"):
        loop.train(recipe, tmp_path / "run")
    assert any(re.search(f"{path}: {message}", problem) for problem in check(recipe).problems)


def test_a_shard_of_a_distributed_checkpoint_is_named(tmp_path):
    folder = make_base(tmp_path / "base")
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(BaseError, match=r"shard-00001.*: a shard of a distributed checkpoint.*; gather the shards"):
        locate(Base(repo="x"), folder)


def test_an_adapter_beside_the_base_is_named(tmp_path, trained_run, recipe_file):
    folder = make_base(tmp_path / "base")
    for path in Run(trained_run).latest.glob("adapter_*"):
        shutil.copy(path, folder)
    recipe = load_recipe(recipe_file, [f"base.repo={folder}"])
    told = r"also has an adapter \(adapter_config.json, adapter_model.safetensors\).*; move these files"
    with pytest.raises(BaseError, match=told):
        loop.train(recipe, tmp_path / "run")
    assert any(re.search(told, problem) for problem in check(recipe).problems)


def test_a_name_that_is_nowhere_says_what_to_check():
    with pytest.raises(BaseError, match=r"nobody/nothing .* is not a local folder and cannot be downloaded"):
        locate(Base(repo="nobody/nothing"), None)


def test_weights_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    folder = make_base(tmp_path / "base")

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bases, "file_hash", refused)
    with pytest.raises(BaseError, match=r"base/\S+ cannot be read: Permission denied; see that this user may read"):
        locate(Base(repo=str(folder)), folder)


def test_a_configuration_for_some_versions_is_part_of_the_fingerprint(tmp_path):
    folder = make_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.5.0.0.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (folder / "config.json").write_text(json.dumps(config | {"configuration_files": ["config.5.0.0.json"]}))
    assert read_config(folder, Base(repo="x")).rms_norm_eps == 0.5, "transformers reads it"
    assert "config.5.0.0.json" in locate(Base(repo="x"), folder).files


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_python_files_of_another_repository_are_refused(name, tmp_path):
    folder = make_base(tmp_path / "base")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"auto_map": {"AutoConfig": "someone/else--configuration.Own"}}))
    with pytest.raises(BaseError, match=f"{name}: it takes Python files from another repository on the Hub"):
        locate(Base(repo="x", trust_remote_code=True), folder)
    assert locate(Base(repo="x"), folder).files, "without permission they do not run"


def test_weights_that_only_the_class_of_a_model_names_are_refused(tmp_path, monkeypatch):
    folder = make_base(tmp_path / "base")
    source, base = locate(Base(repo="x"), folder), Base(repo="x", dtype="float32")
    monkeypatch.setattr(LlamaConfig, "extra_files", ("head.safetensors",))
    load_base(source, base, torch.device("cpu"))
    save_file({"head": torch.ones(1)}, folder / "head.safetensors")
    with pytest.raises(BaseError, match=r"head\.safetensors: the model reads weights from this file, which lora_kit"):
        load_base(source, base, torch.device("cpu"))


OPENED = """
import json, sys
from pathlib import Path
import torch
from lora_kit.model.base import load_base
from lora_kit.model.source import locate
from lora_kit.model.tokenizer import load_renderer
from lora_kit.recipe.load import load_recipe

recipe, folder, opened = load_recipe(sys.argv[1]), Path(sys.argv[2]), set()
source = locate(recipe.base, folder)

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(folder)):
        opened.add(arguments[0][len(str(folder)) + 1:])

sys.addaudithook(note)
load_base(source, recipe.base, torch.device("cpu"))
load_renderer(source, recipe)
print(json.dumps([sorted(opened), sorted(source.files)]))
"""


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer", None])
def test_every_file_that_transformers_opens_is_part_of_the_fingerprint(kind, recipe_file, tmp_path, base_folder):
    folder = shutil.copytree(base_folder, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    decoys = ["processor_config.json", "preprocessor_config.json", "special_tokens_map.json", "added_tokens.json"]
    for name in [*decoys, "chat_template.json", "video_preprocessor_config.json", "custom_generate.json"]:
        (folder / name).write_text("{}")
    opened, hashed = json.loads(run_code(OPENED, recipe_file, folder).splitlines()[-1])
    assert "config.json" in opened and set(opened) - set(hashed) <= set(ONCE_RECORDED)
