"""The norm of all layers."""

from __future__ import annotations

from torch import Tensor, nn

from vista_ext import ops


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension by `ops.rms_norm`; parameters and their names are torch's.

    Args:
        dim: of the rows.
        eps: added to the mean square.
    """

    eps: float

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Rows `[..., dim]` to rows of the same shape."""
        return ops.rms_norm(x, self.weight, norm_eps=self.eps)
