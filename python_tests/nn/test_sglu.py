"""SGLU through the op, which a GPU takes where it has a kernel, and through torch's products."""

import pytest
import torch

from vista_ext import ops
from vista_ext.nn import SGLU, QlaBlock
from vista_ext.testing import assert_as_good_as


@pytest.fixture
def through(monkeypatch):
    """`through(run, module, *inputs, op=...)`: results and gradients, through the op or not."""

    def call(run, module, *inputs, op):
        monkeypatch.setattr(ops, "sglu_has_kernel", lambda x, up: op)
        called = []
        sglu = ops.sglu
        monkeypatch.setattr(ops, "sglu", lambda *a, **o: called.append(1) or sglu(*a, **o))
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = run(module, *inputs)
        wanted = [*inputs, *module.parameters()]
        grads = torch.autograd.grad(out.float().square().sum(), wanted, allow_unused=True)
        monkeypatch.setattr(ops, "sglu", sglu)
        assert bool(called) == op
        return [out.detach(), *(grad for grad in grads if grad is not None)]

    return call


def module_of(dtype):
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"sglu": SGLU(32, 24), "norm": torch.nn.RMSNorm(32, eps=1e-6)})
    torch.nn.init.uniform_(module["norm"].weight, 0.5, 1.5)
    return module.to(dtype)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_the_op_and_the_products_agree(through, with_norm, residual):
    module, exact = module_of(torch.bfloat16), module_of(torch.bfloat16).double()
    x = torch.randn(3, 7, 32).bfloat16()

    def run(module, x):
        return module["sglu"](x, module["norm"] if with_norm else None, residual=residual)

    results = through(run, module, x, op=True)
    right, peer = through(run, exact, x.double(), op=False), through(run, module, x, op=False)
    assert results[0].shape == x.shape
    assert_as_good_as(results, right, peer)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_adds_the_rows_where_there_is_no_dropout(through, training, dropout):
    torch.manual_seed(0)
    block = QlaBlock(32, 2, 16, 24, dropout=dropout).bfloat16().train(training)
    x = torch.randn(9, 32).bfloat16()
    offsets = torch.tensor([0, 4, 9])
    scale = torch.full((2,), 0.2)

    def run(block, x):
        torch.manual_seed(1)
        state = block.state(x, offsets, 5)
        return block.read(x, state, scale, offsets, 5)

    results, peer = (through(run, block, x, op=op) for op in (True, False))
    for a, b in zip(results, peer, strict=True):
        assert (a - b).float().norm() < 0.02 * b.float().norm()
