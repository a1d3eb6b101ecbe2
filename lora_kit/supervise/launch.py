"""Start several training processes on this machine, on torch's elastic agent, and keep their exit code."""

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from lora_kit.errors import Stopped
from lora_kit.journal import Journal

STOPPED = Stopped.exit_code
OURS = "LORA_KIT_LAUNCHED"  # set for processes that `launch` starts
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_launcher() -> None:
    """End with the process that launched this one, on Linux: an orphan would hold the GPU and the run's lease.

    Started by `launch`, it is killed, so that the run can be started again at once. Under another launcher it gets
    SIGTERM and saves: `accelerate launch` does not pass that signal on to a single process (accelerate issue 2741).
    """
    if not sys.platform.startswith("linux"):
        return
    last = signal.SIGKILL if OURS in os.environ else signal.SIGTERM
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, last)


def launch(arguments: Sequence[str], *, processes: int, run: Path) -> int:
    """Run `python -m lora_kit ARGUMENTS` in `processes` processes and return the exit code of the first to fail.

    The agent turns every code into 1 and a signal into an exception; the workers' own code is what a scheduler wants.

    Args:
        arguments: The command line after `python -m lora_kit`.
        processes: How many.
        run: The run's folder, whose events say whether a signal ended it.
    """
    # the agent's shared store keeps a dead attempt's addresses (pytorch issue 135712); read when torch is imported
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[OURS] = "1"
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the workers say what went wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lora_kit", *arguments)
    except SignalException as error:
        return STOPPED if _was_stopped(run) else 128 + error.sigval
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == STOPPED or _was_stopped(run):
            return STOPPED
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _was_stopped(run: Path) -> bool:
    events = Journal(run).read_events()
    return bool(events) and events[-1]["kind"] == "stopped"
