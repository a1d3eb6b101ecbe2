"""The adapter is PEFT's in every respect, and ours to hold in four flat buffers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from lora_kit.errors import CheckpointError
from lora_kit.kernels.attention import own_attention
from lora_kit.model.adapter import initial_a, inject, saved_config
from lora_kit.model.state import flatten
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Adapter
from lora_kit.runs.layout import State, cut
from lora_kit.training import loop


def fresh(base_folder, **changes):
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    settings = Adapter(**{"rank": 4, "alpha": 8} | changes)
    return inject(base, settings, seed=0, name="some/base", revision="abc")


@pytest.mark.quick
def test_only_the_adapter_trains_and_its_names_are_pefts(base_folder):
    model = fresh(base_folder)
    theirs = get_peft_model_state_dict(model)
    state = flatten(model)
    assert set(state.names) == set(theirs)
    assert state.size == sum(tensor.numel() for tensor in theirs.values())


def test_a_fresh_adapter_changes_nothing(base_folder):
    model = fresh(base_folder).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base)


def named(state, flat=None):
    """The weights, or a buffer like them, by PEFT's names."""
    return cut((state.weights if flat is None else flat).numpy(), state.shapes)


def saved(state):
    """What a checkpoint of the state holds."""
    moments = zip(state.layout.moments, state.moments, strict=True)
    return State(named(state), {name: moment.numpy() for name, moment in moments}, {})


def test_the_start_depends_on_seed_and_name_alone(base_folder):
    torch.manual_seed(1)
    first = named(flatten(fresh(base_folder)))
    torch.manual_seed(2)
    second = named(flatten(fresh(base_folder)))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    in_layers = [array for name, array in first.items() if "q_proj.lora_A" in name]
    assert not np.array_equal(*in_layers[:2])


def test_the_start_has_the_distribution_of_pefts():
    ours = initial_a(torch.empty(64, 1000), seed=3)
    reference = torch.nn.init.kaiming_uniform_(torch.empty(64, 1000), a=5**0.5)
    assert abs(ours.std() / reference.std() - 1) < 0.02
    assert ours.abs().max() <= reference.abs().max() * 1.01


def test_training_moves_the_buffers_and_the_model_together(base_folder):
    model = fresh(base_folder)
    state = flatten(model)
    model(torch.arange(20)[None]).logits.sum().backward()
    parameter = state.parameters[-1]  # a B; the gradient of A is zero as long as B is zero
    assert parameter.grad.abs().sum() > 0
    assert torch.equal(state.gradient[: state.size], torch.cat([p.grad.reshape(-1) for p in state.parameters]))
    state.weights.add_(1.0)
    assert all((parameter - 1.0).abs().max() < 2 for parameter in state.parameters)
    state.assert_views()


def test_a_replaced_parameter_is_noticed(base_folder):
    model = fresh(base_folder)
    state = flatten(model)
    state.parameters[0].data = state.parameters[0].data.clone()
    with pytest.raises(AssertionError, match="left the flat buffer"):
        state.assert_views()


def test_saved_arrays_load_back_bit_for_bit(base_folder):
    state = flatten(fresh(base_folder))
    for tensor in (state.weights, *state.moments):
        tensor.copy_(torch.randn_like(tensor))
    other = flatten(fresh(base_folder))
    other.load(saved(state))
    assert torch.equal(other.weights, state.weights)
    assert all(torch.equal(a, b) for a, b in zip(other.moments, state.moments, strict=True))


def test_tensors_of_another_adapter_are_refused(base_folder):
    state = flatten(fresh(base_folder))
    whole, name = saved(state), state.names[0]
    arrays = whole.weights
    with pytest.raises(CheckpointError, match=r"1 tensor names differ .*lora_A"):
        state.load(replace(whole, weights={key: value for key, value in arrays.items() if key != name}))
    with pytest.raises(CheckpointError, match="has shape"):
        state.load(replace(whole, weights=arrays | {name: np.zeros((1, 1), np.float32)}))


def test_the_configuration_is_stable_and_names_the_base(base_folder):
    first, second = (saved_config(fresh(base_folder)) for _ in range(2))
    assert first == second and list(first) == sorted(first)
    assert (first["base_model_name_or_path"], first["revision"], first["inference_mode"]) == (
        "some/base",
        "abc",
        True,
    )
    assert first["target_modules"] == sorted(first["target_modules"])


def test_a_checkpoint_is_a_peft_adapter_with_the_same_logits(recipe_file, base_folder, tmp_path, monkeypatch):
    jobs = []
    make_job = loop.make_job
    monkeypatch.setattr(loop, "make_job", lambda *a, **k: jobs.append(make_job(*a, **k)) or jobs[-1])
    run = loop.train(load_recipe(recipe_file), tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(run.latest)).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad(), own_attention(jobs[0].model):
        ours, theirs = jobs[0].model.eval()(ids).logits, loaded(ids).logits
        with loaded.disable_adapter():
            base_logits = loaded(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (theirs - base_logits).abs().max() > 0.1, "the adapter learned nothing, so this proves nothing"


def test_saving_through_peft_gives_the_same_tensors(recipe_file, tmp_path, monkeypatch):
    jobs = []
    make_job = loop.make_job
    monkeypatch.setattr(loop, "make_job", lambda *a, **k: jobs.append(make_job(*a, **k)) or jobs[-1])
    run = loop.train(load_recipe(recipe_file, ["train.steps=2"]), tmp_path / "run")
    jobs[0].model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(run.latest / "adapter_model.safetensors"),
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"),
    )
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_takes_twelve_bytes_a_parameter_and_little_more(recipe_file, tmp_path):
    run = loop.train(load_recipe(recipe_file, ["train.steps=2", "adapter.rank=64"]), tmp_path / "run")
    arrays = load_file(run.latest / "adapter_model.safetensors")
    parameters = sum(array.size for array in arrays.values())
    total = sum(path.stat().st_size for path in run.latest.iterdir())
    assert total <= 12 * parameters + 400 * len(arrays) + 20_000
