"""One stage-1 layer: quasi-linear attention, then SGLU (paper section 3.2; spec section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista_ext import ops
from vista_ext.nn.linear import Linear
from vista_ext.nn.rms_norm import RMSNorm
from vista_ext.nn.sglu import SGLU
from vista_ext.ops.qla import Activation


def makes_projections_on_the_way(x: Tensor, head_dim: int) -> bool:
    """Whether a layer leaves its projections to `ops.projected_qla_state` and `ops.projected_qla_apply`.

    On a GPU, where kernels are built for the rows: that saves the traffic of keys, values and queries, and what
    autograd would keep of them, which at long histories is more than the memory of the device. Elsewhere those ops are
    composed of the same products as the layer, only in smaller pieces: it keeps the products of all rows at once.
    """
    if not x.is_cuda or head_dim not in (32, 64, 128) or x.shape[-1] % 8 != 0:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


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
        self.norm = RMSNorm(dim)
        self.query = Linear(dim, inner, bias=False)
        self.key = Linear(dim, inner, bias=False)
        self.value = Linear(dim, inner, bias=False)
        self.head_norm = RMSNorm(head_dim)
        self.out = Linear(inner, dim, bias=False)
        self.sglu_norm = RMSNorm(dim)
        self.sglu = SGLU(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[total, heads, head_dim]` each."""
        y = self.norm(x)
        return self._split(self.key(y)), self._split(self.value(y))

    def state(self, x: Tensor, seq_offsets: Tensor, max_seq_len: int) -> Tensor:
        """The float32 state `[n, heads, head_dim, head_dim]` of source rows `[total, dim]`; states of parts add up."""
        if not makes_projections_on_the_way(x, self.head_dim):
            return ops.qla_state(*self.keys_values(x), seq_offsets, max_seq_len, activation=self.activation)
        return ops.projected_qla_state(
            x,
            self._folded(self.key),
            self._folded(self.value),
            seq_offsets,
            max_seq_len,
            heads=self.heads,
            norm_eps=self.norm.eps,
            activation=self.activation,
        )

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
        attended = self._attend(x, state, attn_scale, seq_offsets, max_seq_len, own)
        x = x + self.dropout(self.out(self.head_norm(attended).flatten(1)))
        if self.training and self.dropout.p > 0:
            return x + self.dropout(self.sglu(x, self.sglu_norm))
        rows: Tensor = self.sglu(x, self.sglu_norm, residual=True)
        return rows

    def _attend(
        self,
        x: Tensor,
        state: Tensor,
        attn_scale: Tensor,
        seq_offsets: Tensor,
        max_seq_len: int,
        own: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        if own is None and makes_projections_on_the_way(x, self.head_dim):
            return ops.projected_qla_apply(
                x,
                self._folded(self.query),
                state,
                attn_scale,
                seq_offsets,
                max_seq_len,
                norm_eps=self.norm.eps,
                activation=self.activation,
                state_activation=self.state_activation,
            )
        self_k, self_v = own if own is not None else (None, None)
        return ops.qla_apply(
            self._split(self.query(self.norm(x))),
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

    def _folded(self, projection: nn.Linear) -> Tensor:
        """The projection of rows that the norm has divided, but not weighted."""
        return projection.weight * self.norm.weight

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.heads, self.head_dim)
