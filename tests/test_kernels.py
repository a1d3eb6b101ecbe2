"""Every kernel computes what plain PyTorch does, forward and back: to rounding in fp32, as near as PEFT in bf16."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_loop import relative
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from lora_kit.kernels import fusing, lora, loss, mlp, norm, plain
from lora_kit.kernels.attention import SEGMENT, use_attention
from lora_kit.kernels.dispatch import backend_of
from lora_kit.kernels.limits import GATED_MLP
from lora_kit.model.probe import probe_batch
from lora_kit.training.objectives.sft import Sft

EXACT = 1e-5
WORSE = 1.25  # than PEFT, from the truth
ROUNDING = 2**-7  # of adapters' gradients in bf16, which PEFT takes in fp32; see test_precision for whole models
GROUP = ("q_proj", "k_proj", "v_proj")


class Layers(nn.Module):
    """q, k and v of different widths, a bias here and there, and a Conv1D."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(24, 32, bias=True), nn.Linear(24, 8, bias=False)
        self.v_proj, self.c_attn = nn.Linear(24, 16, bias=True), Conv1D(40, 24)

    def forward(self, x, names=(*GROUP, "c_attn")):
        return torch.cat([self.get_submodule(name)(x) for name in names], dim=-1)


def adapted(model, *, targets=(*GROUP, "c_attn"), dropout=0.0, seed=0, device="cpu"):
    """Return a model with adapters of random weights."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=list(targets))
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.2
    return model.to(device).train()


def layers(**settings):
    torch.manual_seed(1)
    return adapted(Layers(), **settings)


def fused(model):
    model = copy.deepcopy(model)
    assert fusing._fuse_adapters(model)
    return model


def outcome(model, x, *, weights_seed=2, **named):
    """The output, and the gradients of the input (where it has one) and of all that is trained, as one vector each."""
    model.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    output = model(x, **named)
    weights = rows(*output.shape, grad=False, seed=weights_seed, device=output.device)
    (output.double() * weights.double()).sum().backward()
    trained = [one.grad for one in model.parameters() if one.requires_grad and one.grad is not None]
    found = [output.detach(), *([x.grad.flatten()] if x.requires_grad else [])]
    found += [torch.cat([one.flatten() for one in trained])] if trained else []
    return [one.double() for one in found]


def rows(*shape, dtype=torch.float32, grad=True, seed=3, device="cpu"):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype).requires_grad_(grad)


def same(ours, theirs, tolerance=EXACT):
    assert len(ours) == len(theirs)
    assert all(relative(*(one.detach() for one in pair)) < tolerance for pair in zip(ours, theirs, strict=True))


def in_bf16(model, fuse, x):
    """Return the errors of output and input gradient in units of PEFT's, and the error of the adapters' gradients."""
    model = model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() / 4
    exact, ours = copy.deepcopy(model).double(), fuse(model)
    far, adapters = [], [0.0]
    for seed in range(4):
        x = rows(*x.shape, dtype=torch.bfloat16, seed=seed, device=x.device)
        truth, mine, theirs = outcome(exact, x.double()), outcome(ours, x), outcome(model, x)
        adapters += [relative(*pair) for pair in zip(mine[2:], truth[2:], strict=True)]
        far.append([[float((one[at] - truth[at]).norm()) for one in (mine, theirs)] for at in (0, 1)])
    mine, theirs = torch.tensor(far).mean(0).unbind(-1)
    return float((mine / theirs).max()), max(adapters)


# adapters


@pytest.mark.parametrize("shape", [(9, 24), (2, 9, 24), (1, 24)])
@pytest.mark.parametrize("grad", [True, False])
def test_adapted_layers_are_those_of_peft(shape, grad, device):
    model, x = layers(device=device), rows(*shape, grad=grad, device=device)
    same(outcome(fused(model), x), outcome(model, x))


def test_adapted_layers_in_bf16_are_as_near_the_truth(device):
    worse, adapters = in_bf16(layers(device=device), fused, rows(64, 24, device=device))
    assert worse < WORSE and adapters < ROUNDING


@pytest.mark.quick
def test_only_some_of_a_group_may_be_adapted_or_called(device):
    model, x = layers(targets=["q_proj", "v_proj"], device=device), rows(5, 24, device=device)
    same(outcome(fused(model), x), outcome(model, x))
    model = layers(device=device)
    ours = fused(model)
    for names in (("k_proj",), ("v_proj", "q_proj"), ("q_proj", "q_proj", "k_proj")):
        same(outcome(ours, x, names=names), outcome(model, x, names=names))
    assert ours.base_model.model.v_proj.lora_A["default"].weight.grad is None  # nobody read it: as with peft


def test_a_sibling_that_is_called_with_another_input_computes_with_that():
    model, x, other = layers(), rows(5, 24), rows(5, 24, seed=9)
    ours = fused(model)
    for one in (ours, model):
        inner = one.base_model.model
        one.found = torch.cat([inner.q_proj(x), inner.k_proj(other), inner.v_proj(x)], dim=-1)
    same([ours.found], [model.found])


def test_an_output_computed_without_gradient_is_not_used_for_training():
    inner, x = fused(layers()).base_model.model, rows(5, 24)
    with torch.no_grad():
        inner.q_proj(x)
    assert inner.k_proj(x).requires_grad


def test_adapters_that_are_off_merged_or_not_plain_are_left_to_peft():
    model, x = layers(), rows(5, 24)
    ours = fused(model)
    with ours.disable_adapter(), model.disable_adapter():
        same([ours(x)], [model(x)])
        assert not lora.fusable(ours.base_model.model.q_proj)
    ours.merge_adapter()
    same([ours(x)], [model(x)])
    ours.unmerge_adapter()
    same(outcome(ours, x), outcome(model, x))
    torch.manual_seed(0)
    dora = get_peft_model(Layers(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, lora_dropout=0.1))
    assert not lora.fusable(dora.base_model.model.q_proj)


def test_a_layer_that_only_looks_linear_is_left_to_peft():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(24, 8))
    assert not lora.fusable(adapted(model, targets=["0"]).base_model.model[0])


def test_siblings_of_different_inputs_are_computed_apart():
    model = nn.ModuleDict({"q_proj": nn.Linear(24, 8), "k_proj": nn.Linear(12, 8)})
    parts = fused(adapted(model, targets=["q_proj", "k_proj"])).base_model.model
    assert parts["q_proj"](rows(5, 24)).shape == parts["k_proj"](rows(5, 12)).shape == (5, 8)


def test_dropout_is_drawn_anew_keeps_the_mean_and_its_gradient_is_that_of_the_drawn_mask(device):
    model = layers(dropout=0.3, device=device)
    ours, x = fused(model).double(), rows(6, 24, device=device).double()
    inputs = [x, *(one for one in ours.parameters() if one.requires_grad)]

    def drawn(*_):
        torch.manual_seed(5)
        return ours(x)

    assert torch.autograd.gradcheck(drawn, inputs, eps=1e-6, atol=1e-5)
    with torch.no_grad():
        assert not torch.equal(ours(x), ours(x))
        several = torch.stack([ours(x) for _ in range(1000)])
        expected = ours.eval()(x)
    spread = several.std(0) / 1000**0.5
    assert ((several.mean(0) - expected).abs() < 6 * spread + 1e-9).all()
    assert relative(ours(x), model.double().eval()(x)) < EXACT


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantised_base_computes_with_its_dequantised_weights(how, device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = Layers()
    few = copy.deepcopy(plain)
    for name in GROUP:
        old = plain.get_submodule(name)
        kind = bitsandbytes.nn.Linear4bit if how == "nf4" else bitsandbytes.nn.Linear8bitLt
        more = {"quant_type": "nf4"} if how == "nf4" else {"has_fp16_weights": False}
        new = kind(old.in_features, old.out_features, bias=old.bias is not None, **more)
        new.load_state_dict(old.state_dict())
        setattr(few, name, new.to(device))
    plain = plain.to(device)
    ours, x = fused(adapted(few, device=device)), rows(7, 24, device=device)
    for name in GROUP:
        one = lora.adapted_linear(ours.base_model.model.get_submodule(name))
        plain.get_submodule(name).weight.data = one.weight(torch.float32)
        assert relative(one.weight(torch.float32), plain.get_submodule(name).weight) < 0.2
    same(outcome(ours, x), outcome(adapted(plain, device=device), x))


# the gated MLP


def gated_mlp(kind, activation, *, dropout=0.0, seed=0, device="cpu"):
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=24, intermediate_size=40, hidden_act=activation, num_attention_heads=4)
    config.hidden_activation = activation
    return adapted(kind(config), targets=GATED_MLP, dropout=dropout, device=device)


def fused_mlp(activation, *, adapters=True):
    def fuse(model):
        model = copy.deepcopy(model)
        if adapters:
            fusing._fuse_adapters(model)
        mlp.fuse(model.base_model.model, activation)
        return model

    return fuse


MLPS = [(LlamaMLP, "silu"), (GemmaMLP, "gelu_pytorch_tanh")]


@pytest.mark.parametrize(("kind", "activation"), MLPS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_gated_mlp_is_that_of_transformers(kind, activation, grad, device):
    model, x = gated_mlp(kind, activation, device=device), rows(2, 9, 24, grad=grad, device=device)
    same(outcome(fused_mlp(activation)(model), x), outcome(model, x))


@pytest.mark.parametrize(("kind", "activation"), MLPS)
def test_a_gated_mlp_in_bf16_is_as_near_the_truth(kind, activation, device, way):
    model, x = gated_mlp(kind, activation, device=device), rows(64, 24, device=device)
    worse, adapters = in_bf16(model, fused_mlp(activation), x)
    assert worse < WORSE and adapters < ROUNDING


def test_the_gradient_of_a_gated_mlp_with_dropout_is_that_of_the_drawn_masks(device):
    ours = fused_mlp("silu")(gated_mlp(LlamaMLP, "silu", dropout=0.3, device=device)).double()
    x = rows(4, 24, device=device).double()

    def drawn(*_):
        torch.manual_seed(5)
        return ours(x)

    inputs = [x, *(one for one in ours.parameters() if one.requires_grad)]
    assert torch.autograd.gradcheck(drawn, inputs, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computing_again_in_the_backward_pass_changes_no_bit(dropout, device):
    ours = fused_mlp("silu")(gated_mlp(LlamaMLP, "silu", dropout=dropout, device=device))
    x = rows(4, 24, device=device)
    again = nn.Module()
    again.inner = ours
    again.forward = lambda x: torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    found = []
    for one in (ours, again):
        torch.manual_seed(5)
        found.append(outcome(one, x))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# norms


def norm_of(kind, width=24, device="cpu"):
    one = kind(width)
    one.weight.data = rows(width, grad=False, seed=7) * 0.3 + (kind is LlamaRMSNorm)
    return one.to(device).requires_grad_(False)


def fused_norm(model):
    model = copy.deepcopy(model)
    norm.fuse(model, gemma=isinstance(model, GemmaRMSNorm))
    return model


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("shape", [(2, 9, 24), (1, 5, 4, 24), (7, 24)])
def test_norms_are_those_of_transformers_and_leave_their_input_alone(kind, shape, monkeypatch, device):
    monkeypatch.setattr(plain, "ELEMENTS_IN_CACHE", 100)  # several portions
    model, x = norm_of(kind, device=device), rows(*shape, device=device)
    before = x.detach().clone()
    same(outcome(fused_norm(model), x), outcome(model, x))
    assert torch.equal(x, before)
    turned = rows(*shape[::-1][1:], 24, grad=False, device=device).transpose(0, -2) if len(shape) > 2 else x
    same([fused_norm(model)(turned)], [model(turned)])


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_norms_in_bf16_are_as_near_the_truth(kind, device, way):
    assert in_bf16(norm_of(kind, 64, device), fused_norm, rows(32, 64, device=device))[0] < WORSE


def test_a_norm_in_another_precision_than_its_input_keeps_its_own_forward():
    model = norm_of(LlamaRMSNorm)
    x = rows(3, 24, dtype=torch.bfloat16)
    assert fused_norm(model)(x).dtype == model(x).dtype == torch.float32


# the loss


HEADS = {"plain": {}, "bias": {"bias": True}, "scaled": {"scale": 0.25}, "capped": {"cap": 3.0, "scale": 0.5}}


def head_and_rows(case, many, dtype=torch.float32, vocabulary=50, device="cpu"):
    case, fixed = dict(HEADS[case]), {"grad": False, "dtype": dtype, "device": device}
    bias = rows(vocabulary, **fixed) if case.pop("bias", False) else None
    head = loss.Head(linear_of(rows(vocabulary, 16, **fixed), bias), **case)
    labels = torch.randint(vocabulary, (many,), generator=torch.Generator().manual_seed(4)).to(device)
    return head, rows(many, 16, dtype=dtype, seed=5, device=device), labels


def linear_of(weight, bias):
    layer = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return layer


def loss_by_torch(hidden, head, labels):
    logits = functional.linear(hidden, head.weight, head.bias) * head.scale
    logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, labels, reduction="sum")


def summed(hidden, head, labels):
    return loss.summed_cross_entropy(hidden, head, labels, [len(labels)])[0]


def loss_and_gradient(hidden, compute):
    hidden = hidden.detach().requires_grad_()
    total = compute(hidden)
    (total * 0.5).backward()
    return [total.detach().double(), hidden.grad.double()]


@pytest.mark.parametrize("many", [1, 16, 39])
@pytest.mark.parametrize("case", HEADS)
def test_the_loss_in_pieces_is_the_cross_entropy_of_all_logits(case, many, monkeypatch, device):
    monkeypatch.setitem(loss.LOGITS, device.type, 50 * 16)  # pieces of 16 rows
    head, hidden, labels = head_and_rows(case, many, device=device)
    ours = loss_and_gradient(hidden, lambda x: summed(x, head, labels))
    same(ours, loss_and_gradient(hidden, lambda x: loss_by_torch(x, head, labels)))
    with torch.no_grad():
        assert summed(hidden, head, labels) == ours[0]


@pytest.mark.parametrize("case", HEADS)
def test_each_group_of_rows_has_its_own_sum_and_its_own_factor_in_the_gradient(case, monkeypatch, device):
    monkeypatch.setitem(loss.LOGITS, device.type, 50 * 16)  # pieces of 16 rows; groups end inside, at and after them
    head, hidden, labels = head_and_rows(case, 39, device=device)
    sizes, factors = [5, 0, 11, 20, 3], torch.tensor([2.0, 7.0, -1.0, 0.25, 3.0], device=device)

    def by_torch(x):
        groups = zip(x.split(sizes), labels.split(sizes), factors, strict=True)
        return sum(factor * loss_by_torch(rows, head, label) for rows, label, factor in groups)

    ours = loss_and_gradient(hidden, lambda x: loss.summed_cross_entropy(x, head, labels, sizes) @ factors)
    same(ours, loss_and_gradient(hidden, by_torch))


@pytest.mark.parametrize("sure", [1.0, 6.0])
@pytest.mark.parametrize("case", HEADS)
def test_the_loss_in_bf16_is_as_near_the_truth_also_where_the_model_is_sure(case, sure, device):
    head, hidden, _ = head_and_rows(case, 300, torch.bfloat16, device=device)
    hidden = (hidden.detach() * sure).to(torch.bfloat16)
    labels = head.logits(hidden).argmax(-1)
    bias = head.bias if head.bias is None else head.bias.double()
    whole = loss.Head(linear_of(head.weight.double(), bias), head.scale, head.cap)
    truth = loss_and_gradient(hidden.double(), lambda x: loss_by_torch(x, whole, labels))
    ours = loss_and_gradient(hidden, lambda x: summed(x, head, labels))
    theirs = loss_and_gradient(hidden, lambda x: loss_by_torch(x, head, labels))
    assert (ours[1] - truth[1]).norm() < WORSE * (theirs[1] - truth[1]).norm()
    assert relative(ours[0], theirs[0]) < EXACT


def test_nothing_to_train_is_a_loss_of_nothing(device):
    head, hidden, labels = head_and_rows("plain", 0, device=device)
    total, gradient = loss_and_gradient(hidden, lambda x: summed(x, head, labels))
    assert total == 0 and gradient.shape == (0, 16)


# all of them, again


REPLAYED = {
    "adapters": lambda device: (fused(layers(dropout=0.3, device=device)), 24),
    "mlp": lambda device: (fused_mlp("silu")(gated_mlp(LlamaMLP, "silu", dropout=0.3, device=device)), 24),
    "gemma's mlp": lambda device: (
        fused_mlp("gelu_pytorch_tanh")(gated_mlp(GemmaMLP, "gelu_pytorch_tanh", device=device)),
        24,
    ),
    "norm": lambda device: (fused_norm(norm_of(LlamaRMSNorm, 64, device)), 64),
    "gemma's norm": lambda device: (fused_norm(norm_of(GemmaRMSNorm, 64, device)), 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", REPLAYED)
def test_a_replay_has_the_same_bits(kernel, dtype, device):
    model, width = REPLAYED[kernel](device)
    model, found = model.to(dtype), []
    for _ in range(3):
        torch.manual_seed(5)
        found.append(outcome(model, rows(700, width, dtype=dtype, device=device)))
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HEADS)
def test_the_loss_of_a_replay_has_the_same_bits(case, dtype, device):
    head, hidden, labels = head_and_rows(case, 700, dtype, vocabulary=1000, device=device)
    found = [loss_and_gradient(hidden, lambda x: summed(x, head, labels)) for _ in range(3)]
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))


class Rows(TorchDispatchMode):
    """The dimensions of every product."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, kinds, given=(), named=None):
        if function in PRODUCTS:
            self.found.update(size for one in given if torch.is_tensor(one) for size in one.shape)
        return function(*given, **(named or {}))


PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "addmm_")} | {torch.ops.aten.mm.out}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_on_a_cpu_have_few_numbers_of_rows(dtype):
    """oneDNN keeps code for each number of rows; where products are in C, oneDNN computes none."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=96
    )
    model = adapted(LlamaForCausalLM(config), targets=[*GROUP, "o_proj", *GATED_MLP]).to(dtype)
    use_attention(model, SEGMENT)
    fusing.use_kernels(model, ["lora", "mlp", "norm", "rotary", "loss", "last mlp"])
    with Rows() as rows:
        for lengths in ((5, 9), (31,), (64, 1), (40, 3, 60), (33,)):
            batch = probe_batch([np.arange(length) for length in lengths])
            Sft().loss(model, batch, torch.device("cpu")).total.backward()
    ranks = {4, 8, 12}  # of one adapter, of two, of three
    in_c = backend_of(torch.empty(32, 1, dtype=dtype)).pools_memory
    assert rows.found == set() if in_c else {size for size in rows.found if size % 32} == ranks
