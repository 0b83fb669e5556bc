"""The processes of a job, as torchrun starts them: which one this is, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

# One process may have to wait for another that validates, or has a larger share; torchrun ends those whose peer died.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among those of its job; alone by default.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """As RANK, WORLD_SIZE and LOCAL_RANK say; alone where they are not set.

        Raises:
            ValueError: naming the variable, what was expected and what was found.
        """
        given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if given["RANK"] is None and given["WORLD_SIZE"] is None:
            return cls()
        for name in ("RANK", "WORLD_SIZE"):
            if not (given[name] or "").isdecimal():
                raise ValueError(f"{name} must be a number, as torchrun sets it, found {given[name]!r}")
        rank, size = int(given["RANK"] or 0), int(given["WORLD_SIZE"] or 0)
        if rank >= size:
            raise ValueError(f"RANK must be below WORLD_SIZE = {size}, found {rank}")
        local = given["LOCAL_RANK"] or "0"
        if not local.isdecimal():
            raise ValueError(f"LOCAL_RANK must be a number, as torchrun sets it, found {local!r}")
        return cls(rank, size, int(local))

    def device(self, name: str) -> str:
        """The device of this process: "cuda" means the card of its local rank where there are several processes."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    @contextmanager
    def joined(self, device: str = "cpu") -> Iterator[Processes]:
        """Meet the others for the time of the block (gloo, and NCCL on CUDA); nothing to do for a process alone."""
        if self.size == 1:
            yield self
            return
        backend = "cpu:gloo"
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=_PATIENCE)
        try:
            yield self
        finally:
            distributed.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over all processes, in each of them."""
        if self.size == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> list[Tensor]:
        """The values of all processes, of one shape and dtype, by rank, in each of them."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values)
        return parts
