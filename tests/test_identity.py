"""What computes a run is named: the same at every call, and another name for every limit that changes the kernels."""

import json
import os
import subprocess

import pytest
import torch
from conftest import need_c, without_compiled
from runs import run_code

from lora_kit.kernels import identity as module
from lora_kit.kernels.cpu import build
from lora_kit.kernels.identity import identity

CPU = torch.device("cpu")


def in_a_new_process(setting="", fresh=False, **environment):
    code = f"import json, torch; from lora_kit.kernels.identity import identity\n{setting}\n"
    code += "print(json.dumps(identity(torch.device('cpu'), torch.float32)))"
    return json.loads(run_code(code, environment=environment, fresh=fresh))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.quick
def test_the_facts_are_text_sorted_by_name_and_the_same_at_every_call(dtype):
    facts = identity(CPU, dtype)
    assert list(facts) == sorted(facts) and all(type(one) is str for pair in facts.items() for one in pair)
    assert facts == identity(CPU, dtype)
    assert facts["cpu"] and facts["aten"] == torch.backends.cpu.get_cpu_capability()
    assert facts["libc"] == os.confstr("CS_GNU_LIBC_VERSION")


def test_another_process_has_the_same_facts_and_a_limit_of_its_environment_shows():
    here = identity(CPU, torch.float32)
    limits = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    limited = in_a_new_process(**limits)
    assert in_a_new_process(fresh=True) == here
    assert limited == here | limits | {"aten": "DEFAULT"}


def test_the_kernels_in_c_are_named_by_their_library_and_its_compiler():
    need_c()
    facts, library = identity(CPU, torch.bfloat16), build.library()
    assert facts["backend"] == "c" and library.sha256.startswith(facts["library"]) and len(facts["library"]) == 16
    version = subprocess.run(["cc", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    assert version in facts["compiler"] and facts["products"] == ("amx" if library.in_tiles else "avx512")


def test_the_same_compiler_makes_the_same_library_also_with_debug_information_requested(monkeypatch, tmp_path):
    need_c()
    compiler = tmp_path / "compiler"  # which does not optimise, because that takes seconds
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} -g "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    hashes = set()
    for number in range(2):
        monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / str(number)))
        build.library.cache_clear()
        hashes.add(build.library().sha256)
    assert len(hashes) == 1


def test_plain_pytorch_is_named_where_nothing_is_compiled(monkeypatch):
    without_compiled(monkeypatch)
    facts = identity(CPU, torch.bfloat16)
    assert facts["backend"] == "plain" and not {"library", "compiler", "triton"} & facts.keys()
    assert identity(CPU, torch.float32)["backend"] == "plain"


def test_a_machine_that_does_not_describe_its_processor_has_facts_too(monkeypatch):
    monkeypatch.setattr(module, "_read", lambda _: "")
    facts = identity(CPU, torch.float32)
    assert facts["cpu"] and facts["cpu_instructions"] == ""


SETTINGS = {
    "fp32_precision": "torch.set_float32_matmul_precision('medium')",
    "mkldnn": "torch.backends.mkldnn.enabled = False",
    "sdpa": "torch.backends.cuda.enable_flash_sdp(False)",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_torch_that_chooses_kernels_shows(name):
    facts = in_a_new_process(SETTINGS[name])
    assert {key for key, value in facts.items() if value != identity(CPU, torch.float32)[key]} == {name}


def test_the_default_precision_of_fp32_products_has_the_same_name_when_it_is_set():
    assert in_a_new_process("torch.set_float32_matmul_precision('highest')") == identity(CPU, torch.float32)


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_capability():
    facts = identity(torch.device("cuda"), torch.bfloat16)
    assert facts["device"] == torch.cuda.get_device_name() and "." in facts["capability"] and "cpu" not in facts
