"""Which parts of the fast path a model uses, and what is not computed at all."""

import json

import pytest
import torch
from conftest import without_c
from plain_loop import relative
from test_families import EXPERTS_BY_NAME, save_family
from test_kernels import norm_of, rows, same
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo_rotary

from lora_kit.errors import ContractError
from lora_kit.kernels import fusing, lora, mlp, norm
from lora_kit.kernels.attention import inner_of
from lora_kit.kernels.cpu.allocator import LARGE
from lora_kit.kernels.limits import ROW_MULTIPLE
from lora_kit.kernels.rotary import rotated
from lora_kit.model.base import load_base
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop
from lora_kit.training.objectives.sft import Sft


class OtherRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states).clamp(-2, 2)


class OtherMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


def test_a_family_that_computes_otherwise_keeps_its_own_norm_and_mlp(recipe_file, tmp_path, monkeypatch, jobs):
    def other(*arguments):
        base = load_base(*arguments)
        for module in base.modules():
            for known, one in ((LlamaRMSNorm, OtherRMSNorm), (LlamaMLP, OtherMLP)):
                module.__class__ = one if type(module) is known else type(module)
        return base

    monkeypatch.setattr("lora_kit.training.setup.load_base", other)
    loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run")
    assert jobs[0].facts.resolved.kernels == ("lora", "rotary", "loss")


def test_only_the_modules_that_differ_keep_their_own_code():
    model = nn.ModuleList([norm_of(OtherRMSNorm), norm_of(LlamaRMSNorm)])
    assert fusing._fuse_norms(model)
    assert ["forward" in vars(one) and one.forward.__name__ for one in model] == ["forward", "forward"]
    x = rows(3, 24) * 20
    same([one(x) for one in model], [type(one).forward(one, x) for one in model])


@pytest.mark.parametrize("turn", [olmo_rotary, llama_rotary])
def test_angles_in_fp32_are_left_to_the_family_s_own_function(turn):
    queries, angles = rows(1, 3, 5, 16, dtype=torch.bfloat16), rows(1, 5, 16)
    given = (queries, queries, angles.cos(), angles.sin())
    for ours, theirs in zip(rotated(turn, *given), turn(*given), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_the_fast_path_is_printed_once_and_kept_at_a_resume(recipe_file, tmp_path, capsys, monkeypatch):
    loop.train(load_recipe(recipe_file, ["train.steps=2"]), tmp_path / "run")
    printed = capsys.readouterr()
    said = [line for line in (printed.out + printed.err).splitlines() if "fast path:" in line]
    assert len(said) == 1 and said[0].endswith(
        "fast path: fused adapters (14 of 14), fused gated MLP, fused norms, fused rotary positions, "
        "loss at trained positions, last MLP at trained positions"
    )
    monkeypatch.setattr(fusing, "_makes_the_logits", lambda *_: pytest.fail("chosen again"))
    run = loop.train(load_recipe(recipe_file, ["train.steps=3"]), tmp_path / "run", accept=["train.steps"])
    kernels = json.loads((run.latest / "manifest.json").read_text())["resolved"]["kernels"]
    assert kernels == ["lora", "mlp", "norm", "rotary", "loss", "last mlp"]


def test_turning_the_fast_path_off_is_a_change_to_accept(recipe_file, tmp_path):
    loop.train(load_recipe(recipe_file, ["train.steps=2"]), tmp_path / "run")
    slow = load_recipe(recipe_file, ["train.steps=3", "train.kernels=none"])
    with pytest.raises(ContractError, match=r"accept +train\.kernels"):
        loop.train(slow, tmp_path / "run", accept=["train.steps"])
    run = loop.train(slow, tmp_path / "run", accept=["train.steps", "train.kernels"])
    manifest = json.loads((run.latest / "manifest.json").read_text())
    assert manifest["resolved"]["kernels"] == [] and manifest["claim"]["level"] == "rounding"


def test_layers_that_peft_computes_are_named(recipe_file, tmp_path, base_folder, jobs):
    folder = save_family(tmp_path / "base", "mixtral", base_folder)
    changes = [f"base.repo={folder}", f"adapter.targets={EXPERTS_BY_NAME}", "adapter.dropout=0", "train.steps=1"]
    loop.train(load_recipe(recipe_file, changes), tmp_path / "run")
    said = fusing.about(jobs[0].model, jobs[0].facts.resolved.kernels)
    assert said.startswith("fused adapters (2 of 6; experts by peft)")


# what is not needed


def test_no_gradient_is_computed_below_the_first_adapted_layer(recipe_file, tmp_path, monkeypatch):
    wanted, found = [], []
    for where in (lora, mlp):
        backward = where.project_backward
        monkeypatch.setattr(
            where,
            "project_backward",
            lambda *a, to_input, own=backward: (wanted.append(to_input), own(*a, to_input=to_input))[1],
        )
    normal = norm.RmsNorm.backward
    monkeypatch.setattr(norm.RmsNorm, "backward", lambda ctx, *of: (found.append(0), normal(ctx, *of))[1])

    def watched(*arguments):
        base = load_base(*arguments)
        base.get_input_embeddings().register_forward_hook(lambda module, given, x: wanted.append(x.requires_grad))
        return base

    monkeypatch.setattr("lora_kit.training.setup.load_base", watched)
    changes = ["train.steps=1", "train.batch_size=1", "train.micro_batch_tokens=256"]
    loop.train(load_recipe(recipe_file, changes), tmp_path / "run")
    layers = 2
    assert wanted.count(True) == 4 * layers - 1 and not wanted[-1]  # q k v of the first layer, which comes last
    assert len(found) == 2 * layers  # all norms but the first


@pytest.mark.parametrize("twice", [False, True])
def test_the_last_mlp_is_computed_where_tokens_are_trained_and_nothing_else_changes(
    twice, recipe_file, tmp_path, captured, monkeypatch
):
    seen, batches, own, loss_of = [], [], mlp.GatedMlp.forward, Sft.loss
    monkeypatch.setattr(mlp.GatedMlp, "forward", lambda ctx, x, *rest: (seen.append(len(x)), own(ctx, x, *rest))[1])
    monkeypatch.setattr(Sft, "loss", lambda *given: (batches.append(given[2]), loss_of(*given))[1])
    changes = ["train.steps=1", "adapter.dropout=0", f"train.activation_checkpointing={str(twice).lower()}"]
    loop.train(load_recipe(recipe_file, changes), tmp_path / "narrow")
    expected = []
    for one in batches:
        whole, narrow = (-(-many // ROW_MULTIPLE) * ROW_MULTIPLE for many in (one.ids.size, one.weight))
        expected += [whole, narrow] + [narrow, whole] * twice
    assert seen[-len(expected) :] == expected and batches[0].weight < batches[0].ids.size
    monkeypatch.setattr(fusing, "_narrow_last_mlp", lambda *_: False)
    loop.train(load_recipe(recipe_file, changes), tmp_path / "whole")
    (_, ours), (_, whole) = captured
    assert relative(ours, whole) < 1e-6


def test_calls_that_ask_for_no_rows_get_all_of_them(recipe_file, tmp_path, jobs):
    loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run")
    model, last = jobs[0].model.eval(), fusing.last_mlp_of(jobs[0].model)
    x = rows(6, 32)
    whole = last(x)
    with mlp.at_rows(last, torch.tensor([1, 4])):
        narrow = last(x)
    same([narrow[[1, 4]]], [whole[[1, 4]]])
    assert not narrow[[0, 2, 3, 5]].any()
    assert torch.equal(last(x), whole)
    assert mlp.fused(last) and last is inner_of(model).base_model.layers[-1].mlp


@pytest.mark.parametrize(
    ("changes", "all_pooled"),
    [
        ([], True),
        (["base.dtype=float32"], False),
        (["adapter.dropout=0.1"], False),
        (["adapter.targets=[q_proj, v_proj]"], False),
        (["train.kernels=none"], False),
    ],
)
def test_large_tensors_go_back_to_the_system_where_nearly_all_memory_is_pooled(
    changes, all_pooled, recipe_file, tmp_path, monkeypatch
):
    """Elsewhere each large tensor would be new memory at every step, one page fault after another."""
    calls, plain = [], ["train.steps=1", "base.dtype=bfloat16", "adapter.dropout=0"]
    monkeypatch.setattr("lora_kit.training.choices.keep_freed_memory", lambda **below: calls.append(below))
    loop.train(load_recipe(recipe_file, [*plain, *changes]), tmp_path / "run")
    assert calls == ([{"below": LARGE}] if all_pooled and not without_c() else [])
