"""One stage-2 layer: softmax attention on a memory, then an MLP (paper section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from vista_ext import ops
from vista_ext.nn.linear_silu import silu_mlp
from vista_ext.nn.rms_norm import RMSNorm


class TargetBlock(nn.Module):
    """A transformer layer whose keys and values come from memory rows, and from the row itself if it is a target.

    Args:
        dim: of the rows.
        heads, head_dim: of the attention; `head_dim` a multiple of 8 from 16 to 256.
        hidden: width of the MLP.
        dropout: on what each half adds to the rows.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        inner = heads * head_dim
        self.norm = RMSNorm(dim)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key = nn.Linear(dim, inner, bias=False)
        self.value = nn.Linear(dim, inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = silu_mlp(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def queries(self, rows: Tensor) -> Tensor:
        """`[total, heads, head_dim]`."""
        return self._split(self.query(self.norm(rows)))

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`[total, heads, head_dim]` each."""
        y = self.norm(rows)
        return self._split(self.key(y)), self._split(self.value(y))

    def forward(
        self,
        rows: Tensor,
        memory: tuple[Tensor, Tensor],
        q_offsets: Tensor,
        kv_offsets: Tensor,
        max_q_len: int,
        max_kv_len: int,
        *,
        kv_index: Tensor | None = None,
        sees_itself: bool = False,
    ) -> Tensor:
        """The rows `[total, dim]` after this layer; arguments as in `ops.jagged_cross_attn`.

        Args:
            memory: keys and values of the memory rows, from `keys_values`.
            sees_itself: every row also attends to itself (a candidate; a memory row is in the memory already).
        """
        self_k, self_v = self.keys_values(rows) if sees_itself else (None, None)
        attended = ops.jagged_cross_attn(
            self.queries(rows),
            *memory,
            q_offsets,
            kv_offsets,
            max_q_len,
            max_kv_len,
            kv_index=kv_index,
            self_k=self_k,
            self_v=self_v,
        )
        return self.finish(rows, attended)

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """The rows `[total, dim]` after this layer, given what they attended to, `[total, heads, head_dim]`."""
        rows = rows + self.dropout(self.out(attended.flatten(1)))
        return rows + self.dropout(self.mlp(self.mlp_norm(rows)))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.heads, self.head_dim)
