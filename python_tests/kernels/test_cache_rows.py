"""The cache row kernels in the emulator: bytes of rows and bits of values are those of the CPU ops."""

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import Device
from vista_ext import _C, ops

from .cache_rows_checks import (
    DTYPE_IDS,
    SCHEME_IDS,
    build_library,
    check_dequantize,
    check_gather,
    check_gather_traps,
    check_not_finite,
    check_quantize,
    check_scatter,
    check_scatter_traps,
    dequantize,
    gather,
    quantize,
    scatter,
    summaries,
)
from .emulated import library_of

library = library_of(build_library)

ANY_DTYPE = pytest.mark.parametrize("dtype", DTYPE_IDS, ids=lambda dtype: str(dtype).removeprefix("torch."))

# scheme, tokens, dim, group, n
SHAPES = [
    *((scheme, 5, 256, group, 7) for scheme, group in [("int8", 256), ("int4", 64), ("fp8_e4m3", 256)]),
    *((scheme, 1, 256, 32, 1) for scheme in SCHEME_IDS),
    *((scheme, 5, 40, 40, 7) for scheme in SCHEME_IDS),  # not a power of two of vectors
    *((scheme, 1, 16, 16, 3) for scheme in SCHEME_IDS),  # fewer vectors than lanes of a team
    ("int8", 3, 33, 33, 3), ("int4", 3, 34, 34, 3), ("fp8_e4m3", 3, 33, 33, 3),  # no vectors, an odd payload
    *((scheme, 2, 512, 512, 2) for scheme in SCHEME_IDS),  # several vectors a lane
    *((scheme, 1, 2048, 2048, 1) for scheme in SCHEME_IDS),  # longer than a team holds
]  # fmt: skip


def _name(shape: tuple) -> str:
    return "-".join(map(str, shape))


@ANY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_quantize(library, shape, dtype):
    scheme, tokens, dim, group, n = shape
    check_quantize(Device(library, seed=dim), scheme, tokens, dim, group, n, dtype)


@ANY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_dequantize(library, shape, dtype):
    scheme, tokens, dim, group, n = shape
    check_dequantize(Device(library, seed=dim), scheme, tokens, dim, group, n, dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scheme", SCHEME_IDS)
def test_schedules_and_values(library, scheme, seed):
    check_quantize(Device(library, seed), scheme, group=64, seed=seed)
    check_dequantize(Device(library, seed), scheme, group=64, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pointers_need_no_alignment_but_their_elements(library, dtype):
    check_quantize(Device(library), dtype=dtype, misalign=dtype.itemsize)
    check_dequantize(Device(library), dtype=dtype, misalign=dtype.itemsize)
    check_scatter(Device(library), row_bytes=128, n=20, misalign=1)


@ANY_DTYPE
@pytest.mark.parametrize("scheme", SCHEME_IDS)
def test_what_is_not_finite(library, scheme, dtype):
    check_not_finite(Device(library), scheme, dtype)


def test_every_fp8_code_reads_back(library):
    rows = np.zeros((1, _C.row_layout("fp8_e4m3", 1, 256)["row_bytes"]), np.uint8)
    rows[0, :256] = np.arange(256)
    rows[0, 256:258] = np.array([1.5], np.float16).view(np.uint8)
    out = dequantize(Device(library), rows, 1, 256, "fp8_e4m3", 256, torch.float32)
    on_cpu = ops.dequantize_rows(torch.from_numpy(rows), 1, 256, scheme="fp8_e4m3").numpy()
    np.testing.assert_array_equal(out.view(np.uint32), on_cpu.view(np.uint32))


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("scheme", SCHEME_IDS)
def test_gather(library, scheme, index):
    check_gather(Device(library), scheme, index=index)


@ANY_DTYPE
def test_gather_without_vectors(library, dtype):
    check_gather(Device(library), "int8", tokens=3, dim=33, group=33, dtype=dtype)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("seed", range(3))
def test_scatter(library, seed, index):
    check_scatter(Device(library, seed), index=index, seed=seed)


@pytest.mark.parametrize(
    ("row_bytes", "num_slots", "n"), [(33, 3, 20), (128, 1, 40), (128, 0, 5), (17000, 3, 4), (16, 100_000, 300)]
)
def test_scatter_sizes(library, row_bytes, num_slots, n):
    check_scatter(Device(library), row_bytes, num_slots, n)


def test_no_users(library):
    device = Device(library)
    assert quantize(device, torch.zeros(0, 5, 256), "int8", 256).shape == (0, 1408)
    cache = np.zeros((2, 1408), np.uint8)
    none = np.zeros(0, np.int64)
    assert gather(device, cache, none, 5, 256, "int8", 256, torch.float32)[1] == 0
    assert scatter(device, device.array(cache), none, cache[:0]) == 0
    assert not device.launches


def test_bad_slots_trap(library):
    check_gather_traps(Device(library))
    check_scatter_traps(Device(library))
    cache = np.zeros((2, 1408), np.uint8)
    assert gather(Device(library), cache, np.array([1, 0]), 5, 256, "int8", 256, torch.float32, trap=True)[1] == 0


@pytest.mark.parametrize(
    ("kernel", "check"),
    [("quantize_vectors", check_quantize), ("dequantize_vectors", check_dequantize), ("copy_rows", check_scatter)],
)
def test_more_users_than_a_grid_has(library, kernel, check):
    """A grid's y ends at 65535: here all but its first two blocks find no user, and those two stride over the rest."""
    first = r"{ .reg .b32 %y; mov.u32 %y, %ctaid.y; shr.u32 %y, %y, 1; mul.lo.s32 %y, %y, 1000000; "
    first += r"mov.u32 \1, %ctaid.y; add.s32 \1, \1, %y; }"
    small = library.mutate(r"mov\.u32\s+(%r\d+), %ctaid\.y;", first, kernel)
    small = small.mutate(r"%nctaid\.y", "2", kernel)
    check(Device(small), n=7)


def test_addresses_beyond_32_bits(library):
    device = Device(library)
    cache = device.empty((40_000_000, 128), np.uint8)
    x = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    rows = ops.quantize_rows(x)
    slots = np.array([39_999_999, 20_000_001])
    assert scatter(device, cache, slots, rows.numpy()) == 0
    out, num_bad = device.empty((2, 1, 32), np.float32), device.empty((), np.int64)
    sizes = (SCHEME_IDS["int8"], 1, 32, 32, DTYPE_IDS[torch.float32], 2, cache.shape[0])
    assert device.call("test_gather_rows", *sizes, cache, device.array(slots), 1, out, num_bad, 1) == 0
    np.testing.assert_array_equal(out.numpy(), ops.dequantize_rows(rows, 1, 32).numpy())


def traffic(device, kernel: str):
    """The metrics of the one kernel that ran, its accesses wholly coalesced."""
    metrics = device.metrics[kernel]
    # Scales and what pads a row are few bytes at a time; whoever counts is one thread.
    assert metrics.sector_ratio < 1.02, metrics.worst(metrics.global_)[:5]
    return metrics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEME_IDS)
def test_every_byte_moves_once_in_full_sectors(library, scheme, dtype):
    n, tokens, dim = 2, 32, 256
    vectors = n * tokens * dim * dtype.itemsize // 16 // 32  # of a warp
    x = summaries(n, tokens, dim, dtype)
    device = Device(library)
    rows = quantize(device, x, scheme, 64)
    metrics = traffic(device, "quantize_vectors")
    assert metrics.count("ld.global.v4") == metrics.count("ld.global") == vectors
    code_bytes = 16 // dtype.itemsize // (2 if scheme == "int4" else 1)
    store = {8: "st.global.v2.u32", 4: "st.global.u32", 2: "st.global.u16"}[code_bytes]
    assert metrics.count(store) >= vectors

    device = Device(library)
    dequantize(device, rows, tokens, dim, scheme, 64, dtype)
    metrics = traffic(device, "dequantize_vectors")
    assert metrics.count("st.global.v4") == metrics.count("st.global") == vectors
    assert metrics.count("ld.global") == vectors * (3 if scheme == "int4" else 2)  # codes, scales, biases


def test_scatter_moves_full_sectors(library):
    device = Device(library)
    check_scatter(device, row_bytes=33024, num_slots=3, n=2)
    traffic(device, "copy_rows")
