"""The reconstruction loss: a summary must suffice to predict the history's next item (paper section 3.2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vista_ext.models.config import VistaConfig
from vista_ext.nn import last_rows, silu_mlp


class Reconstruction(nn.Module):
    """A causal transformer block over `[summary; events]`, judged by how well event i predicts event i + 1.

    Args:
        config: sizes; `reconstruction_window` bounds the quadratic block.
    """

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp = silu_mlp(config.dim, config.hidden)
        self.predict = nn.Linear(config.dim, config.dim)

    def decode(self, summaries: Tensor, events: Tensor) -> Tensor:
        """`v` of the paper: `[n, m, dim]` from summaries `[n, seeds, dim]` and events `[n, m, dim]`; row i depends on
        the summary and on events 1 to i."""
        rows = torch.cat([summaries, events], 1)
        qkv = self.qkv(self.norm(rows)).view(*rows.shape[:2], 3, self.config.heads, self.config.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        rows = rows + self.out(attended.transpose(1, 2).flatten(2))
        rows = rows + self.mlp(self.mlp_norm(rows))
        return self.predict(rows[:, summaries.shape[1] :])

    def forward(self, summaries: Tensor, events: Tensor, seq_offsets: Tensor, whole: Tensor) -> Tensor:
        """The loss, a scalar: squared error, mean over predicted events and dimensions; 0 if there is none.

        Args:
            summaries: `[n, seeds, dim]`.
            events: `[total, dim]`, embedded events, packed.
            seq_offsets: int64 `[n + 1]`.
            whole: `[total, dim]`, `events` without dropout: what is predicted. An event is its item, its action and
                its age, all of which a summary should keep; what dropout takes from it nobody could predict.
        """
        window, valid = last_rows(events, seq_offsets, self.config.reconstruction_window)
        targets = last_rows(whole, seq_offsets, self.config.reconstruction_window)[0][:, 1:]
        if self.config.reconstruct_constants:
            targets = targets.detach()
        error = (self.decode(summaries, window)[:, :-1] - targets).square().mean(-1)
        predicted = valid[:, 1:]
        return torch.where(predicted, error, 0.0).sum() / predicted.sum().clamp(min=1)
