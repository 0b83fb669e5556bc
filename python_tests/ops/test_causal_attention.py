"""Causal attention of packed rows by torch's own kernels, on every device: which one is taken, and that it is right."""

import pytest
import torch

from vista_ext.nn import causal, causal_attention
from vista_ext.testing import assert_as_good_as

LENGTHS = [4, 0, 1, 130, 64, 4]


def by_sequence(qkv):
    parts = []
    for rows in qkv.split(LENGTHS):
        q, k, v = (x.transpose(0, 1) for x in rows.unbind(1))
        scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
        future = torch.ones(len(rows), len(rows), dtype=torch.bool, device=qkv.device).triu(1)
        parts.append((scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_it_is_softmax_of_what_came_before(device, dtype, head_dim):
    """Queries, keys and values are slices of one product."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3, 2, head_dim).to(device, dtype)
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0)

    def run(function, dtype=dtype):
        x = qkv.to(dtype).requires_grad_()
        out = function(x)
        return out.detach(), *torch.autograd.grad(out, x, torch.full_like(out, 0.5))

    ours = run(lambda x: causal_attention(*x.unbind(1), offsets, 130))
    assert_as_good_as(ours, run(by_sequence, torch.float64), run(by_sequence))
    changed = qkv.clone()
    changed[100] += 1  # the 96th of the sequence of 130
    after = causal_attention(*changed.unbind(1), offsets, 130)
    assert (after != ours[0]).flatten(1).any(1).nonzero().flatten().tolist() == list(range(100, 135))


def test_gradients():
    qkv = torch.randn(9, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 9])
    assert torch.autograd.gradcheck(lambda x: causal_attention(*x.unbind(1), offsets, 5), (qkv,))


def test_the_op_is_well_formed():
    q, k, v = (torch.randn(9, 2, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.vista_nn.causal_by_length, (q, k, v, torch.tensor([0, 4, 4, 9])))


def test_torchs_packed_kernel_takes_what_it_is_given():
    """The one for CUDA in half precision: as far as shapes, dtypes and the backward's graph go, on any machine."""
    q, k, v = (torch.empty(9, 2, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = causal._varlen(q, k, v, torch.zeros(4, dtype=torch.int64, device="meta"), 5)
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert all(x.shape == q.shape and x.dtype == q.dtype for x in (out, *grads))
    assert causal._varlen(*(x[:0] for x in (q, k, v)), torch.zeros(1), 0).shape == (0, 2, 16)
