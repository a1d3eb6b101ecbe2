"""A forked process of the tests does what a fresh interpreter does, and where that could differ it is one."""

import os
import signal

import pytest
import torch
from runs import kill_all, run_code, same_imports, started

pytestmark = pytest.mark.quick
KNOWS_TORCH = "import sys; print(sys.argv[1:], 'torch' in sys.modules)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="an import may have touched CUDA")
def test_everything_is_imported_when_it_begins():
    assert run_code(KNOWS_TORCH, "a", "b") == "['a', 'b'] True\n"


def test_what_imports_have_set_here_does_not_keep_a_run_of_this_process_from_forking_its_keeper():
    assert same_imports(os.environ)


def test_a_variable_that_an_import_may_have_read_leads_to_a_fresh_interpreter():
    assert run_code(KNOWS_TORCH, environment={"MKL_CBWR": "COMPATIBLE"}) == "[] False\n"
    assert run_code(KNOWS_TORCH, fresh=True) == "[] False\n"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("code", "expected", "printed"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("raise ValueError('x')", 1, "ValueError: x\n"),
        ("import os; print(os.environ['FAULTS_SLEEP'], os.getsid(0) == os.getpid())", 0, "0 True\n"),
    ],
)
def test_exit_code_output_environment_and_session_are_those_of_the_code(code, expected, printed, fresh):
    process = started([], {"FAULTS_SLEEP": "0"}, code=code, fresh=fresh)
    output, _ = process.communicate()
    assert process.returncode == expected and output.endswith(printed)


def test_what_a_test_leaves_behind_is_killed():
    process = started([], None, code="import signal; signal.pause()")
    assert process.poll() is None
    kill_all()
    assert process.wait() == -signal.SIGKILL
