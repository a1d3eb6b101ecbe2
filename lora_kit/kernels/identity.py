"""Facts that decide which kernels run: processes with equal facts compute the same bits from the same inputs.

The facts are the backend of lora_kit and the compiler that built it, and the processor, the environment variables and
the settings of torch by which torch and its libraries choose their kernels. With different facts the bits may still be
equal.
"""

import os
import platform
from pathlib import Path

import torch

from lora_kit.kernels import dispatch

CPU_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
CUDA_LIMITS = ("NVIDIA_TF32_OVERRIDE",)
VECTOR_FLAGS = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16")  # prefixes of the names in /proc/cpuinfo


def identity(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return the facts that decide which kernels run on a device in a precision, sorted by name.

    Environment variables that limit instructions appear under their own names, where they are set.
    """
    machine = _of_cuda(device) if device.type == "cuda" else _of_cpu()
    facts = dispatch.backend_for(device, dtype).identity() | machine | _settings(device)
    limits = CUDA_LIMITS if device.type == "cuda" else CPU_LIMITS
    facts |= {name: os.environ[name] for name in limits if name in os.environ}
    return dict(sorted(facts.items()))


def _settings(device: torch.device) -> dict[str, str]:
    """Return the settings of this process by which torch chooses kernels; a notebook may have changed them."""
    library = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = library.matmul.fp32_precision
    sdpa = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return {
        "fp32_precision": "ieee" if precision == "none" else precision,  # torch's default "none" means ieee
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "sdpa": " ".join(name for name, enabled in sdpa.items() if enabled),
    }


def _of_cuda(device: torch.device) -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def _of_cpu() -> dict[str, str]:
    """Return the processor, its caches and vector instructions, and the versions of oneDNN, MKL and the C library.

    oneDNN, MKL and ATen choose their kernels by the processor, its caches and its instructions.
    """
    first = _read(Path("/proc/cpuinfo")).split("\n\n")[0]
    lines = dict(line.replace("\t", "").split(":", 1) for line in first.splitlines() if ":" in line)
    flags = lines.get("flags", lines.get("Features", "")).split()
    built_with = torch.__config__.show().splitlines()
    libraries = [line.strip(" -") for line in built_with if "Math Kernel Library" in line or "MKL-DNN" in line]
    return {
        "cpu": lines.get("model name", "").strip() or platform.processor() or platform.machine(),
        "cpu_caches": _caches(Path("/sys/devices/system/cpu/cpu0/cache")),
        "cpu_instructions": " ".join(sorted(flag for flag in flags if flag.startswith(VECTOR_FLAGS))),
        "aten": torch.backends.cpu.get_cpu_capability(),
        "libraries": "; ".join(libraries),
        "libc": " ".join(platform.libc_ver()).strip(),  # exp, log and cos round differently in other versions
    }


def _caches(folder: Path) -> str:
    """Return the sizes of one core's caches, by which oneDNN and MKL choose the block sizes of a matrix product."""
    kinds = [[_read(cache / name) for name in ("level", "type", "size")] for cache in sorted(folder.glob("index*"))]
    return ", ".join(f"L{level} {kind} {size}" for level, kind, size in kinds)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
