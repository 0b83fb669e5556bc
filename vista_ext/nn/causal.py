"""Causal attention over packed rows, by torch's own kernels.

torch has one for packed rows on CUDA in half precision (`varlen_attn`, FlashAttention) and none elsewhere:
FlexAttention does not differentiate on a CPU, scaled dot product attention refuses a causal mask on jagged tensors
there, and a mask over all pairs of rows would cost the square of the batch. So there it is done length by length: the
sequences of one length are a dense batch. No row is padded, and the scores are never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# torch 2.10 has a flag; from 2.11 on a window without rows to the right says it.
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if torch.__version__ >= "2.11" else {"is_causal": True}


def causal_attention(q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, max_seq_len: int) -> Tensor:
    """Softmax attention of every row on itself and on the rows before it in its sequence.

    Args:
        q, k, v: `[total, heads, d]`, packed.
        seq_offsets: int64 `[n + 1]`, from 0 to total; sequences may be empty.
        max_seq_len: at least the longest sequence.

    Returns:
        `[total, heads, d]`. On CUDA in half precision nothing waits for the device; elsewhere the offsets are read.
    """
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, seq_offsets, max_seq_len)
    return torch.ops.vista_nn.causal_by_length(q, k, v, seq_offsets)


def _varlen(q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, max_seq_len: int) -> Tensor:
    if not q.shape[0]:  # FlashAttention wants a row at least
        return v
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes seconds

    ends = seq_offsets.to(torch.int32)
    return cast(Tensor, varlen_attn(q, k, v, ends, ends, max_seq_len, max_seq_len, **_CAUSAL))


# An op, so that a compiler need not look into what depends on the offsets' values.
@torch.library.custom_op("vista_nn::causal_by_length", mutates_args=())
def _causal_by_length(q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows in _equal_lengths(seq_offsets):
        out[rows] = _attend(q[rows], k[rows], v[rows])
    return out


@torch.library.custom_op("vista_nn::causal_by_length_backward", mutates_args=())
def _causal_by_length_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _like(q, k, v)
    for rows in _equal_lengths(seq_offsets):
        # Attended again: what the kernel keeps for its backward is its own affair, and may differ between devices.
        pull_back = torch.func.vjp(_attend, q[rows], k[rows], v[rows])[1]
        for grad, part in zip(grads, pull_back(grad_out[rows]), strict=True):
            grad[rows] = part
    return grads


def _like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def _equal_lengths(seq_offsets: Tensor) -> Iterator[Tensor]:
    """The rows `[sequences, length]` of the sequences of each length, the shortest first."""
    lengths = seq_offsets.diff()
    for length in lengths.unique().tolist():
        if length:
            starts = seq_offsets[:-1][lengths == length]
            yield starts[:, None] + torch.arange(length, device=starts.device)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[sequences, length, heads, d]`, as are the arguments."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@_causal_by_length.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_causal_by_length_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q, k, v)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> Any:
    return *torch.ops.vista_nn.causal_by_length_backward(grad_out, *ctx.saved_tensors), None


_causal_by_length.register_autograd(_backward, setup_context=_setup)
