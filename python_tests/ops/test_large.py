"""Beyond 2^31 elements: the last rows must come out as they do alone.

On the CPU the inputs are zero pages, which cost no memory.
"""

import os

import pytest
import torch

from vista_ext import ops

ROWS, HEADS, DIM = 2**20, 8, 256  # exactly 2^31 elements, and a few rows more
LAST = 64

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _enough_memory(request):
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
        needed, free = 24 << 30, torch.cuda.mem_get_info()[0]
    else:
        needed, free = 12 << 30, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory for tensors of 2^31 elements")


def tensor(seed, device="cpu", dtype=torch.float16):
    x = torch.zeros(ROWS + LAST, HEADS, DIM, dtype=dtype, device=device)
    x[ROWS:] = torch.randn(LAST, HEADS, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x


def dtype_of_products(device):
    """A CPU may take minutes for a product of 2^31 values of 16 bits."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def test_qla(device):
    q, k, v = tensor(0, device), tensor(1, device), tensor(2, device)
    out = ops.qla(q, k, v, torch.tensor([0, ROWS, ROWS + LAST], device=device), ROWS)
    alone = ops.qla(q[ROWS:], k[ROWS:], v[ROWS:], torch.tensor([0, LAST], device=device), LAST)
    assert torch.equal(out[ROWS:], alone) and alone.any()
    assert not out[:LAST].any() and not out[ROWS - LAST : ROWS].any()


def test_projected_qla(device):
    if device == "cpu":
        pytest.skip(
            "takes a teraflop, piece by piece: no index of the CPU reaches beyond a piece but by torch's narrow"
        )
    rows, dim, inner = 2**23, 256, 128
    x = torch.zeros(rows + LAST, dim, dtype=torch.float16, device=device)
    x[rows:] = torch.randn(LAST, dim, generator=torch.Generator().manual_seed(0)).half()
    weight = torch.randn(inner, dim, generator=torch.Generator().manual_seed(1)).half().to(device) / 16
    offsets, alone = torch.tensor([0, rows, rows + LAST], device=device), torch.tensor([0, LAST], device=device)

    def attend(x, offsets, longest):
        x = x.requires_grad_()
        state = ops.projected_qla_state(x, weight, weight, offsets, longest, heads=2, norm_eps=1e-6)
        out = ops.projected_qla_apply(x, weight, state, ops.mean_scale(offsets), offsets, longest, norm_eps=1e-6)
        return out, *torch.autograd.grad(out, x, torch.full_like(out, 0.5))

    for whole, part in zip(attend(x, offsets, rows), attend(x[rows:].detach(), alone, LAST), strict=True):
        assert torch.equal(whole[rows:], part) and part.any()


def test_jagged_cross_attn():
    q = tensor(0)
    k, v = tensor(1)[ROWS:], tensor(2)[ROWS:]
    offsets = torch.tensor([0, ROWS, ROWS + LAST])
    index = torch.tensor([1, 0])  # the long group reads an empty sequence
    out = ops.jagged_cross_attn(q, k, v, offsets, torch.tensor([0, LAST, LAST]), ROWS, LAST, kv_index=index)
    alone = ops.jagged_cross_attn(q[ROWS:], k, v, torch.tensor([0, LAST]), torch.tensor([0, LAST]), LAST, LAST)
    assert torch.equal(out[ROWS:], alone) and alone.any()
    assert not out[ROWS - LAST : ROWS].any()


def test_sglu(device):
    dtype, generator = dtype_of_products(device), torch.Generator().manual_seed(1)
    x = tensor(0, device, dtype).view(-1, DIM)
    weights = [
        (torch.randn(shape, generator=generator) / 8).to(device, dtype) for shape in ((8, DIM), (8, DIM), (DIM, 8))
    ]
    last = slice(ROWS * HEADS, None)
    out = ops.sglu(x, *weights, norm_eps=1e-6, residual=True)
    torch.testing.assert_close(out[last], ops.sglu(x[last], *weights, norm_eps=1e-6, residual=True))
    assert out[last].any() and not out[:LAST].any() and not out[last.start - LAST : last.start].any()
    if device == "cpu":
        return  # the backward walks the same blocks of rows, at many times the cost
    grad = torch.ops.vista.sglu_backward(x, x, *weights, norm_eps=1e-6, residual=True)[0]
    alone = torch.ops.vista.sglu_backward(x[last], x[last], *weights, norm_eps=1e-6, residual=True)[0]
    torch.testing.assert_close(grad[last], alone)
    assert not grad[:LAST].any() and not grad[last.start - LAST : last.start].any()


def test_rows(device):
    users, tokens = 2**16, 128
    x = torch.zeros(users + 1, tokens, DIM, dtype=torch.float16, device=device)
    x[users] = torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(0)).half()
    rows = ops.quantize_rows(x)
    assert rows.numel() > 2**31
    assert torch.equal(rows[users:], ops.quantize_rows(x[users:]))
    back, _ = ops.cache_gather(rows, torch.tensor([users, 0], device=device), tokens, DIM)
    assert torch.equal(back[:1], ops.dequantize_rows(rows[users:], tokens, DIM)) and not back[1].any()
    ops.cache_scatter_(rows, torch.tensor([users], device=device), rows[:1].clone())
    assert not rows[users].any()


def test_linear_silu(device):
    rows, dtype = 2**21, dtype_of_products(device)  # times 1024 columns of the result
    x = torch.zeros(rows + LAST, 16, dtype=dtype, device=device)
    x[rows:] = torch.randn(LAST, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(1024, 16, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out = ops.linear_silu(x, weight)
    torch.testing.assert_close(out[rows:], ops.linear_silu(x[rows:], weight))
    assert out[rows:].any() and not out[:LAST].any() and not out[rows - LAST : rows].any()
