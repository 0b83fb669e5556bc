"""Products of rows in tiles, at ugly sizes: at most twice as far from float64 as torch's products are."""

import pytest
import torch
from torch.nn import functional

from vista_ext import _C, nn, ops
from vista_ext.testing import assert_as_good_as

vista = torch.ops.vista
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# No rows, one, less than a tile, more than a block, more than one sum; widths of no tile, one and a bit, many.
SIZES = [(0, 8, 8), (1, 16, 48), (5, 7, 3), (130, 100, 70), (129, 33, 257), (2500, 264, 136)]
tiles = pytest.mark.skipif(_C.build_info()["cpu_isa"] != "amx", reason="this processor has no tiles: torch's products")


def make(rows, inside, outside, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inside), (outside, inside), (outside,), (rows, outside)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(function, x, weight, bias, grad):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_layer_and_its_gradients(sizes, dtype):
    inputs = make(*sizes, dtype)
    exact = with_gradients(functional.linear, *(t.double() for t in inputs))
    peer = with_gradients(functional.linear, *inputs)
    assert_as_good_as(with_gradients(vista.row_product, *inputs), exact, peer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_weight_and_an_outer_product(dtype):
    x, weight, _, grad = make(300, 40, 70, dtype)

    def run(product, outer, x, weight, grad):
        x, weight, grad = (t.detach().requires_grad_() for t in (x, weight, grad))
        results = product(grad, weight), outer(grad, x)
        return [*(y.detach() for y in results), *torch.autograd.grad([y.sum() for y in results], [x, weight, grad])]

    def in_torch(*inputs):
        return run(lambda g, w: g @ w, lambda a, b: a.t() @ b, *inputs)

    ours = run(lambda g, w: vista.row_product(g, w, transposed=True), vista.outer_product, x, weight, grad)
    assert_as_good_as(ours, in_torch(x.double(), weight.double(), grad.double()), in_torch(x, weight, grad))


def test_values_of_every_size():
    """Parts of a float32 lose nothing, whatever the exponent."""
    x, weight, _, _ = make(64, 48, 32)
    x *= torch.logspace(-15, 18, 64)[:, None]
    weight *= torch.logspace(-12, 15, 32)[:, None]
    exact = x.double() @ weight.double().t()
    size = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    errors = [((y - exact).abs() / size).max() for y in (vista.row_product(x, weight), x @ weight.t())]
    assert errors[0] <= 2 * errors[1]


@tiles
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bits_depend_on_a_row_alone_and_on_no_thread(dtype):
    x, weight, bias, grad = make(3000, 136, 72, dtype)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append((vista.row_product(x, weight, bias), vista.outer_product(grad, x)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for rows in (slice(0, 1), slice(127, 300)):
        assert torch.equal(vista.row_product(x[rows], weight, bias), results[0][0][rows])


@tiles
def test_nan_stays_in_its_row():
    x, weight, _, _ = make(70, 40, 33)
    x[5, 3] = torch.nan
    expected = torch.arange(70) == 5
    out = vista.row_product(x, weight)
    assert torch.equal(out.isnan().all(1), expected) and torch.equal(out.isnan().any(1), expected)


def test_views():
    x, weight, bias, grad = make(50, 64, 40)
    parts = x[::2, 3:35], weight.t()[3:35].t(), grad[::2, 1:30]
    packed = [part.contiguous() for part in parts]
    assert torch.equal(vista.row_product(*parts[:2], bias), vista.row_product(*packed[:2], bias))
    assert torch.equal(vista.outer_product(parts[2], parts[0]), vista.outer_product(packed[2], packed[0]))


@tiles
def test_who_is_served(monkeypatch):
    called = []
    monkeypatch.setattr(torch.ops.vista, "row_product", lambda *inputs: called.append(1) or functional.linear(*inputs))
    x, weight, bias, _ = make(4096, 128, 130)
    layer = nn.Linear(128, 130)
    for call, served in (
        (lambda: ops.linear(x, weight, bias), True),
        (lambda: layer(x.view(2, 2048, 128)), True),
        (lambda: ops.linear(x[1:], weight), False),
        (lambda: ops.linear(x[:, :120], weight[:, :120]), False),
        (lambda: ops.linear(x.bfloat16(), weight.bfloat16()), False),
        (lambda: ops.linear(x.double(), weight.double()), False),
    ):
        called.clear()
        call()
        assert bool(called) == served
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
        assert layer(x).dtype == torch.bfloat16 and ops.linear(x.bfloat16(), weight, bias).dtype == torch.bfloat16
    for rows in (x[0], x[:6], x.view(2, 2048, 128)):
        assert torch.allclose(layer(rows), functional.linear(rows, layer.weight, layer.bias), atol=1e-5)


@pytest.mark.parametrize("rows", [9, 4096])
def test_bad_input_of_the_layer_is_named(rows):
    x, weight, bias, _ = make(rows, 128, 130)
    for call, message in (
        (lambda: ops.linear(x[0, 0], weight), r"x must have shape \[\.\.\., in_features\], found \[\]"),
        (lambda: ops.linear(x, weight[:, :120]), r"weight must have shape \[out_features, 128\], found \[130, 120\]"),
        (lambda: ops.linear(x, weight[0]), r"weight must have shape \[out_features, 128\], found \[128\]"),
        (lambda: ops.linear(x, weight.half()), "weight must have the dtype of x, torch.float32, found torch.float16"),
        (lambda: ops.linear(x, weight, bias[:1]), r"bias must have shape \[130\], found \[1\]"),
        (lambda: ops.linear(x, weight, bias.double()), "bias must have the dtype of x, .*, found torch.float64"),
        (lambda: ops.linear(x, weight.to("meta")), "weight must be on cpu as x is, found it on meta"),
    ):
        with pytest.raises(RuntimeError, match="vista::linear: " + message):
            call()


def test_opcheck():
    x, weight, bias, grad = (t.requires_grad_() for t in make(9, 16, 24))
    torch.library.opcheck(vista.row_product.default, (x, weight, bias))
    torch.library.opcheck(vista.row_product.default, (grad, weight), {"transposed": True})
    torch.library.opcheck(vista.outer_product.default, (grad, x))


def test_bad_input_is_named():
    x, weight, bias, grad = make(9, 16, 24)
    for call, message in (
        (lambda: vista.row_product(x[0], weight), r"x must have shape \[total, in_features\], found \[16\]"),
        (lambda: vista.row_product(x.double(), weight), "x must be float32, bfloat16 or float16, found float64"),
        (lambda: vista.row_product(x, weight[0]), r"weight must have shape \[out_features, in_features\]"),
        (lambda: vista.row_product(x, weight.half()), r"weight must have the dtype of x \(float32\), found float16"),
        (lambda: vista.row_product(x, weight, transposed=True), r"weight must have the in_features of x \(16\)"),
        (lambda: vista.row_product(x, weight, bias[:3]), r"bias must have shape \[24\] in float32, found \[3\]"),
        (lambda: vista.outer_product(x[0], grad), r"a must have shape \[total, left\], found \[16\]"),
        (lambda: vista.outer_product(x, grad[0]), r"b must have shape \[total, right\], found \[24\]"),
        (lambda: vista.outer_product(x, grad.half()), r"b must have the dtype of a \(float32\), found float16"),
        (lambda: vista.outer_product(x, grad[:4]), r"b must have the rows of a \(9\), found \[4, 24\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
