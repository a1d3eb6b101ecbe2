"""How the processes of `lora-kit train` and `lora-kit launch` find each other. Imports torch and nothing else."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from lora_kit.supervise.zygote import STORE


def meet(environment: Mapping[str, str]) -> None:
    """Form the process group through a file that only this user can open.

    Under another launcher accelerate forms the group, through the launcher's store.
    """
    if STORE not in environment:
        return
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(environment[STORE], count), rank=rank, world_size=count)
