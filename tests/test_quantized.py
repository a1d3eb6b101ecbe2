"""A quantised base is trained as its dequantised weights would be, exactly resumable, and never changed by it."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from plain_loop import plain_loop, relative
from runs import state_hash, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_kit as lk
from lora_kit.check import check, estimate
from lora_kit.errors import BaseError
from lora_kit.kernels import fusing
from lora_kit.kernels.fp8 import BlockFp8Linear
from lora_kit.model import base as bases
from lora_kit.model.base import load_base, refuse_without_bfloat16
from lora_kit.model.probe import leaks_when_packed
from lora_kit.model.source import locate
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Base
from lora_kit.training import loop

bitsandbytes = pytest.importorskip("bitsandbytes")


def linears(model):
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def whole(module):
    """The weight that a quantised layer stands for, by the library's own dequantisation or by the definition."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return module.state.CB.float() * module.state.SCB[:, None] / 127


def dequantized(job):
    """A plain fp32 base whose linear weights are what the quantised ones stand for."""
    plain = AutoModelForCausalLM.from_pretrained(job.inputs.source.folder, dtype=torch.float32)
    for name, module in linears(job.model.get_base_model()).items():
        plain.get_submodule(name.removesuffix(".base_layer")).weight.data = whole(module).float().cpu()
    return plain


def held(model):
    return {name: module.weight.data.clone() for name, module in linears(model).items()}


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_gradients_are_those_of_the_dequantised_weights_also_after_an_evaluation(
    how, recipe_file, tmp_path, captured, jobs, device
):
    changes = [f"base.quantization={how}", "train.steps=3", "adapter.dropout=0", "optim.max_grad_norm=null"]
    changes += ["data.validation=0.2", "evaluate.every_steps=1", "evaluate.generate=2"]
    loop.train(load_recipe(recipe_file, changes), tmp_path / "run")
    (job,) = jobs
    assert len(linears(job.model)) == 14 and job.facts.resolved.layout == "packed"
    for step, (weights, gradient) in enumerate(captured):
        members = [index for group in job.plan.micro_batches(step) for index in group]
        expected, _ = plain_loop(job, weights, members, dequantized(job))
        assert relative(gradient, expected) < (1e-5 if device.type == "cpu" else 1e-4)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_training_evaluation_and_checkpoints_leave_the_base_as_it_was(
    how, recipe_file, tmp_path, jobs, monkeypatch, device
):
    before = {}
    load = load_base
    monkeypatch.setattr(
        "lora_kit.training.setup.load_base", lambda *a: (model := load(*a), before.update(held(model)))[0]
    )
    changes = [f"base.quantization={how}", "train.steps=3", "data.validation=0.2", "evaluate.generate=2"]
    loop.train(load_recipe(recipe_file, changes), tmp_path / "run")
    jobs[0].model.state_dict()
    after = held(jobs[0].model.get_base_model())
    assert before and [name.removesuffix(".base_layer") for name in after] == list(before)
    assert all(torch.equal(*pair) for pair in zip(before.values(), after.values(), strict=True))


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_packed_examples_do_not_touch_each_other_even_with_outliers(how, base_folder, recipe_file):
    recipe = load_recipe(recipe_file, [f"base.quantization={how}"])
    model = load_base(locate(recipe.base, base_folder), recipe.base, torch.device("cpu"))
    with torch.no_grad():
        model.get_input_embeddings().weight[40:60] *= 100  # beyond any threshold for outliers
    assert not leaks_when_packed(model, model.config.vocab_size, torch.device("cpu"))


def test_two_processes_and_going_back_give_the_bytes_of_one(recipe_file, tmp_path):
    changes = ["--set", "base.quantization=nf4", "--set", "base.dtype=bfloat16"]
    train(recipe_file, tmp_path / "one", *changes)
    train(recipe_file, tmp_path / "two", *changes, processes=2)
    expected = state_hash(tmp_path / "one", 8)
    assert state_hash(tmp_path / "two", 8) == expected
    train(recipe_file, tmp_path / "two", *changes, "--from", str(tmp_path / "two" / "checkpoints" / "step-00000003"))
    assert state_hash(tmp_path / "two", 8) == expected


def test_a_trained_adapter_answers_and_merges_into_whole_weights(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["base.quantization=nf4", "train.steps=2"])
    run = loop.train(recipe, tmp_path / "run")
    model, tokenizer = lk.load(run.latest)
    assert linears(model) and len(lk.generate(model, tokenizer, ["hello"], max_new_tokens=4)) == 1
    assert lk.merge(run.latest, tmp_path / "merged").top1_agreement == 1
    assert not linears(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


@pytest.mark.quick
def test_the_estimate_counts_the_bytes_that_are_held(recipe_file, base_folder):
    for how in ("nf4", "int8"):
        recipe = load_recipe(recipe_file, [f"base.quantization={how}"])
        model = load_base(locate(recipe.base, base_folder), recipe.base, torch.device("cpu"))
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        assert weights <= estimate(recipe).memory.base_bytes <= 1.1 * weights


@pytest.fixture
def published(base_folder, tmp_path):
    """A function that publishes the base quantised and returns the folder."""

    def publish(how):
        section = Base(repo="x", quantization=how, dtype="float32")
        folder = tmp_path / how
        shutil.copytree(base_folder, folder)
        load_base(locate(section, base_folder), section, torch.device("cpu")).save_pretrained(folder)
        return folder

    return publish


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("asked", ["none", "nf4", "int8"])
def test_a_base_published_quantised_is_trained_only_as_it_is(how, asked, published, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, [f"base.repo={published(how)}", f"base.quantization={asked}", "train.steps=1"])
    if asked == how:
        assert not check(recipe).problems
        loop.train(recipe, tmp_path / "run")
        return
    told = f"published in {how}, and the recipe has base.quantization: {asked}; write `quantization: {how}`"
    with pytest.raises(BaseError, match=told):
        loop.train(recipe, tmp_path / "run")
    assert any(told in problem for problem in check(recipe).problems)


def test_a_quantisation_that_is_not_trained_is_named(base_folder, recipe_file, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="published in gptq, which lora_kit does not train"):
        loop.train(load_recipe(recipe_file, [f"base.repo={folder}"]), tmp_path / "run")


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_base_published_quantised_is_computed_and_merged_like_one_quantised_at_loading(
    how, published, recipe_file, tmp_path, jobs, captured
):
    changes = [f"base.quantization={how}", "train.steps=2", "data.validation=0.2", "evaluate.every_steps=1"]
    for name in ("at loading", "published"):
        change = [f"base.repo={published(how)}"] if name == "published" else []
        loop.train(load_recipe(recipe_file, [*changes, *change]), tmp_path / name)
    for (_, first), (_, second) in zip(captured[:2], captured[2:], strict=True):
        assert relative(first, second) < 1e-6
    for module in linears(jobs[1].model.get_base_model()).values():
        assert how == "int8" or not module.support_avx512bf16_for_cpu
        assert how == "nf4" or module.state.threshold == 0
    assert lk.merge(tmp_path / "published", tmp_path / "merged").top1_agreement == 1
    assert not linears(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_missing_package_is_reported_before_anything_is_loaded(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "find_spec", lambda name: None)
    with pytest.raises(BaseError, match=r"nf4 needs bitsandbytes, which is missing; pip install 'lora_kit\[bnb\]'"):
        loop.train(load_recipe(recipe_file, ["base.quantization=nf4"]), tmp_path / "run")


def test_a_gpu_without_bfloat16_is_refused_with_the_way_out():
    with pytest.raises(BaseError, match=r"Tesla T4 \(compute capability 7\.5\) has no bfloat16.*base\.dtype=float32"):
        refuse_without_bfloat16("bfloat16", "Tesla T4", (7, 5))
    refuse_without_bfloat16("float32", "Tesla T4", (7, 5))
    refuse_without_bfloat16("bfloat16", "NVIDIA A100", (8, 0))


def publish_in_fp8(plain, folder, *, rows=12, columns=16):
    """Write a base as DeepSeek publishes its own: codes in float8 and a factor for each block; return the folder."""
    shutil.copytree(plain, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        weight = weights[name].float()
        height, width = (-(-size // block) for size, block in zip(weight.shape, (rows, columns), strict=True))
        factors = torch.zeros(height, width)
        for row, column in itertools.product(range(height), range(width)):
            block = weight[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            factors[row, column] = block.abs().max() / 448  # the largest number of e4m3
            block /= factors[row, column]
        weights |= {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": factors}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def from_blocks(folder, name, *, rows=12, columns=16):
    """The weight that the codes stand for, block by block."""
    weights = load_file(folder / "model.safetensors")
    weight = weights[f"{name}.weight"].float()
    for (row, column), factor in np.ndenumerate(weights[f"{name}.weight_scale_inv"].numpy()):
        weight[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] *= factor
    return weight


def test_a_base_in_fp8_trains_as_its_dequantised_weights_would(base_folder, recipe_file, tmp_path, captured, jobs):
    folder = publish_in_fp8(base_folder, tmp_path / "fp8")
    changes = [f"base.repo={folder}", "base.quantization=fp8", "train.steps=2", "adapter.dropout=0"]
    loop.train(load_recipe(recipe_file, [*changes, "optim.max_grad_norm=null"]), tmp_path / "run")
    layers = {name: layer for name, layer in jobs[0].model.named_modules() if isinstance(layer, BlockFp8Linear)}
    assert len(layers) == 14 and all(layer.weight.dtype == torch.float8_e4m3fn for layer in layers.values())
    assert "fused adapters (14 of 14)" in fusing.about(jobs[0].model, jobs[0].facts.resolved.kernels)
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    for name in [name for name, layer in plain.named_modules() if "proj" in name]:
        plain.get_submodule(name).weight.data = from_blocks(folder, name)
    for step, (weights, gradient) in enumerate(captured):
        members = [index for group in jobs[0].plan.micro_batches(step) for index in group]
        expected, _ = plain_loop(jobs[0], weights, members, plain)
        assert relative(gradient, expected) < 1e-5
    assert lk.merge(tmp_path / "run", tmp_path / "merged").top1_agreement == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}


def test_fp8_is_only_for_a_base_that_was_published_in_it(recipe_file, base_folder, tmp_path):
    with pytest.raises(BaseError, match=r"fp8 needs a base that was published in fp8.*set int8 or nf4"):
        loop.train(load_recipe(recipe_file, ["base.quantization=fp8"]), tmp_path / "run")
    folder = publish_in_fp8(base_folder, tmp_path / "fp8")
    with pytest.raises(BaseError, match=r"published in fp8, and the recipe has base\.quantization: none"):
        loop.train(load_recipe(recipe_file, [f"base.repo={folder}"]), tmp_path / "run")
