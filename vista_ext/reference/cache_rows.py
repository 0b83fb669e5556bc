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
    payload = payload.reshape(n, -1)
    payload = np.pad(payload, ((0, 0), (0, payload.shape[1] % 2)))  # a scale starts at an even byte
    row = np.concatenate([payload, scales.view(np.uint8), biases.view(np.uint8)], axis=1)
    return np.pad(row, ((0, 0), (0, -row.shape[1] % 128)))


def dequantize_rows(rows: NDArray[np.uint8], tokens: int, dim: int, scheme: str, group: int) -> NDArray[np.float32]:
    """The values of `rows`, `[n, tokens, dim]`."""
    n, groups = len(rows), tokens * dim // group
    payload = tokens * dim // (2 if scheme == "int4" else 1)
    scales_at = payload + payload % 2
    halves = np.ascontiguousarray(rows[:, scales_at : scales_at + 4 * groups]).view(np.float16).astype(np.float32)
    codes = np.ascontiguousarray(rows[:, :payload])
    if scheme == "int8":
        values = codes.view(np.int8).astype(np.float32)
    elif scheme == "int4":
        values = np.stack([codes & 15, codes >> 4], axis=-1).astype(np.float32)
    else:
        values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    values = values.reshape(n, groups, group) * halves[:, :groups, None]
    if scheme == "int4":
        values += halves[:, groups:, None]
    return values.reshape(n, tokens, dim)
