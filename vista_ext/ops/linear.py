"""A linear layer of many float32 rows on a CPU that has bfloat16 tiles (AMX).

There a float32 product as six of bfloat16 parts takes two thirds to three quarters of the time of the library's, at no
larger an error. All other calls are torch's: fewer rows or narrower ones, where packing the weight costs what is saved,
bfloat16, other processors. docs/cpu_layers.md has the measurements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vista_ext import _C
from vista_ext.ops._autograd import autocasts, register_fake

_LEAST_ROWS, _LEAST_WIDTH = 4096, 128
_HAS_TILES = _C.build_info()["cpu_isa"] == "amx"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`: `torch.nn.functional.linear`, differentiable, with a kernel of its own where that is faster.

    An infinite operand may give NaN in its row (of x) or column (of the weight) where torch gives infinity; denormals
    count as zero.

    Args:
        x: `[..., in_features]`.
        weight: `[out_features, in_features]`, same dtype unless autocast is on.
        bias: `[out_features]`, likewise.

    Returns:
        `[..., out_features]`.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    _check(x, weight, bias)
    if not _is_served(x, weight, bias):
        return functional.linear(x, weight, bias)
    out: Tensor = torch.ops.vista.row_product(x.flatten(0, -2), weight, bias)
    return out.unflatten(0, x.shape[:-1])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0:
        raise RuntimeError("vista::linear: x must have shape [..., in_features], found []")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        expected = f"[out_features, {x.shape[-1]}]"
        raise RuntimeError(f"vista::linear: weight must have shape {expected}, found {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"vista::linear: bias must have shape [{weight.shape[0]}], found {list(bias.shape)}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is None:
            continue
        if operand.device != x.device:
            raise RuntimeError(f"vista::linear: {name} must be on {x.device} as x is, found it on {operand.device}")
        if operand.dtype != x.dtype and not autocasts(x):
            raise RuntimeError(f"vista::linear: {name} must have the dtype of x, {x.dtype}, found {operand.dtype}")


def _is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    operands = [x, weight, *([] if bias is None else [bias])]
    if not _HAS_TILES or not all(y.is_cpu and y.dtype == torch.float32 for y in operands):
        return False
    if x.dim() < 2 or min(weight.shape) < _LEAST_WIDTH or autocasts(x):
        return False
    # Compiled code must not ask how many rows there are: it would be compiled anew for fewer.
    return torch.compiler.is_compiling() or x.shape[:-1].numel() >= _LEAST_ROWS


@register_fake("vista::row_product")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 0]))


@register_fake("vista::outer_product")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[1], b.shape[1]))


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    x, weight, *_ = inputs  # the dispatcher drops a bias of None
    ctx.save_for_backward(x, weight)
    ctx.transposed = keyword_only_inputs["transposed"]


def _backward(ctx: Any, grad_out: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    of_x, of_weight, *of_bias = ctx.needs_input_grad
    product, outer = torch.ops.vista.row_product, torch.ops.vista.outer_product
    pair = (x, grad_out) if ctx.transposed else (grad_out, x)
    return (
        product(grad_out, weight, transposed=not ctx.transposed) if of_x else None,
        outer(*pair) if of_weight else None,
        *(grad_out.sum(0) if wanted else None for wanted in of_bias),
    )


def _outer_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, grad: Tensor) -> Any:
    a, b = ctx.saved_tensors
    product = torch.ops.vista.row_product
    of_a, of_b = ctx.needs_input_grad
    return product(b, grad) if of_a else None, product(a, grad, transposed=True) if of_b else None


torch.library.register_autograd("vista::row_product", _backward, setup_context=_setup)
torch.library.register_autograd("vista::outer_product", _outer_backward, setup_context=_outer_setup)
