"""Benchmark cases of the ops, each declared once: what runs, what it costs, what it is compared with.

A case is data until `make(device)` builds its tensors, so that runs on all devices share the declarations. Which cases
a run has, cpu_cases.py and gpu_cases.py say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.costs import Part
from vista_ext import ops
from vista_ext.reference import cross_attn_by_mask, linear_silu, qla_by_state, sglu_by_products

HEADS, DIM = 4, 64  # one row of 256 values: the published model's size
TOKENS, WIDTH = 128, 256  # one user's summary
# Of a larger result this much, spread over the batch, is compared in float64: the rest would not fit beside it.
MAX_CHECKED_ROWS, MAX_CHECKED_USERS = 300_000, 1024
MAX_CHECKED_SEQUENCES = 256  # the naive backward makes a tensor of all rows for each


@dataclass(frozen=True)
class Problem:
    """A case with its tensors.

    `values` turns a result into tensors that can be compared with `exact` (float64) by the error of `reference`, a
    naive computation in the case's own dtype. All three look at the same part of a large result, named by `checked`.
    """

    inputs: tuple[Tensor, ...]  # what is differentiated
    ours: Callable[..., Any]
    composition: Callable[..., Any]  # the same in plain torch: the peers `eager` and `compile`
    exact: Callable[[], Sequence[Tensor]]
    reference: Callable[[], Sequence[Tensor]]
    values: Callable[[Any], Sequence[Tensor]]
    checked: str = "all of it"
    foreign: Callable[[], Mapping[str, peers.Peer | str]] = dict  # peers from other packages, or why there is none


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
    peers: tuple[str, ...] = ("eager", "compile")  # on a CPU those of `foreign` too that are to be timed
    why_missing: str = ""  # the reason for a composition that is left out
    items: int = 0  # what the cost is stated for too: so many of
    item: str = ""
    cold: bool = False  # on a CPU also timed from a cold allocator
    capturable: bool = True  # in a CUDA graph
    parts: tuple[Part, ...] = ()  # of a case of many kernels: what each kind of them costs

    @property
    def id(self) -> str:
        """Unique name, the pytest id too."""
        parts = [self.shape, str(self.dtype).removeprefix("torch."), "fwd+bwd" if self.backward else "fwd"]
        return "-".join(parts + ([f"{self.threads}t"] if self.threads else []))


def differentiable(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], backward: bool, grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`(out,)`, or `(out, *gradients)` for a fixed gradient of the output, made here unless given."""
    if not backward:
        with torch.no_grad():
            return (function(*inputs),)
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out) * 0.5 if grad is None else grad)


def _float_problem(
    inputs: Sequence[Tensor],
    backward: bool,
    ours: Callable[..., Tensor],
    composition: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    part: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> Problem:
    """`reference` takes, and is compared with, `part` of each tensor."""

    def of_part(dtype: torch.dtype | None) -> Sequence[Tensor]:
        some = [part(x.detach()).to(dtype or x.dtype).requires_grad_() for x in inputs]
        return [x.detach() for x in differentiable(reference, some, backward)]

    return Problem(
        inputs=tuple(inputs),
        ours=ours,
        composition=composition,
        exact=lambda: of_part(torch.float64),
        reference=lambda: of_part(None),
        values=lambda result: [part(x) for x in result],
        **options,
    )


def _rows(device: str, dtype: torch.dtype, counts: Sequence[int], heads: int = HEADS, dim: int = DIM) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(n, heads, dim, generator=generator, device=device).to(dtype).requires_grad_() for n in counts]


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count`, evenly from the first to the last."""
    return sorted({i * (count - 1) // max(1, limit - 1) for i in range(limit)}) if count > limit else list(range(count))


def _sequences(lengths: Sequence[int]) -> tuple[list[int], Callable[[Tensor], Tensor], str]:
    """Which sequences are checked, their rows of a tensor, and what to call them."""
    longest = max(lengths)
    chosen = _spread(len(lengths), max(1, min(MAX_CHECKED_ROWS // longest, MAX_CHECKED_SEQUENCES)))
    if len(chosen) == len(lengths):
        return chosen, lambda x: x, "all of it"
    parts = lambda x: torch.cat([x.split(list(lengths))[i] for i in chosen])  # noqa: E731
    return chosen, parts, f"{len(chosen)} of {len(lengths)} sequences"


def qla_case(
    shape: str,
    lengths: Sequence[int],
    targets: int,
    dtype: torch.dtype,
    backward: bool,
    heads: int = HEADS,
    dim: int = DIM,
    **options: Any,
) -> Case:
    total, item = sum(lengths), dtype.itemsize

    def make(device: str) -> Problem:
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
        num_targets = torch.full((len(lengths),), targets, device=device)
        chosen, part, checked = _sequences(lengths)
        some = torch.tensor([0, *torch.tensor([lengths[i] for i in chosen]).cumsum(0).tolist()], device=device)
        if len(set(lengths)) == 1:
            peer = peers.qla_uniform(len(lengths), targets)
        else:
            peer = peers.qla(lengths, targets, activate_once=backward or device != "cpu", device=device)
        return _float_problem(
            _rows(device, dtype, [total] * 3, heads, dim),
            backward,
            lambda *x: ops.qla(*x, offsets, max(lengths), num_targets=num_targets),
            peer,
            partial(qla_by_state, seq_offsets=some, num_targets=num_targets[: len(chosen)]),
            part=part,
            checked=checked,
            foreign=lambda: peers.linear_attention(lengths, offsets),
        )

    # Forward reads q, k, v and writes out; backward reads q, k, v, grad and writes three gradients.
    return Case(
        "qla",
        shape,
        dtype,
        bytes=total * heads * dim * item * (4 + 7 * backward),
        flops=total * heads * 4 * dim * dim * (3 if backward else 1),
        make=make,
        backward=backward,
        items=total,
        item="event",
        **options,
    )


def state_case(shape: str, batch: int, length: int, dtype: torch.dtype, **options: Any) -> Case:
    """The part of a layer with few queries (the seeds, in the last one) that grows with the history."""
    total = batch * length

    def make(device: str) -> Problem:
        offsets = torch.arange(batch + 1, device=device) * length
        chosen, part, checked = _sequences([length] * batch)

        def reference(k: Tensor, v: Tensor) -> Tensor:
            k, v = (x.view(len(chosen), length, HEADS, DIM) for x in (k, v))
            return torch.einsum("bnhd,bnhe->bhde", torch.nn.functional.silu(k), v)

        inputs = _rows(device, dtype, [total] * 2)
        ours = lambda k, v: ops.qla_state(k, v, offsets, length)  # noqa: E731
        problem = _float_problem(inputs, False, ours, peers.qla_state(batch), reference, part=part, checked=checked)
        # States are float32 whatever the rows are.
        naive, values = problem.reference, lambda result: [result[0].float()[chosen]]
        return replace(problem, reference=lambda: [x.float() for x in naive()], values=values)

    moved = total * HEADS * DIM * 2 * dtype.itemsize + batch * HEADS * DIM * DIM * 4
    return Case("qla_state", shape, dtype, bytes=moved, flops=total * HEADS * 2 * DIM * DIM, make=make, **options)


def linear_silu_case(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, backward: bool, **options: Any
) -> Case:
    def make(device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((rows, in_features), (out_features, in_features), (out_features,))
        x, weight, bias = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        inputs = [y.to(dtype).requires_grad_() for y in (x, weight * 2 * in_features**-0.5, bias)]
        return _float_problem(inputs, backward, ops.linear_silu, peers.linear_silu, linear_silu, foreign=peers.product)

    # The backward reads x, the weights and the gradient, and writes three gradients.
    values, weights = rows * (in_features + out_features), out_features * in_features
    return Case(
        "linear_silu",
        f"{rows} x {in_features} to {out_features}",
        dtype,
        bytes=dtype.itemsize * (values + weights) * (3 if backward else 1),
        flops=2 * rows * weights * (3 if backward else 1),
        make=make,
        backward=backward,
        **options,
    )


def cross_attn_case(
    shape: str, groups: int, queries: int, users: int, own: bool, dtype: torch.dtype, backward: bool, **options: Any
) -> Case:
    rows, keys, item = groups * queries, users * TOKENS, dtype.itemsize

    def make(device: str) -> Problem:
        q_offsets = torch.arange(groups + 1, device=device) * queries
        kv_offsets = torch.arange(users + 1, device=device) * TOKENS
        kv_index = torch.arange(groups, device=device) * users // groups
        inputs = _rows(device, dtype, [rows, keys, keys] + [rows] * 2 * own)
        one_each = users == groups
        chosen = _spread(groups, max(1, MAX_CHECKED_ROWS // queries)) if one_each else list(range(groups))
        seen = range(len(chosen)) if one_each else kv_index.tolist()  # of the chosen groups' sequences

        def part(x: Tensor) -> Tensor:
            return x if len(chosen) == groups else x.view(groups, -1, *x.shape[1:])[chosen].flatten(0, 1)

        def ours(q: Tensor, k: Tensor, v: Tensor, self_k: Tensor | None = None, self_v: Tensor | None = None) -> Tensor:
            offsets = q_offsets, kv_offsets, queries, TOKENS
            return ops.jagged_cross_attn(q, k, v, *offsets, kv_index=kv_index, self_k=self_k, self_v=self_v)

        def reference(q: Tensor, k: Tensor, v: Tensor, *own_item: Tensor) -> Tensor:
            # Group by group: the mask over all pairs would not fit.
            groups_of = [x.split(queries) for x in (q, *own_item)]
            ends = torch.tensor([0, queries]), torch.tensor([0, TOKENS])
            outs = []
            for index, (query, *item) in zip(seen, zip(*groups_of, strict=True), strict=True):
                at = slice(index * TOKENS, (index + 1) * TOKENS)
                named = dict(zip(("self_k", "self_v"), item, strict=False))
                outs.append(cross_attn_by_mask(query, k[at], v[at], *ends, **named))
            return torch.cat(outs)

        peer = peers.cross_attn(groups, users, None if users == groups else kv_index)
        return _float_problem(
            inputs,
            backward,
            ours,
            peer,
            reference,
            part=part,
            checked="all of it" if len(chosen) == groups else f"{len(chosen)} of {groups} groups",
            foreign=lambda: {} if own or not one_each else peers.softmax_attention(groups, q_offsets, kv_offsets),
        )

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


def sglu_case(
    rows: int, dtype: torch.dtype, backward: bool, dim: int = WIDTH, hidden: int = WIDTH, **options: Any
) -> Case:
    """The feed-forward half of a layer: norm, three products, the multiplication, the rows added."""
    item = dtype.itemsize
    norm_eps = 1e-6

    def make(device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)
        shapes = (rows, dim), (hidden, dim), (hidden, dim), (dim, hidden)
        inputs = [
            (torch.randn(shape, generator=generator, device=device) / (1 if shape[0] == rows else shape[1] ** 0.5))
            .to(dtype)
            .requires_grad_()
            for shape in shapes
        ]
        # Gradients of weights are sums over all rows; a result alone is checked in some of them.
        some = None if backward or rows <= MAX_CHECKED_ROWS else torch.tensor(_spread(rows, MAX_CHECKED_ROWS))
        return _float_problem(
            inputs,
            backward,
            partial(ops.sglu, norm_eps=norm_eps, residual=True),
            peers.sglu(norm_eps),
            partial(sglu_by_products, norm_eps=norm_eps, residual=True),
            part=lambda x: x if some is None or len(x) != rows else x[some.to(x.device)],
            checked="all of it" if some is None else f"{len(some)} of {rows} rows",
        )

    # Forward reads and writes the rows; backward reads rows and gradients and writes gradients. Weights likewise.
    return Case(
        "sglu",
        f"{rows} x {dim}" + (f" h{hidden}" if hidden != dim else ""),
        dtype,
        bytes=(rows * dim * (2 + 3 * backward) + 3 * dim * hidden * (1 + 2 * backward)) * item,
        flops=rows * 6 * dim * hidden * (3 if backward else 1),
        make=make,
        backward=backward,
        **options,
    )
