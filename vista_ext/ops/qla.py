"""Quasi-linear attention (paper section 3.2): linear in the history, candidates as target rows.

Per sequence and head, over source rows j: state `Z = sum_j phi1(k_j)^T v_j`, map `P = phi2(attn_scale * Z)`. Every row
gets `phi1(q) P`; a target row (the last `num_targets` of a sequence) adds its own term
`attn_scale * <phi1(q), phi1(k)> v`. A target sees the sources and itself, never another target.

Results are the same bits whatever the number of threads and whatever else is in the batch.

On a GPU no op waits for the device, so what `seq_offsets` and `num_targets` hold is checked there: where they are wrong
the kernel asserts, as torch's own indexing does, and the error surfaces at the next synchronization.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vista_ext.ops._autograd import forbid_double_backward, refuse_scale_gradient, register_fake

Activation = Literal["silu", "shifted_elu", "relu", "identity"]


def mean_scale(seq_offsets: Tensor, num_targets: Tensor | None = None) -> Tensor:
    """The default `attn_scale`: 1 / number of source rows of each sequence, 1 where there is none.

    Args:
        seq_offsets: int64 or int32 `[batch + 1]`.
        num_targets: int64 or int32 `[batch]`, none by default.

    Returns:
        float32 `[batch]`.
    """
    sources = seq_offsets.diff()
    if num_targets is not None:
        sources = sources - num_targets
    return 1.0 / sources.clamp(min=1).to(torch.float32)


def qla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    num_targets: Tensor | None = None,
    attn_scale: Tensor | None = None,
    activation: Activation = "silu",
    state_activation: Activation = "silu",
    allow_tf32: bool = False,
    return_state: bool = False,
) -> Any:
    """Quasi-linear attention over packed sequences.

    Args:
        q, k: `[total, heads, d]`, float32, bfloat16 or float16; d a multiple of 8 from 16 to 256.
        v: `[total, heads, e]`, same dtype; e likewise, may differ from d.
        seq_offsets: int64 or int32 `[batch + 1]`, from 0 to at most total. Rows beyond the last are padding: their
            outputs and gradients are zero.
        max_seq_len: at least the longest sequence.
        num_targets: int64 or int32 `[batch]`, how many last rows of each sequence are targets; none by default.
        attn_scale: float32 `[batch]`, the factor on the state before `state_activation` and on the own term;
            `mean_scale(seq_offsets, num_targets)` by default, `torch.ones(batch)` for a plain sum. Not differentiable.
        activation: phi1, on queries and keys.
        state_activation: phi2, on the scaled state.
        allow_tf32: on a GPU, products of float32 inputs in tf32; elsewhere and for other dtypes without effect.
        return_state: also return the state.

    Returns:
        `[total, heads, e]` in the inputs' dtype; with `return_state` a pair with the float32 state
        `[batch, heads, d, e]` (unscaled; differentiable). NaN stays NaN, in whatever depends on it and nowhere else:
        in a source's key or value, the head's rows of that sequence; in a query or a target, that row. On a CPU with
        AMX and float32 rows of d and e from 128 on, an infinity becomes NaN, and values below 2^-110 lose precision
        (below 2^-126: count as zero).

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    out, state = torch.ops.vista.qla(
        q,
        k,
        v,
        seq_offsets,
        max_seq_len,
        num_targets,
        attn_scale,
        activation=activation,
        state_activation=state_activation,
        allow_tf32=allow_tf32,
    )
    return (out, state) if return_state else out


def qla_state(
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    num_targets: Tensor | None = None,
    activation: Activation = "silu",
    allow_tf32: bool = False,
) -> Tensor:
    """The state alone: the sum over source rows of phi1(k)^T v. States of chunks, devices and new events add up.

    Args:
        k, v, seq_offsets, max_seq_len, num_targets, activation, allow_tf32: as in `qla`.

    Returns:
        float32 `[batch, heads, d, e]`, unscaled; zero for a sequence without source rows.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    return torch.ops.vista.qla_state(
        k, v, seq_offsets, max_seq_len, num_targets, activation=activation, allow_tf32=allow_tf32
    )


def qla_apply(
    q: Tensor,
    state: Tensor,
    attn_scale: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    num_targets: Tensor | None = None,
    self_k: Tensor | None = None,
    self_v: Tensor | None = None,
    activation: Activation = "silu",
    state_activation: Activation = "silu",
    allow_tf32: bool = False,
) -> Tensor:
    """Apply a state to any query rows: the seeds only, the candidates only, or all.

    Args:
        q: `[total, heads, d]`, query rows packed by sequence.
        state: float32 `[batch, heads, d, e]`, from `qla_state`.
        attn_scale: float32 `[batch]`, see `mean_scale`. Not differentiable.
        seq_offsets: int64 or int32 `[batch + 1]`, boundaries of the query rows.
        max_seq_len: at least the longest group of query rows.
        num_targets, self_k, self_v: together or not at all: the last `num_targets` rows of each group add their own
            term with these keys and values, packed like `q`.
        activation, state_activation, allow_tf32: as in `qla`.

    Returns:
        `[total, heads, e]` in the dtype of `q`.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    return torch.ops.vista.qla_apply(
        q,
        state,
        attn_scale,
        seq_offsets,
        max_seq_len,
        self_k,
        self_v,
        num_targets,
        activation=activation,
        state_activation=state_activation,
        allow_tf32=allow_tf32,
    )


def _state_like(rows: Tensor, seq_offsets: Tensor, d: Any, e: Any) -> Tensor:
    return rows.new_empty((seq_offsets.shape[0] - 1, rows.shape[1], d, e), dtype=torch.float32)


@register_fake("vista::qla")
def _(
    q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, max_seq_len: int, *args: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v, memory_format=torch.contiguous_format), _state_like(
        q, seq_offsets, q.shape[2], v.shape[2]
    )


@register_fake("vista::qla_backward")
def _(
    grad_out: Tensor, grad_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v


@register_fake("vista::qla_state")
def _(k: Tensor, v: Tensor, seq_offsets: Tensor, max_seq_len: int, *args: Any, **_: Any) -> Tensor:
    return _state_like(k, seq_offsets, k.shape[2], v.shape[2])


@register_fake("vista::qla_state_backward")
def _(grad_state: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
    k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    return k, v


@register_fake("vista::qla_apply")
def _(q: Tensor, state: Tensor, *args: Any, **_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], state.shape[3]))


@register_fake("vista::qla_apply_backward")
def _(
    grad_out: Tensor,
    q: Tensor,
    state: Tensor,
    attn_scale: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    self_k: Tensor | None = None,
    *args: Any,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own_rows = 0 if self_k is None else q.shape[0]
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(state, memory_format=torch.contiguous_format),
        q.new_empty((own_rows, q.shape[1], q.shape[2])),
        q.new_empty((own_rows, q.shape[1], state.shape[3])),
    )


def _qla_setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    q, k, v, seq_offsets, max_seq_len, num_targets, attn_scale = inputs
    refuse_scale_gradient("qla", attn_scale)
    ctx.save_for_backward(q, k, v, output[1], seq_offsets, num_targets, attn_scale)
    ctx.max_seq_len = max_seq_len
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _qla_backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> Any:
    q, k, v, state, seq_offsets, num_targets, attn_scale = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(v)
    grads = torch.ops.vista.qla_backward(
        grad_out,
        grad_state,
        q,
        k,
        v,
        state,
        seq_offsets,
        ctx.max_seq_len,
        num_targets,
        attn_scale,
        **ctx.options,
    )
    return *grads, None, None, None, None


def _state_setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    k, v, seq_offsets, max_seq_len, num_targets = inputs
    ctx.save_for_backward(k, v, seq_offsets, num_targets)
    ctx.max_seq_len = max_seq_len
    ctx.options = keyword_only_inputs


def _state_backward(ctx: Any, grad_state: Tensor) -> Any:
    k, v, seq_offsets, num_targets = ctx.saved_tensors
    grads = torch.ops.vista.qla_state_backward(
        grad_state, k, v, seq_offsets, ctx.max_seq_len, num_targets, **ctx.options
    )
    return *grads, None, None, None


def _apply_setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    q, state, attn_scale, seq_offsets, max_seq_len, self_k, self_v, num_targets = inputs
    refuse_scale_gradient("qla_apply", attn_scale)
    ctx.save_for_backward(q, state, attn_scale, seq_offsets, num_targets, self_k, self_v)
    ctx.max_seq_len = max_seq_len
    ctx.options = keyword_only_inputs


def _apply_backward(ctx: Any, grad_out: Tensor) -> Any:
    q, state, attn_scale, seq_offsets, num_targets, self_k, self_v = ctx.saved_tensors
    grad_q, grad_state, grad_self_k, grad_self_v = torch.ops.vista.qla_apply_backward(
        grad_out,
        q,
        state,
        attn_scale,
        seq_offsets,
        ctx.max_seq_len,
        self_k,
        self_v,
        num_targets,
        **ctx.options,
    )
    own = (None, None) if self_k is None else (grad_self_k, grad_self_v)
    return grad_q, grad_state, None, None, None, *own, None


torch.library.register_autograd("vista::qla", _qla_backward, setup_context=_qla_setup)
torch.library.register_autograd("vista::qla_state", _state_backward, setup_context=_state_setup)
torch.library.register_autograd("vista::qla_apply", _apply_backward, setup_context=_apply_setup)
for _name in ("qla_backward", "qla_state_backward", "qla_apply_backward"):
    forbid_double_backward(f"vista::{_name}")
