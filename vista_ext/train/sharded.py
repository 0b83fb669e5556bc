"""What is cut over the processes: by torch's `fully_shard` (FSDP2) everything, else the tables of ids at most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard


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


def cut(value: Tensor, mesh: DeviceMesh) -> DTensor:
    """This process's rows of a tensor that each has all of, as `torch.chunk` cuts it: a copy on the mesh's device.
    Nothing is sent."""
    block = -(-value.shape[0] // mesh.size())
    begin = min(mesh.get_local_rank() * block, value.shape[0])
    rows = value[begin : begin + block].to(mesh.device_type, copy=True)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())


def whole(value: Tensor) -> Tensor:
    """All of a tensor that is cut over processes, which call this together, in the host's memory, for it may be more
    than a device has; another one as it is."""
    if not isinstance(value, DTensor):
        return value
    mesh = init_device_mesh("cpu", (value.device_mesh.size(),))
    rows, shape, stride = value.to_local().detach().cpu(), value.shape, value.stride()
    return DTensor.from_local(rows, mesh, value.placements, run_check=False, shape=shape, stride=stride).full_tensor()


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `whole` for what an optimizer has of a parameter; scalars stay."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return cut(value, parameter.device_mesh)
    return value
