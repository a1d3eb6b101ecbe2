"""The library of the kernels in C, which the system's C compiler makes from kernels.c on first use.

Compiling takes two seconds, once on a machine: the library is kept in the user's cache folder. It is linked with torch
and not with an OpenMP runtime, so its loops run on the threads of the runtime that torch itself has loaded.
"""

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lora_kit.files import cache_folder, private_folder

AVX512 = ("f", "bw", "dq", "vl", "bf16")
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-mfma", *(f"-mavx512{x}" for x in AVX512)]
FLAGS += ["-ffp-contract=off"]  # otherwise compilers fuse different products with sums, and so round differently
FLAGS += ["-g0"]  # debug information names the temporary folder, so no two libraries would have the same hash
LINK = ["-shared", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed", "-lm"]  # torch brings its OpenMP runtime
COMPILE_SECONDS = 120.0
C_TYPES = {"long": ctypes.c_long, "int": ctypes.c_int, "float": ctypes.c_float, "void": None}


@dataclass(frozen=True)
class Library:
    """The compiled kernels.

    Attributes:
        kernels: The functions that kernels.c exports, with their argument types.
        sha256: Hash of the library's bytes.
        compiler: Name and version of the compiler that made it.
        in_tiles: Whether products are computed in AMX tiles instead of with AVX-512; the sums have other bits.
    """

    kernels: ctypes.CDLL
    sha256: str
    compiler: str
    in_tiles: bool


@cache
def library() -> Library:
    """Return the compiled kernels; compile them if the cache folder does not hold them.

    A library or a folder that other users may write to is not used.

    Raises:
        OSError: There is no C compiler, it fails or takes too long, or its library cannot be loaded.
        ValueError: `CC` is not a command.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    source = files("lora_kit.kernels.cpu").joinpath("kernels.c").read_text()
    key = hashlib.sha256(" ".join([*compiler, *FLAGS, *LINK, source]).encode()).hexdigest()[:16]
    name = f"cpu-{key}.so"
    kept = None
    # there is no library, or others may have written it
    with suppress(OSError), private_folder(cache_folder("kernels")) as folder:
        kept = folder.open(name)
    if kept is not None:
        with suppress(OSError):  # an incomplete file, or a library for another system: compile again
            return _load(kept, source)
    content = _compile(compiler, source)
    try:
        with private_folder(cache_folder("kernels")) as folder:
            compiled = folder.write(name, content)
    except OSError as error:  # the cache is optional
        warnings.warn(f"the kernels for CPUs are compiled again at every start: {error}", stacklevel=2)
        compiled = os.memfd_create(name)
        with os.fdopen(compiled, "wb", closefd=False) as file:
            file.write(content)
    try:
        return _load(compiled, source)
    except OSError as error:
        command = " ".join(compiler)
        raise OSError(
            f"the library compiled by {command} cannot be loaded together with torch's OpenMP: {error}; try CC=gcc"
        ) from error


def _load(descriptor: int, source: str) -> Library:
    """Load an open library file.

    The descriptor is loaded, not its name, so nobody can exchange the file after the check. It stays open: the loader
    knows libraries by name and would take a later file with the same descriptor for this one.
    """
    try:
        kernels = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise
    for result, name, parameters in re.findall(r"^EXPORT (\w+) (\w+)\(([^)]*)\)", source, re.MULTILINE):
        types: list[Any] = [
            ctypes.c_void_p if "*" in words else C_TYPES[words.split()[-2]] for words in parameters.split(",")
        ]
        try:
            function = getattr(kernels, name)
        except AttributeError as error:
            raise OSError(f"it does not export {name}") from error
        function.argtypes, function.restype = types, C_TYPES[result]
    compiler = ctypes.c_char_p.in_dll(kernels, "COMPILER").value or b""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    in_tiles = bool(kernels.use_tiles(True))
    return Library(kernels, hashlib.sha256(content).hexdigest(), compiler.decode(), in_tiles)


def _compile(compiler: Sequence[str], source: str) -> bytes:
    """Return the bytes of the library that a compiler makes of kernels.c."""
    program = shutil.which(compiler[0])
    if program is None:
        raise OSError(f"there is no C compiler ({' '.join(compiler)}); install gcc or set CC")
    command, torch_libraries = [str(Path(program).absolute()), *compiler[1:]], Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as name:
        folder = Path(name)
        (folder / "kernels.c").write_text(source)
        _run([*command, *FLAGS, "-c", "kernels.c", "-o", "kernels.o"], folder / "kernels.o")
        _run([*command, "kernels.o", f"-L{torch_libraries}", *LINK, "-o", "kernels.so"], folder / "kernels.so")
        return (folder / "kernels.so").read_bytes()


def _run(command: Sequence[str], output: Path) -> None:
    """Run a compiler's command in its output's folder; raise OSError if it fails, takes too long or writes nothing."""
    folder = output.parent
    messages = folder / "messages.txt"
    with messages.open("w") as file:  # not a pipe: a process that the compiler started may keep it open
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise OSError(f"{command[0]} did not compile the kernels in {COMPILE_SECONDS:.0f} s") from error
    if code:
        said = messages.read_text(errors="replace").strip()
        raise OSError(f"{command[0]} does not compile the kernels: {said[:500]}")
    if not output.is_file():
        raise OSError(f"{command[0]} ended without an error but has not written {output.name}; set CC to a C compiler")
