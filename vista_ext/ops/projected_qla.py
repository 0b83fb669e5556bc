"""Quasi-linear attention on projections of the rows (paper section 3.2): `qla_state` and `qla_apply` of `x W^T`.

On a GPU keys and values are made while the state is summed up, queries while the output is written; none of them is a
tensor there. What autograd keeps is `x`, the weights and the state; the backward makes the projections anew.

With `norm_eps` the projections are those of `y = x / sqrt(mean(x^2) + norm_eps)`, row by row: an RMS norm whose own
weight is folded into the columns of the projections (`weight * norm.weight`).

The kernels serve bfloat16 and float16, a `dim` that is a multiple of 8, and equal head dims of 32, 64 or 128, if
the weights of a group of heads fit into the shared memory of the device. Whatever else the ops accept is composed of
torch's products and the QLA ops: the same values, with the projections as tensors for as long as the call takes. On the
CPU every call is composed, a few thousand rows at a time; where a gradient is wanted there, of all rows at once, and
autograd keeps keys, values and queries, for a product made again takes longer than it does on a GPU.

Results are the same bits whatever else is in the batch, as far as torch's products are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_ext.ops._autograd import (
    autocast,
    differentiates_on_cpu,
    forbid_double_backward,
    no_rows,
    refuse_scale_gradient,
    register_fake,
    without_autocast,
)
from vista_ext.ops.linear import linear
from vista_ext.ops.qla import Activation, qla_apply, qla_state
from vista_ext.ops.rms_norm import rms_norm


def projected_qla_state(
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    heads: int,
    norm_eps: float | None = None,
    activation: Activation = "silu",
) -> Tensor:
    """`qla_state` of keys `x weight_k^T` and values `x weight_v^T`.

    Args:
        x: `[total, dim]`, float32, bfloat16 or float16.
        weight_k: `[heads * d, dim]`, same dtype, as `torch.nn.Linear` holds it; d a multiple of 8 from 16 to 256.
        weight_v: `[heads * e, dim]`, likewise.
        seq_offsets, max_seq_len: as in `qla`.
        heads: of keys and values.
        norm_eps: if given, rows are divided by their root mean square first.
        activation: phi1, on the keys.

    Returns:
        float32 `[batch, heads, d, e]`, unscaled; zero for a sequence without rows.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    operands = x, weight_k, weight_v = autocast(x, weight_k, weight_v)
    options = {"heads": heads, "norm_eps": norm_eps, "activation": activation}
    if not differentiates_on_cpu(*operands):
        return torch.ops.vista.projected_qla_state(*operands, seq_offsets, max_seq_len, **options)
    with torch.no_grad():
        ends = torch.zeros_like(seq_offsets[:1] if seq_offsets.dim() == 1 else seq_offsets)
        torch.ops.vista.projected_qla_state(no_rows(x), weight_k, weight_v, ends, 0, **options)
    y = _normalised(x, seq_offsets, norm_eps)
    k, v = (linear(y, weight).unflatten(1, (heads, -1)) for weight in (weight_k, weight_v))
    return qla_state(k, v, seq_offsets, max_seq_len, activation=activation)


def projected_qla_apply(
    x: Tensor,
    weight_q: Tensor,
    state: Tensor,
    attn_scale: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    norm_eps: float | None = None,
    activation: Activation = "silu",
    state_activation: Activation = "silu",
) -> Tensor:
    """`qla_apply` of queries `x weight_q^T`, without own term.

    Args:
        x: `[total, dim]`, float32, bfloat16 or float16.
        weight_q: `[heads * d, dim]`, same dtype; d a multiple of 8 from 16 to 256.
        state: float32 `[batch, heads, d, e]`, e likewise.
        attn_scale: float32 `[batch]`, see `mean_scale`. Not differentiable.
        seq_offsets, max_seq_len: as in `qla`.
        norm_eps: if given, rows are divided by their root mean square first.
        activation, state_activation: phi1, on the queries, and phi2, on the scaled state.

    Returns:
        `[total, heads, e]` in the dtype of `x`.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    x, weight_q = autocast(x, weight_q)
    options = {"norm_eps": norm_eps, "activation": activation, "state_activation": state_activation}
    if not differentiates_on_cpu(x, weight_q, state):
        return torch.ops.vista.projected_qla_apply(x, weight_q, state, attn_scale, seq_offsets, max_seq_len, **options)
    with torch.no_grad():
        empty = torch.zeros_like(seq_offsets), 0
        torch.ops.vista.projected_qla_apply(no_rows(x), weight_q, state, attn_scale, *empty, **options)
    q = linear(_normalised(x, seq_offsets, norm_eps), weight_q).unflatten(1, (state.shape[1], -1))
    return qla_apply(
        q, state, attn_scale, seq_offsets, max_seq_len, activation=activation, state_activation=state_activation
    )


def _normalised(x: Tensor, seq_offsets: Tensor, norm_eps: float | None) -> Tensor:
    """The rows that are projected; on a CPU, with zeros for padding."""
    if torch.compiler.is_compiling() or int(seq_offsets[-1]) != x.shape[0]:
        x = _without_padding(x, seq_offsets)
    return x if norm_eps is None else rms_norm(x, x.new_ones(x.shape[1]), norm_eps=norm_eps)


@register_fake("vista::projected_qla_state")
def _(
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    heads: int,
    norm_eps: float | None = None,
    activation: str = "silu",
) -> Tensor:
    dims = weight_k.shape[0] // heads, weight_v.shape[0] // heads
    return x.new_empty((seq_offsets.shape[0] - 1, heads, *dims), dtype=torch.float32)


@register_fake("vista::projected_qla_state_backward")
def _(grad_state: Tensor, x: Tensor, weight_k: Tensor, weight_v: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight_k.shape[0])), x.new_empty((x.shape[0], weight_v.shape[0]))


@register_fake("vista::projected_qla_apply")
def _(x: Tensor, weight_q: Tensor, state: Tensor, *args: Any, **_: Any) -> Tensor:
    return x.new_empty((x.shape[0], state.shape[1], state.shape[3]))


@register_fake("vista::projected_qla_apply_backward")
def _(grad_out: Tensor, x: Tensor, weight_q: Tensor, state: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
    grad_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    return x.new_empty((x.shape[0], weight_q.shape[0])), grad_state


@register_fake("vista::rms_norm_backward")
def _(grad_rows: Tensor, x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _grad_x(x: Tensor, norm_eps: float | None, *products: tuple[Tensor, Tensor]) -> Tensor:
    """From the gradients of the projections, already divided as `x` was, and their weights."""
    (rows, weight), *others = products
    with without_autocast(x):  # which would not cast what is added to in place
        grad = rows @ weight
        for rows, weight in others:
            grad.addmm_(rows, weight)
    if norm_eps is None:
        return grad
    grad_x: Tensor = torch.ops.vista.rms_norm_backward(grad, x, norm_eps=norm_eps)
    return grad_x


def _without_padding(x: Tensor, seq_offsets: Tensor) -> Tensor:
    """Zeros beyond the last sequence, where the gradients of projections are zeros: NaN there would spoil a product."""
    rows = torch.arange(x.shape[0], device=x.device) < seq_offsets[-1]
    return torch.where(rows[:, None], x, 0)


def _state_setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    x, weight_k, weight_v, seq_offsets, max_seq_len = inputs
    ctx.save_for_backward(x, weight_k, weight_v, seq_offsets)
    ctx.max_seq_len = max_seq_len
    ctx.options = keyword_only_inputs


def _state_backward(ctx: Any, grad_state: Tensor) -> Any:
    x, weight_k, weight_v, seq_offsets = ctx.saved_tensors
    x = _without_padding(x, seq_offsets)
    grad_k, grad_v = torch.ops.vista.projected_qla_state_backward(
        grad_state, x, weight_k, weight_v, seq_offsets, ctx.max_seq_len, **ctx.options
    )
    of_x, of_weight_k, of_weight_v, *_ = ctx.needs_input_grad
    return (
        _grad_x(x, ctx.options["norm_eps"], (grad_k, weight_k), (grad_v, weight_v)) if of_x else None,
        grad_k.t() @ x if of_weight_k else None,
        grad_v.t() @ x if of_weight_v else None,
        None,
        None,
    )


def _apply_setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    x, weight_q, state, attn_scale, seq_offsets, max_seq_len = inputs
    refuse_scale_gradient("projected_qla_apply", attn_scale)
    ctx.save_for_backward(x, weight_q, state, attn_scale, seq_offsets)
    ctx.max_seq_len = max_seq_len
    ctx.options = keyword_only_inputs


def _apply_backward(ctx: Any, grad_out: Tensor) -> Any:
    x, weight_q, state, attn_scale, seq_offsets = ctx.saved_tensors
    x = _without_padding(x, seq_offsets)
    grad_q, grad_state = torch.ops.vista.projected_qla_apply_backward(
        grad_out, x, weight_q, state, attn_scale, seq_offsets, ctx.max_seq_len, **ctx.options
    )
    of_x, of_weight_q, *_ = ctx.needs_input_grad
    return (
        _grad_x(x, ctx.options["norm_eps"], (grad_q, weight_q)) if of_x else None,
        grad_q.t() @ x if of_weight_q else None,
        grad_state,
        None,
        None,
        None,
    )


torch.library.register_autograd("vista::projected_qla_state", _state_backward, setup_context=_state_setup)
torch.library.register_autograd("vista::projected_qla_apply", _apply_backward, setup_context=_apply_setup)
for _name in ("projected_qla_state_backward", "projected_qla_apply_backward", "rms_norm_backward"):
    forbid_double_backward(f"vista::{_name}")
