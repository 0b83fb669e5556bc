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


def packed_suffix(rows: Tensor, seq_offsets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The last `most` rows of each sequence, packed, in a tensor of fixed size `[n * most, ...]`.

    Returns:
        The rows, zeros behind the last sequence, and the int64 `[n + 1]` offsets into them.
    """
    windows, valid = last_rows(rows, seq_offsets, most)
    offsets = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0))
    # A stable sort moves the padding behind the rows and keeps their order.
    order = torch.argsort(valid.flatten().logical_not().to(torch.int8), stable=True)
    return windows.flatten(0, 1)[order], offsets
