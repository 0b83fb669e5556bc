"""What projected QLA's gradient of rows takes from the norm: against autograd in float64."""

import pytest
import torch

import vista_ext  # noqa: F401  (registers the op)
from vista_ext.reference.projected_qla import normalised
from vista_ext.testing import assert_as_good_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
backward = torch.ops.vista.rms_norm_backward


def make(device, rows, dim, dtype):
    grad, x = (torch.randn((rows, dim), generator=torch.Generator().manual_seed(i)) for i in range(2))
    return (grad + 3 * x).to(device, dtype), (3 * x).to(device, dtype)  # of which the norm takes most


def by_autograd(grad_rows, x, eps):
    """From the gradient of y = x / rms, which is `grad_rows` times the root mean square."""
    x = x.detach().requires_grad_()
    root = (x.detach().square().mean(1, keepdim=True) + eps).sqrt()
    return torch.autograd.grad(normalised(x, eps), x, grad_rows * root)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize(("rows", "dim"), [(1, 4), (65, 7), (200, 256), (3, 1031)])
def test_matches_autograd(device, rows, dim, eps, dtype):
    grad, x = make(device, rows, dim, dtype)
    exact = by_autograd(grad.double(), x.double(), eps)
    assert_as_good_as([backward(grad, x, norm_eps=eps)], [exact], [by_autograd(grad, x, eps)])


def test_rows_of_zeros_pull_nothing(device):
    grad, x = make(device, 3, 16, torch.float32)
    x[1] = 0
    for eps in (0.0, 1e-6):
        assert torch.equal(backward(grad, x, norm_eps=eps)[1], grad[1])


def test_nan_stays_in_its_row(device):
    grad, x = make(device, 3, 16, torch.bfloat16)
    x[1, 3] = torch.nan
    assert backward(grad, x, norm_eps=1e-6).isnan().any(1).tolist() == [False, True, False]


def test_views_and_no_rows(device):
    grad, x = make(device, 6, 34, torch.bfloat16)
    parts = grad[::2, 1:25], x[::2, 1:25]
    found = backward(*parts, norm_eps=1e-6)
    assert torch.equal(found, backward(*(t.contiguous() for t in parts), norm_eps=1e-6))
    assert backward(grad[:0], x[:0], norm_eps=1e-6).shape == (0, 34)


def test_opcheck(device):
    torch.library.opcheck(backward.default, make(device, 3, 16, torch.float32), {"norm_eps": 1e-6})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"x": torch.ones(3)}, r"x must have 2 dimensions|x must"),
        ({"x": torch.ones(3, 0), "grad_rows": torch.ones(3, 0)}, "x must have at least one column"),
        ({"grad_rows": torch.ones(3, 8)}, r"grad_rows must be like x, .*found \[3, 8\]"),
        ({"grad_rows": torch.ones(3, 16).half()}, "grad_rows must be like x, .*float16"),
        ({"norm_eps": -1.0}, "norm_eps must not be negative, found -1"),
    ],
)
def test_bad_input_is_named(spoil, message):
    arguments = {"grad_rows": torch.ones(3, 16), "x": torch.ones(3, 16), "norm_eps": 1e-6} | spoil
    with pytest.raises(RuntimeError, match=message):
        backward(**arguments)
