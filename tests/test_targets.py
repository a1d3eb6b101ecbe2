"""An adapter goes where it was asked to go: all-linear hits no head, router or expert, and says what it leaves."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kit.check import check
from lora_kit.errors import RecipeError
from lora_kit.model.adapter import inject
from lora_kit.model.targets import find_targets
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Adapter
from lora_kit.training import loop

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "pad_token_id": None,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LEFT_OUT = {
    "llama": set(),
    "gpt2": set(),
    "mixtral": {"mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    "qwen3_moe": {"mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    "gpt_oss": {"mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    "mamba": {"mixer.dt_proj", "mixer.out_proj"},
}


def tiny(family):
    names = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | names), dtype=torch.float32)


def adapted(model):
    return {name.split(".lora_")[0] for name, tensor in model.named_parameters() if tensor.requires_grad}


def put(base, targets="all-linear", **changes):
    return inject(base, Adapter(targets=targets, **changes), seed=0, name="x", revision=None)


@pytest.mark.parametrize("family", LEFT_OUT)
def test_all_linear_leaves_out_what_it_says_and_nothing_else(family):
    base = tiny(family)
    found = find_targets(base, Adapter())
    assert set(found.left_out) == LEFT_OUT[family]
    model = put(base)
    leaves = {path.rpartition(".")[2] for path in adapted(model)}
    assert len(adapted(model)) == len(found.modules)
    assert not leaves & {"lm_head", "gate", "router", "experts", "base_layer"}
    if family in ("mixtral", "qwen3_moe", "gpt_oss"):
        assert leaves == ATTENTION


@pytest.mark.quick
def test_a_dense_model_gets_what_pefts_all_linear_gives():
    from peft import LoraConfig, get_peft_model

    for family in ("llama", "gpt2"):
        theirs = get_peft_model(tiny(family), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        assert adapted(put(tiny(family))) == adapted(theirs)


def test_experts_can_be_named_in_one_layer_only():
    model = put(tiny("mixtral"), ("model.layers.1.mlp.experts.down_proj",))
    assert adapted(model) == {"base_model.model.model.layers.1.mlp.experts"}


def test_every_unknown_name_is_refused_with_those_that_are_there():
    with pytest.raises(RecipeError) as refusal:
        put(tiny("mixtral"), ("q_proj", "w1", "query", "embed_tokens"))
    told = str(refusal.value)
    assert told.startswith("adapter.targets: ['w1', 'query', 'embed_tokens'] match no layer of the base; choose from [")
    assert "'q_proj'" in told and "'mlp.experts.gate_up_proj'" in told


def test_what_peft_cannot_adapt_is_told_in_its_words():
    with pytest.raises(RecipeError, match=r"adapter.targets: peft cannot adapt .*dropout"):
        put(tiny("mixtral"), ("experts.down_proj",), dropout=0.1)


def test_a_name_that_peft_moves_to_the_experts_is_refused():
    # a shared expert's layers have the names that all experts had in transformers 4
    with pytest.raises(RecipeError, match=r"peft adapts mlp\.experts instead of mlp\.shared_expert\.down_proj"):
        put(tiny("qwen3_next"), ("in_proj_qkvz", "shared_expert.down_proj"))


TEXT = SMALL | {"head_dim": 8, "max_position_embeddings": 512}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}


def sighted(vocabulary=64):
    """A tiny Gemma 3 with its vision tower, whose layers are also called q_proj and so on."""
    config = AutoConfig.for_model("gemma3", text_config=TEXT | {"vocab_size": vocabulary}, vision_config=VISION)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj"), ("*.layers.*",), ("layers.1.mlp.*",)])
def test_layers_that_text_does_not_reach_get_no_adapter(targets):
    base = sighted()
    with_gradient = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    base(torch.arange(20)[None]).logits.sum().backward()
    with_gradient = {name for name in with_gradient if base.get_submodule(name).weight.grad is not None}
    found = find_targets(base, Adapter(targets=targets))
    assert found.modules and with_gradient.issuperset(found.modules)
    assert targets != "all-linear" or with_gradient == {*found.modules, "lm_head"}
    assert found.towers == ("model.vision_tower",)
    assert any("model.vision_tower get no adapter" in note for note in found.notes)


def test_targets_that_are_only_in_a_tower_are_refused():
    with pytest.raises(RecipeError, match=r"\['fc1'\] match only layers that text does not reach \(model.vision_tower"):
        find_targets(sighted(), Adapter(targets=("fc1",)))


def test_check_names_the_tower_and_the_run_trains_without_it(recipe_file, tmp_path, base_folder, capsys):
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    sighted(106).save_pretrained(folder)
    recipe = load_recipe(recipe_file, [f"base.repo={folder}", "train.steps=2"])
    report = check(recipe)
    assert not report.problems and any("model.vision_tower get no adapter" in note for note in report.notes)
    loop.train(recipe, tmp_path / "run")
    assert "model.vision_tower get no adapter" in " ".join(capsys.readouterr().out.split())
    (problem,) = check(load_recipe(recipe_file, [f"base.repo={folder}", "adapter.targets=[fc1]"])).problems
    assert "match only layers that text does not reach" in problem


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("layers.1.*",), 7),
        (("*.q_proj", "layers.0.mlp.*_proj"), 2 + 3),
        (("[qk]_proj",), 4),
        (("lm_head", "o_proj"), 3),
    ],
)
def test_targets_take_patterns_and_check_counts_them_as_the_run_does(targets, count, recipe_file, tmp_path, jobs):
    recipe = load_recipe(recipe_file, ["train.steps=1", f"adapter.targets={json.dumps(targets)}"])
    report = check(recipe)
    loop.train(recipe, tmp_path / "run")
    (job,) = jobs
    assert not report.problems and len(adapted(job.model)) == count
    assert report.estimate.memory.trainable_parameters == sum(
        tensor.numel() for tensor in job.model.parameters() if tensor.requires_grad
    )


def test_the_run_says_what_all_linear_leaves_out(recipe_file, tmp_path, base_folder, capsys):
    from test_families import save_family

    folder = save_family(tmp_path / "base", "mixtral", base_folder)
    loop.train(load_recipe(recipe_file, [f"base.repo={folder}", "train.steps=1"]), tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    assert "all-linear leaves out mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate; routers stay" in told
