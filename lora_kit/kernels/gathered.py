"""Whole weights of a sharded base.

FSDP2 shards a base by units, such as a decoder layer. While a unit's forward or backward runs, its modules hold whole
weights, otherwise shards (DTensor). So the kernels read a weight from its module at the time of use and never keep it.
Code that needs weights outside of a unit's forward uses `gathered`, which is a collective: all processes call it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of a model, or of a part of it, are sharded over the processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def unit_of(model: nn.Module, module: nn.Module) -> nn.Module:
    """Return the unit of a model that gathers the weights of a module, or the module if none of them is sharded."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    return next(unit for unit in reversed(units) if any(part is module for part in unit.modules()))


def type_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; `fully_shard` replaces the class of a unit by a subclass of it."""
    found: type[nn.Module] = type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)
    return found


@contextmanager
def gathered(unit: nn.Module) -> Iterator[None]:
    """Gather the weights of a unit in this context; a module that is no unit is left as it is."""
    if not isinstance(unit, FSDPModule):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
