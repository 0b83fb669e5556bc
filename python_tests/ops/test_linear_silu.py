"""linear_silu against float64, at ugly sizes."""

import pytest
import torch
from torch.nn import functional

from vista_ext import ops
from vista_ext.reference import linear_silu as reference
from vista_ext.testing import assert_as_good_as

# Rows: one, a few, a tile of each kernel and one beside it. Widths: the least, primes of the unit, more than a tile,
# and two that no kernel serves.
ROWS = (0, 1, 63, 127, 129, 1000)
WIDTHS = ((8, 8), (64, 256), (40, 72), (264, 136), (512, 520), (20, 24), (24, 7))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_the_device(device):
    with torch.device(device):
        yield


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make(rows, widths, dtype, bias=True, seed=0):
    generator = seeded(seed)
    inside, outside = widths
    shapes = ((rows, inside), (outside, inside), (outside,))
    scales = (1, 2 * inside**-0.5, 1)
    tensors = [s * torch.randn(shape, generator=generator) for shape, s in zip(shapes, scales, strict=True)]
    return [x.to(dtype).requires_grad_() for x in (tensors if bias else tensors[:2])]


def composition(x, weight, bias=None):
    return functional.silu(functional.linear(x, weight, bias))


def with_grads(function, inputs, grad):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("products")
def test_matches_the_definition(rows, widths, bias, dtype):
    inputs = make(rows, widths, dtype, bias)
    grad = torch.randn(rows, widths[1], generator=seeded(1)).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = with_grads(ops.linear_silu, inputs, grad)
    assert_as_good_as(ours, with_grads(reference, exact, grad), with_grads(composition, inputs, grad))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_bits_of_torch_on_the_cpu(bias, dtype, device):
    if device != "cpu":
        pytest.skip("a promise for the CPU")
    inputs = make(77, (48, 104), dtype, bias)
    grad = torch.randn(77, 104, generator=seeded(1)).to(dtype)
    ours, right = (with_grads(function, inputs, grad) for function in (ops.linear_silu, composition))
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_of_a_row_depend_on_it_alone(dtype, device):
    if device == "cpu":
        pytest.skip("torch's product on the CPU does not promise it")
    x, weight, bias = (x.detach() for x in make(1000, (256, 512), dtype))
    grad = torch.randn(1000, 512, generator=seeded(1)).to(dtype)
    out, grad_pre = ops.linear_silu(x, weight, bias), torch.ops.vista.linear_silu_backward(grad, x, weight, bias)
    for rows in (slice(0, 1), slice(127, 130), slice(500, 1000)):
        assert torch.equal(ops.linear_silu(x[rows], weight, bias), out[rows])
        alone = torch.ops.vista.linear_silu_backward(grad[rows], x[rows], weight, bias)
        assert torch.equal(alone, grad_pre[rows])


def test_views_are_read_as_they_are():
    x, weight, bias = (x.detach().bfloat16() for x in make(50, (32, 16), torch.float32))
    right = ops.linear_silu(x, weight, bias)
    wide = torch.zeros(50, 64, dtype=torch.bfloat16)
    wide[:, 3:35] = x  # starts at no multiple of 16 bytes
    assert torch.equal(ops.linear_silu(wide[:, 3:35], weight, bias), right)
    assert torch.equal(ops.linear_silu(x, weight.T.contiguous().T, bias), right)
    shifted = torch.zeros(17, dtype=torch.bfloat16)
    shifted[1:] = bias
    assert torch.equal(ops.linear_silu(x, weight, shifted[1:]), right)


def test_a_transposed_gradient():
    x, weight, bias = (x.detach() for x in make(5, (16, 24), torch.float32))
    grad = torch.randn(24, 5, generator=seeded(1)).T
    found = torch.ops.vista.linear_silu_backward(grad, x, weight, bias)
    right = torch.ops.vista.linear_silu_backward(grad.contiguous(), x, weight, bias)
    assert found.is_contiguous() and torch.equal(found, right)


@pytest.mark.usefixtures("products")
def test_only_the_wanted_gradients():
    x, weight, bias = make(5, (16, 8), torch.float32)
    right = torch.autograd.grad(ops.linear_silu(x, weight, bias).sum(), (x, weight, bias))
    frozen = ops.linear_silu(x, weight.detach(), bias.detach())
    assert torch.equal(torch.autograd.grad(frozen.sum(), x)[0], right[0])  # the gradient comes expanded


def test_saturates():
    """Where exp would overflow: 0 below, the identity above, and NaN only from NaN."""

    def rows(*values):
        return torch.tensor(values, dtype=torch.half)[:, None].expand(-1, 8).contiguous()

    x = rows(-1e4, -200, 0, 200, 1e4, torch.nan).requires_grad_()
    out = ops.linear_silu(x, torch.eye(8, dtype=torch.half))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    for result, expected in ((out, rows(0, 0, 0, 200, 1e4, torch.nan)), (grad, rows(0, 0, 0.5, 1, 1, torch.nan))):
        torch.testing.assert_close(result, expected, equal_nan=True, rtol=0, atol=0)


def test_autocast_casts_as_for_a_linear_layer(device):
    inputs = make(9, (16, 24), torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ops.linear_silu(*inputs)
        assert out.dtype == composition(*inputs).dtype == torch.bfloat16
    assert torch.equal(out, ops.linear_silu(*(x.bfloat16() for x in inputs)))
    assert torch.autograd.grad(out.sum(), inputs[1])[0].dtype == torch.float32


@pytest.mark.usefixtures("products")
def test_a_backward_under_autocast_keeps_the_dtype(device):
    inputs = make(9, (16, 24), torch.float32)
    out = ops.linear_silu(*inputs)
    right = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        grads = torch.autograd.grad(out.sum(), inputs)
        pre = torch.ops.vista.linear_silu_backward(torch.ones_like(out), *(x.detach() for x in inputs))
    assert pre.dtype == torch.float32
    for grad, expected in zip(grads, right, strict=True):
        assert grad.dtype == torch.float32 and (grad - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(bias):
    inputs = make(5, (16, 24), torch.float32, bias)
    inputs = [*inputs, *([] if bias else [None])]
    torch.library.opcheck(torch.ops.vista.linear_silu.default, tuple(inputs))
    plain = [x if x is None else x.detach() for x in inputs]
    grad = torch.randn(5, 24, generator=seeded(1))
    torch.library.opcheck(torch.ops.vista.linear_silu_backward.default, (grad, *plain))


@pytest.mark.usefixtures("products_made_again")
def test_double_backward_is_refused():
    x, weight = make(3, (8, 8), torch.float32, bias=False)
    (grad,) = torch.autograd.grad(ops.linear_silu(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_compiles_whole_and_once():
    compiles = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def model(x, weight, bias):
        return ops.linear_silu(x, weight, bias) + 1

    for rows in (5, 9, 70):
        inputs = make(rows, (16, 24), torch.float32)
        torch.testing.assert_close(model(*inputs), ops.linear_silu(*inputs) + 1)
    assert compiles.frame_count == 1


def bad_inputs():
    x, weight, bias = torch.zeros(5, 16), torch.zeros(24, 16), torch.zeros(24)
    grad = torch.zeros(5, 24)
    yield (grad, x[0], weight, bias), r"x must have shape \[total, in_features\], found \[16\]"
    yield (grad, x.double(), weight, bias), "x must be float32, bfloat16 or float16, found float64"
    yield (grad, x, weight[0], bias), r"weight must have shape \[out_features, in_features\], found \[16\]"
    yield (grad, x, weight[:, :8], bias), r"weight must have shape \[24, 16\], found \[24, 8\]"
    yield (grad, x, weight.half(), bias), r"weight must have the dtype of x \(float32\), found float16"
    yield (grad, x, weight, bias[:3]), r"bias must have shape \[24\], found \[3\]"
    yield (grad, x, weight, bias[None]), r"bias must have shape \[24\], found \[1, 24\]"
    yield (grad, x, weight, bias.bfloat16()), r"bias must have the dtype of x \(float32\), found bfloat16"
    yield (grad[:4], x, weight, bias), r"grad_out must have shape \[5, 24\], found \[4, 24\]"
    yield (grad.half(), x, weight, bias), r"grad_out must have the dtype of x \(float32\), found float16"


@pytest.mark.parametrize(("arguments", "message"), list(bad_inputs()), ids=[m[:40] for _, m in bad_inputs()])
def test_bad_input_is_named(arguments, message, device):
    arguments = [x.to(device) for x in arguments]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vista.linear_silu_backward(*arguments)
    if "grad_out" not in message:
        with pytest.raises(RuntimeError, match=message):
            ops.linear_silu(*arguments[1:])
