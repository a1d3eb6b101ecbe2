"""The library of the kernels in C is made once, trusted only in a private folder, and missed without harm."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import need_c
from runs import WAIT_SECONDS, wait_until

from lora_kit.kernels import dispatch
from lora_kit.kernels.cpu import build
from lora_kit.kernels.cpu.backend import Cpu
from lora_kit.kernels.dispatch import backend_of

BF16 = torch.bfloat16


@pytest.fixture
def c():
    """Skip what needs the kernels where they cannot be."""
    need_c()


def ones():
    return torch.ones(2, 8, dtype=BF16)


def script(path, text):
    """Write a compiler."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


QUICK = """
for output; do [ "$before" = -o ] && break; before=$output; done
kept={folder}/$(echo "$@" | cat - kernels.c $(ls *.o 2> /dev/null) | sha256sum | cut -c 1-16)
cp "$kept" "$output" 2> /dev/null && exit
{compiler} "$@" -O0 && cp "$output" "$kept.$$" && mv "$kept.$$" "$kept"
"""


@pytest.fixture
def quick(shared):
    """The text of a compiler that does not optimise, which takes seconds, and compiles the same only once."""
    folder = shared("compiled", lambda folder: None)
    return QUICK.format(folder=folder, compiler=os.environ.get("CC", "cc"))


@pytest.fixture
def fresh(monkeypatch, tmp_path, quick):
    """An empty cache and no library in this process, before and after; the CPU passes for one that can use it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(script(tmp_path / "quick", quick)))
    caches = build.library, dispatch._c  # which tests put others in the place of
    for one in caches:
        one.cache_clear()
    yield tmp_path / "cache"
    for one in caches:
        one.cache_clear()


def warned(*, compiled=False):
    """What two calls warn of, both of which find compiled kernels or neither."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = backend_of(ones())
        assert backend_of(ones()) is found and isinstance(found, Cpu if compiled else dispatch.Plain)
    assert all(one.category is UserWarning for one in seen)
    return [str(one.message) for one in seen]


def exchange(library):
    """Put other bytes in the place of a library, whose own file this process has mapped and must keep."""
    library.unlink()
    library.write_bytes(b"theirs")


def left_in(folder):
    return sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file() or "tmp" in one.name)


KEPT = "the kernels for CPUs are compiled again at every start: "
PLAIN = "the kernels for CPUs could not be compiled, so attention, norms and other parts take longer: "


def test_without_a_compiler_there_is_one_warning_and_the_plain_way(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert warned() == [PLAIN + "there is no C compiler (cc); install gcc or set CC"]


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(fresh, monkeypatch, tmp_path):
    compiler = script(tmp_path / "broken", "echo 'unrecognized option -mavx512bf16' >&2\nexit 1\n")
    monkeypatch.setenv("CC", str(compiler))
    assert warned() == [PLAIN + f"{compiler} does not compile the kernels: unrecognized option -mavx512bf16"]
    assert left_in(fresh) == []


def test_a_compiler_that_ends_well_and_writes_nothing_is_named(fresh, monkeypatch, tmp_path):
    compiler = script(tmp_path / "idle", "exit 0\n")
    monkeypatch.setenv("CC", str(compiler))
    said = f"{compiler} ended without an error but has not written kernels.o; set CC to a C compiler"
    assert warned() == [PLAIN + said]


def test_messages_of_a_compiler_that_are_not_utf_8_are_quoted_too(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(script(tmp_path / "old", "printf 'mauvaise entr\\351e' >&2; exit 1\n")))
    (message,) = warned()
    assert "does not compile the kernels: mauvaise entr\ufffde" in message


def test_a_library_without_the_functions_is_no_crash(c, fresh, monkeypatch, tmp_path):
    real = os.environ.get("CC", "cc")
    compiler = script(tmp_path / "empties", f'[ -f kernels.o ] || echo "int nothing;" > kernels.c\nexec {real} "$@"\n')
    monkeypatch.setenv("CC", str(compiler))
    (message,) = warned()
    assert "cannot be loaded together with torch's OpenMP: it does not export " in message
    build.library.cache_clear(), dispatch._c.cache_clear()
    assert warned() == [message], "a kept library without them is compiled again"


def test_an_empty_name_of_a_compiler_is_none(c, fresh, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    Path(os.environ["CC"]).rename(tmp_path / "bin" / "cc")
    script(tmp_path / "bin" / "cc", f"PATH={os.environ['PATH']}\n" + (tmp_path / "bin" / "cc").read_text())
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CC", " ")
    assert build.library()


def test_a_library_that_cannot_be_loaded_is_no_crash(fresh, monkeypatch, tmp_path):
    compiler = script(tmp_path / "empty", 'for one; do case $one in *.so|*.o) : > "$one";; esac; done\n')
    monkeypatch.setenv("CC", str(compiler))
    (message,) = warned()
    assert message.startswith(
        PLAIN + f"the library compiled by {compiler} cannot be loaded together with torch's OpenMP: "
    )


def test_a_compiler_with_an_openmp_that_torch_does_not_have_is_refused(c, fresh, monkeypatch, tmp_path):
    """Its threads would be others than torch's; clang calls its runtime by names such as this."""
    real = os.environ.get("CC", "cc")
    compiler = script(tmp_path / "clang", f'exec {real} "$@" -Domp_get_thread_num=__kmpc_global_thread_num\n')
    monkeypatch.setenv("CC", str(compiler))
    (message,) = warned()
    assert "undefined symbol: __kmpc_global_thread_num; try CC=gcc" in message


def test_the_library_runs_on_the_threads_of_torch_alone(c):
    """A second OpenMP runtime would bring threads that compete with torch's."""
    build.library()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = [path for path in mapped if re.search(r"lib(gomp|omp|iomp5)[-.]", path)]
    kernels = next(path for path in mapped if "/cpu-" in path)
    assert len(runtimes) == 1 and Path(torch.__file__).parent in Path(runtimes[0]).parents
    needed = subprocess.run(["readelf", "-d", kernels], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed and "omp" not in needed


def test_a_compiler_that_never_ends_is_stopped_with_all_that_it_started(fresh, monkeypatch, tmp_path):
    compiler = script(tmp_path / "slow", f"sleep 1000 &\necho $! > {tmp_path}/child\nwait\n")
    child, wait = tmp_path / "child", subprocess.Popen.wait

    def once_it_has_a_child(process, timeout=None):
        wait_until(lambda: child.exists() and child.read_text().endswith("\n"))
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_has_a_child)
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.1)
    monkeypatch.setenv("CC", str(compiler))
    assert warned() == [PLAIN + f"{compiler} did not compile the kernels in 0 s"]
    status = Path(f"/proc/{child.read_text().strip()}/stat")
    wait_until(lambda: not status.exists() or status.read_text().split()[2] == "Z")  # until its parent collects it


def test_where_nothing_can_be_kept_there_is_one_warning_and_the_library_is_in_memory(c, fresh):
    fresh.write_text("a file where the folder should be")
    (message,) = warned(compiled=True)
    assert message.startswith(KEPT) and str(fresh) in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_precisions_ask_for_no_compiler(dtype, fresh, monkeypatch):
    monkeypatch.setattr(build, "library", None)
    assert backend_of(torch.ones(2, dtype=dtype)) is dispatch.PLAIN


def test_a_cpu_without_bf16_asks_for_no_compiler_and_warns_of_nothing(fresh, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(build, "library", None)
    assert warned() == []


def counted(tmp_path, meet=""):
    """A compiler that counts what it compiles and is the real one."""
    count = f'case " $* " in *" -c "*) echo $$ >> {tmp_path}/calls; {meet or ":"};; esac'
    return script(tmp_path / "counted", f'{count}\nexec {os.environ.get("CC", "cc")} "$@"\n')


def calls(tmp_path):
    return len((tmp_path / "calls").read_text().splitlines())


def test_a_library_that_is_kept_is_used_again_and_another_source_makes_another(c, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(counted(tmp_path)))
    for _ in range(2):
        assert isinstance(backend_of(ones()), Cpu)
        build.library.cache_clear()
        dispatch._c.cache_clear()
    assert calls(tmp_path) == 1 and len(left_in(fresh)) == 1
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DANOTHER"])
    build.library()
    assert calls(tmp_path) == 2 and len(left_in(fresh)) == 2


def test_a_library_that_is_broken_is_made_again(c, fresh):
    code = "from lora_kit.kernels.cpu import build; build.library()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_SECONDS)  # in this process it would stay open
    (made,) = fresh.rglob("*.so")
    made.write_bytes(b"half")
    assert build.library() and made.stat().st_size > 1000


def test_a_library_that_other_users_may_write_is_replaced(c, fresh):
    made = build.library()
    (library,) = fresh.rglob("*.so")
    exchange(library)
    library.chmod(0o720)
    build.library.cache_clear()
    assert warned(compiled=True) == [] and build.library().sha256 == made.sha256
    assert library.stat().st_mode & 0o777 == 0o600 and library.stat().st_size > 1000


def test_a_folder_that_other_users_may_write_is_not_used(c, fresh):
    build.library()
    (library,) = fresh.rglob("*.so")
    exchange(library)
    library.parent.chmod(0o720)
    build.library.cache_clear()
    (message,) = warned(compiled=True)
    assert message == KEPT + f"other users may write to {library.parent} (mode 720); run chmod go-w on it"
    assert library.read_bytes() == b"theirs"


def test_a_folder_of_another_user_is_not_used(c, fresh, monkeypatch):
    build.library()
    (library,) = fresh.rglob("*.so")
    owned = library.parent
    status = os.fstat

    def fstat(descriptor):
        found = status(descriptor)
        if not os.path.samestat(found, owned.stat()):
            return found
        return os.stat_result([*found[:4], os.getuid() + 1, *found[5:]])

    monkeypatch.setattr(os, "fstat", fstat)
    build.library.cache_clear()
    (message,) = warned(compiled=True)
    assert message == KEPT + f"{owned} belongs to another user (uid {os.getuid() + 1}); remove it or set LORA_KIT_CACHE"


def test_a_library_is_not_taken_from_behind_a_link(c, fresh, tmp_path):
    build.library()
    (library,) = fresh.rglob("*.so")
    exchange(library)
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    build.library.cache_clear()
    assert warned(compiled=True) == [] and not library.is_symlink()


def test_the_folder_of_a_new_library_is_its_user_s_alone(c, fresh):
    before = os.umask(0)
    try:
        build.library()
    finally:
        os.umask(before)
    (library,) = fresh.rglob("*.so")
    assert library.parent.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o777 == 0o600


def test_a_library_that_is_kept_needs_no_compiler(c, fresh, monkeypatch, tmp_path):
    assert build.library()
    monkeypatch.setenv("PATH", str(tmp_path))
    build.library.cache_clear()
    assert build.library()


def test_two_processes_that_compile_at_once_leave_one_library(c, fresh, tmp_path):
    # neither begins before the other is there
    both = f"for look in $(seq 1000); do [ $(wc -l < {tmp_path}/calls) -ge 2 ] && break; sleep 0.05; done"
    code = "import torch; from lora_kit.kernels.cpu import ops; x = torch.ones(2, 8, dtype=torch.bfloat16)\n"
    code += "assert (ops.rms_norm(x, x[0], 0.0, False)[0] == 1).all()"
    settings = dict(os.environ, CC=str(counted(tmp_path, both)), PYTHONPATH=str(Path(__file__).parents[1]))
    started = [subprocess.Popen([sys.executable, "-c", code], env=settings) for _ in range(2)]
    try:
        assert [one.wait(timeout=WAIT_SECONDS) for one in started] == [0, 0]
    finally:
        for one in started:
            one.kill()
    assert calls(tmp_path) == 2 and len(left_in(fresh)) == 1
