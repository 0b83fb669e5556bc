"""Cases at the sizes of serving and of lifelong histories: requests of many lengths, a history of a million events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from bench import peers
from bench.cases import DIM, HEADS, TOKENS, Case, Problem, _float_problem, _rows, differentiable
from vista_ext import ops
from vista_ext.reference import cross_attn_by_mask


def request_attn_case(shape: str, counts: Sequence[int], dtype: torch.dtype, backward: bool, **options: Any) -> Case:
    """Target attention of requests: so many candidates for each user, all on that user's one summary."""
    rows, users = sum(counts), len(counts)

    def make(device: str) -> Problem:
        q_offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], device=device)
        kv_offsets = torch.arange(users + 1, device=device) * TOKENS

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.jagged_cross_attn(q, k, v, q_offsets, kv_offsets, max(counts), TOKENS)

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Request by request: the mask over all pairs would not fit.
            parts = zip(q.split(list(counts)), k.split(TOKENS), v.split(TOKENS), strict=True)
            ends = torch.tensor([0, TOKENS])
            return torch.cat([cross_attn_by_mask(*part, torch.tensor([0, len(part[0])]), ends) for part in parts])

        def foreign() -> Mapping[str, peers.Peer | str]:
            return {"expanded": peers.Peer(peers.expanded_attn(counts), "the keys as a view: nothing is copied")}

        inputs = _rows(device, dtype, [rows, users * TOKENS, users * TOKENS])
        return _float_problem(inputs, backward, ours, peers.padded_attn(counts, device), reference, foreign=foreign)

    passes = 1 + 2 * backward  # backward reads all of them again and writes as many gradients
    return Case(
        "jagged_cross_attn",
        shape,
        dtype,
        bytes=(2 * rows + 2 * users * TOKENS) * HEADS * DIM * dtype.itemsize * passes,
        flops=int(rows * HEADS * DIM * TOKENS * 4 * (3.5 if backward else 1)),
        make=make,
        backward=backward,
        items=rows,
        item="candidate",
        **options,
    )


def lifelong_case(shape: str, block: int, times: int, dtype: torch.dtype, backward: bool, **options: Any) -> Case:
    """One history: a block of rows, again and again. Its mean state is the block's, and so are all of its results,
    which float64 can be asked for."""
    total = block * times

    def make(device: str) -> Problem:
        parts = _rows(device, dtype, [block] * 3)
        inputs = tuple(x.detach().repeat(times, 1, 1).requires_grad_() for x in parts)
        offsets = torch.tensor([0, total], device=device)

        def naive(precision: torch.dtype, repeats: int, piece: int) -> Sequence[Tensor]:
            """All `repeats` of the block, which share its tensors: gradients of these are so many times as large."""

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                pieces = zip(silu(k).split(piece), v.split(piece), strict=True)
                states = [torch.einsum("nhd,nhe->hde", *pair) for pair in pieces]
                state = torch.zeros_like(states[0])
                for part in states * repeats:
                    state = state + part
                mapped = silu(state / (repeats * block))
                queries = silu(q).split(piece) * repeats
                return torch.cat([torch.einsum("nhd,hde->nhe", part, mapped) for part in queries])

            some = [x.detach().to(precision).requires_grad_() for x in parts]
            out, *grads = differentiable(run, some, backward)
            return [torch.cat([x] * 2) for x in (out.detach()[:block], *(grad / repeats for grad in grads))]

        return Problem(
            inputs=inputs,
            ours=lambda q, k, v: ops.qla(q, k, v, offsets, total),
            composition=peers.qla_uniform(1, 0),
            exact=lambda: naive(torch.float64, 1, block),
            # float32 rounds as often as it adds, over the whole history; narrower types round the rows and the state.
            reference=lambda: naive(dtype, *((times, max(1, block // 50)) if dtype == torch.float32 else (1, block))),
            values=lambda result: [torch.cat([x.detach()[:block], x.detach()[-block:]]) for x in result],
            checked=f"first and last {block} rows",
        )

    moved = total * HEADS * DIM * dtype.itemsize * (4 + 7 * backward)
    case = Case("qla", shape, dtype, moved, total * HEADS * 4 * DIM * DIM * (3 if backward else 1), make, backward)
    return replace(case, items=total, item="event", **options)
