"""The norm of all layers on a CPU, and its gradients: against the formula in float64."""

import pytest
import torch

from vista_ext import ops
from vista_ext.nn import RMSNorm
from vista_ext.testing import assert_as_good_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(s, generator=generator) for s in (shape, shape[-1:], shape))
    return (3 * x).to(dtype), weight.to(dtype), (grad + x).to(dtype)


def by_formula(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def with_gradients(function, x, weight, grad, eps):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight, eps)
    return [out.detach(), *torch.autograd.grad(out, [x, weight], grad)]


def ours(x, weight, eps):
    return ops.rms_norm(x, weight, norm_eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", [(1, 4), (65, 7), (3, 1031), (70, 4, 16), (1500, 24), (300, 256)], ids=str)
def test_matches_the_formula(shape, eps, dtype):
    inputs = make(shape, dtype)
    exact = with_gradients(by_formula, *(x.double() for x in inputs), eps)
    peer = with_gradients(lambda x, w, eps: torch.nn.functional.rms_norm(x, x.shape[-1:], w, eps), *inputs, eps)
    assert_as_good_as(with_gradients(ours, *inputs, eps), exact, peer)


def test_threads_and_other_rows_change_no_bit():
    x, weight, grad = make((1000, 40), torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(with_gradients(ours, x, weight, grad, 1e-6))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    some = with_gradients(ours, x[100:117], weight, grad[100:117], 1e-6)
    assert all(torch.equal(a, b[100:117]) for a, b in zip(some[:2], results[0][:2], strict=True))


def test_views_no_rows_and_nan():
    x, weight, grad = make((6, 34), torch.float32)
    parts = x[::2, 1:25], weight[1:25], grad[::2, 1:25]
    packed = [part.contiguous() for part in parts]
    pairs = zip(with_gradients(ours, *parts, 1e-6), with_gradients(ours, *packed, 1e-6), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    out, grad_x, grad_weight = with_gradients(ours, x[:0], weight, grad[:0], 1e-6)
    assert out.shape == grad_x.shape == (0, 34) and not grad_weight.any()
    x[1, 3] = torch.nan
    assert ours(x, weight, 1e-6).isnan().any(1).tolist() == [False, True, False, False, False, False]


def test_the_module_is_torchs():
    module, peer = RMSNorm(24), torch.nn.RMSNorm(24, eps=1e-6)
    torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    peer.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 24)
    assert torch.allclose(module(x), peer(x), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x.bfloat16()), peer(x.bfloat16()))  # mixed dtypes are torch's
    assert torch.equal(module.double()(x.double()), peer.double()(x.double()))


def test_compiled_it_is_torchs_for_the_compiler_to_fuse():
    x, weight, _ = make((5, 16), torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    assert torch.allclose(torch.compile(ours, fullgraph=True, backend=backend)(x, weight, 1e-6), ours(x, weight, 1e-6))
    assert not any("vista" in str(node.target) for node in graphs[0].graph.nodes)


def test_opcheck():
    x, weight, grad = make((5, 16), torch.float32)
    vista, options = torch.ops.vista, {"norm_eps": 1e-6}
    torch.library.opcheck(vista.weighted_rms_norm_backward.default, (grad, x, weight), options)
    torch.library.opcheck(vista.weighted_rms_norm.default, (x.requires_grad_(), weight.requires_grad_()), options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"x": torch.ones(3)}, r"x must have shape \[total, dim\], found \[3\]"),
        ({"x": torch.ones(3, 0), "weight": torch.ones(0)}, "x must have at least one column"),
        ({"x": torch.ones(3, 16).double()}, "x must be float32, bfloat16 or float16, found float64"),
        ({"weight": torch.ones(8)}, r"weight must have shape \[16\] in float32, found \[8\] in float32"),
        ({"weight": torch.ones(16).half()}, r"weight must have shape \[16\] in float32, found \[16\] in float16"),
        ({"norm_eps": -1.0}, "norm_eps must not be negative, found -1"),
    ],
)
def test_bad_input_is_named(spoil, message):
    arguments = {"x": torch.ones(3, 16), "weight": torch.ones(16), "norm_eps": 1e-6} | spoil
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vista.weighted_rms_norm(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vista.weighted_rms_norm_backward(torch.ones(3, 16), **arguments)


def test_a_gradient_of_another_shape_is_named():
    rows = torch.ones(3, 16)
    with pytest.raises(RuntimeError, match=r"grad_out must be like x, .*found \[2, 16\]"):
        torch.ops.vista.weighted_rms_norm_backward(rows[:2], rows, rows[0], norm_eps=1e-6)


@pytest.mark.parametrize("x", [torch.ones(3, 16), torch.ones(3, 16).double()], ids=["ours", "torch's"])
def test_bad_input_of_the_norm_is_named(x):
    weight = x[0]
    for call, message in (
        (lambda: ops.rms_norm(x[0, 0], weight, norm_eps=0), r"x must have shape .* with columns, found \[\]"),
        (lambda: ops.rms_norm(x[:, :0], weight[:0], norm_eps=0), r"x must have shape .* with columns, found \[3, 0\]"),
        (lambda: ops.rms_norm(x, weight[:8], norm_eps=0), r"weight must have shape \[16\], found \[8\]"),
        (lambda: ops.rms_norm(x, weight.to("meta"), norm_eps=0), "weight must be on cpu as x is, found it on meta"),
        (lambda: ops.rms_norm(x, weight, norm_eps=-1), "norm_eps must not be negative, found -1"),
    ):
        with pytest.raises(RuntimeError, match="vista::rms_norm: " + message):
            call()
