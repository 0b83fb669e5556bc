"""Softmax target attention, twice (paper section 3.3)."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from vista_ext.reference.cache_rows import dequantize_rows


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
    sees = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    for begin, end, sequence in _own_sequences(q_offsets, kv_index):
        sees[begin:end, int(kv_offsets[sequence]) : int(kv_offsets[sequence + 1])] = True
    if self_k is not None and self_v is not None:
        k, v = torch.cat([k, self_k]), torch.cat([v, self_v])
        sees = torch.cat([sees, torch.eye(q.shape[0], dtype=torch.bool, device=q.device)], 1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, scale=attn_scale, enable_gqa=True)
    out = out.transpose(0, 1)
    within = torch.arange(q.shape[1], device=q.device) < int(q_offsets[-1])
    return torch.where((within & sees.any(1))[:, None, None], out, 0)


def cached_cross_attn(
    q: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    slots: Tensor,
    q_offsets: Tensor,
    tokens: int,
    kv_heads: int,
    *,
    scheme: str,
    group: int,
    value_dim: int | None = None,
    self_k: Tensor | None = None,
    self_v: Tensor | None = None,
    attn_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_attn_by_rows` on the rows' values in the dtype of q; a slot out of range is an empty sequence."""
    slots = slots.cpu()
    known = [int(slot) for slot in slots if 0 <= slot < len(k_rows)]
    lengths = [tokens if 0 <= slot < len(k_rows) else 0 for slot in slots]

    def values(rows: Tensor, dim: int) -> Tensor:
        table = dequantize_rows(rows[known].cpu().numpy(), tokens, kv_heads * dim, scheme, group)
        return torch.from_numpy(table).to(q).view(-1, kv_heads, dim)

    d = q.shape[2]
    return cross_attn_by_rows(
        q,
        values(k_rows, d),
        values(v_rows, d if value_dim is None else value_dim),
        q_offsets,
        torch.tensor([0, *accumulate(lengths)]),
        self_k=self_k,
        self_v=self_v,
        attn_scale=attn_scale,
    )
