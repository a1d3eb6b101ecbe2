"""The library of kernels in C, which the system's compiler makes on first use.

That takes two seconds, once on a machine; the library is kept beside other things that lora_kit caches. Made by gcc, it
runs on the threads of torch, whose OpenMP it shares.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from lora_kit.files import cache_folder

AVX512 = ("f", "bw", "dq", "vl", "bf16")
FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-mfma", *(f"-mavx512{one}" for one in AVX512)]


class Attention(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "sums", "tiles")]
        + [(name, ctypes.c_long) for name in ("examples", "length", "heads", "key_heads", "width", "window")]
        + [("scale", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("gradient", "of_query", "of_key", "of_value")]
    )


class Part(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight")] + [
        (name, ctypes.c_long) for name in ("inner", "apart", "turned")
    ]


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        OSError: There is no C compiler, it does not know this CPU, or nothing can be kept (safely).
        ValueError: `CC` is no command.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    source = files("lora_kit.kernels.cpu").joinpath("kernels.c").read_text()
    name = hashlib.sha256(" ".join([*compiler, *FLAGS, source]).encode()).hexdigest()[:16]
    made = cache_folder("kernels") / f"cpu-{name}-{os.getuid()}.so"
    if not made.exists():
        _compile(compiler, source, made)
    status = made.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"others may write {made}: remove it")
    try:
        kernels = ctypes.CDLL(str(made))
    except OSError:  # it is not whole, or was made for another system
        _compile(compiler, source, made)
        kernels = ctypes.CDLL(str(made))
    return _declared(kernels)


def _compile(compiler: Sequence[str], source: str, made: Path) -> None:
    """Make the library; others may be at it at the same time."""
    if shutil.which(compiler[0]) is None:
        raise OSError(f"there is no C compiler ({' '.join(compiler)})")
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as work:
        target = Path(work) / made.name
        command = [*compiler, *FLAGS, "-x", "c", "-", "-o", str(target), "-lm"]
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{compiler[0]} does not compile the kernels: {done.stderr.strip()[:500]}")
        target.chmod(0o700)
        target.replace(made)


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    long, pointer, number = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    kernels.attention_room.argtypes, kernels.attention_room.restype = [long, long], long
    kernels.attention.argtypes = [ctypes.POINTER(Attention), number, pointer, long, number]
    kernels.linear_room.argtypes, kernels.linear_room.restype = [long], long
    kernels.linear.argtypes = [ctypes.POINTER(Part), number, pointer, pointer, long, long, pointer, long, number]
    kernels.outer_room.argtypes, kernels.outer_room.restype = [long], long
    kernels.outer.argtypes = [pointer, long, pointer, long, pointer, long, long, long, pointer, long, number]
    kernels.norm.argtypes = [*[pointer] * 4, long, long, ctypes.c_float, number, number]
    kernels.norm_back.argtypes = [*[pointer] * 5, long, long, number, number]
    kernels.gate.argtypes = [*[pointer] * 3, long, number, number]
    kernels.gate_back.argtypes = [*[pointer] * 5, long, number, number]
    kernels.rotate.argtypes = [*[pointer] * 4, long, long, long, number]
    kernels.choose.argtypes = [*[pointer] * 3, long, long, number, number]
    for one in ("attention", "linear", "outer", "norm", "norm_back", "gate", "gate_back", "choose", "rotate"):
        kernels[one].restype = None
    return kernels
