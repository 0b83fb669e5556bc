"""Quantized rows, value by value as docs/row_layout.md has them, in numpy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def quantize_rows(x: NDArray[np.float32], scheme: str, group: int) -> NDArray[np.uint8]:
    """Rows of `x` `[n, tokens, dim]`; finite values only."""
    n, tokens, dim = x.shape
    groups = x.reshape(n, tokens * dim // group, group).astype(np.float32)
    biases = np.zeros((n, 0), np.float16)
    if scheme == "int4":
        low, high = groups.min(-1) + np.float32(0), groups.max(-1) + np.float32(0)  # no negative zero
        scales = ((high - low) / np.float32(15)).astype(np.float16)
        biases = low.astype(np.float16)
    else:
        most = np.float32(127 if scheme == "int8" else 448)
        scales = (np.abs(groups).max(-1) / most).astype(np.float16)
    unit = scales.astype(np.float32)[..., None]
    shifted = groups - (biases.astype(np.float32)[..., None] if scheme == "int4" else np.float32(0))
    values = np.divide(shifted, unit, out=np.zeros_like(shifted), where=unit > 0)
    if scheme == "int8":
        payload = np.rint(np.clip(values, -127, 127)).astype(np.int8).view(np.uint8)
    elif scheme == "int4":
        nibbles = np.rint(np.clip(values, 0, 15)).astype(np.uint8)
        payload = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    else:
        clipped = torch.from_numpy(np.clip(values, -448, 448))
        payload = clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    row = np.concatenate([payload.reshape(n, -1), scales.view(np.uint8), biases.view(np.uint8)], axis=1)
    return np.pad(row, ((0, 0), (0, -row.shape[1] % 128)))
