"""The feed-forward half of a layer in one kernel: normalised rows, gate, product and residual (paper section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_ext.ops._autograd import (
    autocast,
    differentiates_on_cpu,
    forbid_double_backward,
    no_rows,
    register_fake,
)
from vista_ext.ops.linear import linear
from vista_ext.ops.rms_norm import rms_norm

# What the CUDA kernels are built for (csrc/include/vista/cuda/sglu.h).
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST_ROW = 256

_GATED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_ROWS = 1024  # for fewer the weights side by side cost what is saved


def sglu(
    x: Tensor,
    up: Tensor,
    gate: Tensor,
    down: Tensor,
    *,
    norm_eps: float | None = None,
    residual: bool = False,
) -> Tensor:
    """Simple gated linear unit of packed rows: `((y up^T) * (y gate^T)) down^T`, no activation in it.

    With `norm_eps`, y_i is x_i divided by its root mean square, `sqrt(mean(x_i^2) + norm_eps)`, else x_i; a norm's own
    weight belongs into the columns of `up` and `gate` (`up * norm.weight`). On a GPU the rows are read once, the result
    is written once, and nothing `hidden` wide is ever stored. Saved for the backward: the inputs; on the CPU also what
    torch's products keep. Under autocast it computes in autocast's dtype, the residual included.

    Args:
        x: `[total, dim]`, float32, bfloat16 or float16. On a GPU bfloat16 or float16, and dim a multiple of 8 from 16
            to 256: `sglu_has_kernel` says so, anything else is an error there, and `nn.SGLU` takes torch's products.
        up, gate: `[hidden, dim]`, same dtype, as `torch.nn.Linear` holds them; on a GPU hidden is a multiple of 8.
        down: `[dim, hidden]`, same dtype.
        norm_eps: added to the mean square; None leaves the rows as they are.
        residual: add x to the result.

    Returns:
        `[total, dim]` in the inputs' dtype; products and norm are computed in float32. NaN stays in its row.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    operands = autocast(x, up, gate, down)
    if not differentiates_on_cpu(*operands):
        out: Tensor = torch.ops.vista.sglu(*operands, norm_eps=norm_eps, residual=residual)
        return out
    x, up, gate, down = operands
    with torch.no_grad():
        torch.ops.vista.sglu(no_rows(x), up, gate, down, norm_eps=norm_eps, residual=residual)
    y = x if norm_eps is None else rms_norm(x, x.new_ones(x.shape[1]), norm_eps=norm_eps)
    out = linear(gated_products(y, up, gate), down)
    return x + out if residual else out


def gated_products(y: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """`(y up^T) * (y gate^T)`, differentiable: on a CPU both products as one, and so all that their gradients need.

    Args:
        y: `[..., dim]`.
        up, gate: `[hidden, dim]`, same dtype.

    Returns:
        `[..., hidden]`.

    Raises:
        RuntimeError: naming what was expected and what was found.
    """
    fits = y.is_cpu and y.dtype in _GATED_DTYPES and y.dtype == up.dtype == gate.dtype and y.dim() == 2
    fits = fits and up.shape == gate.shape  # side by side, others might pass for halves of another width
    if not fits or torch.compiler.is_compiling() or y.shape[0] < _LEAST_ROWS or torch.is_autocast_enabled("cpu"):
        return linear(y, up) * linear(y, gate)
    out: Tensor = torch.ops.vista.gated_product(linear(y, torch.cat([up, gate])))
    return out


def sglu_has_kernel(x: Tensor, up: Tensor) -> bool:
    """Whether `sglu` is one GPU kernel for these rows, forward and backward; elsewhere torch's products do as well.

    Args:
        x: `[..., dim]`.
        up: `[hidden, dim]`.
    """
    hidden, dim = up.shape
    built = 16 <= dim <= _WIDEST_ROW and dim % 8 == 0 and hidden > 0 and hidden % 8 == 0
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and up.dtype == x.dtype and built


@register_fake("vista::sglu")
def _(x: Tensor, *args: Any, **_: Any) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("vista::sglu_backward")
def _(grad_out: Tensor, x: Tensor, up: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = (x.shape[0], up.shape[0])
    return x.new_empty(x.shape), x.new_empty(hidden), x.new_empty(hidden), x.new_empty(hidden)


@register_fake("vista::gated_product")
def _(uv: Tensor) -> Tensor:
    return uv.new_empty((uv.shape[0], uv.shape[1] // 2))


@register_fake("vista::gated_product_backward")
def _(grad_out: Tensor, uv: Tensor) -> Tensor:
    return uv.new_empty(uv.shape)


def _gated_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gated_backward(ctx: Any, grad_out: Tensor) -> Any:
    return torch.ops.vista.gated_product_backward(grad_out, *ctx.saved_tensors)


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor) -> Any:
    x, up, gate, down = ctx.saved_tensors
    grad_x, up_rows, gate_rows, hidden = torch.ops.vista.sglu_backward(grad_out, x, up, gate, down, **ctx.options)
    _, of_up, of_gate, of_down = ctx.needs_input_grad[:4]
    return (
        grad_x,
        up_rows.t() @ x if of_up else None,
        gate_rows.t() @ x if of_gate else None,
        grad_out.t() @ hidden if of_down else None,
    )


torch.library.register_autograd("vista::sglu", _backward, setup_context=_setup)
torch.library.register_autograd("vista::gated_product", _gated_backward, setup_context=_gated_setup)
forbid_double_backward("vista::sglu_backward")
forbid_double_backward("vista::gated_product_backward")
