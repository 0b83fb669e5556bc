"""The kernels of projected QLA for Hopper in the emulator: as exact as torch in the same precision, with no finding."""

import pytest
import torch

from .emulated import assert_found, library_of
from .projected_qla_checks import KERNELS, RESULTS, Call, Case, build_library, check

library = library_of(build_library)

EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS)


def hopper(lengths: list[int], **options) -> Case:
    return Case(lengths, **{"d": 64, "heads": 2, "hopper": True, **options})


def ran_on_hopper(call: Call) -> bool:
    return any("sm90" in name for name in call.device.metrics)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ugly_lengths(library, kernel, dtype):
    assert ran_on_hopper(check(hopper([5, 0, 1, 65, 17, 256, 149], dtype=dtype), library, kernel))


@EVERY_KERNEL
@pytest.mark.parametrize(
    ("dim", "d", "heads"), [(256, 64, 4), (72, 64, 3), (128, 32, 8), (40, 32, 5), (192, 64, 5), (256, 32, 4)]
)
def test_sizes(library, kernel, dim, d, heads):
    case = hopper([83, 3], dim=dim, d=d, heads=heads, padding=1, chunk_rows=64, dtype=torch.float16)
    assert ran_on_hopper(check(case, library, kernel, seed=dim))


@EVERY_KERNEL
@pytest.mark.parametrize("seed", range(1, 4))
def test_schedules(library, kernel, seed):
    """More panels than the ring has places."""
    check(hopper([300], dim=256, chunk_rows=2048), library, kernel, seed)


@EVERY_KERNEL
@pytest.mark.parametrize(
    ("activation", "state_activation"),
    [("silu", "shifted_elu"), ("shifted_elu", "relu"), ("relu", "identity"), ("identity", "silu")],
)
def test_activations(library, kernel, activation, state_activation):
    options = {"activation": activation, "state_activation": state_activation, "scale": [0.1, 0.02, 0.03]}
    check(hopper([9, 0, 70], d=32, heads=4, chunk_rows=64, **options), library, kernel)


@EVERY_KERNEL
@pytest.mark.parametrize("norm_eps", [None, 0.0])
def test_without_a_norm_or_an_epsilon(library, kernel, norm_eps):
    check(hopper([70, 9], dim=128, norm_eps=norm_eps, padding=0), library, kernel)


@EVERY_KERNEL
@pytest.mark.parametrize("lengths", [[0, 0], [64, 128], [1]])
def test_empty_and_exact_lengths(library, kernel, lengths):
    check(hopper(lengths, padding=0 if sum(lengths) else 5), library, kernel)


@EVERY_KERNEL
def test_rows_of_the_next_sequence_do_not_count(library, kernel):
    """A panel holds them, whatever they are."""
    case = hopper([40, 30], norm_eps=None)
    clean = Call(case, library)
    assert clean.launch(kernel) == 0
    for name in ("x", "grad_out"):
        case.tensors[name][40:] = float("nan")
    call = Call(case, library)
    call.put("state", clean.arrays["state"].numpy())
    assert call.launch(kernel) == 0
    for name in RESULTS[kernel]:
        own = slice(0, 1) if "state" in name else slice(0, 40)
        assert torch.equal(call.result(name)[own], clean.result(name)[own]), name


@EVERY_KERNEL
@pytest.mark.parametrize(
    "options", [{"d": 128}, {"dim": 320}, {"heads": 1}, {"d": 32, "heads": 3}], ids=["d128", "wide", "one", "few"]
)
def test_what_stays_with_the_portable_kernels(library, kernel, options):
    assert not ran_on_hopper(check(hopper([30], **options), library, kernel))


@EVERY_KERNEL
def test_memory_is_met_in_whole_sectors_and_without_bank_conflicts(library, kernel):
    call = check(hopper([200], dim=256, heads=4, chunk_rows=2048), library, kernel)
    ((name, metrics),) = ((name, m) for name, m in call.device.metrics.items() if "projected" in name)
    assert metrics.bank_conflict_ratio < 1.05, (name, metrics.worst(metrics.shared)[:3])
    assert metrics.sector_ratio < 1.05, (name, metrics.worst(metrics.global_)[:3])


INSTANCES = {kernel: f"projected_qla_{kernel}INS0_8BFloat16ELi64E" for kernel in KERNELS}
SHUFFLE = r"shfl\.sync\.\w+\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;"
EVERYWHERE = {
    "no proxy fence": (r"fence\.proxy\.async\.shared::cta;", "", None),
    "no fence before products": (r"wgmma\.fence\.sync\.aligned;", "", None),
    "does not wait for its products": (r"wgmma\.wait_group\.sync\.aligned 0;", "", None),
    "a place in the ring is never free": (r"mbarrier\.arrive\.shared::cta\.b64[^;]*;", "", None),
    "a place in the ring is free too soon": (r"wgmma\.wait_group\.sync\.aligned 1;", "", None),
    "no barrier of the consumers": (r"bar\.sync %r\d+, %r\d+;", "", None),
    "squares of a part of the row": (SHUFFLE, r"mov.b32 \1, \2;", 0),
    "too few bytes announced": (r"(mbarrier\.arrive\.expect_tx[^,]*, \[[^\]]*\]), %r\d+;", r"\1, 4096;", None),
}
MUTANTS = {f"{kernel}: {fault}": (kernel, *edit) for kernel in KERNELS for fault, edit in EVERYWHERE.items()} | {
    "state: half the result": ("state", r"st\.global\.cg\.v2\.f32[^;]*;", "", 0),
    "apply: half the result": ("apply", r"st\.global\.cg\.v4\.u32[^;]*;", "", 1),
    "apply_backward: half of W": ("apply_backward", r"st\.global\.cg\.v2\.f32[^;]*;", "", None),
}
# More panels than the ring has places.
CASE = {"lengths": [150, 0, 40], "dim": 256, "chunk_rows": 2048}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    kernel, *fault = MUTANTS[name]
    assert_found(library, INSTANCES[kernel], *fault, lambda mutant, seed: check(hopper(**CASE), mutant, kernel, seed))


@EVERY_KERNEL
def test_without_a_bug_the_checks_pass(library, kernel):
    check(hopper(**CASE), library, kernel)
