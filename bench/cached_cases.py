"""The cases of attention on quantized rows: against dequantizing first, by torch and SDPA or by two of our ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cases, peers, row_cases
from bench.cases import DIM, HEADS, TOKENS, WIDTH, Case, Problem
from vista_ext import ops
from vista_ext.ops.cache_rows import Scheme


def cached_cross_attn_case(
    users: int, queries: int, scheme: Scheme, dtype: torch.dtype, *, two_ops: bool = False, **options: Any
) -> Case:
    """`two_ops`: compared with `cache_gather` and then `jagged_cross_attn`; else with the same in plain torch."""
    slots = 2 * max(users, 256)

    def make(device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        distinct = [ops.quantize_rows(normal(64, TOKENS, WIDTH), scheme=scheme) for _ in range(2)]
        caches = [rows[torch.arange(slots, device=device) % 64] for rows in distinct]
        keys_cache, values_cache = caches
        q, at = normal(users * queries, HEADS, DIM), row_cases.random_slots(users, slots).to(device)
        q_offsets = torch.arange(users + 1, device=device) * queries
        kv_offsets = torch.arange(users + 1, device=device) * TOKENS
        chosen = cases._spread(users, max(1, cases.MAX_CHECKED_ROWS // queries))

        def part(rows: Tensor) -> Tensor:
            return rows.view(users, queries, HEADS, DIM)[chosen].flatten(0, 1)

        def ours() -> Tensor:
            of_rows = at, q_offsets, queries, TOKENS, HEADS
            return ops.cached_cross_attn(q, keys_cache, values_cache, *of_rows, scheme=scheme)[0]

        def by_torch(some: Tensor, where: Tensor) -> Tensor:
            naive = peers.dequantize(TOKENS, WIDTH, scheme, row_cases.group_of(scheme), some.dtype)
            tables = [naive(where, *row_cases.typed_views(cache, scheme)).view(-1, HEADS, DIM) for cache in caches]
            return peers.cross_attn(len(where), len(where), None)(some, *tables)

        def gathered() -> list[Tensor]:
            tables = [ops.cache_gather(cache, at, TOKENS, WIDTH, scheme=scheme, dtype=dtype)[0] for cache in caches]
            return [table.view(-1, HEADS, DIM) for table in tables]

        def on_rows(keys: Tensor, values: Tensor) -> Tensor:
            return ops.jagged_cross_attn(q, keys, values, q_offsets, kv_offsets, queries, TOKENS)

        def by_two_ops() -> Tensor:
            keys, values = gathered()
            return on_rows(keys, values)

        def unquantized() -> Mapping[str, peers.Peer | str]:
            keys, values = gathered()
            run = partial(on_rows, keys, values)
            return {"unquantized": peers.Peer(run, "jagged_cross_attn, rows gathered beforehand")}

        def checked_part(of: torch.dtype) -> Sequence[Tensor]:
            return [by_torch(part(q).to(of), at[chosen])]

        return Problem(
            inputs=(),
            ours=ours,
            composition=by_two_ops if two_ops else lambda: by_torch(q, at),
            exact=lambda: checked_part(torch.float64),
            reference=lambda: checked_part(dtype),
            values=lambda result: [part(result)],
            checked="all of it" if len(chosen) == users else f"{len(chosen)} of {users} users",
            foreign=unquantized,
        )

    rows = users * queries
    return Case(
        "cached_cross_attn",
        f"{scheme} {users} x {queries}" + (" to gather and attend" if two_ops else ""),
        dtype,
        bytes=2 * rows * WIDTH * dtype.itemsize + 2 * users * row_cases.layout(scheme)["row_bytes"],
        flops=rows * WIDTH * TOKENS * 4,
        make=make,
        items=rows,
        item="candidate",
        **options,
    )
