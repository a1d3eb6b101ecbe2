"""The fast path: what transformers would compute, without the work that packed examples do not need."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def by_triton(x: Tensor) -> bool:
    """Return whether our kernels for GPUs compute this: where Triton compiles, in any precision but fp64."""
    return x.is_cuda and x.dtype != torch.float64 and _triton_compiles()


@cache
def _triton_compiles() -> bool:
    """Try the kernels: Triton also needs a C compiler, a folder for what it compiles, and a GPU that it knows."""
    if find_spec("triton") is None:
        return False
    try:
        from lora_kit.kernels import gpu, gpu_attention

        x = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
        gpu.norm_back(x, x, x[0], gpu.norm(x, x[0], 1e-6, gemma=False)[1], gemma=False)
        gated = gpu.Gated(x, x, torch.cat([x, x], 1), (x, x), "silu")
        gated.back(gated.product())
        heads = gpu.rotate(x[None], x[:1], x[:1]).transpose(0, 1).contiguous()
        tiles = torch.tensor([[0, 0, 16]], dtype=torch.int32, device=x.device)
        output = gpu_attention.attend(heads, heads, heads, tiles, 1.0, None)
        gpu_attention.attend_back(heads, heads, heads, heads, *output, tiles, 1.0, None)
    except Exception as error:  # of Triton, its compilers or the driver: there is no end to their kinds
        warnings.warn(
            f"Triton compiles nothing here, so attention, norms and the like take longer: {error}", stacklevel=2
        )
        return False
    return True
