"""The linear layer of packed rows."""

from __future__ import annotations

from torch import Tensor, nn

from vista_ext import ops


class Linear(nn.Linear):
    """`torch.nn.Linear` by `ops.linear`; parameters and their names are torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows `[..., in_features]` to `[..., out_features]`."""
        return ops.linear(x, self.weight, self.bias)
