"""The cases of the ops on cache rows: quantizing, gathering, scattering users' summaries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cases, peers
from bench.cases import TOKENS, WIDTH, Case, Problem
from vista_ext import _C, ops
from vista_ext.ops.cache_rows import Scheme
from vista_ext.reference.cache_rows import quantize_rows as reference_rows


def layout(scheme: str) -> dict[str, int]:
    return _C.row_layout(scheme, TOKENS, WIDTH, 0)


def typed_views(cache: Tensor, scheme: str) -> tuple[Tensor, ...]:
    payload_bytes = TOKENS * WIDTH // (2 if scheme == "int4" else 1)
    scale_bytes = 2 * TOKENS * WIDTH // group_of(scheme)
    payload = {"int8": torch.int8, "int4": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn}[scheme]
    starts = [payload_bytes + i * scale_bytes for i in range(2 if scheme == "int4" else 1)]
    scales = [cache[:, at : at + scale_bytes].view(torch.float16) for at in starts]
    return cache[:, :payload_bytes].view(payload), *scales


def group_of(scheme: str) -> int:
    return 64 if scheme == "int4" else WIDTH


def _summaries(users: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(users, TOKENS, WIDTH, generator=generator, device=device)


def random_slots(users: int, slots: int) -> Tensor:
    return torch.randperm(slots, generator=torch.Generator().manual_seed(1))[:users]


def _checked_users(users: int) -> tuple[list[int], str]:
    chosen = cases._spread(users, cases.MAX_CHECKED_USERS)
    return chosen, "all of it" if len(chosen) == users else f"{len(chosen)} of {users} users"


def gather_case(scheme: Scheme, users: int, slots: int, dtype: torch.dtype, **options: Any) -> Case:
    def make(device: str) -> Problem:
        distinct = ops.quantize_rows(_summaries(64), scheme=scheme).to(device)
        cache = distinct[torch.arange(slots, device=device) % 64]
        at = random_slots(users, slots).to(device)
        chosen, checked = _checked_users(users)
        views = typed_views(cache, scheme)
        naive = peers.dequantize(TOKENS, WIDTH, scheme, group_of(scheme), dtype)
        exact = peers.dequantize(TOKENS, WIDTH, scheme, group_of(scheme), torch.float64)
        return Problem(
            inputs=(),
            ours=lambda: ops.cache_gather(cache, at, TOKENS, WIDTH, scheme=scheme, dtype=dtype)[0],
            composition=lambda: naive(at, *views),
            exact=lambda: [exact(at[chosen], *views)],
            reference=lambda: [naive(at[chosen], *views)],
            values=lambda result: [result[chosen]],
            checked=checked,
            foreign=lambda: peers.fbgemm_gather(scheme, at, slots, TOKENS, WIDTH, dtype),
        )

    values = users * TOKENS * WIDTH
    return Case(
        "cache_gather",
        f"{scheme} {users} of {slots} users",
        dtype,
        bytes=users * layout(scheme)["row_bytes"] + values * dtype.itemsize,
        flops=values * (2 if scheme == "int4" else 1),
        make=make,
        items=users,
        item="user",
        **options,
    )


def quantize_case(users: int, dtype: torch.dtype, **options: Any) -> Case:
    def make(device: str) -> Problem:
        x = _summaries(users, device).to(dtype)
        back = partial(ops.dequantize_rows, tokens=TOKENS, dim=WIDTH)
        chosen, checked = _checked_users(users)

        def values(result: Tensor | tuple[Tensor, Tensor]) -> Sequence[Tensor]:
            if isinstance(result, Tensor):
                return [back(result[chosen])]
            return [result[0][chosen].float() * result[1][chosen].float()]

        def reference() -> Sequence[Tensor]:
            rows = torch.from_numpy(reference_rows(x[chosen].float().cpu().numpy(), "int8", WIDTH))
            return [back(rows).to(device)]

        return Problem(
            inputs=(),
            ours=lambda: ops.quantize_rows(x),
            composition=lambda: peers.quantize_int8(x),
            exact=lambda: [x[chosen].double()],
            reference=reference,
            values=values,
            checked=checked,
            foreign=lambda: peers.fbgemm_quantize(x),
        )

    values = users * TOKENS * WIDTH
    moved = users * layout("int8")["row_bytes"] + values * dtype.itemsize
    shape, cost = f"int8 {users} users", {"bytes": moved, "flops": 2 * values, "items": users, "item": "user"}
    return Case("quantize_rows", shape, dtype, make=make, **cost, **options)


def scatter_case(users: int, slots: int, **options: Any) -> Case:
    row_bytes = layout("int8")["row_bytes"]

    def make(device: str) -> Problem:
        rows = torch.randint(256, (users, row_bytes), dtype=torch.uint8, device=device)
        cache = torch.zeros(slots, row_bytes, dtype=torch.uint8, device=device)
        at = random_slots(users, slots).to(device)
        chosen, checked = _checked_users(users)

        def ours() -> Tensor:
            ops.cache_scatter_(cache, at, rows)
            return cache

        def values(result: Tensor) -> Sequence[Tensor]:
            written = result[at[chosen]].float()
            cache.zero_()  # the next implementation must write for itself
            return [written]

        return Problem(
            inputs=(),
            ours=ours,
            composition=lambda: peers.scatter(cache, at, rows),
            exact=lambda: [rows[chosen].double()],
            reference=lambda: [rows[chosen].float()],
            values=values,
            checked=checked,
        )

    shape = f"int8 {users} of {slots} users"
    moved = 2 * users * row_bytes
    return Case("cache_scatter_", shape, torch.uint8, bytes=moved, flops=0, make=make, **options)
