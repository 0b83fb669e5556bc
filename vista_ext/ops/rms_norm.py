"""The root-mean-square norm of rows, with its weight: on a CPU one pass over the rows forward, and one backward.

torch composes it there of a dozen passes, most of them in the backward. On a GPU torch has kernels of its own, and a
compiler fuses the composition with its neighbours: there this is torch's norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vista_ext.ops._autograd import forbid_double_backward, register_fake

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, *, norm_eps: float) -> Tensor:
    """`x_i / sqrt(mean(x_i^2) + norm_eps) * weight` of every row.

    On a CPU sums are in float32 and double and each result is rounded once; the bits of a row, and of the gradients,
    depend neither on the threads nor, for rows, on the others. float64, mixed dtypes, other devices and compiled code
    get `torch.nn.functional.rms_norm`.

    Args:
        x: `[..., dim]`.
        weight: `[dim]`.
        norm_eps: added to the mean square.

    Returns:
        A tensor like x.

    Raises:
        RuntimeError: naming the argument, what was expected and what was found.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise RuntimeError(f"vista::rms_norm: x must have shape [..., dim] with columns, found {list(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise RuntimeError(f"vista::rms_norm: weight must have shape [{x.shape[-1]}], found {list(weight.shape)}")
    if weight.device != x.device:
        raise RuntimeError(f"vista::rms_norm: weight must be on {x.device} as x is, found it on {weight.device}")
    if not norm_eps >= 0:
        raise RuntimeError(f"vista::rms_norm: norm_eps must not be negative, found {norm_eps}")
    ours = x.is_cpu and x.dtype in _DTYPES and weight.dtype == x.dtype
    if not ours or torch.compiler.is_compiling():
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, norm_eps)
    out: Tensor = torch.ops.vista.weighted_rms_norm(x.reshape(-1, x.shape[-1]), weight, norm_eps=norm_eps)
    return out.view(x.shape)


@register_fake("vista::weighted_rms_norm")
def _(x: Tensor, weight: Tensor, *, norm_eps: float) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("vista::weighted_rms_norm_backward")
def _(grad_out: Tensor, x: Tensor, weight: Tensor, *, norm_eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor) -> Any:
    return torch.ops.vista.weighted_rms_norm_backward(grad_out, *ctx.saved_tensors, **ctx.options)


torch.library.register_autograd("vista::weighted_rms_norm", _backward, setup_context=_setup)
forbid_double_backward("vista::weighted_rms_norm_backward")
