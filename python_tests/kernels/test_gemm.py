"""The linear_silu kernels in the emulator: as exact as torch in the same precision, with no finding."""

import numpy as np
import pytest
import torch

from .emulated import library_of
from .gemm_checks import Call, Case, Recorder, best_tile, build_library, check

library = library_of(build_library)

pytestmark = pytest.mark.timeout(1800)  # the first test compiles CUTLASS: minutes, on a busy machine many

BF16, FP16 = torch.bfloat16, torch.float16
BOTH_WAYS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
ANY_ARCH = pytest.mark.parametrize("arch", [80, 90])
KERNELS = ((80, (64, 64)), (80, (128, 128)), (90, (64, 64)), (90, (128, 128)), (90, (128, 256)))
ANY_KERNEL = pytest.mark.parametrize(("arch", "tile"), KERNELS, ids=str)


def check_tile(library, tile: tuple[int, int], case: Case, arch: int, **options: int) -> Call:
    """With as many multiprocessors as make this tile the best."""
    for multiprocessors in (132, 8, 4, 2, 1):
        if best_tile(library, case, arch, multiprocessors) == tile:
            call = check(case, library, arch, multiprocessors=multiprocessors, **options)
            ((kernel, *_),) = call.device.launches
            assert f"linear_silu_sm{arch}" in kernel and f"TileILi{tile[0]}ELi{tile[1]}E" in kernel
            return call
    raise AssertionError(f"{tile} is never the best for {case.rows} x {case.out_features}")


@ANY_KERNEL
@BOTH_WAYS
@pytest.mark.parametrize(("rows", "dtype", "bias"), [(1, BF16, True), (63, FP16, False), (65, BF16, True)], ids=str)
def test_few_rows(library, arch, tile, rows, backward, dtype, bias):
    widest = max(8, tile[1] - 8)
    if tile != (64, 64) and rows < 65:
        pytest.skip("for which the smallest tile is the best")
    check_tile(library, tile, Case(rows, 40, widest, dtype, bias, backward), arch)


@ANY_KERNEL
@BOTH_WAYS
@pytest.mark.parametrize(
    ("rows", "dtype", "bias"), [(127, BF16, False), (127, FP16, True), (129, BF16, True), (129, FP16, False)], ids=str
)
def test_rows_that_end_in_a_tile_or_behind_it(library, arch, tile, rows, backward, dtype, bias):
    columns = {(64, 64): 136, (128, 128): 264, (128, 256): 256}[tile]
    check_tile(library, tile, Case(rows, 72, columns, dtype, bias, backward), arch)


@ANY_KERNEL
@pytest.mark.parametrize("in_features", [8, 64, 96, 320, 1000])
def test_as_many_steps_as_stages_fewer_and_more(library, arch, tile, in_features):
    check_tile(library, tile, Case(65, in_features, tile[1]), arch)


@ANY_KERNEL
@BOTH_WAYS
def test_several_tiles_for_a_block(library, arch, tile, backward):
    """Blocks of sm90 stay for all tiles of a multiprocessor; more than eight columns of tiles on sm80."""
    rows, columns = {(64, 64): (330, 64), (128, 128): (300, 128), (128, 256): (300, 512)}[tile]
    case = Case(rows, 72, columns, backward=backward)
    multiprocessors = {(64, 64): 2, (128, 128): 1, (128, 256): 1}[tile]
    assert best_tile(library, case, arch, multiprocessors) == tile
    check(case, library, arch, multiprocessors=multiprocessors)
    if arch == 80:
        check_tile(library, (64, 64), Case(3, 16, 64 * 11, backward=backward), arch)


@ANY_KERNEL
@BOTH_WAYS
@pytest.mark.parametrize("seed", range(1, 4))
def test_schedules(library, arch, tile, seed, backward):
    check_tile(library, tile, Case(129, 200, tile[1] + 8, backward=backward), arch, seed=seed)


@ANY_ARCH
@BOTH_WAYS
def test_bits_depend_neither_on_the_tile_nor_on_other_rows(library, arch, backward):
    case = Case(140, 104, 256, backward=backward)
    whole = check_tile(library, (128, 128) if arch == 80 else (128, 256), case, arch)
    some = Case(70, 104, 256, backward=backward)
    rows = slice(69, 139)
    some.tensors = {name: x[rows] if name in ("x", "grad_out") else x for name, x in case.tensors.items()}
    assert torch.equal(check_tile(library, (64, 64), some, arch, seed=1).result(), whole.result()[rows])


@ANY_ARCH
@BOTH_WAYS
@pytest.mark.parametrize("name", ["x", "weight", "bias", "grad_out"])
def test_nan_stays_where_it_matters(library, arch, name, backward):
    if name == "grad_out" and not backward:
        pytest.skip("only the backward reads it")
    case = Case(70, 40, 72, backward=backward)
    case.tensors[name][66 if case.tensors[name].dim() == 2 else 9, ...] = float("nan")
    call = Call(case, library, arch)
    assert call.run() == 0
    expected = torch.zeros(70, 72, dtype=torch.bool)
    if name in ("x", "grad_out"):
        expected[66] = True
    else:
        expected[:, 66 if name == "weight" else 9] = True
    assert torch.equal(call.result().isnan(), expected)


@ANY_ARCH
@BOTH_WAYS
def test_saturates(library, arch, backward):
    case = Case(4, 8, 8, bias=False, backward=backward)
    case.tensors["x"] = torch.tensor([-1e4, -200, 200, 1e4])[:, None].expand(-1, 8).bfloat16().contiguous()
    case.tensors["weight"] = torch.eye(8).bfloat16()
    call = Call(case, library, arch)
    assert call.run() == 0
    right = torch.tensor([0.0, 0, 1, 1])[:, None] * (case.tensors["grad_out"] if backward else case.tensors["x"])
    assert torch.equal(call.result().float(), right.float())


@ANY_ARCH
@BOTH_WAYS
def test_no_rows(library, arch, backward):
    call = Call(Case(0, backward=backward), library, arch)
    assert call.run() == 0 and not call.device.launches


@ANY_ARCH
def test_what_is_not_built_is_named(library, arch, capfd):
    for overrides, message in [
        ({"dtype": 0}, "built for bfloat16 and float16"),
        ({"in_features": 12}, "multiples of 8 below 2^31 as in_features and out_features, found 12 and 64"),
        ({"in_features": 0}, "found 0 and 64"),
        ({"out_features": 60}, "found 64 and 60"),
        ({"out_features": 2**31}, "found 64 and 2147483648"),
        ({"rows": -1}, "from 0 to 2^31 - 257 rows, found -1"),
        ({"rows": 2**31 - 256}, "found 2147483392"),
    ]:
        call = Call(Case(5), library, arch, **overrides)
        assert call.run() == -1 and not call.device.launches
        assert message in capfd.readouterr().err
    for name in ("x", "weight", "bias", "out", "grad_out"):
        call = Call(Case(5, backward=True), library, arch)
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
    for arch, expected, multiprocessors in ((80, sm80, 108), (90, sm90, 132)):
        assert best_tile(library, Case(0), arch, multiprocessors, rows, out_features) == expected


@BOTH_WAYS
@pytest.mark.parametrize(
    ("tile", "columns", "rows_at_a_time"),
    [((64, 64), 64, 64), ((128, 128), 128, 64), ((128, 256), 512, 128)],
    ids=str,
)
def test_tensor_maps_of_more_than_2_to_the_31_elements(library, tile, columns, rows_at_a_time, backward):
    """What TMA is told, at a size that is not run; fake_cudart.cpp refuses what the driver would."""
    rows, inside = 2**31 - 512, 4096
    call = Call(
        Case(1, backward=backward), library, 90, device=Recorder, multiprocessors=132,
        rows=rows, in_features=inside, out_features=columns,
    )  # fmt: skip
    assert call.run() == 0
    ((kernel, grid, threads, shared),) = call.device.launches
    assert f"TileILi{tile[0]}ELi{tile[1]}E" in kernel and np.prod(grid) == 132 and threads == (384, 1, 1)
    assert shared <= 227 * 1024
    maps = call.device.tensor_maps()
    # Operands in boxes of 64 columns and the whole tile's rows; results in boxes of 32 columns.
    expected = {
        "x": ([inside, rows, 1], [64, tile[0], 1]),
        "weight": ([inside, columns, 1], [64, tile[1], 1]),
        "out": ([columns, rows, 1], [32, rows_at_a_time, 1]),
    }
    if backward:
        expected["grad_out"] = expected["out"]
    assert set(maps) == {call.arrays[name].pointer for name in expected}
    for name, (extents, box) in expected.items():
        found = maps[call.arrays[name].pointer]
        assert (found.extents, found.box) == (extents, box), name
        assert found.strides[:2] == [2, 2 * extents[0]] and found.swizzle == 2 * box[0], name


@pytest.mark.parametrize("tile", [(64, 64), (128, 128)], ids=str)
@BOTH_WAYS
def test_memory_is_met_in_whole_sectors_and_without_bank_conflicts(library, backward, tile):
    call = check_tile(library, tile, Case(256, 128, 256, backward=backward), 80)
    ((_, metrics),) = call.device.metrics.items()
    # Operands meet no conflict. CUTLASS hands the accumulators over in pairs of 16 bytes: twice the wavefronts there.
    operands = [part for text, part in metrics.shared.items() if "ldmatrix" in text or "cp.async" in text]
    assert operands and all(part.actual == part.ideal for part in operands)
    assert metrics.bank_conflict_ratio < 1.2, metrics.worst(metrics.shared)[:3]
    assert metrics.sector_ratio < 1.1, metrics.worst(metrics.global_)[:3]
