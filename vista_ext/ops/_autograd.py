"""Registration shared by the ops' Python halves."""

from __future__ import annotations

from typing import Any

import torch


def forbid_double_backward(name: str) -> None:
    """Make differentiating a backward op an error: without this it would silently contribute nothing.

    Args:
        name: qualified name of the backward op, e.g. "vista::qla_backward".
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} is not differentiable: double backward through vista ops is not implemented")

    torch.library.register_autograd(name, backward)
