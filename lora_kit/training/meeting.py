"""How training processes find each other."""

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from lora_kit.errors import LaunchError
from lora_kit.runs.journal import short_cause
from lora_kit.supervise.zygote import STORE


def meet(environment: Mapping[str, str], seconds: float) -> None:
    """Form the process group: of `lora-kit train` and `lora-kit launch` through a file that only this user can open, of
    another launcher through the launcher's store. Accelerate takes the group over.

    Args:
        environment: The variables of the launcher.
        seconds: How long to wait for the other processes.

    Raises:
        LaunchError: The processes have not all met after so many seconds.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    launched = STORE in environment or {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    if dist.is_initialized() or count == 1 or not launched:
        return
    on_gpus = torch.cuda.is_available() and environment.get("ACCELERATE_USE_CPU", "false").lower() == "false"
    if on_gpus:
        torch.cuda.set_device(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())
    store = dist.FileStore(environment[STORE], count) if STORE in environment else None
    try:
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            rank=int(environment["RANK"]),
            world_size=count,
            timeout=timedelta(seconds=seconds),
            store=store,
        )
    except (RuntimeError, ValueError) as error:  # DistStoreError, and what gloo raises
        at = f" at {environment['MASTER_ADDR']}:{environment['MASTER_PORT']}" if "MASTER_ADDR" in environment else ""
        raise LaunchError(
            f"launcher: the {count} processes have not met{at}: {short_cause(str(error))}; see that all machines reach "
            "each other (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or raise launch.rendezvous_timeout"
        ) from error
