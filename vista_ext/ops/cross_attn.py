"""Softmax target attention over jagged sequences (paper section 3.3): many query groups may share one sequence.

Results are the same bits whatever the number of threads, whatever else is in the batch, and however the queries of a
sequence are split into groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_ext.ops._autograd import forbid_double_backward, register_fake


def jagged_cross_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    max_q_len: int,
    max_kv_len: int,
    *,
    kv_index: Tensor | None = None,
    self_k: Tensor | None = None,
    self_v: Tensor | None = None,
    attn_scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attend from packed query groups to packed key/value sequences.

    Query group g holds the rows `q_offsets[g]:q_offsets[g + 1]` and reads the sequence `kv_index[g]`. With `self_k` and
    `self_v` every query row has one more entry in its softmax, its own item: a candidate sees the summary and itself,
    never another candidate.

    Args:
        q: `[total_q, q_heads, d]`, float32, bfloat16 or float16; d a multiple of 8 from 16 to 256.
        k: `[total_kv, kv_heads, d]`, same dtype; kv_heads divides q_heads (grouped queries).
        v: `[total_kv, kv_heads, e]`, same dtype; e a multiple of 8 from 16 to 256.
        q_offsets: int64 or int32 `[groups + 1]`. Rows beyond the last are padding: zero output, zero gradient.
        kv_offsets: int64 or int32 `[sequences + 1]`.
        max_q_len, max_kv_len: at least the longest group and the longest sequence.
        kv_index: int64 or int32 `[groups]`, the sequence that each group reads; by default group g reads sequence g.
        self_k, self_v: `[total_q, kv_heads, d]` and `[total_q, kv_heads, e]`, together or not at all.
        attn_scale: factor on the scores, 1 / sqrt(d) by default.
        return_lse: also return the log-sum-exp of each row's scores (differentiable), which merges partial results.

    Returns:
        `[total_q, q_heads, e]` in the inputs' dtype; with `return_lse` a pair with float32 `[total_q, q_heads]`
        (natural logarithm). A row that sees nothing gets 0 and minus infinity. NaN stays NaN, in whatever depends on it
        and nowhere else: in a key or value, the rows that read it; in a query or a row's own item, that row.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    out, lse = torch.ops.vista.jagged_cross_attn(
        q, k, v, q_offsets, kv_offsets, max_q_len, max_kv_len, self_k, self_v, kv_index, attn_scale=attn_scale
    )
    return (out, lse) if return_lse else out


@register_fake("vista::jagged_cross_attn")
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
    total, heads, _d = q.shape
    return q.new_empty((total, heads, v.shape[2])), q.new_empty((total, heads), dtype=torch.float32)


@register_fake("vista::jagged_cross_attn_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    max_q_len: int,
    max_kv_len: int,
    self_k: Tensor | None = None,
    *args: Any,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own_rows = 0 if self_k is None else q.shape[0]
    q_like, k_like, v_like = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return (
        q_like,
        k_like,
        v_like,
        q.new_empty((own_rows, k.shape[1], q.shape[2])),
        q.new_empty((own_rows, k.shape[1], v.shape[2])),
    )


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    q, k, v, q_offsets, kv_offsets, max_q_len, max_kv_len, self_k, self_v, kv_index = inputs
    ctx.save_for_backward(q, k, v, *output, q_offsets, kv_offsets, self_k, self_v, kv_index)
    ctx.lengths = max_q_len, max_kv_len
    ctx.attn_scale = keyword_only_inputs["attn_scale"]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, out, lse, q_offsets, kv_offsets, self_k, self_v, kv_index = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_q, grad_k, grad_v, grad_self_k, grad_self_v = torch.ops.vista.jagged_cross_attn_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        q_offsets,
        kv_offsets,
        *ctx.lengths,
        self_k,
        self_v,
        kv_index,
        attn_scale=ctx.attn_scale,
    )
    own = (None, None) if self_k is None else (grad_self_k, grad_self_v)
    return grad_q, grad_k, grad_v, None, None, None, None, *own, None


torch.library.register_autograd("vista::jagged_cross_attn", _backward, setup_context=_setup)
forbid_double_backward("vista::jagged_cross_attn_backward")
