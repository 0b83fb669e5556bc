"""Quasi-linear attention, twice (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    # The clamp keeps exp finite on the branch that is not taken: an infinity there would turn its gradient into NaN.
    "shifted_elu": lambda x: torch.where(x >= 1, x, torch.exp(x.clamp(max=1) - 1)),
    "relu": torch.relu,
    "identity": lambda x: x,
}


def qla_by_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    *,
    num_targets: Tensor | None = None,
    attn_scale: Tensor | None = None,
    activation: str = "silu",
    state_activation: str = "silu",
) -> Tensor:
    """The definition: per sequence the state, its map, and the target rows' own term. Arguments as in `ops.qla`."""
    phi1, phi2 = ACTIVATIONS[activation], ACTIVATIONS[state_activation]
    out = torch.zeros_like(v)
    for b in range(len(seq_offsets) - 1):
        begin, end = int(seq_offsets[b]), int(seq_offsets[b + 1])
        sources = end - (0 if num_targets is None else int(num_targets[b]))
        scale = 1 / max(1, sources - begin) if attn_scale is None else attn_scale[b].to(q.dtype)
        queries, keys, values = phi1(q[begin:end]), phi1(k[begin:end]), v[begin:end]
        n = sources - begin
        state = torch.einsum("nhd,nhe->hde", keys[:n], values[:n])
        rows = torch.einsum("nhd,hde->nhe", queries, phi2(scale * state))
        own = scale * (queries[n:] * keys[n:]).sum(-1, keepdim=True) * values[n:]
        out[begin:end] = torch.cat([rows[:n], rows[n:] + own])
    return out


def qla_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    *,
    num_targets: Tensor | None = None,
    attn_scale: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """With phi2 the identity QLA is unnormalised attention: here as an n x n matrix of scores under a mask.

    Shares nothing with `qla_by_state` but the activation: a second, independent formula.
    """
    phi1 = ACTIVATIONS[activation]
    out = torch.zeros_like(v)
    for b in range(len(seq_offsets) - 1):
        begin, end = int(seq_offsets[b]), int(seq_offsets[b + 1])
        length = end - begin
        sources = length - (0 if num_targets is None else int(num_targets[b]))
        scale = 1 / max(1, sources) if attn_scale is None else attn_scale[b].to(q.dtype)
        column = torch.arange(length, device=q.device)
        sees = (column[None, :] < sources) | (column[None, :] == column[:, None])
        scores = torch.einsum("ihd,jhd->hij", phi1(q[begin:end]), phi1(k[begin:end])) * scale
        out[begin:end] = torch.einsum("hij,jhe->ihe", scores * sees, v[begin:end])
    return out
