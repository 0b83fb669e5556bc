"""The sglu kernels for Hopper in the emulator: values, schedules, and faults planted into their PTX."""

from functools import partial

import pytest
import torch

from . import sglu_checks
from .emulated import assert_found, library_of
from .sglu_checks import GRADIENTS, Case, build_library

library = library_of(build_library)

HOPPER = {"capability": (9, 0)}
ANY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
check_forward = partial(sglu_checks.check_forward, **HOPPER)
check_backward = partial(sglu_checks.check_backward, **HOPPER)
BOTH_WAYS = pytest.mark.parametrize("check_way", [check_forward, check_backward], ids=["forward", "backward"])
Call = partial(sglu_checks.Call, **HOPPER)


@pytest.mark.parametrize(("capability", "sm90"), [((8, 0), False), ((9, 0), True)])
@pytest.mark.parametrize("check_way", [sglu_checks.check_forward, sglu_checks.check_backward])
def test_a_card_gets_its_kernel(library, check_way, capability, sm90):
    call = check_way(Case(5), library, capability=capability)
    ((name, *_),) = call.device.launches
    assert ("4sm90" in name) == sm90


@ANY_DTYPE
@pytest.mark.parametrize("rows", [0, 1, 63, 65, 128, 129])
@BOTH_WAYS
def test_ugly_rows(library, check_way, rows, dtype):
    check_way(Case(rows, dtype=dtype), library)


@ANY_DTYPE
@pytest.mark.parametrize(
    ("dim", "hidden"), [(64, 8), (16, 40), (128, 128), (104, 72), (256, 64), (200, 24), (256, 8), (256, 456)]
)
@BOTH_WAYS
def test_sizes(library, check_way, dim, hidden, dtype):
    check_way(Case(33, dim, hidden, dtype), library, seed=dim)


@ANY_DTYPE
@pytest.mark.parametrize(("eps", "residual"), [(None, False), (None, True), (1e-6, False), (0.5, True)])
@pytest.mark.parametrize("dim", [24, 128])
@BOTH_WAYS
def test_options(library, check_way, dim, eps, residual, dtype):
    check_way(Case(17, dim, 24, dtype, eps, residual), library)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("dim", [64, 128, 256])
@BOTH_WAYS
def test_schedules(library, check_way, seed, dim):
    check_way(Case(140, dim, 392), library, seed)


@pytest.mark.parametrize("dim", [64, 256])
@BOTH_WAYS
def test_a_block_takes_several_tiles(library, check_way, dim):
    check_way(Case(300, dim, 40), library, seed=1, multiprocessors=1)
    check_way(Case(700, dim, 104), library, multiprocessors=2)


@BOTH_WAYS
def test_large_rows(library, check_way):
    """Products of rows that are not normalised yet are beyond float16."""
    case = Case(20, dtype=torch.float16, residual=False)
    case.tensors["x"] *= 4000
    check_way(case, library)


def test_bits_do_not_depend_on_the_other_rows(library):
    case, part = Case(150, 64, 40), Case(21, 64, 40)
    rows = slice(100, 121)
    part.tensors = case.tensors | {name: case.tensors[name][rows] for name in ("x", "grad_out")}
    whole, alone = Call(case, library, 1), Call(part, library, 2)
    for call in (whole, alone):
        assert call.forward() == 0 and call.backward() == 0
    for name in ("out", *GRADIENTS):
        assert torch.equal(whole.result(name)[rows], alone.result(name)), name


def test_nan_stays_in_its_row(library):
    case, row = Case(70, 64, 24), 37
    case.tensors["x"][row, 5] = float("nan")
    call = Call(case, library)
    assert call.forward() == 0 and call.backward() == 0
    for name in ("out", *GRADIENTS):
        assert torch.equal(call.result(name).isnan().any(1), torch.arange(70) == row), name


def test_what_is_not_built_is_named(library, capfd):
    for overrides, message in [
        ({"dim": 264}, "16 to 256"),
        ({"hidden": 12}, "multiple of 8"),
        ({"dtype": 0}, "float16"),
    ]:
        call = Call(Case(5), library, **overrides)
        for run in (call.forward, call.backward):
            assert run() == -1 and not call.device.launches
            assert message in capfd.readouterr().err


@pytest.mark.parametrize("dim", [64, 128, 256])
@BOTH_WAYS
def test_shared_memory_is_met_without_bank_conflicts(library, check_way, dim):
    ((_, metrics),) = check_way(Case(128, dim, 64), library).device.metrics.items()
    assert metrics.bank_conflict_ratio < 1.05, metrics.worst(metrics.shared)[:3]
    assert metrics.sector_ratio < 1.05, metrics.worst(metrics.global_)[:3]


# Two tiles of one block, the second with few rows.
FORWARD = "sglu_forwardINS0_8BFloat16ELi64E", partial(check_forward, multiprocessors=1), Case(140, 64, 264)
BACKWARD = "sglu_backwardINS0_8BFloat16ELi64E", partial(check_backward, multiprocessors=1), Case(140, 64, 136)
TRY_WAIT, NO_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 ended, [^;]*;", "setp.eq.u32 ended, 0, 0;"
ARRIVE = r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];"
WAIT_0, WAIT_1 = r"wgmma\.wait_group\.sync\.aligned 0;", r"wgmma\.wait_group\.sync\.aligned 1;"
FENCE = r"wgmma\.fence\.sync\.aligned;"
MAJOR_B, MAJOR_B_OF_FRAGMENTS = r"(accumulate, 1, 1, (?:0, )?)0;", r"(accumulate, 1, 1, )1;"
SHUFFLE, ALONE = r"shfl\.sync\.\w+\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;", r"mov.b32 \1, \2;"
OF_BOTH = {
    "barriers not shown to the copies": (r"fence\.mbarrier_init\.release\.cluster;", "", None),
    "no block barrier after making them": (r"bar\.sync\s+0;", "", None),
    "results read too early": (WAIT_0, "", 1),
    "no fence before the first product": (FENCE, "", 0),
    "no fence before the second product": (FENCE, "", 1),
    "a stage is not released": (ARRIVE, "", 0),
    "up lies across": (MAJOR_B, r"\g<1>1;", 0),
    "results not shown to the copy": (r"fence\.proxy\.async\.shared::cta;", "", None),
    "no barrier before the results are copied": (r"bar\.sync %r\d+, %r\d+;", "", None),
    "results not waited for": (r"cp\.async\.bulk\.wait_group\.read 0;", "", None),
    "a root of too few columns": (SHUFFLE, ALONE, 0),
}
OF_FORWARD = {
    **{f"wait {n} left out": (TRY_WAIT, NO_WAIT, n) for n in range(5)},
    "up and gate released too early": (WAIT_0, "", 0),
    "down released too early": (WAIT_1, "", 0),
    "the other stage is not released": (ARRIVE, "", 1),
    "down lies across": (MAJOR_B, r"\g<1>1;", 4),
}
OF_BACKWARD = {
    **{f"wait {n} left out": (TRY_WAIT, NO_WAIT, n) for n in range(3)},
    "first products read too early": (WAIT_0, "", 0),
    "a stage released too early": (WAIT_1, "", 0),
    "up is multiplied along dim twice": (MAJOR_B_OF_FRAGMENTS, r"\g<1>0;", 0),
    "lanes keep what is their neighbour's": (SHUFFLE, ALONE, 4),
    "lanes keep what is the other pair's": (SHUFFLE, ALONE, 6),
    "a product of x and t of too few columns": (SHUFFLE, ALONE, 28),
    "hidden rows are not written": (r"st\.global\.cg\.v4\.u32[^;]*;", "", 5),
}
MUTANTS = {f"forward: {name}": (*FORWARD, *mutant) for name, mutant in {**OF_BOTH, **OF_FORWARD}.items()} | {
    f"backward: {name}": (*BACKWARD, *mutant) for name, mutant in {**OF_BOTH, **OF_BACKWARD}.items()
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    kernel, check, case, *fault = MUTANTS[name]
    assert_found(library, kernel, *fault, lambda mutant, seed: check(case, mutant, seed=seed))


@pytest.mark.parametrize("way", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_without_a_bug_the_checks_pass(library, way):
    _, check, case = way
    check(case, library)
