"""The cache row kernels in the emulator against the CPU ops and the reference: what the tests here run."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import Device, DeviceArray, DeviceTrap, EmulatedLibrary
from vista_ext import _C, ops
from vista_ext.reference import cache_rows as reference

SOURCES = [f"csrc/kernels/cache_rows/{name}.cu" for name in ("quantize", "dequantize", "scatter")]
ENTRY = "python_tests/kernels/cache_rows_entry.cpp"

SCHEME_IDS = {"int8": 0, "int4": 1, "fp8_e4m3": 2}  # vista::RowScheme
DTYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # vista::DType


@cache
def build_library() -> EmulatedLibrary:
    return EmulatedLibrary.build([*SOURCES, "csrc/kernels/common/launch.cu"], entry=ENTRY)


def summaries(n: int, tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Gaussian but for the tokens that are hard to quantize."""
    x = torch.randn(n, tokens, dim, generator=torch.Generator().manual_seed(seed))
    hard = x.view(-1, dim)
    zeros = torch.tensor([0.0, -0.0]).repeat(dim)[:dim]
    signs = torch.tensor([1.0, -1.0]).repeat(dim)[:dim]
    halfway = torch.arange(dim) % 126 + 0.5
    halfway[0] = 127.0
    low_halfway = torch.arange(dim) % 15 + 0.5
    low_halfway[0], low_halfway[-1] = 0.0, 15.0
    first = x[0, 0].clone()
    special = [
        halfway * signs * (2021 / 1024),  # between two codes, by a scale whose inverse is rounded much
        low_halfway * 3,  # the same for int4
        first * 3e-6,  # a scale below the normal float16, rounded down: codes are clamped
        zeros,
        torch.where(first > 0, first, zeros),
        first * 1e4,
        first * 1e-7,  # a scale below the smallest float16
        torch.full((dim,), -3.0),
    ]
    for row, values in zip(hard[1:], special, strict=False):
        row.copy_(values)
    return x.to(dtype)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def quantize(device: Device, x: torch.Tensor, scheme: str, group: int, misalign: int = 0) -> np.ndarray:
    n, tokens, dim = x.shape
    rows = device.empty((n, _C.row_layout(scheme, tokens, dim, group)["row_bytes"]), np.uint8)
    values = device.array(bits(x), misalign=misalign)
    arguments = (SCHEME_IDS[scheme], tokens, dim, group, DTYPE_IDS[x.dtype], n)
    assert device.call("test_quantize_rows", *arguments, values, rows) == 0
    return rows.numpy()


def empty_out(device, n: int, tokens: int, dim: int, dtype: torch.dtype, misalign: int = 0) -> DeviceArray:
    return device.empty((n, tokens, dim), np.float32 if dtype == torch.float32 else np.uint16, misalign=misalign)


def dequantize(device, rows, tokens, dim, scheme, group, dtype, misalign=0) -> np.ndarray:
    out = empty_out(device, len(rows), tokens, dim, dtype, misalign)
    arguments = (SCHEME_IDS[scheme], tokens, dim, group, DTYPE_IDS[dtype], len(rows))
    assert device.call("test_dequantize_rows", *arguments, device.array(rows, misalign=misalign), out) == 0
    return out.numpy()


def gather(device, cache, slots, tokens, dim, scheme, group, dtype, trap=False) -> tuple[np.ndarray, int]:
    out = empty_out(device, len(slots), tokens, dim, dtype)
    num_bad = device.empty((), np.int64)
    arguments = (SCHEME_IDS[scheme], tokens, dim, group, DTYPE_IDS[dtype], len(slots), len(cache))
    index = (device.array(slots), int(slots.dtype == np.int64))
    assert device.call("test_gather_rows", *arguments, device.array(cache), *index, out, num_bad, int(trap)) == 0
    return out.numpy(), int(num_bad.numpy())


def scatter(device, cache, slots, rows, trap=False) -> int:
    """`cache`: on the device."""
    num_bad = device.empty((), np.int64)
    workspace = device.empty(device.call("test_scatter_workspace_bytes", len(slots)), np.uint8)
    index = (device.array(slots), int(slots.dtype == np.int64))
    sizes = (len(slots), *cache.shape)
    arguments = (*sizes, cache, *index, device.array(rows), num_bad, int(trap), workspace)
    assert device.call("test_scatter_rows", *arguments) == 0
    return int(num_bad.numpy())


def check_quantize(device, scheme="int8", tokens=5, dim=256, group=256, n=2, dtype=torch.bfloat16, misalign=0, seed=0):
    x = summaries(n, tokens, dim, dtype, seed)
    rows = quantize(device, x, scheme, group, misalign)
    np.testing.assert_array_equal(rows, reference.quantize_rows(x.float().numpy(), scheme, group))
    np.testing.assert_array_equal(rows, ops.quantize_rows(x, scheme=scheme, group=group).numpy())


def check_not_finite(device, scheme="int8", dtype=torch.bfloat16):
    x = summaries(2, 5, 256, dtype)
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, 3e38 if dtype != torch.float16 else -torch.nan]):
        x.view(-1, 256)[row + 2, 70 + row] = value
    expected = ops.quantize_rows(x, scheme=scheme, group=64).numpy()
    np.testing.assert_array_equal(quantize(device, x, scheme, 64), expected)


def check_dequantize(
    device, scheme="int8", tokens=5, dim=256, group=256, n=2, dtype=torch.bfloat16, misalign=0, seed=0
):
    x = summaries(n, tokens, dim, torch.float32, seed)
    x[0, 0, 0] = torch.nan
    rows = ops.quantize_rows(x, scheme=scheme, group=group)
    out = dequantize(device, rows.numpy(), tokens, dim, scheme, group, dtype, misalign)
    values = torch.from_numpy(reference.dequantize_rows(rows.numpy(), tokens, dim, scheme, group)).to(dtype)
    result = torch.from_numpy(out).view(dtype)
    assert torch.equal(result.isnan(), values.isnan())
    np.testing.assert_array_equal(bits(result.nan_to_num(0.0)), bits(values.nan_to_num(0.0)))
    on_cpu = ops.dequantize_rows(rows, tokens, dim, scheme=scheme, group=group, dtype=dtype)
    np.testing.assert_array_equal(out.view(np.uint8), bits(on_cpu).view(np.uint8))  # the NaNs too


def check_gather(device, scheme="int8", tokens=5, dim=256, group=64, dtype=torch.bfloat16, index=np.int64):
    cache = ops.quantize_rows(summaries(4, tokens, dim, torch.float32), scheme=scheme, group=group).numpy()
    slots = np.array([3, 0, 4, 3, -1, 1, 2**31 - 1 if index == np.int32 else 2**40], index)
    out, num_bad = gather(device, cache, slots, tokens, dim, scheme, group, dtype)
    good = (slots >= 0) & (slots < 4)
    assert num_bad == (~good).sum()
    expected = reference.dequantize_rows(cache[slots[good]], tokens, dim, scheme, group)
    np.testing.assert_array_equal(out[good], bits(torch.from_numpy(expected).to(dtype)))
    assert not out[~good].any()


def check_scatter(device, row_bytes=256, num_slots=50, n=300, index=np.int64, misalign=0, seed=0):
    random = np.random.default_rng(seed)
    before = random.integers(0, 256, (num_slots, row_bytes), np.uint8)
    rows = random.integers(0, 256, (n, row_bytes), np.uint8)
    slots = random.integers(-5, num_slots + 5, n).astype(index)
    cache = device.array(before, misalign=misalign)
    num_bad = scatter(device, cache, slots, rows)
    expected = before.copy()
    for slot, row in zip(slots, rows, strict=True):
        if 0 <= slot < num_slots:
            expected[slot] = row
    np.testing.assert_array_equal(cache.numpy(), expected)
    assert num_bad == ((slots < 0) | (slots >= num_slots)).sum()


def check_gather_traps(device):
    cache = np.zeros((2, 1408), np.uint8)
    with pytest.raises(DeviceTrap):
        gather(device, cache, np.array([0, 2]), 5, 256, "int8", 256, torch.bfloat16, trap=True)


def check_scatter_traps(device):
    cache = device.array(np.zeros((2, 128), np.uint8))
    with pytest.raises(DeviceTrap):
        scatter(device, cache, np.array([0, 1, -1]), np.ones((3, 128), np.uint8), trap=True)
    assert not cache.numpy().any(), "nothing is written when a slot traps"
