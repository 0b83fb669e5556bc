"""Softmax target attention, twice (paper section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def _own_sequences(q_offsets: Tensor, kv_index: Tensor | None) -> list[tuple[int, int, int]]:
    groups = range(len(q_offsets) - 1)
    return [(int(q_offsets[g]), int(q_offsets[g + 1]), g if kv_index is None else int(kv_index[g])) for g in groups]


def cross_attn_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    kv_index: Tensor | None = None,
    self_k: Tensor | None = None,
    self_v: Tensor | None = None,
    attn_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: per query row a softmax over its sequence and, if given, its own item. `(out, lse)`."""
    scale = q.shape[-1] ** -0.5 if attn_scale is None else attn_scale
    share = q.shape[1] // k.shape[1]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_zeros(q.shape[0], q.shape[1])
    for begin, end, sequence in _own_sequences(q_offsets, kv_index):
        rows = slice(int(kv_offsets[sequence]), int(kv_offsets[sequence + 1]))
        for i in range(begin, end):
            keys, values = k[rows], v[rows]
            if self_k is not None and self_v is not None:
                keys, values = torch.cat([keys, self_k[i : i + 1]]), torch.cat([values, self_v[i : i + 1]])
            keys, values = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1)
            scores = scale * torch.einsum("hd,nhd->hn", q[i], keys)
            lse[i] = scores.logsumexp(-1)
            if len(keys):
                out[i] = torch.einsum("hn,nhe->he", scores.softmax(-1), values)
    return out, lse


def cross_attn_by_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    kv_index: Tensor | None = None,
    self_k: Tensor | None = None,
    self_v: Tensor | None = None,
    attn_scale: float | None = None,
) -> Tensor:
    """All queries against all keys and all own items at once, under a mask, by torch's own attention."""
    sees = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for begin, end, sequence in _own_sequences(q_offsets, kv_index):
        sees[begin:end, int(kv_offsets[sequence]) : int(kv_offsets[sequence + 1])] = True
    if self_k is not None and self_v is not None:
        k, v = torch.cat([k, self_k]), torch.cat([v, self_v])
        sees = torch.cat([sees, torch.eye(q.shape[0], dtype=torch.bool)], 1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, scale=attn_scale, enable_gqa=True)
    out = out.transpose(0, 1)
    within = torch.arange(q.shape[1]) < q_offsets[-1]
    return torch.where((within & sees.any(1))[:, None, None], out, 0)
