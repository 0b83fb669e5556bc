"""Every benchmark case, declared once: what runs, what it costs, what it is compared with.

A case is data until `make(device)` builds its tensors, so that runs on other devices share the declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import peers
from vista_ext import _C, ops
from vista_ext.reference import cross_attn_by_mask, qla_by_state
from vista_ext.reference.cache_rows import quantize_rows as reference_rows

HEADS, DIM = 4, 64  # one row of 256 values: the published model's size
TOKENS, WIDTH = 128, 256  # one user's summary


@dataclass(frozen=True)
class Problem:
    """A case with its tensors.

    `values` turns a result into tensors that can be compared with `exact` (float64) by the error of `reference`, a
    naive computation in the case's own dtype.
    """

    inputs: tuple[Tensor, ...]  # what is differentiated
    ours: Callable[..., Any]
    composition: Callable[..., Any]  # the same in plain torch: the peers `eager` and `compile`
    exact: Callable[[], Sequence[Tensor]]
    reference: Callable[[], Sequence[Tensor]]
    values: Callable[[Any], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One line of the results. `bytes`: every operand touched once, the least any implementation moves."""

    op: str
    shape: str
    dtype: torch.dtype
    bytes: int
    flops: int
    make: Callable[[str], Problem]
    backward: bool = False
    threads: int | None = None  # None: as many as torch uses
    quick: bool = False  # part of the smoke run, which leaves the others out
    peers: tuple[str, ...] = ("eager", "compile")

    @property
    def id(self) -> str:
        """Unique name, the pytest id too."""
        parts = [self.shape, str(self.dtype).removeprefix("torch."), "fwd+bwd" if self.backward else "fwd"]
        return "-".join(parts + ([f"{self.threads}t"] if self.threads else []))


def differentiable(function: Callable[..., Tensor], inputs: Sequence[Tensor], backward: bool) -> tuple[Tensor, ...]:
    """`(out,)`, or `(out, *gradients)` for a fixed gradient of the output."""
    if not backward:
        with torch.no_grad():
            return (function(*inputs),)
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out) * 0.5)


def _float_problem(
    inputs: Sequence[Tensor],
    backward: bool,
    ours: Callable[..., Tensor],
    composition: Callable[..., Tensor],
    reference: Callable[..., Tensor],
) -> Problem:
    return Problem(
        inputs=tuple(inputs),
        ours=ours,
        composition=composition,
        exact=lambda: differentiable(reference, [x.detach().double().requires_grad_() for x in inputs], backward),
        reference=lambda: differentiable(reference, inputs, backward),
        values=lambda result: result,
    )


def _rows(device: str, dtype: torch.dtype, counts: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, HEADS, DIM, generator=generator).to(device=device, dtype=dtype).requires_grad_() for n in counts
    ]


def _qla(shape: str, lengths: Sequence[int], targets: int, dtype: torch.dtype, backward: bool, **options: Any) -> Case:
    total, item = sum(lengths), dtype.itemsize

    def make(device: str) -> Problem:
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
        num_targets = torch.full((len(lengths),), targets, device=device)
        return _float_problem(
            _rows(device, dtype, [total] * 3),
            backward,
            lambda *x: ops.qla(*x, offsets, max(lengths), num_targets=num_targets),
            peers.qla(lengths, targets, activate_once=backward),
            partial(qla_by_state, seq_offsets=offsets, num_targets=num_targets),
        )

    # Forward reads q, k, v and writes out; backward reads q, k, v, grad and writes three gradients.
    return Case(
        "qla",
        shape,
        dtype,
        bytes=total * HEADS * DIM * item * (4 + 7 * backward),
        flops=total * HEADS * 4 * DIM * DIM * (3 if backward else 1),
        make=make,
        backward=backward,
        **options,
    )


def _cross_attn(
    shape: str, groups: int, queries: int, users: int, own: bool, dtype: torch.dtype, backward: bool, **options: Any
) -> Case:
    rows, keys, item = groups * queries, users * TOKENS, dtype.itemsize

    def make(device: str) -> Problem:
        q_offsets = torch.arange(groups + 1, device=device) * queries
        kv_offsets = torch.arange(users + 1, device=device) * TOKENS
        kv_index = torch.arange(groups, device=device) * users // groups
        inputs = _rows(device, dtype, [rows, keys, keys] + [rows] * 2 * own)

        def ours(q: Tensor, k: Tensor, v: Tensor, self_k: Tensor | None = None, self_v: Tensor | None = None) -> Tensor:
            offsets = q_offsets, kv_offsets, queries, TOKENS
            return ops.jagged_cross_attn(q, k, v, *offsets, kv_index=kv_index, self_k=self_k, self_v=self_v)

        def reference(q: Tensor, k: Tensor, v: Tensor, *own_item: Tensor) -> Tensor:
            # Group by group: the mask over all pairs would not fit.
            groups_of = [x.split(queries) for x in (q, *own_item)]
            ends = torch.tensor([0, queries]), torch.tensor([0, TOKENS])
            outs = []
            for index, (query, *item) in zip(kv_index.tolist(), zip(*groups_of, strict=True), strict=True):
                at = slice(index * TOKENS, (index + 1) * TOKENS)
                named = dict(zip(("self_k", "self_v"), item, strict=False))
                outs.append(cross_attn_by_mask(query, k[at], v[at], *ends, **named))
            return torch.cat(outs)

        peer = peers.cross_attn(groups, users, None if users == groups else kv_index)
        return _float_problem(inputs, backward, ours, peer, reference)

    q_like, kv_like = (4 if own else 2), 2  # tensors of the queries' and of the keys' size
    passes = 1 + 2 * backward  # backward reads all of them again and writes as many gradients
    return Case(
        "jagged_cross_attn",
        shape,
        dtype,
        bytes=(rows * q_like + keys * kv_like) * HEADS * DIM * item * passes,
        flops=int(rows * HEADS * DIM * (TOKENS + own) * 4 * (3.5 if backward else 1)),
        make=make,
        backward=backward,
        **options,
    )


def _layout(scheme: str) -> dict[str, int]:
    return _C.row_layout(scheme, TOKENS, WIDTH, 0)


def _typed_views(cache: Tensor, scheme: str) -> tuple[Tensor, ...]:
    payload_bytes = TOKENS * WIDTH // (2 if scheme == "int4" else 1)
    scale_bytes = 2 * TOKENS * WIDTH // _group(scheme)
    payload = {"int8": torch.int8, "int4": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn}[scheme]
    starts = [payload_bytes + i * scale_bytes for i in range(2 if scheme == "int4" else 1)]
    scales = [cache[:, at : at + scale_bytes].view(torch.float16) for at in starts]
    return cache[:, :payload_bytes].view(payload), *scales


def _group(scheme: str) -> int:
    return 64 if scheme == "int4" else WIDTH


def _summaries(users: int) -> Tensor:
    return torch.randn(users, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def _random_slots(users: int, slots: int) -> Tensor:
    return torch.randperm(slots, generator=torch.Generator().manual_seed(1))[:users]


def _gather(scheme: str, users: int, slots: int, dtype: torch.dtype, **options: Any) -> Case:
    def make(device: str) -> Problem:
        distinct = ops.quantize_rows(_summaries(64), scheme=scheme)
        cache = distinct[torch.arange(slots) % 64].to(device)
        at = _random_slots(users, slots).to(device)
        views = _typed_views(cache, scheme)
        naive = peers.dequantize(TOKENS, WIDTH, scheme, _group(scheme), dtype)
        exact = peers.dequantize(TOKENS, WIDTH, scheme, _group(scheme), torch.float64)
        return Problem(
            inputs=(),
            ours=lambda: ops.cache_gather(cache, at, TOKENS, WIDTH, scheme=scheme, dtype=dtype)[0],
            composition=lambda: naive(at, *views),
            exact=lambda: [exact(at, *views)],
            reference=lambda: [naive(at, *views)],
            values=lambda result: [result],
        )

    values = users * TOKENS * WIDTH
    return Case(
        "cache_gather",
        f"{scheme} {users} of {slots} users",
        dtype,
        bytes=users * _layout(scheme)["row_bytes"] + values * dtype.itemsize,
        flops=values * (2 if scheme == "int4" else 1),
        make=make,
        **options,
    )


def _quantize(users: int, dtype: torch.dtype, **options: Any) -> Case:
    def make(device: str) -> Problem:
        x = _summaries(users).to(device=device, dtype=dtype)
        back = partial(ops.dequantize_rows, tokens=TOKENS, dim=WIDTH)

        def values(result: Tensor | tuple[Tensor, Tensor]) -> Sequence[Tensor]:
            return [back(result) if isinstance(result, Tensor) else result[0].float() * result[1].float()]

        return Problem(
            inputs=(),
            ours=lambda: ops.quantize_rows(x),
            composition=lambda: peers.quantize_int8(x),
            exact=lambda: [x.double()],
            reference=lambda: [back(torch.from_numpy(reference_rows(x.float().cpu().numpy(), "int8", WIDTH)))],
            values=values,
        )

    values = users * TOKENS * WIDTH
    moved = users * _layout("int8")["row_bytes"] + values * dtype.itemsize
    return Case("quantize_rows", f"int8 {users} users", dtype, bytes=moved, flops=2 * values, make=make, **options)


def _scatter(users: int, slots: int, **options: Any) -> Case:
    row_bytes = _layout("int8")["row_bytes"]

    def make(device: str) -> Problem:
        rows = torch.randint(256, (users, row_bytes), dtype=torch.uint8, device=device)
        cache = torch.zeros(slots, row_bytes, dtype=torch.uint8, device=device)
        at = _random_slots(users, slots).to(device)

        def ours() -> Tensor:
            ops.cache_scatter_(cache, at, rows)
            return cache

        def values(result: Tensor) -> Sequence[Tensor]:
            written = result[at].float()
            cache.zero_()  # the next implementation must write for itself
            return [written]

        return Problem(
            inputs=(),
            ours=ours,
            composition=lambda: peers.scatter(cache, at, rows),
            exact=lambda: [rows.double()],
            reference=lambda: [rows.float()],
            values=values,
        )

    shape = f"int8 {users} of {slots} users"
    moved = 2 * users * row_bytes
    return Case("cache_scatter_", shape, torch.uint8, bytes=moved, flops=0, make=make, **options)


def _cases() -> list[Case]:
    # Compiling the peers takes most of a run's time: a case must earn its place.
    fp32, bf16 = torch.float32, torch.bfloat16
    # Jagged histories of mean 3,531 with 16 candidates each.
    jagged = [2512, 3976, 2211, 5863, 3041, 2709, 4577, 3359]
    cases = []
    for dtype in (fp32, bf16):
        for backward in (False, True):
            cases += [
                *[_qla("8 x 2k-6k", jagged, 16, dtype, backward, threads=threads) for threads in (1, None)],
                _qla("1 x 64k", [65536], 16, dtype, backward),
                _cross_attn("32 users x 256", 32, 256, 32, False, dtype, backward),
                _cross_attn("32 users x 256 own", 32, 256, 32, True, dtype, backward),
            ]
        cases += [
            _cross_attn("16 users x 4 x 128 own", 64, 128, 16, True, dtype, False),
            _gather("int8", 512, 8192, dtype),
            _quantize(512, dtype),
        ]
    cases += [_gather("int4", 512, 8192, bf16), _gather("fp8_e4m3", 512, 8192, bf16), _scatter(512, 8192)]
    cases += [
        _qla("2 x 200-300", [300, 200], 16, fp32, True, quick=True),
        _cross_attn("4 users x 32 own", 4, 32, 4, True, bf16, False, quick=True),
        _gather("int8", 16, 64, fp32, quick=True),
        _quantize(16, fp32, quick=True),
    ]
    return cases


CASES = _cases()
