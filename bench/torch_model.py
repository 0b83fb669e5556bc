"""VISTA in torch's own operators, as one would write it without this package: the peer of the whole model.

Users are a dense batch, padded to the longest history, candidates likewise; products are batched, softmax attention is
torch's where it can express what is asked. Parameters have the names and shapes of `vista_ext.models.Vista`, so that a
state dict of one loads into the other. What the published model has is here, not every choice of `VistaConfig`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from vista_ext.data.batch import Candidates, FeatureSchema, Histories
from vista_ext.models import Vista, VistaConfig
from vista_ext.models.decoder import Reconstruction
from vista_ext.models.encoders import Encoded, Events
from vista_ext.models.summarizer import Summarizer
from vista_ext.models.target import TargetAttention
from vista_ext.models.vista import VistaEncoder
from vista_ext.nn import QlaBlock, RMSNorm, TargetBlock


def with_norms_of_torch(module: nn.Module) -> nn.Module:
    """The module, its norms replaced by torch's with the same parameters."""
    for name, part in list(module.named_modules()):
        if isinstance(part, RMSNorm):
            norm = nn.RMSNorm(part.normalized_shape, part.eps)
            norm.weight = part.weight
            module.set_submodule(name, norm)
    return module


def qla_layer(block: QlaBlock, x: Tensor, valid: Tensor | None, scale: Tensor | float, queried: int) -> Tensor:
    """A stage-1 layer on `[n, rows, dim]`, all of them sources: its first `queried` rows.

    Args:
        valid: bool `[n, rows]`, false for padding; None if there is none.
        scale: `[n, 1, 1, 1]`, or one number: 1 / sources.
    """
    y = block.norm(x)
    k, v = _heads(linear(y, block.key.weight), block.heads), _heads(linear(y, block.value.weight), block.heads)
    k = silu(k) if valid is None else silu(k) * valid[:, None, :, None]
    state = silu((k.transpose(2, 3) @ v) * scale)
    q = silu(_heads(linear(y[:, :queried], block.query.weight), block.heads))
    attended = block.head_norm((q @ state).transpose(1, 2)).flatten(2)
    x = x[:, :queried] + linear(attended, block.out.weight)
    y, gate = block.sglu_norm(x), block.sglu
    return x + linear(linear(y, gate.up.weight) * linear(y, gate.gate.weight), gate.down.weight)


def target_layer(block: TargetBlock, rows: Tensor, memory: tuple[Tensor, Tensor], sees_itself: bool) -> Tensor:
    """A stage-2 layer on `[n, rows, dim]`, with keys and values `[n, heads, seeds, head_dim]` of the memory."""
    y = block.norm(rows)
    q, (keys, values) = _heads(block.query(y), block.heads), memory
    if sees_itself:
        # One softmax over the memory's scores and the row's own: torch's fused attention has no such row.
        own = (q * _heads(block.key(y), block.heads)).sum(-1, keepdim=True)
        weights = (torch.cat([q @ keys.transpose(2, 3), own], -1) * q.shape[-1] ** -0.5).softmax(-1)
        attended = weights[..., :-1] @ values + weights[..., -1:] * _heads(block.value(y), block.heads)
    else:
        attended = scaled_dot_product_attention(q, keys, values)
    rows = rows + linear(attended.transpose(1, 2).flatten(2), block.out.weight)
    return rows + _mlp(block.mlp, block.mlp_norm(rows))


class TorchVista(Vista):
    """The model of `vista_ext.models.Vista` in torch's operators.

    Args:
        schema, config: as for `Vista`.
    """

    def __init__(self, schema: FeatureSchema, config: VistaConfig) -> None:
        chosen = (config.seeds, config.activation, config.state_activation, config.recent_events, config.dropout)
        if chosen != ("source", "silu", "silu", 0, 0.0):
            raise ValueError(f"the published model without dropout is what there is, found {config}")
        super().__init__(schema, config)
        self.encoder = TorchEncoder(config)
        with_norms_of_torch(self)

    def summarize_whole(self, histories: Histories) -> Tensor:
        """The summaries, from all events at once."""
        return summarize(self.encoder.summarizer, self.embed(histories))

    def score_whole(self, summaries: Tensor, candidates: Candidates) -> Tensor:
        """The logits of a request of each summary."""
        rows = self.items(candidates.items).to(self.dtype)
        return self.head(attend(self.encoder.stage2.target, summaries, rows, candidates), rows, candidates)


class TorchEncoder(VistaEncoder):
    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        summaries = summarize(self.summarizer, events)
        losses = {}
        if self.reconstruction is not None and self.training:
            loss = reconstruct(self.reconstruction, summaries, events)
            losses["reconstruction"] = self.config.reconstruction_weight * loss
        attended = attend(self.stage2.target, summaries.index_select(0, kv_index), rows, candidates)
        return Encoded(attended, losses)


def summarize(summarizer: Summarizer, events: Events) -> Tensor:
    """`[n, seeds, dim]`: the seeds in front of the history, through every layer."""
    lengths = events.seq_offsets.diff()
    seeds = summarizer.begin(lengths, events.rows.dtype)
    history, valid = _padded(events.rows, events.seq_offsets, events.max_seq_len)
    count = seeds.shape[1]
    x = torch.cat([seeds, history], 1)
    if valid is not None:
        valid = torch.cat([valid.new_ones(valid.shape[0], count), valid], 1)
    scale = (1.0 / (lengths + count)).to(x.dtype)[:, None, None, None] if summarizer.config.scale == "mean" else 1.0
    for number, block in enumerate(summarizer.layers):
        last = number + 1 == len(summarizer.layers)
        x = qla_layer(cast(QlaBlock, block), x, valid, scale, count if last else x.shape[1])
    return summarizer.norm(x[:, :count])


def attend(target: TargetAttention, summaries: Tensor, rows: Tensor, candidates: Candidates) -> Tensor:
    """Candidate rows `[m, dim]` after stage 2; request r reads `summaries[r]`."""
    padded, valid = _padded(rows, candidates.offsets, candidates.max_len)
    for number, layer in enumerate(target.layers):
        block = cast(TargetBlock, layer)
        y = block.norm(summaries)
        memory = _heads(block.key(y), block.heads), _heads(block.value(y), block.heads)
        padded = target_layer(block, padded, memory, True)
        if number + 1 < len(target.layers):
            summaries = target_layer(block, summaries, memory, False)
    packed = padded.flatten(0, 1) if valid is None else padded[valid]
    return target.norm(packed)


def reconstruct(decoder: Reconstruction, summaries: Tensor, events: Events) -> Tensor:
    """The reconstruction loss on windows padded to the longest."""
    config, count = decoder.config, summaries.shape[1]
    window, length = config.reconstruction_window, events.max_seq_len
    rows, valid = _padded(events.rows, events.seq_offsets, length)
    whole = _padded(events.whole, events.seq_offsets, length)[0]
    if length > window:
        rows, whole, valid = (_newest(x, events.seq_offsets, window) for x in (rows, whole, valid))
    x = torch.cat([summaries, rows], 1)
    qkv = decoder.qkv(decoder.norm(x)).view(*x.shape[:2], 3, config.heads, config.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = (x + decoder.out(attended))[:, count:-1]
    x = x + _mlp(decoder.mlp, decoder.mlp_norm(x))
    targets = whole[:, 1:].detach() if config.reconstruct_constants else whole[:, 1:]
    error = (decoder.predict(x).float() - targets.float()).square().mean(-1)
    if valid is None:
        return error.mean()
    return torch.where(valid[:, 1:], error, 0.0).sum() / valid[:, 1:].sum().clamp(min=1)


def _mlp(layers: nn.Sequential, rows: Tensor) -> Tensor:
    first, last = cast(nn.Linear, layers[0]), cast(nn.Linear, layers[-1])
    return linear(silu(linear(rows, first.weight, first.bias)), last.weight, last.bias)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """`[n, rows, heads * d]` to `[n, heads, rows, d]`."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _padded(rows: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor | None]:
    """Packed rows as `[n, longest, dim]` and what of them is there; None if all is, and nothing needs a copy."""
    users = offsets.shape[0] - 1
    if rows.shape[0] == users * longest:
        return rows.view(users, longest, -1), None
    at = torch.arange(longest, device=rows.device)
    valid = at < offsets.diff()[:, None]
    index = (offsets[:-1, None] + at).clamp(max=max(rows.shape[0] - 1, 0))
    return rows[index] * valid[..., None], valid


def _newest(x: Tensor | None, offsets: Tensor, window: int) -> Tensor | None:
    """The last `window` rows of each user of a padded batch, without padding in front."""
    if x is None:
        return None
    first = (offsets.diff() - window).clamp(min=0)[:, None]
    at = first + torch.arange(window, device=x.device)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], at]
