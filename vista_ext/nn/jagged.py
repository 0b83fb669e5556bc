"""Index arithmetic on packed sequences. Nothing here reads a value on the host, so it compiles and exports."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(values: Tensor, seq_offsets: Tensor, total: int) -> Tensor:
    """Give every packed row its sequence's value: `[n, ...]` to `[total, ...]`. `total` is `seq_offsets[-1]`."""
    return torch.repeat_interleave(values, seq_offsets.diff(), dim=0, output_size=total)


def last_rows(rows: Tensor, seq_offsets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The last `most` rows of each sequence, padded at the end.

    Args:
        rows: `[total, ...]`.
        seq_offsets: int64 `[n + 1]`.

    Returns:
        `[n, most, ...]`, zeros where a sequence is shorter, and bool `[n, most]`, true where there is a row.
    """
    ends = seq_offsets[1:, None]
    first = torch.maximum(seq_offsets[:-1, None], ends - most)
    index = first + torch.arange(most, device=rows.device)
    valid = index < ends
    # One row of zeros behind the data: an index for padding that exists even when there are no rows at all.
    padded = torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])
    return padded[torch.where(valid, index, rows.shape[0])], valid


def packed_suffix(seq_offsets: Tensor, most: int, total: int) -> tuple[Tensor, Tensor]:
    """Where the last `most` rows of each sequence are, packed.

    How many there are is known to the device. Their number is read where the offsets are on the host; elsewhere, and
    while compiling, room is left for as many as there can be.

    Args:
        seq_offsets: int64 `[n + 1]`.
        total: how many rows there are.

    Returns:
        int64 `[size]`, the rows to take, and the int64 `[n + 1]` offsets of the sequences among them. `size` is at most
        the smaller of total and n * most; behind the last sequence any rows.
    """
    lengths = seq_offsets.diff().clamp(max=most)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        size = torch.sym_min(total, lengths.shape[0] * most)
    else:
        size = int(offsets[-1])
    index = torch.arange(size, device=offsets.device)
    # Before a sequence's last rows lie the rows that are left out, of it and of those before it.
    left_out = (seq_offsets[1:] - offsets[1:])[owners(offsets, size)]
    return torch.where(index < offsets[-1], index + left_out, index), offsets


def owners(seq_offsets: Tensor, total: int) -> Tensor:
    """The sequence int64 `[total]` of each of so many packed rows; behind the last sequence the last one."""
    rows = torch.arange(total, device=seq_offsets.device)
    return torch.searchsorted(seq_offsets[1:], rows, right=True).clamp(max=seq_offsets.shape[0] - 2)
