"""The sglu kernels in the emulator: as exact as torch in the same precision, with no finding."""

import pytest
import torch

from .emulated import library_of
from .sglu_checks import GRADIENTS, Call, Case, build_library, check_backward, check_forward

library = library_of(build_library)

ANY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BOTH_WAYS = pytest.mark.parametrize("check_way", [check_forward, check_backward], ids=["forward", "backward"])
OPTIONS = pytest.mark.parametrize(("eps", "residual"), [(None, False), (None, True), (1e-6, False), (1e-6, True)])


@ANY_DTYPE
@BOTH_WAYS
@pytest.mark.parametrize("rows", [0, 1, 63, 65, 129])
def test_ugly_rows(library, check_way, rows, dtype):
    check_way(Case(rows, dtype=dtype), library)


@ANY_DTYPE
@BOTH_WAYS
@pytest.mark.parametrize(("dim", "hidden"), [(64, 8), (16, 40), (128, 128), (104, 72), (256, 64), (200, 24), (256, 8)])
def test_sizes(library, check_way, dim, hidden, dtype):
    check_way(Case(33, dim, hidden, dtype), library, seed=dim)


@ANY_DTYPE
@BOTH_WAYS
@OPTIONS
@pytest.mark.parametrize("dim", [24, 128])
def test_options(library, check_way, dim, eps, residual, dtype):
    check_way(Case(17, dim, 24, dtype, eps, residual), library)


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_schedules(library, check_way, seed, dim):
    check_way(Case(70, dim, 104), library, seed)


@BOTH_WAYS
def test_the_eps_matters(library, check_way):
    case = Case(20, eps=0.5)
    case.tensors["x"] *= 0.1
    check_way(case, library)


@BOTH_WAYS
def test_large_rows(library, check_way):
    """Products of rows that are not normalised yet are beyond float16."""
    case = Case(20, dtype=torch.float16, residual=False)
    case.tensors["x"] *= 4000
    check_way(case, library)


def test_bits_do_not_depend_on_the_other_rows(library):
    case = Case(150, 64, 40)
    part = Case(21, 64, 40)
    rows = slice(100, 121)
    part.tensors = case.tensors | {name: case.tensors[name][rows] for name in ("x", "grad_out")}
    whole, alone = Call(case, library, 1), Call(part, library, 2)
    for call in (whole, alone):
        assert call.forward() == 0 and call.backward() == 0
    for name in ("out", *GRADIENTS):
        assert torch.equal(whole.result(name)[rows], alone.result(name)), name


@pytest.mark.parametrize("name", ["x", "grad_out"])
def test_nan_stays_in_its_row(library, name):
    case, row = Case(70, 64, 24), 37
    case.tensors[name][row, 5] = float("nan")
    call = Call(case, library)
    assert call.forward() == 0 and call.backward() == 0
    expected = torch.arange(70) == row
    for result in ("grad_x", "grad_up_rows", "grad_gate_rows", *(["out", "hidden_rows"] if name == "x" else [])):
        assert torch.equal(call.result(result).isnan().any(1), expected), result


def test_what_is_not_built_is_named(library, capfd):
    for overrides, message in [
        ({"dim": 20}, "multiple of 8"),
        ({"dim": 264}, "16 to 256"),
        ({"hidden": 12}, "multiple of 8 from 8"),
        ({"hidden": 0}, "multiple of 8 from 8"),
        ({"dtype": 0}, "bfloat16 and float16"),
    ]:
        call = Call(Case(5), library, **overrides)
        for run in (call.forward, call.backward):
            assert run() == -1
            assert message in capfd.readouterr().err
    call = Call(Case(5), library)
    call.arrays["up"] = call.device.array(call.arrays["up"].numpy(), misalign=8)
    assert call.forward() == -1
    assert "16 bytes" in capfd.readouterr().err


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_memory_is_met_in_whole_sectors_and_without_bank_conflicts(library, dim):
    for check_way in (check_forward, check_backward):
        call = check_way(Case(128, dim, 64), library)
        for name, metrics in call.device.metrics.items():
            assert metrics.bank_conflict_ratio < 1.05, (name, metrics.worst(metrics.shared)[:3])
            assert metrics.sector_ratio < 1.05, (name, metrics.worst(metrics.global_)[:3])


def test_rows_are_read_once_and_weights_once_a_block(library):
    case = Case(256, 256, 64)
    for check_way, tensors, block_rows in ((check_forward, 1, 128), (check_backward, 2, 64)):
        call = check_way(case, library)
        (metrics,) = call.device.metrics.values()
        read = sum(part.actual for text, part in metrics.global_.items() if "cp.async" in text) * 32
        weights = 3 * 64 * 256 * 2 * case.rows // block_rows
        assert read == tensors * case.rows * 256 * 2 + weights
