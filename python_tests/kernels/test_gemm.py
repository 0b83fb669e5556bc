"""The linear_silu kernels in the emulator: as exact as torch in the same precision, with no finding."""

import pytest
import torch

from python_tests.ptx_emulator import toolkit

from .gemm_checks import Call, Case, build_library, check

DTYPES = [torch.bfloat16, torch.float16]
ANY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BOTH_WAYS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
ANY_BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
ONE = {"multiprocessors": 1}  # of which one wave of large tiles is the cheapest


@pytest.fixture(scope="module")
def library():
    if toolkit() is None:
        pytest.skip("no nvcc on this machine")
    return build_library()


def tile_of(call: Call) -> tuple[int, int]:
    """By the name of the one kernel that was launched."""
    ((kernel, _, threads, _),) = call.device.launches
    assert "linear_silu" in kernel and threads[0] in (128, 384)
    return next((m, n) for m, n in ((64, 64), (128, 128), (128, 256)) if f"TileILi{m}ELi{n}E" in kernel)


@ANY_DTYPE
@ANY_BIAS
@BOTH_WAYS
@pytest.mark.parametrize("rows", [1, 63, 65, 130])
def test_small_tiles(library, rows, backward, bias, dtype):
    call = check(Case(rows, 72, 136, dtype, bias, backward), library)
    assert tile_of(call) == (64, 64)


@ANY_DTYPE
@ANY_BIAS
@BOTH_WAYS
@pytest.mark.parametrize("rows", [127, 129])
def test_large_tiles(library, rows, backward, bias, dtype):
    call = check(Case(rows, 40, 136, dtype, bias, backward), library, **ONE)
    assert tile_of(call) == (128, 128)


@BOTH_WAYS
@pytest.mark.parametrize("in_features", [8, 32, 64, 96, 128, 200, 320])
def test_as_many_steps_as_stages_fewer_and_more(library, in_features, backward):
    check(Case(5, in_features, 8, backward=backward), library)
    check(Case(65, in_features, 128, backward=backward), library, **ONE)


@BOTH_WAYS
def test_many_columns_of_tiles(library, backward):
    """More than the eight that share their rows in the order of blocks, and a number that is no multiple of it."""
    check(Case(3, 16, 64 * 11, backward=backward), library)


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(1, 4))
def test_schedules(library, seed, backward):
    check(Case(70, 200, 72, backward=backward), library, seed=seed)


@ANY_DTYPE
@BOTH_WAYS
def test_bits_depend_neither_on_the_tile_nor_on_other_rows(library, backward, dtype):
    case = Case(140, 104, 136, dtype, backward=backward)
    whole = check(case, library, **ONE)
    some = Case(70, 104, 136, dtype, backward=backward)
    rows = slice(69, 139)
    some.tensors = {name: x[rows] if name in ("x", "grad_out") else x for name, x in case.tensors.items()}
    part = check(some, library, seed=1)
    assert tile_of(whole) != tile_of(part)
    assert torch.equal(part.result(), whole.result()[rows])


@BOTH_WAYS
@pytest.mark.parametrize("name", ["x", "weight", "bias", "grad_out"])
def test_nan_stays_where_it_matters(library, name, backward):
    if name == "grad_out" and not backward:
        pytest.skip("only the backward reads it")
    case = Case(70, 40, 72, backward=backward)
    case.tensors[name][66 if case.tensors[name].dim() == 2 else 9, ...] = float("nan")
    call = Call(case, library)
    assert call.run() == 0
    expected = torch.zeros(70, 72, dtype=torch.bool)
    if name in ("x", "grad_out"):
        expected[66] = True
    else:
        expected[:, 66 if name == "weight" else 9] = True
    assert torch.equal(call.result().isnan(), expected)


@BOTH_WAYS
def test_saturates(library, backward):
    case = Case(4, 8, 8, bias=False, backward=backward)
    case.tensors["x"] = torch.tensor([-1e4, -200, 200, 1e4])[:, None].expand(-1, 8).bfloat16().contiguous()
    case.tensors["weight"] = torch.eye(8).bfloat16()
    call = Call(case, library)
    assert call.run() == 0
    right = torch.tensor([0.0, 0, 1, 1])[:, None] * (case.tensors["grad_out"] if backward else case.tensors["x"])
    assert torch.equal(call.result().float(), right.float())


@BOTH_WAYS
def test_no_rows(library, backward):
    call = Call(Case(0, backward=backward), library)
    assert call.run() == 0 and not call.device.launches


def test_what_is_not_built_is_named(library, capfd):
    for overrides, message in [
        ({"dtype": 0}, "built for bfloat16 and float16"),
        ({"in_features": 12}, "multiples of 8 below 2^31 as in_features and out_features, found 12 and 64"),
        ({"in_features": 0}, "found 0 and 64"),
        ({"out_features": 60}, "found 64 and 60"),
        ({"out_features": 2**31}, "found 64 and 2147483648"),
        ({"rows": -1}, "from 0 to 2^31 - 257 rows, found -1"),
        ({"rows": 2**31 - 256}, "found 2147483392"),
    ]:
        call = Call(Case(5), library, **overrides)
        assert call.run() == -1 and not call.device.launches
        assert message in capfd.readouterr().err
    for name in ("x", "weight", "bias", "out", "grad_out"):
        call = Call(Case(5, backward=True), library)
        call.arrays[name] = call.device.empty(call.arrays[name].shape, call.arrays[name].dtype, misalign=8)
        assert call.run() == -1 and "multiples of 16 bytes" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("rows", "out_features", "sm80", "sm90"),
    [
        (1, 512, (64, 64), (64, 64)),
        (500, 512, (64, 64), (64, 64)),  # one wave of the smallest
        (4000, 512, (128, 128), (128, 128)),
        (1_000_000, 64, (64, 64), (64, 64)),  # half of a larger tile would be empty
        (1_000_000, 128, (128, 128), (128, 128)),
        (1_000_000, 256, (128, 128), (128, 256)),
        (1_000_000, 384, (128, 128), (128, 128)),  # the second of two wide tiles would be half empty
        (1_000_000, 512, (128, 128), (128, 256)),
        (1_000_000, 768, (128, 128), (128, 256)),
    ],
)
def test_tiles(library, rows, out_features, sm80, sm90):
    for is_sm90, expected, multiprocessors in ((0, sm80, 108), (1, sm90, 132)):
        found = library.host.test_linear_silu_tile(*map(int, (rows, out_features, multiprocessors, is_sm90)))
        assert divmod(found, 1000) == expected


@pytest.mark.parametrize("options", [{}, ONE], ids=["64 x 64", "128 x 128"])
@BOTH_WAYS
def test_memory_is_met_in_whole_sectors_and_without_bank_conflicts(library, backward, options):
    call = check(Case(256, 128, 256, backward=backward), library, **options)
    ((_, metrics),) = call.device.metrics.items()
    # Operands meet no conflict. CUTLASS hands the accumulators over in pairs of 16 bytes: twice the wavefronts there.
    operands = [part for text, part in metrics.shared.items() if "ldmatrix" in text or "cp.async" in text]
    assert operands and all(part.actual == part.ideal for part in operands)
    assert metrics.bank_conflict_ratio < 1.2, metrics.worst(metrics.shared)[:3]
    assert metrics.sector_ratio < 1.1, metrics.worst(metrics.global_)[:3]
