"""The fast path: what transformers would compute, without the work that packed examples do not need."""

import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

FEWEST_ROWS = 32  # for fewer, as in generation, packing the weight would cost more than the product


def compiled(x: Tensor) -> ModuleType | None:
    """Return the module of compiled kernels that computes this: `gpu`, in any precision but fp64, or `cpu`, in bf16.

    None stands for plain PyTorch, where nothing compiles and on other devices.
    """
    if x.is_cuda and x.dtype != torch.float64:
        return _triton()
    return _c() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else None


def multiplying(x: Tensor) -> ModuleType | None:
    """Return the module whose products of some rows are faster than torch's: `cpu`, but where there is AMX."""
    few = len(x) < FEWEST_ROWS
    return None if few or x.is_cuda or torch.cpu._is_amx_tile_supported() else compiled(x)


@cache
def _triton() -> ModuleType | None:
    """Try the kernels: Triton also needs a C compiler, a folder for what it compiles, and a GPU that it knows."""
    if find_spec("triton") is None:
        return None
    try:
        from lora_kit.kernels.triton import pointwise

        x = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
        pointwise.norm_back(x, x, x[0], pointwise.norm(x, x[0], 1e-6, gemma=False)[1], gemma=False)
        gated = pointwise.Gated(x, x, torch.cat([x, x], 1), (x, x), "silu")
        gated.back(gated.product())
        heads = pointwise.rotate(x[None], x[:1], x[:1]).transpose(0, 1).contiguous()
        tiles = torch.tensor([[0, 0, 16]], dtype=torch.int32, device=x.device)
        output = pointwise.attend(heads, heads, heads, tiles, 1.0, None)
        pointwise.attend_back(heads, heads, heads, heads, *output, tiles, 1.0, None)
    except Exception as error:  # of Triton, its compilers or the driver: there is no end to their kinds
        _warn("Triton compiles nothing here", error)
        return None
    return pointwise


@cache
def _c() -> ModuleType | None:
    """Compile the kernels, if the CPU multiplies bf16 by AVX-512."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    from lora_kit.kernels.cpu import build, ops

    try:
        build.library()
    except (OSError, ValueError) as error:
        _warn("the kernels for CPUs are not compiled", error)
        return None
    return ops


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"{what}, so attention, norms and the like take longer: {error}", stacklevel=3)
