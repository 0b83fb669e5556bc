"""Every op, small and ugly: what tests of bits, memory, streams and graphs run, and sanitizers."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from vista_ext import ops

# None, one, primes, a tile and one more, more than one chunk; behind the last sequence three rows of padding.
LENGTHS, TARGETS, PADDING = [5, 0, 1, 113, 64, 65, 2300], [2, 0, 1, 7, 0, 3, 33], 3
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = ("int8", "int4", "fp8_e4m3")


def _normal(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    # Made on the host: a copy from there is what a sanitizer of uninitialised reads knows for sure.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def _with_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs)
    outs = results if isinstance(results, tuple) else (results,)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, [torch.full_like(o, 0.5) for o in outs])


def qla_calls(device: str, dtype: torch.dtype, d: int, e: int, heads: int = 2) -> Iterator[tuple[str, Callable]]:
    """Names and calls; a call returns all results, gradients among them."""
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    offsets, targets = ends.to(device), torch.tensor(TARGETS, dtype=torch.int32, device=device)
    total, longest = int(ends[-1]) + PADDING, max(LENGTHS)
    q, k, v = (_normal((total, heads, n), device, dtype, seed) for seed, n in enumerate((d, d, e)))
    state = _normal((len(LENGTHS), heads, d, e), device, torch.float32, 3)
    scale = torch.linspace(0.01, 0.1, len(LENGTHS)).to(device)
    label = f"{str(dtype).removeprefix('torch.')} d{d} e{e}"

    def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qla(q, k, v, offsets, longest, num_targets=targets, return_state=True)

    def no_targets(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.qla(q, k, v, offsets.int(), longest, activation="relu", state_activation="identity")

    def state_only(k: Tensor, v: Tensor) -> Tensor:
        return ops.qla_state(k, v, offsets, longest, num_targets=targets)

    def apply(q: Tensor, state: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
        own = {"num_targets": targets, "self_k": own_k, "self_v": own_v}
        return ops.qla_apply(q, state, scale, offsets, longest, **own)

    yield f"qla {label}", partial(_with_gradients, whole, [q, k, v])
    yield f"qla without targets {label}", partial(_with_gradients, no_targets, [q, k, v])
    yield f"qla_state {label}", partial(_with_gradients, state_only, [k, v])
    yield f"qla_apply {label}", partial(_with_gradients, apply, [q, state, k, v])


def sglu_calls(device: str, dtype: torch.dtype, dim: int, hidden: int) -> Iterator[tuple[str, Callable]]:
    """Names and calls of the feed-forward half; a call returns all results, gradients among them."""
    label = f"{str(dtype).removeprefix('torch.')} {dim} {hidden}"
    weights = [_normal(shape, device, dtype, 1) / 16 for shape in ((hidden, dim), (hidden, dim), (dim, hidden))]
    for rows, options in ((1, {}), (193, {"norm_eps": 1e-6, "residual": True}), (64, {"norm_eps": 1e-6})):
        inputs = [_normal((rows, dim), device, dtype, 0), *weights]
        yield f"sglu {label} rows {rows}", partial(_with_gradients, partial(ops.sglu, **options), inputs)


def projected_calls(device: str, dtype: torch.dtype, dim: int, d: int, heads: int) -> Iterator[tuple[str, Callable]]:
    """Names and calls of QLA on projections; a call returns all results, gradients among them."""
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    offsets, total, longest = ends.to(device), int(ends[-1]) + PADDING, max(LENGTHS)
    x, *weights = (_normal((n, dim), device, dtype, seed) for seed, n in enumerate((total, heads * d, heads * d)))
    state = _normal((len(LENGTHS), heads, d, d), device, torch.float32, 3)
    scale = torch.linspace(0.01, 0.1, len(LENGTHS)).to(device)
    label = f"{str(dtype).removeprefix('torch.')} dim{dim} h{heads} d{d}"

    def state_of(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.projected_qla_state(x, k / dim**0.5, v / dim**0.5, offsets, longest, heads=heads, norm_eps=1e-6)

    def apply(x: Tensor, q: Tensor, state: Tensor) -> Tensor:
        return ops.projected_qla_apply(x, q / dim**0.5, state, scale, offsets.int(), longest, activation="relu")

    yield f"projected_qla_state {label}", partial(_with_gradients, state_of, [x, *weights])
    yield f"projected_qla_apply {label}", partial(_with_gradients, apply, [x, weights[0], state])


def row_calls(device: str, dtype: torch.dtype, scheme: str) -> Iterator[tuple[str, Callable]]:
    """Names and calls on cache rows; a call returns all results."""
    x = _normal((7, 5, 192), device, dtype, 4)
    rows = ops.quantize_rows(x.cpu(), scheme=scheme).to(device)
    slots = torch.tensor([6, 0, 6, -1, 3, 7], device=device)
    label = f"{scheme} {str(dtype).removeprefix('torch.')}"

    def gather() -> tuple[Tensor, ...]:
        return ops.cache_gather(rows, slots, 5, 192, scheme=scheme, dtype=dtype, policy="zero")

    def scatter() -> tuple[Tensor, ...]:
        cache = torch.zeros_like(rows)
        return ops.cache_scatter_(cache, slots, rows[:6], policy="zero"), cache

    yield f"quantize_rows {label}", lambda: (ops.quantize_rows(x, scheme=scheme),)
    yield (
        f"dequantize_rows {label}",
        lambda: (ops.dequantize_rows(rows, 5, 192, scheme=scheme, dtype=dtype),),
    )
    yield f"cache_gather {label}", gather
    yield f"cache_scatter_ {label}", scatter


def linear_calls(device: str, dtype: torch.dtype, widths: tuple[int, int]) -> Iterator[tuple[str, Callable]]:
    """Names and calls on a linear layer; a call returns the result and all gradients."""
    inside, outside = widths
    weight = _normal((outside, inside), device, dtype, 6) * inside**-0.5
    bias = _normal((outside,), device, dtype, 7)
    for rows in (0, 257):
        x = _normal((rows, inside), device, dtype, 5)
        label = f"{str(dtype).removeprefix('torch.')} {rows} x {inside} to {outside}"
        yield f"linear_silu {label}", partial(_with_gradients, ops.linear_silu, [x, weight, bias])
        yield f"linear_silu without bias {label}", partial(_with_gradients, ops.linear_silu, [x, weight])


def cross_attn_calls(device: str, dtype: torch.dtype, d: int, e: int) -> Iterator[tuple[str, Callable]]:
    """Names and calls of both cross attentions; a call returns all results, gradients among them."""
    lengths = [5, 0, 1, 113, 64, 65]  # of the groups; of the sequences:
    key_lengths = [1, 0, 130, 65]
    q_offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).to(device)
    kv_offsets = torch.tensor([0, *torch.tensor(key_lengths).cumsum(0).tolist()]).to(device)
    index = torch.tensor([2, 0, 2, 1, 0, 2], dtype=torch.int32, device=device)
    total, keys = sum(lengths) + PADDING, sum(key_lengths) + PADDING
    shapes = ((total, 4, d), (keys, 2, d), (keys, 2, e), (total, 2, d), (total, 2, e))
    q, k, v, self_k, self_v = (_normal(shape, device, dtype, seed) for seed, shape in enumerate(shapes))
    label = f"{str(dtype).removeprefix('torch.')} d{d} e{e}"

    def own(q: Tensor, k: Tensor, v: Tensor, self_k: Tensor, self_v: Tensor) -> tuple[Tensor, Tensor]:
        options = {"kv_index": index, "self_k": self_k, "self_v": self_v, "return_lse": True}
        return ops.jagged_cross_attn(q, k, v, q_offsets, kv_offsets, max(lengths), max(key_lengths), **options)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        some = q_offsets[: len(key_lengths) + 1].int()
        return ops.jagged_cross_attn(q, k, v, some, kv_offsets, max(lengths), max(key_lengths))

    yield f"jagged_cross_attn own {label}", partial(_with_gradients, own, [q, k, v, self_k, self_v])
    yield f"jagged_cross_attn {label}", partial(_with_gradients, plain, [q, k, v])
    tokens, slots = 70, torch.tensor([2, 0, 2, -1, 1, 3], device=device)
    for scheme in SCHEMES:
        summaries = [_normal((3, tokens, 2 * n), "cpu", dtype, seed) for seed, n in ((5, d), (6, e))]
        k_rows, v_rows = (ops.quantize_rows(x, scheme=scheme).to(device) for x in summaries)
        arguments = q, k_rows, v_rows, slots, q_offsets, max(lengths), tokens, 2
        options = {"self_k": self_k, "self_v": self_v, "value_dim": e, "scheme": scheme, "policy": "zero"}
        yield f"cached_cross_attn {scheme} {label}", partial(ops.cached_cross_attn, *arguments, **options)


def _groups() -> Iterator[tuple[str, Callable[[str], Iterator[tuple[str, Callable]]]]]:
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        for d, e in ((64, 64), (24, 40), (256, 16), (32, 128)):
            yield f"{name} qla d{d} e{e}", partial(qla_calls, dtype=dtype, d=d, e=e)
        for widths in ((64, 264), (264, 64), (24, 7)):
            yield f"{name} linear {widths}", partial(linear_calls, dtype=dtype, widths=widths)
        if dtype != torch.float32:  # not built for a GPU
            for dim, hidden in ((64, 64), (24, 40), (128, 136), (256, 48)):
                yield f"{name} sglu {dim} {hidden}", partial(sglu_calls, dtype=dtype, dim=dim, hidden=hidden)
        # The last is composed on every device: its head dim is not built.
        for dim, d, heads in ((64, 32, 3), (256, 64, 4), (136, 128, 1), (512, 64, 3), (64, 40, 2)):
            group = partial(projected_calls, dtype=dtype, dim=dim, d=d, heads=heads)
            yield f"{name} projected dim{dim} h{heads} d{d}", group
        for scheme in SCHEMES:
            yield f"{name} rows {scheme}", partial(row_calls, dtype=dtype, scheme=scheme)
        for d, e in ((64, 64), (24, 40), (256, 16), (32, 128)):
            yield f"{name} cross_attn d{d} e{e}", partial(cross_attn_calls, dtype=dtype, d=d, e=e)


GROUPS = dict(_groups())
