"""The feed-forward half of a layer (paper section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def sglu_by_products(
    x: Tensor, up: Tensor, gate: Tensor, down: Tensor, *, norm_eps: float | None = None, residual: bool = False
) -> Tensor:
    """The definition: three products and an element-wise one, of rows that torch normalises."""
    y = x if norm_eps is None else torch.nn.functional.rms_norm(x, x.shape[-1:], eps=norm_eps)
    out = ((y @ up.t()) * (y @ gate.t())) @ down.t()
    return x + out if residual else out


def sglu_by_columns(
    x: Tensor, up: Tensor, gate: Tensor, down: Tensor, *, norm_eps: float | None = None, residual: bool = False
) -> Tensor:
    """One hidden column at a time: `sum_j <y, up_j> <y, gate_j> down_j`, the norm applied to each column's product."""
    square = torch.ones_like(x[:, :1]) if norm_eps is None else 1 / (x.square().mean(1, keepdim=True) + norm_eps)
    out = x.clone() if residual else torch.zeros_like(x)
    for j in range(len(up)):
        pair = (x * up[j]).sum(1, keepdim=True) * (x * gate[j]).sum(1, keepdim=True)
        out = out + square * pair * down[:, j]
    return out
