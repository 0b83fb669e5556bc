"""The gate of the feed-forward half on a CPU: both products as one, against float64."""

import pytest
import torch

from vista_ext import ops
from vista_ext.testing import assert_as_good_as

vista = torch.ops.vista
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, dim, hidden, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, dim), (hidden, dim), (hidden, dim), (rows, hidden)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(function, y, up, gate, grad):
    inputs = [t.detach().requires_grad_() for t in (y, up, gate)]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def definition(y, up, gate):
    return (y @ up.t()) * (y @ gate.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim", "hidden"), [(1500, 24, 37), (1024, 16, 64), (3, 24, 40), (0, 8, 8)])
def test_matches_the_definition(rows, dim, hidden, dtype):
    inputs = make(rows, dim, hidden, dtype)
    exact = with_gradients(definition, *(t.double() for t in inputs))
    assert_as_good_as(with_gradients(ops.gated_products, *inputs), exact, with_gradients(definition, *inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(70, 37), (5, 64), (1, 1), (0, 8)])
def test_products_and_gradients_are_rounded_once(rows, hidden, dtype):
    u, grad = make(rows, hidden, 1, dtype)[0], make(hidden, 1, rows, dtype)[3].t()
    v = u.flip(0) + 1
    uv = torch.cat([u, v], 1)
    assert torch.equal(vista.gated_product(uv), u * v)
    assert torch.equal(vista.gated_product_backward(grad, uv), torch.cat([grad * v, grad * u], 1))
    wide = torch.zeros(rows, 2 * hidden + 3, dtype=dtype)
    wide[:, 2:-1] = uv
    assert torch.equal(vista.gated_product(wide[:, 2:-1]), u * v)


def test_opcheck():
    uv, grad = torch.randn(5, 24), torch.randn(5, 12)
    torch.library.opcheck(vista.gated_product_backward.default, (grad, uv))
    torch.library.opcheck(vista.gated_product.default, (uv.requires_grad_(),))


@pytest.mark.parametrize("rows", [3, 1500])
def test_halves_of_two_widths_are_refused(rows):
    """Side by side they would pass for equal halves."""
    with pytest.raises(RuntimeError, match=r"size of tensor a \(6\) must match the size of tensor b \(4\)"):
        ops.gated_products(torch.ones(rows, 8), torch.ones(6, 8), torch.ones(4, 8))


def test_bad_input_is_named():
    uv = torch.ones(4, 6)
    for call, message in (
        (lambda: vista.gated_product(uv[0]), r"uv must have shape \[total, 2 \* hidden\], found \[6\]"),
        (lambda: vista.gated_product(uv.double()), "uv must be float32, bfloat16 or float16, found float64"),
        (lambda: vista.gated_product(uv[:, :5]), r"uv must have an even number of columns, found \[4, 5\]"),
        (lambda: vista.gated_product_backward(uv, uv), r"grad_out must have shape \[4, 3\], found \[4, 6\]"),
        (lambda: vista.gated_product_backward(uv[:, :3].half(), uv), "grad_out must have the dtype of x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
