"""Kernels without a fault: the right values under every seed, and no finding."""

import numpy as np
import pytest

from python_tests.ptx_emulator import Device, DeviceTrap, EmulatedLibrary, EmulationError
from python_tests.ptx_emulator.formats import bf16_to_f32, bf16_to_f64

from .toys import FOLDER, bf16, quantized, run_gemm

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 32), (72, 136, 96), (8, 8, 64)])
def test_gemm(gemm, seed, m, n, k):
    device, a, b, c = run_gemm(gemm, seed, m, n, k)
    exact = bf16_to_f64(a) @ bf16_to_f64(b).T
    bound = np.abs(bf16_to_f64(a)) @ np.abs(bf16_to_f64(b)).T * k * 2.0**-24
    assert (np.abs(c - exact) <= bound).all()
    metrics = device.metrics["tile_gemm"]
    assert metrics.bank_conflict_ratio == 1
    blocks = -(-m // 64) * -(-n // 64)
    assert metrics.count("mma") == blocks * 4 * (k // 16) * 8
    assert metrics.blocks == blocks


def test_unswizzled_rows_conflict(gemm):
    # Rows are 64 bytes, two to a line of all banks: unswizzled, 8 rows of a matrix fall on the same 4 banks by fours.
    plain = EmulatedLibrary.build([f"{FOLDER}/tile_gemm.cu"], defines=["PLAIN_ROWS"])
    device, *_ = run_gemm(plain, 0, 64, 64, 32)
    loads = {text: part for text, part in device.metrics["tile_gemm"].shared.items() if "ldmatrix" in text}
    assert {part.ratio for part in loads.values()} == {4}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("columns", [1, 100, 128, 1000])
def test_row_sums(simple, seed, columns):
    x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    device = Device(simple, seed)
    sums = device.empty(5, np.float32)
    assert device.call("run_row_sums", device.array(x), sums, 5, columns) == 0
    np.testing.assert_allclose(sums.numpy(), x.astype(np.float64).sum(axis=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_histogram(simple, seed):
    values = np.random.default_rng(0).integers(0, 50, 3000).astype(np.int32)
    device = Device(simple, seed)
    counts = device.empty(50, np.int32)
    assert device.call("run_histogram", device.array(values), counts, 3000, 50, 7) == 0
    np.testing.assert_array_equal(counts.numpy(), np.bincount(values, minlength=50))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 33), (5, 256)])
def test_quantize(simple, seed, rows, columns):
    x = bf16(np.random.default_rng(0).standard_normal((rows, columns)))
    x[0] = 0
    device = Device(simple, seed)
    codes, scales = device.empty((rows, columns), np.int8), device.empty(rows, np.float32)
    assert device.call("run_quantize", device.array(x), codes, scales, rows, columns) == 0
    expected_codes, expected_scales = quantized(bf16_to_f32(x))
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)


@pytest.mark.parametrize("seed", SEEDS)
def test_scatter_to_distinct_targets(simple, seed):
    target = np.random.default_rng(0).permutation(1000).astype(np.int32)
    x = np.arange(1000, dtype=np.int32)
    device = Device(simple, seed)
    y = device.array(np.ones(1000, np.int32))
    assert device.call("run_scatter", device.array(target), device.array(x), y, 1000) == 0
    expected = np.ones(1000, np.int32)
    expected[target] += x
    np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize("seed", range(8))
def test_named_barriers_hand_over(simple, seed):
    x = np.arange(5 * 32, dtype=np.int32)
    device = Device(simple, seed)
    y = device.empty((2, 5, 32), np.int32)
    assert device.call("run_handover", device.array(x), y, 5) == 0
    np.testing.assert_array_equal(y.numpy(), np.stack([x.reshape(5, 32)[:, ::-1]] * 2))


def test_whole_barrier_in_a_branch_that_all_threads_take(simple):
    device = Device(simple)
    x = device.array(np.arange(128, dtype=np.float32))
    assert device.call("run_torn_barrier", x, 128) == 0
    np.testing.assert_array_equal(x.numpy(), np.arange(128)[::-1])


def test_whole_warps_may_exit_before_a_barrier(simple):
    device = Device(simple)
    x = device.array(np.arange(128, dtype=np.float32))
    assert device.call("run_torn_barrier", x, 64) == 0
    np.testing.assert_array_equal(x.numpy()[:64], np.arange(64)[::-1])


def test_trap_is_its_own_outcome(simple):
    device = Device(simple)
    values = np.array([0, 1, 50], np.int32)
    with pytest.raises(DeviceTrap) as caught:
        device.call("run_histogram", device.array(values), device.empty(50, np.int32), 3, 50, 1)
    assert "histogram" in caught.value.kernel


def test_launch_limits(simple, gemm):
    device = Device(simple)
    with pytest.raises(EmulationError, match="dynamic shared memory"):
        device.call("run_histogram", device.array(np.zeros(1, np.int32)), device.empty(20000, np.int32), 1, 20000, 1)
    with pytest.raises(EmulationError, match="grid"):
        device.call("run_row_sums", device.array(np.zeros(1, np.float32)), device.empty(1, np.float32), 0, 1)


def test_results_must_be_written(simple):
    device = Device(simple)
    sums = device.empty(6, np.float32)
    device.call("run_row_sums", device.array(np.zeros((5, 8), np.float32)), sums, 5, 8)
    with pytest.raises(EmulationError, match="4 of 24 bytes"):
        sums.numpy()
    assert (sums.numpy(partly=True)[:5] == 0).all()


def test_arrays_beyond_2_31_bytes_cost_nothing_until_touched(simple):
    device = Device(simple)
    huge = device.empty(3 << 30, np.int32)
    target = np.array([(1 << 31) - 1], np.int32)
    last = device.memory.view(huge.pointer + 4 * int(target[0]), 4)
    last[:] = 0
    device.memory.mark_written(huge.pointer + 4 * int(target[0]), 4)
    device.call("run_scatter", device.array(target), device.array(np.array([7], np.int32)), huge, 1)
    assert last.view(np.int32)[0] == 7
