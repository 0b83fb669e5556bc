"""Tensors of an op on different devices: an error, never memory that nobody wrote."""

import pytest
import torch

from vista_ext import ops

OFFSETS = torch.tensor([0, 2, 5])
ROWS = torch.ones(5, 2, 16)
STATE = torch.ones(2, 2, 16, 16)
X, WEIGHT = torch.ones(5, 8), torch.ones(32, 8)
SCALE, TARGETS, LSE = torch.ones(2), torch.tensor([1, 1]), torch.ones(5, 2)
BYTES, SLOTS = torch.zeros(4, 128, dtype=torch.uint8), torch.tensor([0, 1])
MATRIX = torch.ones(16, 16)

INPUTS = {
    "qla": (ROWS, ROWS, ROWS, OFFSETS, 3, TARGETS, SCALE),
    "qla_backward": (ROWS, STATE, ROWS, ROWS, ROWS, STATE, OFFSETS, 3, TARGETS, SCALE),
    "qla_state": (ROWS, ROWS, OFFSETS, 3, TARGETS),
    "qla_state_backward": (STATE, ROWS, ROWS, OFFSETS, 3, TARGETS),
    "qla_apply": (ROWS, STATE, SCALE, OFFSETS, 3, ROWS, ROWS, TARGETS),
    "qla_apply_backward": (ROWS, ROWS, STATE, SCALE, OFFSETS, 3, ROWS, ROWS, TARGETS),
    "projected_qla_state": (X, WEIGHT, WEIGHT, OFFSETS, 3),
    "projected_qla_state_backward": (STATE, X, WEIGHT, WEIGHT, OFFSETS, 3),
    "projected_qla_apply": (X, WEIGHT, STATE, SCALE, OFFSETS, 3),
    "projected_qla_apply_backward": (ROWS, X, WEIGHT, STATE, SCALE, OFFSETS, 3),
    "jagged_cross_attn": (ROWS, ROWS, ROWS, OFFSETS, OFFSETS, 3, 3, ROWS, ROWS, SLOTS),
    "jagged_cross_attn_backward": (ROWS, LSE, ROWS, ROWS, ROWS, ROWS, LSE, OFFSETS, OFFSETS, 3, 3, ROWS, ROWS, SLOTS),
    "cached_cross_attn": (ROWS, BYTES, BYTES, SLOTS, OFFSETS, 3, 2, 2, ROWS, ROWS),
    "linear_silu": (MATRIX, MATRIX, MATRIX[0]),
    "linear_silu_backward": (MATRIX, MATRIX, MATRIX, MATRIX[0]),
    "sglu": (MATRIX,) * 4,
    "sglu_backward": (MATRIX,) * 5,
    "rms_norm_backward": (MATRIX,) * 2,
    "gated_product_backward": (MATRIX[:, :8], MATRIX),
    "row_product": (MATRIX, MATRIX, MATRIX[0]),
    "outer_product": (MATRIX, MATRIX),
    "weighted_rms_norm": (MATRIX, MATRIX[0]),
    "weighted_rms_norm_backward": (MATRIX, MATRIX, MATRIX[0]),
    "cache_gather": (BYTES, SLOTS, 2, 16),
    "cache_scatter_": (BYTES, SLOTS, BYTES[:2]),
}
OPTIONS = {
    "projected_qla_state": {"heads": 2},
    "projected_qla_state_backward": {"heads": 2},
    "rms_norm_backward": {"norm_eps": 1e-6},
    "weighted_rms_norm": {"norm_eps": 1e-6},
    "weighted_rms_norm_backward": {"norm_eps": 1e-6},
}
CASES = [(op, i) for op, inputs in INPUTS.items() for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("op", "index"), CASES)
def test_one_input_on_another_device(op, index):
    call = getattr(torch.ops.vista, op)
    inputs = list(INPUTS[op])
    call(*inputs, **OPTIONS.get(op, {}))
    inputs[index] = inputs[index].to("meta")
    arguments = call.default._schema.arguments
    named = arguments[index or 1].name  # the others are compared with the first
    with pytest.raises(
        RuntimeError, match=rf"vista::{op}: {named} must be on \w+ as {arguments[0].name} is, found it on"
    ):
        call(*inputs, **OPTIONS.get(op, {}))


def test_a_result_to_write_on_another_device():
    out = torch.empty(2, 2, 16, device="meta")
    with pytest.raises(RuntimeError, match="vista::cache_gather: out must be on cpu as cache is, found it on meta"):
        torch.ops.vista.cache_gather.out(BYTES, SLOTS, 2, 16, out=out)


def attend_to_projections(x, weight, state):
    own = ops.projected_qla_state(x, weight, weight, OFFSETS.to(x.device), 3, heads=2, norm_eps=1e-6)
    scale = SCALE.to(x.device)
    return ops.projected_qla_apply(x, weight, state + own, scale, OFFSETS.to(x.device), 3, norm_eps=1e-6)


@pytest.mark.parametrize(
    ("call", "inputs", "shape"),
    [
        (ops.linear_silu, (X, WEIGHT), (5, 32)),
        (ops.sglu, (MATRIX,) * 4, (16, 16)),
        (attend_to_projections, (X, WEIGHT, STATE), (5, 2, 16)),
    ],
    ids=["linear_silu", "sglu", "projected_qla"],
)
def test_products_without_memory(call, inputs, shape):
    """On "meta", which has no autocast to ask for."""
    inputs = [x.to("meta").requires_grad_() for x in inputs]
    out = call(*inputs)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert out.is_meta and out.shape == shape
    assert [(grad.shape, grad.dtype) for grad in grads] == [(x.shape, x.dtype) for x in inputs]


def test_every_op_of_several_tensors_is_tried():
    several = set()
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("vista::") and sum("Tensor" in str(a.type) for a in schema.arguments) > 1:
            several.add(schema.name.removeprefix("vista::"))
    assert several == set(INPUTS)
