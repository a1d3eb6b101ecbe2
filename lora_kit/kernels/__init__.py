"""The fast path: what transformers would compute, without the work that packed examples do not need."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def by_triton(x: Tensor) -> bool:
    """Return whether kernels/gpu.py computes what is bound by memory: on a GPU for which Triton compiles."""
    return x.is_cuda and _triton_compiles()


@cache
def _triton_compiles() -> bool:
    """Try a kernel: Triton also needs a C compiler, a folder for what it compiles, and a GPU that it knows."""
    if find_spec("triton") is None:
        return False
    try:
        from lora_kit.kernels import gpu

        gpu.norm(torch.ones(1, 16, device="cuda"), torch.ones(16, device="cuda"), 1e-6, gemma=False)
    except Exception as error:  # of Triton, its compilers or the driver: there is no end to their kinds
        warnings.warn(f"Triton compiles nothing here, so norms and activations take longer: {error}", stacklevel=2)
        return False
    return True
