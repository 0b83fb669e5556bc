"""Quasi-linear attention on projections of the rows, step by step (paper section 3.2)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vista_ext.reference.qla import ACTIVATIONS


def normalised(x: Tensor, norm_eps: float | None) -> Tensor:
    """Rows divided by their root mean square; as they are without `norm_eps`."""
    return x if norm_eps is None else x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm_eps)


def projected_qla_state(
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    seq_offsets: Tensor,
    *,
    heads: int,
    norm_eps: float | None = None,
    activation: str = "silu",
) -> Tensor:
    """`[batch, heads, d, e]` in the dtype of `x`. Arguments as in `ops.projected_qla_state`."""
    y = normalised(x, norm_eps)
    keys = ACTIVATIONS[activation](y @ weight_k.t()).unflatten(1, (heads, -1))
    values = (y @ weight_v.t()).unflatten(1, (heads, -1))
    states = [torch.einsum("nhd,nhe->hde", keys[begin:end], values[begin:end]) for begin, end in pairwise(seq_offsets)]
    return torch.stack(states) if states else x.new_zeros((0, heads, keys.shape[2], values.shape[2])) + 0 * x.sum()


def projected_qla_apply(
    x: Tensor,
    weight_q: Tensor,
    state: Tensor,
    attn_scale: Tensor,
    seq_offsets: Tensor,
    *,
    norm_eps: float | None = None,
    activation: str = "silu",
    state_activation: str = "silu",
) -> Tensor:
    """`[total, heads, e]`. Arguments as in `ops.projected_qla_apply`."""
    heads = state.shape[1]
    queries = ACTIVATIONS[activation](normalised(x, norm_eps) @ weight_q.t()).unflatten(1, (heads, -1))
    maps = ACTIVATIONS[state_activation](attn_scale.to(state.dtype)[:, None, None, None] * state).to(x.dtype)
    parts = [
        torch.einsum("nhd,hde->nhe", queries[begin:end], maps[b])
        for b, (begin, end) in enumerate(pairwise(seq_offsets))
    ]
    padding = x.new_zeros((len(x) - int(seq_offsets[-1]), heads, state.shape[3]))
    return torch.cat([*parts, padding])
