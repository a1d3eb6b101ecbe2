"""An adapter goes where it was asked to go: all-linear hits no head, router or expert, and says what it leaves."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kit.errors import RecipeError
from lora_kit.model.adapter import inject
from lora_kit.model.targets import find_targets
from lora_kit.recipe.schema import Adapter

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


def test_the_run_says_what_all_linear_leaves_out(recipe_file, tmp_path, base_folder, capsys):
    from test_families import save_family

    from lora_kit.recipe.load import load_recipe
    from lora_kit.training import loop

    folder = save_family(tmp_path / "base", "mixtral", base_folder)
    loop.train(load_recipe(recipe_file, [f"base.repo={folder}", "train.steps=1"]), tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    assert "all-linear leaves out mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate; routers stay" in told
