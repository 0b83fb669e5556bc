"""The feed-forward half of a layer."""

from __future__ import annotations

from torch import Tensor, nn


class SGLU(nn.Module):
    """Simple gated linear unit: `((y W_u) * (y W_v)) W_o`, no activation in it (TransNormerLLM; paper section 3.2).

    Args:
        dim: of the rows.
        hidden: width of the gate.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Rows `[..., dim]` to rows of the same shape."""
        return self.down(self.up(y) * self.gate(y))
