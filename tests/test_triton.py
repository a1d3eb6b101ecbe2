"""The kernels for GPUs against the same in plain PyTorch: by Triton's interpreter where there is no GPU."""

import pytest
import torch
from plain_loop import relative
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lora_kit import kernels, trainer
from lora_kit.kernels import attention, mlp, norm, rotary
from lora_kit.kernels.attention import Segments, visible
from lora_kit.kernels.mlp import ACTIVATIONS
from lora_kit.recipe import load_recipe

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
from lora_kit.kernels import gpu, gpu_attention  # isort: skip  (its own errors must not pass for a missing Triton)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # which sigmoid is made for
pytestmark = [overflows, *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # the interpreter cuts, a GPU rounds
IN_DOTS = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]  # which it does not know in bf16


def drawn(dtype, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert relative(one.float(), other.float()) < TOLERANCE[one.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("shape", [(37, 64), (5, 100), (1, 5000)])
def test_a_norm_and_its_gradient(dtype, gemma, shape):
    x, weight, above = drawn(dtype, *shape), drawn(dtype, shape[1], seed=1), drawn(dtype, *shape, seed=2)
    plain = x.float().requires_grad_()
    expected = torch.nn.functional.rms_norm(plain, shape[1:], eps=1e-5) * (weight.float() + gemma)
    (of_x,) = torch.autograd.grad(expected, plain, above.float())
    output, inverse = gpu.norm(x, weight, 1e-5, gemma=gemma)
    near([output, gpu.norm_back(above, x, weight, inverse, gemma=gemma)], [expected.to(dtype), of_x.to(dtype)])


@pytest.mark.parametrize("dtype", IN_DOTS)
@pytest.mark.parametrize("ranks", [(16, 16), (8, 40)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_activation_with_adapters_and_its_gradients(dtype, ranks, name):
    shapes = [(50, 200), (50, 200), (50, sum(ranks)), (200, ranks[0]), (200, ranks[1]), (50, 200)]
    gate, up, low, *ups, above = (drawn(dtype, *shape, seed=seed) for seed, shape in enumerate(shapes))
    lows = low.float().split(ranks, dim=1)
    plain = [one.float() + part @ b.float().T for one, part, b in zip((gate, up), lows, ups, strict=True)]
    plain = [one.requires_grad_() for one in plain]
    expected = ACTIVATIONS[name][0](plain[0]) * plain[1]
    gradients = torch.autograd.grad(expected, plain, above.float())
    gated = gpu.Gated(gate, up, low, tuple(ups), name)
    near([gated.product()], [expected.to(dtype)])
    near(gated.back(above.clone()), [one.to(dtype) for one in gradients])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [24, 64])
def test_rotary_positions(dtype, width):
    x, cos, sin = drawn(dtype, 37, 5, width), drawn(dtype, 37, width, seed=1), drawn(dtype, 37, width, seed=2)
    queries, angles = x.transpose(0, 1)[None].float(), (cos[None].float(), sin[None].float())
    expected = apply_rotary_pos_emb(queries, queries, *angles)[0][0].transpose(0, 1)
    near([gpu.rotate(x, cos, sin)], [expected.to(dtype)])
    with_gaps = torch.cat([x, x], dim=1)[:, 5:]
    assert not with_gaps.is_contiguous() and torch.equal(gpu.rotate(with_gaps, cos, sin), gpu.rotate(x, cos, sin))


@pytest.mark.parametrize("dtype", IN_DOTS)
@pytest.mark.parametrize(("width", "heads", "shared"), [(24, 4, 2), (64, 3, 3), (136, 4, 1)])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_inside_examples_and_its_gradients(dtype, width, heads, shared, window):
    lengths = (130, 3, 70)
    shapes = [(sum(lengths), many, width) for many in (heads, shared, shared, heads)]
    *given, above = (drawn(dtype, *shape, seed=seed) for seed, shape in enumerate(shapes))
    plain, outputs = [one.float().requires_grad_() for one in given], []
    for parts in zip(*(one.split(lengths) for one in plain), strict=True):
        by_head = [part.transpose(0, 1).repeat_interleave(heads // part.shape[1], dim=0) for part in parts]
        seen = visible(len(parts[0]), window, parts[0].device)
        outputs.append(functional.scaled_dot_product_attention(*by_head, seen, scale=0.3).transpose(0, 1))
    expected = torch.cat(outputs)
    gradients = torch.autograd.grad(expected, plain, above.float())
    tiles = Segments(lengths, torch.device(DEVICE)).tiles(gpu_attention.tile_rows(width))
    output, sums = gpu_attention.attend(*given, tiles, 0.3, window)
    ours = gpu_attention.attend_back(above, *given, output, sums, tiles, 0.3, window)
    near([output, *ours], [one.to(dtype) for one in (expected, *gradients)])


def test_rows_of_any_number_are_computed_alike():
    x, weight = drawn(torch.bfloat16, 64, 128), drawn(torch.bfloat16, 128, seed=1)
    whole, _ = gpu.norm(x, weight, 1e-5, gemma=False)
    for rows in (1, 16, 33):
        assert torch.equal(gpu.norm(x[:rows], weight, 1e-5, gemma=False)[0], whole[:rows])


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_a_step_with_them_is_the_step_without(dropout, recipe_file, tmp_path, captured, jobs, monkeypatch):
    monkeypatch.setattr(attention, "TILED_DTYPES", (torch.float32,))
    changes = ["train.steps=1", "train.batch_size=2", f"adapter.dropout={dropout}", "adapter.rank=3"]
    for there in (False, True):
        for one in (attention, mlp, norm, rotary):
            monkeypatch.setattr(one, "by_triton", lambda x, there=there: there)
        trainer.train(load_recipe(recipe_file, changes), tmp_path / str(there))
    (_, plain), (_, ours) = captured
    assert jobs[1].manifest["resolved"]["kernels"] == ["lora", "mlp", "norm", "rotary", "loss", "last mlp"]
    assert 0 < relative(ours, plain) < 1e-5  # 0 would be the same code twice


def test_where_triton_compiles_nothing_there_is_a_warning_and_the_plain_way(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    kernels._triton_compiles.cache_clear()
    assert kernels._triton_compiles()
    monkeypatch.setattr(gpu.Gated, "back", refused)
    kernels._triton_compiles.cache_clear()
    with pytest.warns(UserWarning, match="Triton compiles nothing here, .*: Failed to find C compiler"):
        assert not kernels._triton_compiles()
    kernels._triton_compiles.cache_clear()
