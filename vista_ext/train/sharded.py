"""Parameters, gradients and optimizer state cut over the processes, by torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device, processes: int) -> None:
    """Cut the parameters of a module over processes. They are whole during its forward and backward; gradients are
    averaged as they are cut. The optimizer is to be made afterwards."""
    fully_shard(module, mesh=init_device_mesh(device.type, (processes,)))


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Parameters of a sharded module whole for the time of the block; for another one nothing to do."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(value: Tensor) -> Tensor:
    """All of a tensor that is cut over processes, which call this together; another one as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `whole` for what an optimizer has of a parameter; scalars stay. Nothing is sent: each process has
    all of the value."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
