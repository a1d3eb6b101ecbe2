"""A merged model is base and adapter in one, as far as rounding allows, and what is told about it is true."""

import errno
import json

import pytest
import torch
from conftest import TEMPLATE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kit as lk
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
