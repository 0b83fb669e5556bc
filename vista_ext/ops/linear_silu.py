"""A linear layer and its SiLU in one kernel: the first half of an MLP.

On the CPU these are torch's own product and SiLU, bit for bit; where a gradient is wanted the product is that of
`ops.linear`. On CUDA bfloat16 and float16 rows with widths that are multiples of 8 go through one kernel, which sums in
float32, adds the bias, applies the SiLU and rounds once; float32 and other widths are composed of torch's ops there too
(and obey `torch.backends.cuda.matmul`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vista_ext.ops._autograd import (
    autocast,
    differentiates_on_cpu,
    forbid_double_backward,
    no_rows,
    register_fake,
)
from vista_ext.ops.linear import linear


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`silu(x weight^T + bias)`.

    Only x and the parameters are kept for the backward, which makes the product again: the rows before the SiLU are
    never stored. (On the CPU they are: there a product takes longer than its rows take to be read.) Under autocast it
    computes in autocast's dtype, as torch's linear layer does.

    Args:
        x: `[total, in_features]`, float32, bfloat16 or float16.
        weight: `[out_features, in_features]`, same dtype, as `torch.nn.Linear` holds it.
        bias: `[out_features]`, same dtype.

    Returns:
        `[total, out_features]` in the inputs' dtype. NaN stays NaN: of x in its row, of a weight or bias in its column.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    operands = autocast(x, weight, bias)
    if not differentiates_on_cpu(*operands):
        return torch.ops.vista.linear_silu(*operands)
    with torch.no_grad():
        torch.ops.vista.linear_silu(no_rows(operands[0]), *operands[1:])
    return functional.silu(linear(*operands))


@register_fake("vista::linear_silu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register_fake("vista::linear_silu_backward")
def _(grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> Any:
    x, weight, bias = ctx.saved_tensors
    grad_pre = torch.ops.vista.linear_silu_backward(grad_out, x, weight, bias)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        grad_pre @ weight if needs_x else None,
        grad_pre.T @ x if needs_weight else None,
        grad_pre.sum(0) if needs_bias else None,
    )


torch.library.register_autograd("vista::linear_silu", _backward, setup_context=_setup)
forbid_double_backward("vista::linear_silu_backward")
