"""Registration shared by the ops' Python halves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def register_fake(name: str) -> Callable[[Kernel], Kernel]:
    """`torch.library.register_fake` for a kernel that gets tensors of one device only.

    One tensor on "meta" is enough for an op to come here instead of to the kernel of the others' device; the memory
    made here would be returned as if it held a result.

    Args:
        name: qualified name of the op, with the overload if it has one, e.g. "vista::cache_gather.out".
    """
    op, _, overload = name.removeprefix("vista::").partition(".")
    schema = getattr(getattr(torch.ops.vista, op), overload or "default")._schema
    names = [argument.name for argument in schema.arguments]

    def register(kernel: Kernel) -> Kernel:
        @wraps(kernel)
        def checked(*args: Any, **options: Any) -> Any:
            given = [*zip(names, args, strict=False), *options.items()]
            (first, like), *others = [(key, value) for key, value in given if isinstance(value, Tensor)]
            for key, value in others:
                if value.device != like.device:
                    raise RuntimeError(
                        f"vista::{op}: {key} must be on {like.device} as {first} is, found it on {value.device}"
                    )
            return kernel(*args, **options)

        torch.library.register_fake(name, checked)
        return kernel

    return register


def forbid_double_backward(name: str) -> None:
    """`forbid_backward` of a backward op, e.g. "vista::qla_backward"."""
    forbid_backward(name, "double backward through vista ops is not implemented")


def forbid_backward(name: str, reason: str) -> None:
    """Make differentiating an op an error: without this it would silently contribute nothing.

    Args:
        name: qualified name of the op.
        reason: for the message.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} is not differentiable: {reason}")

    torch.library.register_autograd(name, backward)


def refuse_scale_gradient(op: str, attn_scale: Tensor | None) -> None:
    """Make an `attn_scale` that wants a gradient an error: it would get none."""
    if attn_scale is not None and attn_scale.requires_grad:
        raise RuntimeError(f"vista::{op}: attn_scale must not require a gradient (it is not differentiable), found one")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` is; there is none of "meta"."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """The operands of a product in autocast's dtype, where that is on: what torch does for its own products."""
    operands: list[Tensor | None] = [x, *others]
    if not autocasts(x):
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if operand is None else operand.to(dtype) for operand in operands]


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Products on the device of `x` in their operands' dtype; there is no autocast of "meta" to leave."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def differentiates_on_cpu(*operands: Tensor | None) -> bool:
    """Whether a gradient is wanted of products on a CPU. There products made again cost more than the memory that keeps
    them, so such a call is composed of torch's products and autograd keeps what those keep."""
    tensors = [x for x in operands if x is not None]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return wanted and all(x.is_cpu for x in tensors)


def no_rows(x: Tensor) -> Tensor:
    """None of the rows of x: an op called on them checks its other arguments, and x's columns. Of another rank as it
    is, for the error to show."""
    return x.detach()[:0] if x.dim() == 2 else x
