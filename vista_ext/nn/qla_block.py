"""One stage-1 layer: quasi-linear attention, then SGLU (paper section 3.2; spec section 2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from vista_ext import ops
from vista_ext.nn.sglu import SGLU
from vista_ext.ops.qla import Activation


class QlaBlock(nn.Module):
    """A layer in two parts, because the state between them is a sum: over seeds and history, chunks, devices.

    `state` reads source rows, `read` gives rows what they take from a state. Rows are packed `[total, dim]`.

    Args:
        dim: of the rows.
        heads, head_dim: of the attention; `head_dim` a multiple of 8 from 16 to 256.
        hidden: width of the SGLU.
        activation, state_activation: as in `ops.qla`.
        dropout: on what each half adds to the rows.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        hidden: int,
        *,
        activation: Activation = "silu",
        state_activation: Activation = "silu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.activation: Activation = activation
        self.state_activation: Activation = state_activation
        inner = heads * head_dim
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key = nn.Linear(dim, inner, bias=False)
        self.value = nn.Linear(dim, inner, bias=False)
        self.head_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.out = nn.Linear(inner, dim, bias=False)
        self.sglu_norm = nn.RMSNorm(dim, eps=1e-6)
        self.sglu = SGLU(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[total, heads, head_dim]` each."""
        y = self.norm(x)
        return self._split(self.key(y)), self._split(self.value(y))

    def state(self, keys: Tensor, values: Tensor, seq_offsets: Tensor, max_seq_len: int) -> Tensor:
        """The float32 state `[n, heads, head_dim, head_dim]` of source rows; states of parts add up."""
        return ops.qla_state(keys, values, seq_offsets, max_seq_len, activation=self.activation)

    def read(
        self,
        x: Tensor,
        state: Tensor,
        attn_scale: Tensor,
        seq_offsets: Tensor,
        max_seq_len: int,
        *,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The rows after this layer.

        Args:
            x: `[total, dim]`.
            state: of each sequence, as `state` gives it.
            attn_scale: float32 `[n]`, factor of each sequence.
            own: keys and values of `x` when its rows are targets, which add their own term.
        """
        queries = self._split(self.query(self.norm(x)))
        self_k, self_v = own if own is not None else (None, None)
        attended = ops.qla_apply(
            queries,
            state,
            attn_scale,
            seq_offsets,
            max_seq_len,
            self_k=self_k,
            self_v=self_v,
            num_targets=None if own is None else seq_offsets.diff(),
            activation=self.activation,
            state_activation=self.state_activation,
        )
        x = x + self.dropout(self.out(self.head_norm(attended).flatten(1)))
        if self.training and self.dropout.p > 0:
            return x + self.dropout(self.sglu(x, self.sglu_norm))
        rows: Tensor = self.sglu(x, self.sglu_norm, residual=True)
        return rows

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.heads, self.head_dim)
