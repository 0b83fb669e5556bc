"""A linear layer with its SiLU, and the MLP that begins with one."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from vista_ext import ops


class LinearSiLU(nn.Linear):
    """`silu(x W^T + b)` by `ops.linear_silu`; parameters and their names are those of `torch.nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows `[..., in_features]` to `[..., out_features]`; float64 and a row by itself, which the op does not take,
        by torch."""
        if x.dtype == torch.float64 or x.dim() < 2:
            return functional.silu(super().forward(x))
        return ops.linear_silu(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


def silu_mlp(dim: int, hidden: int) -> nn.Sequential:
    """Rows `[..., dim]` to rows of the same shape through one hidden layer.

    The layers are called "0" and "2" as in `Sequential(Linear, SiLU, Linear)`, so that checkpoints of either load into
    the other.

    Args:
        dim: of the rows.
        hidden: width of the hidden layer.
    """
    return nn.Sequential(OrderedDict({"0": LinearSiLU(dim, hidden), "2": nn.Linear(hidden, dim)}))
