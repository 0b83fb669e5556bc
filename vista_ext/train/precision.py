"""Mixed precision: layers compute in a short format, parameters, their gradients and the optimizer stay in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vista_ext.models import Ranker

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layers_in(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's parameters with those of the layers in `dtype`, for `torch.func.functional_call`.

    Gradients come back through the copies to the parameters. Rows, weights and norms of one format are what the ops
    take, and half of the memory, which autocast, that leaves norms and residuals in float32, does not give. Embedding
    tables keep theirs: a step reads few of their rows, and those are rounded after they are read.

    Args:
        model: whose forward rounds what it reads from tables to the format of its layers, as `Ranker` does.
        dtype: of the copies.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name: p if id(p) in tables else p.to(dtype) for name, p in model.named_parameters()}


def call_in(model: Ranker, dtype: torch.dtype, *arguments: Any) -> Any:
    """`model(*arguments)` with its layers in `dtype`."""
    if model.dtype == dtype:
        return model(*arguments)
    return torch.func.functional_call(model, layers_in(model, dtype), arguments)
