"""The backward pass of the norm in the emulator: as exact as torch in the same precision, with no finding."""

import ctypes
from functools import cache

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import Device, EmulatedLibrary
from vista_ext.reference.projected_qla import normalised
from vista_ext.testing import assert_as_good_as

from .emulated import assert_found, library_of
from .qla_checks import DTYPE_IDS, bits


@cache
def build_library() -> EmulatedLibrary:
    files = [f"csrc/kernels/{name}.cu" for name in ("rms_norm/backward", "common/launch")]
    return EmulatedLibrary.build(files, entry="python_tests/kernels/rms_norm_entry.cpp")


library = library_of(build_library)


def by_autograd(grad_rows: torch.Tensor, x: torch.Tensor, eps: float) -> torch.Tensor:
    """The gradient of y = x / rms from that of y, which is `grad_rows` times the root mean square."""
    x = x.detach().requires_grad_()
    root = (x.detach().square().mean(1, keepdim=True) + eps).sqrt()
    return torch.autograd.grad(normalised(x, eps), x, grad_rows * root)[0]


def check(library: EmulatedLibrary, seed: int = 0, rows: int = 9, dim: int = 264, dtype=torch.bfloat16, eps=1e-6):
    grad, x = (torch.randn((rows, dim), generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2))
    x *= 3
    grad += x  # so that the norm takes most of it
    device = Device(library, seed)
    out = device.empty((rows, dim), bits(x).dtype, name="grad_x")
    arrays = [device.array(bits(values)).pointer for values in (grad, x)]
    sizes = [ctypes.c_int64(value) for value in (DTYPE_IDS[dtype], rows, dim)]
    assert device.call("test_rms_norm_backward", *sizes, ctypes.c_double(eps), *arrays, out.pointer) == 0
    found = torch.from_numpy(out.numpy().view(np.float32 if dtype == torch.float32 else np.int16)).view(dtype)
    assert_as_good_as([found], [by_autograd(grad.double(), x.double(), eps)], [by_autograd(grad, x, eps)])
    return device


@pytest.mark.parametrize("dtype", DTYPE_IDS, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize(("rows", "dim"), [(0, 64), (1, 4), (7, 8), (8, 256), (9, 264), (17, 70), (3, 1032)])
def test_sizes(library, rows, dim, eps, dtype):
    check(library, rows=rows, dim=dim, dtype=dtype, eps=eps)


def test_memory_is_met_a_line_at_a_time(library):
    ((_, metrics),) = check(library, rows=64, dim=256).metrics.items()
    assert metrics.sector_ratio < 1.05, metrics.worst(metrics.global_)[:3]


KERNEL = "rms_norm_backwardINS0_8BFloat16ELi8E"
SHUFFLE, ALONE = r"shfl\.sync\.\w+\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;", r"mov.b32 \1, \2;"
MUTANTS = {
    "a sum of too few lanes": (SHUFFLE, ALONE, 0),
    "the other sum of too few lanes": (SHUFFLE, ALONE, 3),
    "a row too many": (r"setp\.(ge|le)\.s64(\s+%p\d+, %rd\d+, %rd\d+);", r"setp.eq.s64\2;", 0),
    "not written": (r"st\.global\.cg\.v4\.u32[^;]*;", "", None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    assert_found(library, KERNEL, *MUTANTS[name], check)
