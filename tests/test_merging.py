"""A merged model is base and adapter in one, as far as rounding allows, and what is told about it is true."""

import errno
import json
import os

import pytest
import torch
from conftest import TEMPLATE, make_base
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.artifacts import merging
from lora_kit.cli import app
from lora_kit.errors import CheckpointError, InputError


@pytest.mark.quick
def test_weights_are_the_sum_of_base_and_adapter(trained_run, tmp_path, base_folder):
    merged = lk.merge(trained_run, tmp_path / "merged", dtype="float32")
    weights, base = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base_folder / "model.safetensors")
    adapter = load_file(lk.Run(trained_run).latest / "adapter_model.safetensors")
    config = json.loads((lk.Run(trained_run).latest / "adapter_config.json").read_text())
    name = next(key for key in adapter if key.endswith("lora_A.weight")).removesuffix(".lora_A.weight")
    a, b = (adapter[f"{name}.lora_{letter}.weight"] for letter in "AB")
    layer = name.removeprefix("base_model.model.") + ".weight"
    expected = base[layer].float() + config["lora_alpha"] / config["r"] * b @ a
    assert torch.allclose(weights[layer], expected, atol=1e-6) and not torch.equal(weights[layer], base[layer].float())
    assert merged.largest_difference < 1e-4 * merged.largest_logit and merged.top1_agreement == 1


def test_what_is_told_is_what_plain_transformers_finds(trained_run, tmp_path):
    merged = lk.merge(trained_run, tmp_path / "merged", dtype="bfloat16", prompts=["hello there"])
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert told | {"folder": merged.folder} == merged.to_dict() and told["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = [{"role": "user", "content": "hello there"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model, _ = lk.load(trained_run, dtype="bfloat16")
    together = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        difference = (model(**ids).logits.float() - together(**ids).logits.float()).abs().max()
    assert (
        0 < merged.largest_difference == pytest.approx(float(difference)) and merged.positions == ids.input_ids.shape[1]
    )


def test_it_stops_where_the_adapter_learned_to_stop(recipe_file, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("</s>", "<unk>"))
    changes = ["train.steps=1", "base.stop_token=<unk>", f"data.template={tmp_path / 'template.jinja'}"]
    recipe = lk.load_recipe(recipe_file, changes)
    run = lk.train(recipe, tmp_path / "run")
    lk.merge(run.latest, tmp_path / "merged")
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<unk>") in ends


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 5, 7]}, {1, 0, 5, 7}),
        ({"num_beams": 1, "length_penalty": 2.0, "output_scores": True, "eos_token_id": 5}, {1, 5}),
        ({"do_sample": True, "temperature": 0.6}, {1}),
    ],
)
def test_settings_of_generation_stay_valid_and_keep_the_end_tokens_of_the_base(settings, ends, recipe_file, tmp_path):
    folder = make_base(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    run = lk.train(lk.load_recipe(recipe_file, [f"base.repo={folder}", "train.steps=1"]), tmp_path / "run")
    lk.merge(run.latest, tmp_path / "merged")
    written = GenerationConfig.from_pretrained(tmp_path / "merged")
    written.validate(strict=True)
    assert set(written.eos_token_id) == ends and written.eos_token_id[0] == 1
    assert written.temperature == (0.6 if settings.get("do_sample") else None)


def test_files_have_the_permissions_of_new_files(trained_run, tmp_path):
    before = os.umask(0o027)
    try:
        lk.merge(trained_run, tmp_path / "merged")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o640}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_adapted_head_gets_weights_of_its_own(family, recipe_file, tmp_path):
    folder = make_base(tmp_path / "base", tie_word_embeddings=True)
    if family != "llama":
        save_family(folder, family)
    changes = [f"base.repo={folder}", "train.steps=3", "adapter.targets=[lm_head, q_proj]", "optim.learning_rate=0.1"]
    run = lk.train(lk.load_recipe(recipe_file, changes), tmp_path / "run")
    merged = lk.merge(run.latest, tmp_path / "merged")
    assert merged.top1_agreement == 1 and merged.largest_difference < 1e-3 * merged.largest_logit
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def save_family(folder, family):
    """Replace the tiny base in a folder by one of another family, with a tied head."""
    content = json.loads((folder / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {key: content[key] for key in (*keys, "num_key_value_heads", "max_position_embeddings")}
    config = AutoConfig.for_model(family, **shape, head_dim=8, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_a_merged_model_that_predicts_something_else_exits_with_1(trained_run, tmp_path, monkeypatch):
    from lora_kit.artifacts import merging

    found = merging._logits
    calls = iter([1, -1])
    monkeypatch.setattr(merging, "_logits", lambda *arguments: next(calls) * found(*arguments))
    result = CliRunner().invoke(app, ["merge", str(trained_run), "--out", str(tmp_path / "merged")])
    assert result.exit_code == 1 and "predicts other tokens than base and adapter; do not use it" in result.stderr


def test_an_adapter_that_is_not_a_number_is_not_merged(trained_run, tmp_path, monkeypatch):
    loaded = merging.open_adapter(trained_run)
    next(p for name, p in loaded.model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    monkeypatch.setattr(merging, "open_adapter", lambda *_, **__: loaded)
    with pytest.raises(CheckpointError, match="cannot be merged: NaNs detected"):
        lk.merge(trained_run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(trained_run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match=r"not an empty folder; choose another --out"):
        lk.merge(trained_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_write_that_fails_leaves_nothing(trained_run, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def full(self, folder, *arguments, **options):
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left on device; the partial model was deleted"):
        lk.merge(trained_run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_the_current_folder_can_be_named(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lk.merge(trained_run, ".").folder == str(tmp_path) and (tmp_path / "config.json").is_file()
