"""sglu against float64 references, at ugly sizes, with every option."""

import itertools

import pytest
import torch

from vista_ext import ops
from vista_ext.reference import sglu_by_columns, sglu_by_products
from vista_ext.testing import assert_as_good_as

OPTIONS = [{"norm_eps": eps, "residual": residual} for eps, residual in itertools.product((None, 1e-6), (False, True))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_the_device(device):
    with torch.device(device):
        yield


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, device):
    if device == "cuda" and request.param == torch.float32:
        pytest.skip("not built for a GPU")
    return request.param


def make(rows=70, dim=64, hidden=64, dtype=torch.float32, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    shapes = (rows, dim), (hidden, dim), (hidden, dim), (dim, hidden)
    scales = 2, dim**-0.5, dim**-0.5, hidden**-0.5
    return [
        (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def with_grads(function, inputs, **options):
    out = function(*inputs, **options)
    generator = torch.Generator(out.device).manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, weight)


def in_float64(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("rows", "dim", "hidden"), [(1, 16, 8), (65, 64, 64), (129, 24, 40), (63, 128, 136), (70, 256, 256), (33, 200, 72)]
)
@pytest.mark.usefixtures("products")
def test_matches_the_definition(rows, dim, hidden, options, dtype):
    inputs = make(rows, dim, hidden, dtype)
    exact = with_grads(sglu_by_products, in_float64(inputs), **options)
    assert_as_good_as(with_grads(ops.sglu, inputs, **options), exact, with_grads(sglu_by_products, inputs, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_references_agree(options):
    inputs = in_float64(make(7, 24, 40))
    for a, b in zip(
        with_grads(sglu_by_products, inputs, **options), with_grads(sglu_by_columns, inputs, **options), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("products")
def test_more_rows_than_a_block(dtype):
    inputs = make(2500, 32, 24, dtype)
    options = {"norm_eps": 1e-6, "residual": True}
    exact = with_grads(sglu_by_products, in_float64(inputs), **options)
    assert_as_good_as(with_grads(ops.sglu, inputs, **options), exact, with_grads(sglu_by_products, inputs, **options))


def test_the_weight_of_a_norm_belongs_into_the_columns(dtype):
    x, up, gate, down = make(dtype=dtype)
    norm = torch.nn.RMSNorm(64, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    scale = norm.weight.detach().to(dtype)
    ours = ops.sglu(x, up * scale, gate * scale, down, norm_eps=1e-6)
    exact = sglu_by_products(*(norm.double()(x.double()), up.double(), gate.double(), down.double()))
    peer = sglu_by_products(norm.to(dtype)(x), up, gate, down)
    assert_as_good_as([ours], [exact], [peer])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("products")
def test_no_rows(options, dtype):
    inputs = make(0, dtype=dtype)
    out, *grads = with_grads(ops.sglu, inputs, **options)
    assert out.shape == (0, 64) and grads[0].shape == (0, 64)
    assert not any(grad.any() for grad in grads[1:])


def test_inputs_need_not_be_contiguous(dtype):
    x, up, gate, down = (x.detach() for x in make(dtype=dtype))
    odd = torch.cat([torch.zeros(1, dtype=dtype), x.flatten()])[1:].view_as(x)  # starts anywhere
    strided = [up.t().contiguous().t(), gate.repeat(1, 2)[:, :64], down.t().contiguous().t()]
    expected = ops.sglu(x, up, gate, down, norm_eps=1e-6)
    assert torch.equal(ops.sglu(odd, *strided, norm_eps=1e-6), expected)
    grad = torch.ones(1, 1, dtype=dtype).expand_as(x)
    for a, b in zip(
        torch.ops.vista.sglu_backward(grad, odd, *strided),
        torch.ops.vista.sglu_backward(grad.contiguous(), x, up, gate, down),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_autocast_takes_its_dtype(device):
    inputs, options = make(), {"norm_eps": 1e-6, "residual": True}
    with torch.autocast(device, torch.bfloat16):
        out = ops.sglu(*inputs, **options)
    assert torch.equal(out, ops.sglu(*(x.bfloat16() for x in inputs), **options))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), inputs))


def test_a_backward_under_autocast_keeps_the_dtype(device, dtype):
    """The products inside the op are torch's, which then come in autocast's dtype."""
    inputs = make(dtype=dtype)
    out = ops.sglu(*inputs, norm_eps=1e-6)
    right = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        grads = torch.autograd.grad(out.sum(), inputs)
    for grad, expected in zip(grads, right, strict=True):
        assert grad.dtype == dtype and (grad - expected).float().norm() < 0.02 * expected.float().norm()


def test_large_rows_stay_finite():
    """The products of such rows are beyond float16; those of the normalised ones are not."""
    inputs = [x.detach().half() for x in make()]
    inputs[0] *= 4000
    out = ops.sglu(*inputs, norm_eps=1e-6)
    exact = sglu_by_products(*(x.double() for x in inputs), norm_eps=1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


def test_nan_stays_in_its_row(dtype):
    inputs = [x.detach() for x in make(dtype=dtype)]
    inputs[0][5, 3] = torch.nan
    expected = torch.arange(70) == 5
    out = ops.sglu(*inputs, norm_eps=1e-6)
    assert torch.equal(out.isnan().all(1), expected) and torch.equal(out.isnan().any(1), expected)
    for result in torch.ops.vista.sglu_backward(torch.ones_like(out), *inputs, norm_eps=1e-6):
        assert torch.equal(result.isnan().any(1), expected)


def test_gradients_where_they_are_wanted(dtype):
    inputs = make(dtype=dtype)
    full = with_grads(ops.sglu, inputs)
    for i in range(4):
        some = [x.detach().requires_grad_(j == i) for j, x in enumerate(inputs)]
        out = ops.sglu(*some)
        weight = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1)).to(dtype)
        assert torch.equal(torch.autograd.grad(out, some[i], weight)[0], full[1 + i])


@pytest.mark.usefixtures("products_made_again")
def test_double_backward_is_an_error(dtype):
    inputs = make(dtype=dtype)
    (grad,) = torch.autograd.grad(ops.sglu(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_opcheck(options, dtype):
    inputs = make(9, 16, 24, dtype)
    torch.library.opcheck(torch.ops.vista.sglu.default, tuple(inputs), options)
    plain = [x.detach() for x in inputs]
    torch.library.opcheck(torch.ops.vista.sglu_backward.default, (torch.ones_like(plain[0]), *plain), options)


def test_compiles_whole_and_once(dtype):
    compiles = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def model(x, up, gate, down):
        return ops.sglu(x, up, gate, down, norm_eps=1e-6) + 1

    for rows in (3, 9, 70):
        inputs = [x.detach() for x in make(rows, dtype=dtype)]
        torch.testing.assert_close(model(*inputs), ops.sglu(*inputs, norm_eps=1e-6) + 1)
    assert compiles.frame_count == 1


@pytest.mark.parametrize(
    ("dtype", "dim", "hidden", "built"),
    [
        (torch.bfloat16, 32, 24, True),
        (torch.float16, 256, 8, True),
        (torch.float32, 32, 24, False),
        (torch.bfloat16, 264, 24, False),
        (torch.bfloat16, 8, 24, False),
        (torch.bfloat16, 32, 20, False),
    ],
)
def test_where_there_is_a_kernel(dtype, dim, hidden, built, device):
    x, up, down = (torch.zeros(shape, dtype=dtype) for shape in ((3, dim), (hidden, dim), (dim, hidden)))
    assert ops.sglu_has_kernel(x, up) == (built and device == "cuda")
    assert not ops.sglu_has_kernel(x, up.double())
    if built or device == "cpu":
        ops.sglu(x, up, up, down)
    else:
        with pytest.raises(RuntimeError, match="are built for"):
            ops.sglu(x, up, up, down)


def bad_inputs():
    x, up, gate, down = (x.detach() for x in make(dim=16, hidden=24))
    good = {"x": x, "up": up, "gate": gate, "down": down}
    yield {**good, "x": x[0]}, r"x must have shape \[total, dim\], found \[16\]"
    yield {**good, "x": x.double()}, "x must be float32, bfloat16 or float16, found float64"
    yield {**good, "x": x[:, :0]}, r"x must have columns, found \[70, 0\]"
    yield {**good, "up": up.half()}, r"up must have the dtype of x \(float32\), found float16"
    yield {**good, "up": up[:, :8]}, r"up must have shape \[24, 16\], found \[24, 8\]"
    yield {**good, "up": up[:0]}, r"up must have rows, found \[0, 16\]"
    yield {**good, "gate": gate[:8]}, r"gate must have shape \[24, 16\], found \[8, 16\]"
    yield {**good, "down": down.t()}, r"down must have shape \[16, 24\], found \[24, 16\]"
    yield {**good, "norm_eps": -1.0}, "norm_eps must not be negative, found -1"


@pytest.mark.parametrize(("arguments", "message"), list(bad_inputs()), ids=[m[:40] for _, m in bad_inputs()])
def test_bad_input_is_named(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.sglu(**arguments)
    if message.startswith("x must have columns"):
        return
    grad = torch.ones_like(arguments["x"])
    options = {"norm_eps": arguments.pop("norm_eps", None)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vista.sglu_backward(grad, *arguments.values(), **options)


def test_bad_gradient_is_named():
    inputs = [x.detach() for x in make()]
    with pytest.raises(RuntimeError, match=r"grad_out must have shape \[70, 64\], found \[3, 64\]"):
        torch.ops.vista.sglu_backward(inputs[0][:3], *inputs)
