"""Quantized rows: the byte format of summaries in caches, stores and messages (docs/row_layout.md)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vista_ext import _C
from vista_ext.ops._autograd import register_fake

IndexPolicy = Literal["raise", "zero"]
Scheme = Literal["int8", "int4", "fp8_e4m3"]


def quantize_rows(x: Tensor, *, scheme: Scheme = "int8", group: int | None = None) -> Tensor:
    """Quantize summaries into rows, one per user. Not differentiable.

    Args:
        x: `[n, tokens, dim]`, float32, bfloat16 or float16. A group with a value that is not finite, or
            whose scale does not fit float16, reads back as NaN.
        scheme: "int8" (symmetric), "int4" (asymmetric) or "fp8_e4m3".
        group: values of a token that share a scale, at least 32 (or the whole token); by default the token, 64
            for int4.

    Returns:
        uint8 `[n, row_bytes]`; `row_bytes` is 33,024 for int8 of 128 x 256, 18,432 for int4.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    _refuse_gradient(x)
    return torch.ops.vista.quantize_rows(x, scheme=scheme, group=group)


def dequantize_rows(
    rows: Tensor,
    tokens: int,
    dim: int,
    *,
    scheme: Scheme = "int8",
    group: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Read rows back: `[n, tokens, dim]` in `dtype` (float32, bfloat16 or float16). Arguments as in `quantize_rows`.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    return torch.ops.vista.dequantize_rows(rows, tokens, dim, scheme=scheme, group=group, dtype=dtype)


def cache_gather(
    cache: Tensor,
    slots: Tensor,
    tokens: int,
    dim: int,
    *,
    scheme: Scheme = "int8",
    group: int | None = None,
    dtype: torch.dtype = torch.float32,
    policy: IndexPolicy = "raise",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the rows of a cache at some slots, dequantized. Not differentiable.

    Args:
        cache: uint8 `[num_slots, row_bytes]`.
        slots: int64 or int32 `[n]`.
        tokens, dim, scheme, group: what the rows hold, as in `quantize_rows`.
        dtype: of the result, unless `out` is given.
        policy: what to do with a slot outside `[0, num_slots)`: "raise", or "zero" to fill zeros and count it. On a
            CUDA device "raise" is an assertion in the kernel: it surfaces at the next synchronization.
        out: contiguous `[n, tokens, dim]` to write into: a large result from a cold allocator costs more than the read.

    Returns:
        `[n, tokens, dim]` (`out` itself if given) and an int64 scalar: how many slots were out of range.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    options: dict[str, Any] = {"scheme": scheme, "group": group, "policy": policy}
    if out is not None:
        return out, torch.ops.vista.cache_gather.out(cache, slots, tokens, dim, **options, out=out)
    return torch.ops.vista.cache_gather(cache, slots, tokens, dim, **options, dtype=dtype)


def cache_scatter_(cache: Tensor, slots: Tensor, rows: Tensor, *, policy: IndexPolicy = "raise") -> Tensor:
    """Overwrite rows of a cache in place, the refresh of summaries on a device.

    Args:
        cache: uint8 `[num_slots, row_bytes]`, contiguous; written.
        slots: int64 or int32 `[n]`, the slot of each row; of equal slots the last row stays.
        rows: uint8 `[n, row_bytes]`, made by `quantize_rows`.
        policy: what to do with a slot outside `[0, num_slots)`: "raise" (nothing is written then), or "zero" to skip
            and count it. On a CUDA device "raise" is an assertion in the kernel, as in `cache_gather`.

    Returns:
        int64 scalar: how many slots were out of range (0 under "raise").

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    return torch.ops.vista.cache_scatter_(cache, slots, rows, policy=policy)


@register_fake("vista::cache_scatter_")
def _(cache: Tensor, slots: Tensor, rows: Tensor, *, policy: str = "raise") -> Tensor:
    return slots.new_empty((), dtype=torch.int64)


def _refuse_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("vista::quantize_rows: x must not require a gradient (rounding has none): detach it")


@register_fake("vista::quantize_rows")
def _(x: Tensor, *, scheme: str = "int8", group: int | None = None) -> Tensor:
    row_bytes = _C.row_layout(scheme, int(x.shape[1]), int(x.shape[2]), group or 0)["row_bytes"]
    return x.new_empty((x.shape[0], row_bytes), dtype=torch.uint8)


@register_fake("vista::dequantize_rows")
def _(rows: Tensor, tokens: int, dim: int, *, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
    return rows.new_empty((rows.shape[0], tokens, dim), dtype=dtype)


@register_fake("vista::cache_gather")
def _(
    cache: Tensor, slots: Tensor, tokens: int, dim: int, *, dtype: torch.dtype = torch.float32, **_: Any
) -> tuple[Tensor, Tensor]:
    return cache.new_empty((slots.shape[0], tokens, dim), dtype=dtype), cache.new_empty((), dtype=torch.int64)


@register_fake("vista::cache_gather.out")
def _(cache: Tensor, slots: Tensor, tokens: int, dim: int, **_: Any) -> Tensor:
    return cache.new_empty((), dtype=torch.int64)
