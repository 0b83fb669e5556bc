"""The kernels of projected QLA in the emulator: as exact as torch in the same precision, with no finding."""

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import DeviceTrap

from .emulated import library_of
from .projected_qla_checks import KERNELS, RESULTS, SM80, SM86, SM90, Call, Case, build_library, check

library = library_of(build_library)

# None, one, a tile and a row, several chunks of 128 rows, full ones among them.
LENGTHS = [5, 0, 1, 65, 17, 256, 149]
DTYPES = [torch.bfloat16, torch.float16]
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ugly_lengths(library, kernel, dtype):
    check(Case(LENGTHS, dtype=dtype), library, kernel)


# By head dim and number of heads every instance of the tables, groups that are not full among them; widths of one slab,
# of several, and none that is whole.
SIZES = [
    *[(64, 32, 1), (128, 32, 3), (40, 32, 8), (136, 32, 7)],
    *[(128, 64, 1), (256, 64, 4), (72, 64, 3), (192, 64, 2), (512, 64, 1)],
    *[(256, 128, 1), (128, 128, 3), (64, 128, 2)],
]


@EVERY_KERNEL
@pytest.mark.parametrize(("dim", "d", "heads"), SIZES)
def test_sizes(library, kernel, dim, d, heads):
    dtype = DTYPES[heads % 2]
    check(Case([83, 3], dim=dim, d=d, heads=heads, dtype=dtype, padding=1, chunk_rows=64), library, kernel, seed=dim)


@pytest.mark.parametrize("kernel", ["state", "apply"])
@pytest.mark.parametrize(("dim", "shared"), [(512, SM90), (256, SM80), (128, SM86)])
def test_wide_heads_in_parts(library, kernel, dim, shared):
    """Keys and values of a head of 128 do not fit: a block takes a quarter of the state."""
    check(Case([40, 70], dim=dim, d=128, heads=1, shared=shared, chunk_rows=64), library, kernel)


@EVERY_KERNEL
@pytest.mark.parametrize("seed", range(1, 3))
def test_schedules(library, kernel, seed):
    check(Case([200, 33], dim=128, d=64, heads=2, dtype=DTYPES[seed % 2]), library, kernel, seed)


@EVERY_KERNEL
@pytest.mark.parametrize(
    ("activation", "state_activation"),
    [("silu", "shifted_elu"), ("shifted_elu", "relu"), ("relu", "identity"), ("identity", "silu")],
)
def test_activations(library, kernel, activation, state_activation):
    scale = [0.1, 0.02, 0.03]
    options = {"activation": activation, "state_activation": state_activation, "scale": scale, "indices": np.int32}
    check(Case([9, 0, 70], heads=1, chunk_rows=64, **options), library, kernel)


@EVERY_KERNEL
def test_without_a_norm(library, kernel):
    check(Case([70, 9], dim=128, norm_eps=None), library, kernel)


@EVERY_KERNEL
def test_a_norm_without_epsilon_leaves_padding_alone(library, kernel):
    """Rows behind the last of a tile are zeros: one over their root is infinite."""
    check(Case([70, 9], norm_eps=0.0), library, kernel)


@EVERY_KERNEL
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [64], [128], [1]])
def test_empty_and_exact_lengths(library, kernel, lengths):
    check(Case(lengths, padding=0 if sum(lengths) else 5), library, kernel)


@EVERY_KERNEL
def test_nothing_at_all(library, kernel):
    case = Case([0], padding=0)
    case.lengths = []
    call = Call(case, library)
    assert call.launch(kernel) == 0
    assert not call.device.metrics


@EVERY_KERNEL
def test_bits_do_not_depend_on_the_batch(library, kernel):
    """The same sequence alone and behind others, at another place in memory and among other blocks."""
    whole = Case([30, 200, 7], heads=3)
    alone = Case([200], heads=3, padding=0)
    for name in ("x", "grad_out"):
        alone.tensors[name] = whole.tensors[name][30:230]
    for name in ("weight_q", "weight_k", "weight_v"):
        alone.tensors[name] = whole.tensors[name]
    alone.tensors["grad_state"] = whole.tensors["grad_state"][1:2]
    calls = [Call(case, library, seed) for seed, case in enumerate((whole, alone))]
    for call in calls:
        assert call.launch(kernel) == 0
    for name in RESULTS[kernel]:
        rows = slice(1, 2) if "state" in name else slice(30, 230)
        assert torch.equal(calls[0].result(name)[rows], calls[1].result(name))


@EVERY_KERNEL
def test_nan_stays_in_its_sequence(library, kernel):
    case = Case([20, 70, 20], heads=1)
    clean = Call(case, library)
    clean.launch(kernel)
    case.tensors["x"][25, 3] = float("nan")
    call = Call(case, library)
    call.put("state", clean.arrays["state"].numpy())
    call.launch(kernel)
    for name in RESULTS[kernel]:
        mine, right = call.result(name), clean.result(name)
        others = [0, 2] if "state" in name else [i for i in range(case.total) if i != 25]
        touched = 1 if "state" in name else 25
        assert torch.equal(mine[others], right[others]) and mine[touched].isnan().any(), name


@pytest.mark.parametrize(
    ("offsets", "most"),
    [
        ([1, 5, 9], 9),
        ([0, 6, 5], 9),
        ([0, 5, 13], 9),
        ([0, 5, -1], 9),
        ([0, 5, 9], 4),
        ([0, 2**40, 9], 9),
    ],
)
def test_bad_offsets_trap(library, offsets, most):
    call = Call(Case([5, 4]), library, max_seq_len=most)
    call.put("seq_offsets", np.array(offsets))
    with pytest.raises(DeviceTrap):
        call.launch("state")


@EVERY_KERNEL
def test_what_is_not_built_is_named(library, capfd, kernel):
    for overrides in ({"d": 48}, {"e": 64}, {"dim": 60}, {"dtype": 0}, {"dim": 1024}):
        call = Call(Case([5]), library, **overrides)
        assert not call.fits(kernel)
        assert call.launch(kernel) == -1
        assert "built for bfloat16 and float16" in capfd.readouterr().err
    call = Call(Case([5]), library)
    assert call.fits(kernel)
    call.arrays["x"] = call.device.array(call.arrays["x"].numpy(), misalign=8)
    assert call.launch(kernel) == -1
    assert "16 bytes" in capfd.readouterr().err


# By device, the largest multiple of 64 for dim at which each kernel is built; 0: none.
LARGEST = {
    SM90: {32: [704, 704, 704, 512], 64: [704, 704, 704, 512], 128: [704, 640, 256, 448]},
    SM80: {32: [448, 448, 448, 256], 64: [448, 448, 448, 256], 128: [448, 384, 128, 192]},
    SM86: {32: [192, 192, 192, 0], 64: [192, 192, 192, 0], 128: [192, 128, 0, 0]},
}


@pytest.mark.parametrize("shared", LARGEST)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_what_fits(library, shared, d):
    call = Call(Case([1], d=d, shared=shared), library)
    largest = []
    for kernel in KERNELS:
        fits = []
        for dim in range(64, 1025, 64):
            call.overrides["dim"] = dim
            fits.append(call.fits(kernel))
        assert fits == sorted(fits, reverse=True)
        largest.append(64 * sum(fits))
    assert largest == LARGEST[shared][d]


@EVERY_KERNEL
@pytest.mark.parametrize(("dim", "d", "heads"), [(256, 64, 4), (128, 32, 8), (128, 128, 2)])
def test_memory_is_met_in_whole_sectors_and_without_bank_conflicts(library, kernel, dim, d, heads):
    call = check(Case([200], dim=dim, d=d, heads=heads, chunk_rows=2048), library, kernel)
    ((name, metrics),) = ((name, m) for name, m in call.device.metrics.items() if "projected" in name)
    assert metrics.bank_conflict_ratio < 1.03, (name, metrics.worst(metrics.shared)[:3])
    assert metrics.sector_ratio < 1.05, (name, metrics.worst(metrics.global_)[:3])


def test_rows_are_read_once_for_a_group_of_heads(library):
    """Sectors of cp.async are those of x and of the weights, once for each group of heads."""
    dim, rows = 256, 128
    for kernel, groups, weights in (("state", 2, 2), ("apply", 1, 1)):
        call = check(Case([rows], dim=dim, d=64, heads=4, padding=0, chunk_rows=2048), library, kernel)
        ((_, metrics),) = ((name, m) for name, m in call.device.metrics.items() if "projected" in name)
        read = sum(part.actual for text, part in metrics.global_.items() if "cp.async" in text)
        assert read == (groups * rows + weights * 256) * dim * 2 / 32, kernel
