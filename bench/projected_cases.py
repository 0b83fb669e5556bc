"""Cases of the attention half of a layer, from its input: norm, projections, state, apply."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.cases import DIM, HEADS, Case, Problem, _sequences, differentiable
from vista_ext import ops, reference

WIDTH, EPS = HEADS * DIM, 1e-6


def _attend(module: ModuleType, offsets: Tensor, *most: int, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Both halves, by the ops or by their references."""
    query, key, value = weights
    state = module.projected_qla_state(x, key, value, offsets, *most, heads=HEADS, norm_eps=EPS)
    return module.projected_qla_apply(x, query, state, ops.mean_scale(offsets), offsets, *most, norm_eps=EPS)


def projected_case(shape: str, batch: int, length: int, dtype: torch.dtype, backward: bool, **options: Any) -> Case:
    total = batch * length

    def make(device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((total, WIDTH), *[(WIDTH, WIDTH)] * 3)
        scales = (1.0, *[WIDTH**-0.5] * 3)
        inputs = tuple(
            (torch.randn(size, generator=generator, device=device) * scale).to(dtype).requires_grad_()
            for size, scale in zip(shapes, scales, strict=True)
        )
        chosen, part, checked = _sequences([length] * batch)
        offsets, some = (torch.arange(n + 1, device=device) * length for n in (batch, len(chosen)))
        # Of a part of the batch the gradients of the weights cannot be told.
        compared = len(inputs) + 1 if len(chosen) == batch else 2

        def exact(precision: torch.dtype) -> Sequence[Tensor]:
            x, *weights = (y.detach().to(precision) for y in inputs)
            tensors = [y.requires_grad_() for y in (part(x), *weights)]
            run = lambda x, *weights: _attend(reference, some, x=x, weights=weights)  # noqa: E731
            return [y.detach() for y in differentiable(run, tensors, backward)][:compared]

        def values(result: Sequence[Tensor]) -> Sequence[Tensor]:
            rows, others = result[:2], result[2:compared]
            return [*(part(y) for y in rows), *others]

        return Problem(
            inputs=inputs,
            ours=lambda x, *weights: _attend(ops, offsets, length, x=x, weights=weights),
            composition=peers.projected_qla(batch, HEADS, EPS),
            exact=lambda: exact(torch.float64),
            reference=lambda: exact(dtype),
            values=values,
            checked=checked if len(chosen) == batch else f"{checked}; not the weights' gradients",
            foreign=partial(peers.unfused_qla, offsets, length, HEADS, EPS),
        )

    # x read and out written; backward x and the gradient read and another written. The weights count once each.
    rows, weights = total * WIDTH, 3 * WIDTH * WIDTH
    return Case(
        "projected_qla",
        shape,
        dtype,
        bytes=dtype.itemsize * (rows * (5 if backward else 2) + weights * (3 if backward else 1)),
        flops=total * (2 * weights + 4 * DIM * WIDTH) * (3 if backward else 1),
        make=make,
        backward=backward,
        **options,
    )
