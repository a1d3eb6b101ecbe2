"""An exported adapter is the same function as its checkpoint, in the layout that vLLM reads."""

import pytest
import torch
from peft import PeftModel
from plain_loop import relative
from safetensors.torch import load_file
from test_families import EXPERTS_BY_NAME, save_family
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop

NAMES = {
    "mixtral": "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_B.weight",
    "qwen3_moe": "base_model.model.model.layers.1.mlp.experts.3.down_proj.lora_B.weight",
}


@torch.no_grad()
def logits(folder, adapter):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter)).eval()(torch.arange(40)[None]).logits


def trained(recipe_file, tmp_path, folder, *changes):
    settings = [f"base.repo={folder}", "train.steps=3", "adapter.dropout=0", "optim.learning_rate=0.05", *changes]
    return loop.train(load_recipe(recipe_file, settings), tmp_path / "run")


def exported(run, out):
    return CliRunner().invoke(app, ["export", str(run.folder), "--to", "vllm", "--out", str(out)])


@pytest.mark.parametrize("family", NAMES)
def test_both_layouts_of_experts_give_the_same_logits_in_peft(family, recipe_file, tmp_path, base_folder):
    folder = save_family(tmp_path / "base", family, base_folder)
    run = trained(recipe_file, tmp_path, folder, f"adapter.targets={EXPERTS_BY_NAME}")
    result = exported(run, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert NAMES[family] in tensors and not any("base_layer" in name for name in tensors)
    assert all(tensor.ndim == 2 and 4 in tensor.shape for tensor in tensors.values())
    before, after = logits(folder, run.latest), logits(folder, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(40)[None]).logits
    assert relative(after, before) < 1e-5 < 1e-3 < relative(before, base)


def test_what_vllm_does_not_read_is_refused_with_advice(recipe_file, tmp_path, base_folder):
    folder = save_family(tmp_path / "base", "gpt_oss", base_folder)
    run = trained(recipe_file, tmp_path, folder, "adapter.targets=[experts.down_proj]", "train.steps=1")
    result = exported(run, tmp_path / "out")
    assert result.exit_code == 1 and "the experts of gpt_oss have no layout that vLLM reads" in result.stderr
    dora = loop.train(load_recipe(recipe_file, ["train.steps=1", "adapter.variant=dora"]), tmp_path / "dora")
    result = exported(dora, tmp_path / "out")
    assert result.exit_code == 1 and "vLLM reads no DoRA adapters; use `lora-kit merge`" in result.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert exported(run, tmp_path / "out").exit_code == 2
