"""The plain torch compositions that the ops are compared with, each the fastest of the formulations tried.

Shapes are baked in (lengths are Python numbers), which is more than a real jagged batch grants a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu


def qla(lengths: Sequence[int], targets: int, *, activate_once: bool) -> Callable[..., Tensor]:
    """Per sequence two products in the heads' own layout; the targets' own terms of the whole batch at once.

    Args:
        lengths: of the sequences, targets included.
        targets: last rows of each sequence that are targets.
        activate_once: phi1 on the packed rows (faster forward and backward) or per sequence (faster forward).
    """
    ends = torch.tensor(lengths).cumsum(0)
    own_rows = (ends[:, None] - targets + torch.arange(targets)).flatten()
    own_scale = (1 / (torch.tensor(lengths) - targets)).repeat_interleave(targets)[:, None, None]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = (silu(q[own_rows]) * silu(k[own_rows])).sum(-1, keepdim=True) * own_scale.to(q.dtype) * v[own_rows]
        if activate_once:
            q, k = silu(q), silu(k)
        outs = []
        for q_b, k_b, v_b in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            sources = len(q_b) - targets
            k_b, v_b = k_b[:sources], v_b[:sources]
            if not activate_once:
                q_b, k_b = silu(q_b), silu(k_b)
            state = k_b.permute(1, 2, 0) @ v_b.transpose(0, 1)
            outs.append((q_b.transpose(0, 1) @ silu(state / sources)).transpose(0, 1))
        return torch.cat(outs).index_add(0, own_rows, own)

    return run


def cross_attn(groups: int, sequences: int, kv_index: Tensor | None) -> Callable[..., Tensor]:
    """Equal groups as a batch: SDPA, or with own items one softmax over the sequence's scores and the own score."""

    def run(q: Tensor, k: Tensor, v: Tensor, self_k: Tensor | None = None, self_v: Tensor | None = None) -> Tensor:
        def heads_first(x: Tensor, batch: int) -> Tensor:
            return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)

        query, keys, values = heads_first(q, groups), heads_first(k, sequences), heads_first(v, sequences)
        if kv_index is not None:
            keys, values = keys[kv_index], values[kv_index]
        if self_k is None or self_v is None:
            out = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        else:
            own = (query * heads_first(self_k, groups)).sum(-1, keepdim=True)
            scores = torch.cat([query @ keys.transpose(-1, -2), own], -1) * q.shape[-1] ** -0.5
            weights = scores.softmax(-1)
            out = weights[..., :-1] @ values + weights[..., -1:] * heads_first(self_v, groups)
        return out.transpose(1, 2).reshape(q.shape)

    return run


def dequantize(tokens: int, dim: int, scheme: str, group: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Rows at some slots from typed views of the cache: payload `[slots, bytes]`, float16 scales and biases."""

    def run(slots: Tensor, payload: Tensor, scales: Tensor, biases: Tensor | None = None) -> Tensor:
        codes = payload[slots]
        if scheme == "int4":
            codes = torch.stack([codes & 15, codes >> 4], -1)
        values = codes.reshape(len(slots), -1, group).float() * scales[slots].float()[..., None]
        if biases is not None:
            values = values + biases[slots].float()[..., None]
        return values.to(dtype).view(len(slots), tokens, dim)

    return run


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of tokens, each its own tensor: the peer is spared packing them into rows."""
    scales = (x.float().abs().amax(-1, keepdim=True) / 127).half()
    unit = scales.float().clamp(min=torch.finfo(torch.float16).tiny)
    return (x.float() / unit).clamp(-127, 127).round().to(torch.int8), scales


def scatter(cache: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Overwrites rows in place."""
    return cache.index_copy_(0, slots, rows)
