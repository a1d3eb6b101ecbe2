"""The fast path: what transformers would compute, without the work that packed examples do not need."""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def by_triton(x: Tensor) -> bool:
    """Return whether kernels.gpu computes what is bound by memory: where a tensor is on a GPU and Triton is there."""
    return x.is_cuda and _triton()


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
