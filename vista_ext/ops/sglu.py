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
    out = linear(linear(y, up) * linear(y, gate), down)
    return x + out if residual else out


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
forbid_double_backward("vista::sglu_backward")
