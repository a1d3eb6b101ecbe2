"""Choose the backend that computes a tensor: C on CPUs in bf16, Triton on GPUs, otherwise plain PyTorch."""

import os
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from lora_kit.files import cache_folder, private_folder
from lora_kit.kernels.backend import Backend
from lora_kit.kernels.plain import Plain

PLAIN = Plain()


def backend_of(x: Tensor) -> Backend:
    """Return the backend that computes a tensor."""
    return backend_for(x.device, x.dtype)


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend of a device and a dtype: Triton in any precision but fp64, C in bf16, else plain PyTorch."""
    if device.type == "cuda" and dtype != torch.float64:
        return _triton()
    return _c() if device.type == "cpu" and dtype == torch.bfloat16 else PLAIN


@cache
def _triton() -> Backend:
    """Return Triton if its kernels compile and run, otherwise plain PyTorch.

    Triton also needs a C compiler, a folder for compiled kernels, and a GPU that it supports.
    """
    if find_spec("triton") is None:
        return PLAIN
    _move_triton_cache()
    try:
        from lora_kit.kernels.triton.backend import Triton, try_kernels

        try_kernels(torch.device("cuda"))
    except Exception as error:  # Triton, its compilers and the driver raise many kinds of errors
        _warn("Triton cannot compile its kernels", error)
        return PLAIN
    return Triton()


def _move_triton_cache() -> None:
    """Set another folder for compiled kernels if Triton's own, below HOME, cannot be written.

    Triton loads what it finds there, so it must be a folder that only this user can change.
    """
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111 (raises nothing without a home)
    own = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    for folder in (own, cache_folder("triton"), Path(tempfile.gettempdir(), f"lora_kit-triton-{os.getuid()}")):
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if folder != own:
                with private_folder(folder):
                    os.environ["TRITON_CACHE_DIR"] = str(folder)
            return


@cache
def _c() -> Backend:
    """Return the backend in C if this is Linux, the CPU has AVX-512 bf16 and the kernels compile; else PyTorch."""
    if sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported():
        return PLAIN
    from lora_kit.kernels.cpu import build
    from lora_kit.kernels.cpu.backend import Cpu

    try:
        build.library()
    except (OSError, ValueError) as error:
        _warn("the kernels for CPUs could not be compiled", error)
        return PLAIN
    return Cpu()


def _warn(problem: str, error: Exception) -> None:
    warnings.warn(f"{problem}, so attention, norms and other parts take longer: {error}", stacklevel=3)
