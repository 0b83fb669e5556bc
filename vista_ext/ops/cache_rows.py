"""Quantized rows: the byte format of summaries in caches, stores and messages (docs/row_layout.md)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

IndexPolicy = Literal["raise", "zero"]


def cache_scatter_(cache: Tensor, slots: Tensor, rows: Tensor, *, policy: IndexPolicy = "raise") -> Tensor:
    """Overwrite rows of a cache in place, the refresh of summaries on a device.

    Args:
        cache: uint8 `[num_slots, row_bytes]`, contiguous; written.
        slots: int64 or int32 `[n]`, the slot of each row; of equal slots the last row stays.
        rows: uint8 `[n, row_bytes]`, made by `quantize_rows`.
        policy: what to do with a slot outside `[0, num_slots)`: "raise", or "zero" to skip and count it.

    Returns:
        int64 scalar: how many slots were out of range (0 under "raise").

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    return torch.ops.vista.cache_scatter_(cache, slots, rows, policy=policy)


@torch.library.register_fake("vista::cache_scatter_")
def _(cache: Tensor, slots: Tensor, rows: Tensor, *, policy: str = "raise") -> Tensor:
    return slots.new_empty((), dtype=torch.int64)
