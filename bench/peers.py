"""What the ops are compared with: plain torch compositions, and on a GPU kernels of other packages (`Peer`).

Each composition is the fastest of the formulations tried on a CPU; those for a GPU were not chosen by measurement.
Shapes are baked in (lengths are Python numbers), which is more than a real jagged batch grants a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from vista_ext import ops

FBGEMM_CPU = "needs FBGEMM: pip install --no-deps fbgemm-gpu-cpu==1.8.0 (for torch 2.13)"


@dataclass(frozen=True)
class Peer:
    """A kernel of another package. Its values are not compared: `note` says in what it differs from ours."""

    run: Callable[..., object]
    note: str
    capturable: bool = True  # in a CUDA graph


def qla(lengths: Sequence[int], targets: int, *, activate_once: bool, device: str = "cpu") -> Callable[..., Tensor]:
    """Per sequence two products in the heads' own layout; the targets' own terms of the whole batch at once.

    Args:
        lengths: of the sequences, targets included.
        targets: last rows of each sequence that are targets.
        activate_once: phi1 on the packed rows (faster forward and backward) or per sequence (faster forward).
    """
    ends = torch.tensor(lengths).cumsum(0)
    own_rows = (ends[:, None] - targets + torch.arange(targets)).flatten().to(device)
    own_scale = (1 / (torch.tensor(lengths) - targets)).repeat_interleave(targets)[:, None, None].to(device)

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


def qla_uniform(batch: int, targets: int) -> Callable[..., Tensor]:
    """Sequences of one length as a batch of products."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        q, k = silu(q), silu(k)
        sources = q.shape[2] - targets
        state = k[:, :, :sources].transpose(-1, -2) @ v[:, :, :sources]
        out = q @ silu(state / sources)
        own = (q[:, :, sources:] * k[:, :, sources:]).sum(-1, keepdim=True) / sources * v[:, :, sources:]
        out = torch.cat([out[:, :, :sources], out[:, :, sources:] + own], 2) if targets else out
        return out.transpose(1, 2).flatten(0, 1)

    return run


def projected_qla(batch: int, heads: int, eps: float) -> Callable[..., Tensor]:
    """Norm, three projections, and sequences of one length as a batch of products."""
    attend = qla_uniform(batch, 0)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        y = torch.nn.functional.rms_norm(x, x.shape[1:], eps=eps)
        return attend(*((y @ weight.t()).unflatten(1, (heads, -1)) for weight in weights))

    return run


def unfused_qla(offsets: Tensor, longest: int, heads: int, eps: float) -> Mapping[str, Peer | str]:
    """Our own QLA behind torch's norm and projections."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        y = torch.nn.functional.rms_norm(x, x.shape[1:], eps=eps)
        return ops.qla(*((y @ weight.t()).unflatten(1, (heads, -1)) for weight in weights), offsets, longest)

    return {"unfused": Peer(run, "torch's norm and projections, then the op qla")}


def qla_state(batch: int) -> Callable[..., Tensor]:
    """States of sequences of one length, in the rows' own dtype."""

    def run(k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.view(batch, -1, *x.shape[1:]) for x in (k, v))
        return silu(k).permute(0, 2, 3, 1) @ v.transpose(1, 2)

    return run


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A product, and another kernel for the SiLU."""
    return silu(torch.nn.functional.linear(x, weight, bias))


def product() -> Mapping[str, Peer | str]:
    """The product alone."""
    return {"cublas": Peer(torch.nn.functional.linear, "torch's product and bias, without the SiLU")}


def linear_attention(lengths: Sequence[int], offsets: Tensor) -> Mapping[str, Peer | str]:
    """fla's chunked linear attention at the same shape."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except Exception as error:  # whatever hinders the import is the reason
        return {"fla": f"fla is not importable here: {error}"}
    equal = len(set(lengths)) == 1
    scale = len(lengths) / sum(lengths)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(len(lengths) if equal else 1, -1, *x.shape[1:]) for x in (silu(q), silu(k), v))
        ends = None if equal else offsets
        return chunk_linear_attn(q, k, v, scale=scale, normalize=False, cu_seqlens=ends)[0]

    return {"fla": Peer(run, "causal, no phi2, no own term; SiLU applied outside, by torch", capturable=equal)}


def fbgemm_gather(
    scheme: str, slots_read: Tensor, slots: int, tokens: int, dim: int, dtype: torch.dtype
) -> Mapping[str, Peer | str]:
    """FBGEMM's lookup of rows in a quantized table; on a GPU its dequantization of a key/value cache."""
    if slots_read.device.type == "cpu":
        return _fbgemm_lookup(scheme, slots_read, slots, tokens, dim, dtype)
    return fbgemm_dequantize(scheme, len(slots_read), tokens, dim, slots_read.device.type)


def _fbgemm_lookup(
    scheme: str, slots_read: Tensor, slots: int, tokens: int, dim: int, dtype: torch.dtype
) -> Mapping[str, Peer | str]:
    if scheme == "fp8_e4m3":
        return {"fbgemm": "its CPU lookup has no such rows"}
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
    except Exception as error:  # whatever hinders the import is the reason
        return {"fbgemm": f"{FBGEMM_CPU}, found: {error}"}
    rows = {"int8": SparseType.INT8, "int4": SparseType.INT4}[scheme]
    table = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("", slots * tokens, dim, rows, EmbeddingLocation.HOST)],
        pooling_mode=PoolingMode.NONE,
        output_dtype=SparseType.from_dtype(dtype),
        device="cpu",
    )
    table.fill_random_weights()
    index = (slots_read[:, None] * tokens + torch.arange(tokens)).flatten().int()
    offsets = torch.tensor([0, len(index)], dtype=torch.int32)
    return {"fbgemm": Peer(lambda: table(index, offsets), "a table with a row for each token, indices made beforehand")}


def fbgemm_quantize(x: Tensor) -> Mapping[str, Peer | str]:
    """FBGEMM's int8 rows, a scale and a bias with each."""
    if x.device.type != "cpu":
        return {}
    if x.dtype != torch.float32:
        return {"fbgemm": "its CPU op reads float32"}
    try:
        import fbgemm_gpu  # noqa: F401  (registers the ops)
    except Exception as error:  # whatever hinders the import is the reason
        return {"fbgemm": f"{FBGEMM_CPU}, found: {error}"}
    rows = x.flatten(0, -2)
    return {"fbgemm": Peer(lambda: torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows), "float32 scale and bias")}


def fbgemm_dequantize(scheme: str, users: int, tokens: int, dim: int, device: str) -> Mapping[str, Peer | str]:
    """FBGEMM's dequantization of a key/value cache with as many values: half of the users as keys, half as values."""
    if scheme == "int8":
        return {"fbgemm": "genai dequantizes int4 and fp8 caches only"}
    try:
        import fbgemm_gpu.experimental.gen_ai  # noqa: F401  (registers the ops)
    except Exception as error:  # whatever hinders the import is the reason
        return {"fbgemm": f"FBGEMM genai is not importable here: {error}"}
    op = getattr(torch.ops.fbgemm, "dequantize_int4_cache" if scheme == "int4" else "dequantize_fp8_cache")
    head = 128  # the one head size of these kernels
    groups = 2 if scheme == "int4" else 1
    width = head // 2 + 4 * groups if scheme == "int4" else head + 4
    # Small bytes: any scale that they spell is finite.
    halves = [
        torch.randint(60, (users // 2, tokens, dim // head, width), dtype=torch.uint8, device=device) for _ in range(2)
    ]
    lengths = torch.full((users // 2,), tokens, dtype=torch.int32, device=device)
    options = {"num_groups": groups} if scheme == "int4" else {}
    note = "rows in their place (no slots), scales within the row, its own layout"
    return {"fbgemm": Peer(lambda: op(*halves, lengths, **options), note)}


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


def padded_attn(counts: Sequence[int], device: str) -> Callable[..., Tensor]:
    """Groups padded to the longest, as a batch for SDPA; each on its own keys."""
    longest = max(counts)
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
    at = torch.arange(longest)
    there = at < torch.tensor(counts)[:, None]
    padded = (starts[:, None] + at).clamp(max=sum(counts) - 1).to(device)
    packed = (torch.arange(len(counts))[:, None] * longest + at)[there].to(device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.view(len(counts), -1, *x.shape[1:]).transpose(1, 2) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q[padded].transpose(1, 2), keys, values)
        return out.transpose(1, 2).flatten(0, 1)[packed]

    return run


def expanded_attn(counts: Sequence[int]) -> Callable[..., Tensor]:
    """Each query of a group a sequence of its own, with the group's keys: how one scores without sharing a user."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        groups = (x.view(len(counts), -1, *x.shape[1:]).transpose(1, 2) for x in (k, v))
        for query, keys, values in zip(q.split(list(counts)), *groups, strict=True):
            shared = (x.expand(len(query), *x.shape) for x in (keys, values))
            outs.append(torch.nn.functional.scaled_dot_product_attention(query[:, :, None], *shared)[:, :, 0])
        return torch.cat(outs)

    return run


def sglu(norm_eps: float) -> Callable[..., Tensor]:
    """Three products, as torch.nn.Linear computes them, between element-wise kernels."""

    def run(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=norm_eps)
        return x + linear(linear(y, up) * linear(y, gate), down)

    return run


def softmax_attention(groups: int, q_offsets: Tensor, kv_offsets: Tensor) -> Mapping[str, Peer | str]:
    """torch's attention of equal groups, each on its own keys: FlexAttention compiled, and the packed form."""
    from torch.nn.attention.flex_attention import flex_attention

    found: dict[str, Peer | str] = {}
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(*(x.view(groups, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).reshape(q.shape)

    found["flex"] = Peer(flex, "groups of one length, as a batch")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return found | {"varlen": f"this torch has no varlen_attn: {error}"}
    ends = q_offsets.int(), kv_offsets.int()
    longest = [int(offsets.diff().max()) for offsets in ends]
    return found | {"varlen": Peer(lambda q, k, v: varlen_attn(q, k, v, *ends, *longest), "16-bit rows only")}


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
