"""Softmax target attention that reads quantized rows of a cache (paper sections 3.3 and 4): what serving asks for.

A row is dequantized where it is used (on the GPU into shared memory, once for all candidates of a block), so that no
dequantized summary is ever written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_ext.ops._autograd import forbid_backward, register_fake
from vista_ext.ops.cache_rows import IndexPolicy, Scheme


def cached_cross_attn(
    q: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    slots: Tensor,
    q_offsets: Tensor,
    max_q_len: int,
    tokens: int,
    kv_heads: int,
    *,
    value_dim: int | None = None,
    self_k: Tensor | None = None,
    self_v: Tensor | None = None,
    scheme: Scheme = "int8",
    group: int | None = None,
    policy: IndexPolicy = "raise",
    attn_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`jagged_cross_attn` whose keys and values are quantized rows, found by slot. Not differentiable.

    Query group g holds the rows `q_offsets[g]:q_offsets[g + 1]` and reads the row `slots[g]` of both caches; own items
    as in `jagged_cross_attn`. On the CPU the results are the bits of `cache_gather` and then `jagged_cross_attn`.

    Args:
        q: `[total_q, q_heads, d]`, float32, bfloat16 or float16; d a multiple of 8 from 16 to 256. Rows are dequantized
            to this dtype.
        k_rows: uint8 `[num_slots, row_bytes]`, keys `[tokens, kv_heads * d]` of each slot as `quantize_rows` made them.
        v_rows: uint8 `[num_slots, row_bytes]`, values `[tokens, kv_heads * value_dim]` likewise. The tensor `k_rows`
            itself, where the values are the keys, is read once.
        slots: int64 or int32 `[groups]`.
        q_offsets: int64 or int32 `[groups + 1]`. Rows beyond the last are padding: zero output.
        max_q_len: at least the longest group.
        tokens, kv_heads, scheme, group: what the rows hold; kv_heads divides q_heads.
        value_dim: head dim of the values, a multiple of 8 from 16 to 256; by default d.
        self_k, self_v: `[total_q, kv_heads, d]` and `[total_q, kv_heads, value_dim]`, together or not at all.
        policy: what to do with a slot outside `[0, num_slots)`: "raise", or "zero" to count it and show its group an
            empty memory: a row then sees its own item only, or nothing. On a CUDA device "raise" is an assertion in the
            kernel: it surfaces at the next synchronization.
        attn_scale: factor on the scores, 1 / sqrt(d) by default.

    Returns:
        `[total_q, q_heads, value_dim]` in the dtype of q; float32 `[total_q, q_heads]`, the log-sum-exp of each row's
        scores; an int64 scalar, how many slots were out of range. A row that sees nothing gets 0 and minus infinity.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    for name, x in (("q", q), ("self_k", self_k), ("self_v", self_v)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"vista::cached_cross_attn: {name} must not require a gradient (there is none): detach it, or use "
                "jagged_cross_attn on dequantized rows"
            )
    return torch.ops.vista.cached_cross_attn(
        q,
        k_rows,
        v_rows,
        slots,
        q_offsets,
        max_q_len,
        tokens,
        kv_heads,
        self_k,
        self_v,
        value_dim=value_dim,
        scheme=scheme,
        group=group,
        policy=policy,
        attn_scale=attn_scale,
    )


@register_fake("vista::cached_cross_attn")
def _(q: Tensor, k_rows: Tensor, *args: Any, value_dim: int | None = None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    total, heads, d = q.shape
    return (
        q.new_empty((total, heads, d if value_dim is None else value_dim)),
        q.new_empty((total, heads), dtype=torch.float32),
        q.new_empty((), dtype=torch.int64),
    )


forbid_backward("vista::cached_cross_attn", "it is for inference")
