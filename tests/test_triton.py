"""The kernels for GPUs against the same in plain PyTorch: by Triton's interpreter where there is no GPU."""

import pytest
import torch
from plain_loop import relative
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lora_kit.kernels.mlp import ACTIVATIONS

gpu = pytest.importorskip("lora_kit.kernels.gpu", reason="Triton is not installed", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # which sigmoid is made for
pytestmark = [overflows, *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # the interpreter cuts to bf16 where a GPU rounds


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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_activation_and_its_gradients(dtype, name):
    gate, up, above = (3 * drawn(dtype, 50, 100, seed=seed) for seed in range(3))
    plain = [one.float().requires_grad_() for one in (gate, up)]
    expected = ACTIVATIONS[name][0](plain[0]) * plain[1]
    gradients = torch.autograd.grad(expected, plain, above.float())
    near([gpu.gate(gate, up, name)], [expected.to(dtype)])
    near(gpu.gate_back(above.clone(), gate, up, name), [one.to(dtype) for one in gradients])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [24, 64])
def test_rotary_positions(dtype, width):
    x, cos, sin = drawn(dtype, 37, 5, width), drawn(dtype, 37, width, seed=1), drawn(dtype, 37, width, seed=2)
    queries, angles = x.transpose(0, 1)[None].float(), (cos[None].float(), sin[None].float())
    expected = apply_rotary_pos_emb(queries, queries, *angles)[0][0].transpose(0, 1)
    near([gpu.rotate(x, cos, sin)], [expected.to(dtype)])
    with_gaps = torch.cat([x, x], dim=1)[:, 5:]
    assert not with_gaps.is_contiguous() and torch.equal(gpu.rotate(with_gaps, cos, sin), gpu.rotate(x, cos, sin))


def test_rows_of_any_number_are_computed_alike():
    x, weight = drawn(torch.bfloat16, 64, 128), drawn(torch.bfloat16, 128, seed=1)
    whole, _ = gpu.norm(x, weight, 1e-5, gemma=False)
    for rows in (1, 16, 33):
        assert torch.equal(gpu.norm(x[:rows], weight, 1e-5, gemma=False)[0], whole[:rows])
