"""The sum over processes has the bits of the sum in one process; contradicting launch settings are refused."""

import json
import platform
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import run_code, started

from lora_kit.data.packing import reduction_schedule
from lora_kit.errors import LaunchError
from lora_kit.supervise import launch
from lora_kit.training import meeting
from lora_kit.training.processes import refuse_contradictions

WORKER = """
import sys, json
import torch
from lora_kit.training.processes import Processes
from lora_kit.data.packing import reduction_schedule
from lora_kit.training.loop import add_to_tree
from lora_kit.errors import DataError
processes = Processes.start("float32")
torch.distributed.distributed_c10d._pickler = torch.distributed.distributed_c10d._unpickler = None
out = []
for count in (1, 2, 3, 5, 8, 11):
    leaves = torch.randn(count, 1003, generator=torch.Generator().manual_seed(count)) * 10
    mine = leaves[processes.index :: processes.count]
    stack = []
    for index, merges in reduction_schedule(len(mine)):
        add_to_tree(stack, mine[index].clone(), merges)
    flat = stack.pop() if stack else torch.full((1003,), float("nan"))
    processes.tree_sum(flat, contributors=min(count, processes.count))
    out.append(flat.numpy().tobytes().hex())
assert processes.gather([processes.index] * 2) == [i for i in range(processes.count) for _ in range(2)]
assert processes.gather([{"index": processes.index, "text": "x" * processes.index}])[-1]["index"] + 1 == processes.count
assert processes.main_decides(lambda: processes.index) == 0
assert processes.main_decides(lambda: None) is None
import tempfile
with tempfile.TemporaryFile() as file:
    if processes.is_main:
        file.write(b"content" * 5_000_000)
    processes.copy_to_all(file)
    file.seek(0)
    assert file.read() == b"content" * 5_000_000
def refuse():
    raise DataError("told to all")
try:
    processes.main_decides(refuse)
    sys.exit(3)
except DataError as error:
    assert str(error) == "told to all"
open(f"{sys.argv[1]}.{processes.index}", "w").write(json.dumps(out))
"""


def in_one_process(count):
    leaves = torch.randn(count, 1003, generator=torch.Generator().manual_seed(count)) * 10
    stack = []
    for index, merges in reduction_schedule(count):
        total = leaves[index].clone()
        for _ in range(merges):
            total = stack.pop() + total
        stack.append(total)
    return stack.pop().numpy()


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_many_processes_sum_like_one(tmp_path, processes):
    workers = [started([tmp_path / "sums"], environment, code=WORKER) for environment in launch.environments(processes)]
    for worker in workers:
        printed, _ = worker.communicate()
        assert worker.returncode == 0, printed
    results = [json.loads((tmp_path / f"sums.{index}").read_text()) for index in range(processes)]
    assert all(result == results[0] for result in results), "every process holds the same sum"
    for count, text in zip((1, 2, 3, 5, 8, 11), results[0], strict=True):
        ours, expected = np.frombuffer(bytes.fromhex(text), np.float32), in_one_process(count)
        if processes == 3:
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
        else:
            assert np.array_equal(ours, expected)


LATE = """
import sys
from pathlib import Path
from runs import wait_until
from lora_kit.recipe.schema import Launch
from lora_kit.training.processes import Processes
processes, given_up = Processes.start("float32", Launch(collective_timeout=0.5)), Path(sys.argv[1])
assert processes.gather([1]) == [1, 1] and processes.machines == 1 and processes.publisher == 0
processes.expect_steps()
if processes.is_main:
    try:
        processes.gather([1])
    except RuntimeError as error:
        assert "500ms" in str(error), error
        given_up.touch()
else:
    wait_until(given_up.exists)
"""


def test_a_process_does_not_wait_longer_than_the_recipe_says(tmp_path):
    environments = [{"PYTHONPATH": str(Path(__file__).parent)} | each for each in launch.environments(2)]
    workers = [started([tmp_path / "given up"], each, code=LATE) for each in environments]
    for worker in workers:
        printed, _ = worker.communicate()
        assert worker.returncode == 0, printed
    assert (tmp_path / "given up").exists()


def test_processes_that_do_not_meet_are_told(monkeypatch):
    monkeypatch.setattr(meeting.dist, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        alone = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = str(nobody.getsockname()[1])
        with pytest.raises(LaunchError, match=r"have not met at 127\.0\.0\.1:.*launch\.rendezvous_timeout"):
            meeting.meet(alone, 0.2)


MANY_SHAPES = """
import sys
import torch
from lora_kit.training.processes import Processes
Processes.start("bfloat16")
def multiply(rows):
    torch.ones(rows, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
for rows in (*range(16, 177), 176, 16):
    print("rows", rows, flush=True)
    multiply(rows)
"""


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bf16 here")
@pytest.mark.parametrize("wanted", [None, "1000"])
def test_products_of_shapes_long_past_are_not_kept_unless_told_so(wanted):
    environment = {"CUDA_VISIBLE_DEVICES": "", "ONEDNN_VERBOSE": "profile_create"}
    environment |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": wanted} if wanted else {}
    *_, newest, oldest = run_code(MANY_SHAPES, environment=environment).split("rows ")
    assert "cache_hit" in newest and "cache_miss" not in newest
    assert ("cache_miss" in oldest) == (wanted is None)


FAULTS = """
import resource
import torch
from lora_kit.training.processes import Processes
Processes.start("bfloat16")
def faults():
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [faults() for _ in range(20)][-1]  # aligned memory does not fit a hole of its size
print("faults", [faults() for _ in range(5)][-1] - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc is not glibc's")
def test_what_is_freed_on_a_cpu_is_used_again_unless_the_user_says_otherwise():
    found = []
    for more in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        told = run_code(FAULTS, environment={"CUDA_VISIBLE_DEVICES": ""} | more, fresh=True)
        found.append(int(told.rsplit("faults ", 1)[1]))
    assert found[0] < found[1] / 4


HOLES = """
import sys
import psutil
import torch
from lora_kit.kernels.cpu.allocator import LARGE, keep_freed_memory
keep_freed_memory()
if sys.argv[1] == "large":
    keep_freed_memory(below=LARGE)
held = lambda: psutil.Process().memory_info().rss
before, several = held(), [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(200)]
del several[:-1]
print("holes", held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc is not glibc's")
def test_malloc_keeps_no_holes_of_large_tensors_if_it_is_told_so():
    found = []
    for kept in ("large", "all"):
        told = run_code(HOLES, kept, fresh=True)
        found.append(int(told.rsplit("holes ", 1)[1]))
    assert found[0] < 20e6 < 150e6 < found[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision is 'fp16', the recipe needs 'no'"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision is 'bf16', the recipe needs 'no'"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps is '4'"),
        ({"ACCELERATE_USE_FSDP": "true"}, "use_fsdp is 'true'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "use_deepspeed is 'true'"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend is 'inductor'"),
    ],
)
def test_launcher_settings_that_contradict_the_recipe_are_refused(environment, message):
    with pytest.raises(LaunchError, match=message):
        refuse_contradictions(environment, "float32")


def test_all_contradictions_are_told_at_once():
    with pytest.raises(LaunchError) as caught:
        refuse_contradictions({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true"}, "float32")
    assert str(caught.value).count("launcher:") == 2


def test_what_agrees_with_the_recipe_goes_through():
    refuse_contradictions({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"}, "bfloat16")
    refuse_contradictions({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "float32")
    refuse_contradictions({}, "float32")


THREADS = """
import torch
from lora_kit.training.processes import Processes
processes = Processes.start("float32")
torch.manual_seed(0)
left, right, found = torch.randn(2048, 64), torch.randn(2048, 16), []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    found.append(left.T @ right)
print(all(torch.equal(found[0], each) for each in found))
"""


def test_a_product_in_fp32_has_the_same_bits_with_any_number_of_threads():
    # so one process with two threads ends with the bytes of two processes with one; MKL alone would not do so
    assert run_code(THREADS).splitlines()[-1] == "True"
