"""A linear layer and its SiLU."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition. Arguments as in `ops.linear_silu`."""
    pre = torch.einsum("ni,oi->no", x, weight)
    if bias is not None:
        pre = pre + bias
    return pre / (1 + torch.exp(-pre))
