"""The feed-forward half of a layer."""

from __future__ import annotations

from torch import Tensor, nn

from vista_ext import ops
from vista_ext.nn.linear import Linear


class SGLU(nn.Module):
    """Simple gated linear unit: `((y W_u) * (y W_v)) W_o`, no activation in it (TransNormerLLM; paper section 3.2).

    On a GPU, in bfloat16 or float16 and in sizes that are built (`ops.sglu_has_kernel`), all of it is one kernel, which
    stores nothing but its rows; anything else takes torch's products. The two agree within rounding.

    Args:
        dim: of the rows.
        hidden: width of the gate.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(dim, hidden, bias=False)
        self.gate = Linear(dim, hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.RMSNorm | None = None, *, residual: bool = False) -> Tensor:
        """Rows `[..., dim]` to rows of the same shape.

        Args:
            x: the rows.
            norm: applied to them first.
            residual: add x to the result.
        """
        eps = None if norm is None else norm.eps
        if ops.sglu_has_kernel(x, self.up.weight) and (norm is None or eps is not None):
            up, gate = self.up.weight, self.gate.weight
            if norm is not None and norm.weight is not None:
                up, gate = up * norm.weight, gate * norm.weight
            rows = x.reshape(-1, x.shape[-1])
            return ops.sglu(rows, up, gate, self.down.weight, norm_eps=eps, residual=residual).view(x.shape)
        y = x if norm is None else norm(x)
        out: Tensor = self.down(ops.gated_products(y, self.up.weight, self.gate.weight))
        return x + out if residual else out
