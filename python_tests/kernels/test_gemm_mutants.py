"""Faults planted into the PTX of the linear_silu kernels: the checks of test_gemm.py find each of them."""

import pytest

from python_tests.ptx_emulator import EmulatedLibrary

from .emulated import assert_found, library_of
from .gemm_checks import Case, build_library, check

library = library_of(build_library)

pytestmark = pytest.mark.timeout(1800)  # the first test compiles CUTLASS: minutes, on a busy machine many


def forward(library: EmulatedLibrary, seed: int) -> None:
    """More steps than stages, rows and columns that end within a tile."""
    check(Case(70, 264, 136), library, seed=seed)


def backward(library: EmulatedLibrary, seed: int) -> None:
    check(Case(70, 264, 136, backward=True), library, seed=seed)


def no_bias(library: EmulatedLibrary, seed: int) -> None:
    check(Case(5, 32, 64, bias=False), library, seed=seed)


def few_steps(library: EmulatedLibrary, seed: int) -> None:
    check(Case(5, 96, 72), library, seed=seed)


def hopper(library: EmulatedLibrary, seed: int) -> None:
    """Several tiles for a block, and more steps than stages."""
    check(Case(200, 840, 72, backward=True), library, 90, seed, multiprocessors=4)


def hopper_short(library: EmulatedLibrary, seed: int) -> None:
    check(Case(70, 72, 72, backward=True), library, 90, seed)


def hopper_wide(library: EmulatedLibrary, seed: int) -> None:
    check(Case(129, 72, 256), library, 90, seed, multiprocessors=1)


FORWARD, BACKWARD = (f"linear_silu_sm80INS0_8BFloat16ENS1_8Sm80TileILi64ELi64EEELb{way}E" for way in (0, 1))

BARRIER = r"bar\.sync\s+0;"
LOAD = r"(ld\.global\.L2::128B\.v4\.u32 \{[^}]*\}), \[(%rd\d+)\]"
NEIGHBOURS = r"\1, [\2+16]"
EXPONENTIAL = r"ex2\.approx\.ftz\.f32(\s+%f\d+), %f\d+;"
ONE = r"mov.f32\1, 0f3F800000;"
COPY = r"(cp\.async\.cg\.shared\.global\.L2::128B \[%r\d+\], \[%rd\d+\], 16), %r\d+;"
GUARD = r"@p st\.global"
IS_NULL = r"setp\.eq\.s64"
PRODUCT = r"(mma\.sync\.aligned\.m16n8k16\S+\s+\{[^}]*\},\s*\{[^}]*\},\s*)\{(%r\d+),\s*(%r\d+)\}"

HOPPER = "linear_silu_sm90INS0_8BFloat16ENS1_8Sm90TileILi64ELi64EEELb1E"
HOPPER_WIDE = "linear_silu_sm90INS0_8BFloat16ENS1_8Sm90TileILi128ELi256EEELb0E"
TMA_LOAD = r"(cp\.async\.bulk\.tensor\.3d\.shared::cluster\S+ \[%r\d+\], \[%rd\d+, )\{(%r\d+), (%r\d+),"
ACROSS = r"\1{\3, \2,"
PROXY_FENCE = r"fence\.proxy\.async\.shared::cta;"
NAMED_BARRIER = r"bar\.sync %r\d+, %r\d+;"
LAST_STEPS = r"wgmma\.wait_group\.sync\.aligned 0;"
RELEASE = r"mbarrier\.arrive\.shared::cluster\.b64\s+_, \[remAddr32\];"
EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\]), %r\d+;"
SCALAR_BIAS = r"(ld\.global\.u16\s+%rs\d+), \[(%rd\d+)\]"

MUTANTS = {
    "forward: waits for too little": (FORWARD, r"wait_group 2;", "wait_group 3;", None, forward),
    "forward: no barrier before the first step": (FORWARD, BARRIER, "", 1, forward),
    "forward: no barrier between steps": (FORWARD, BARRIER, "", 2, forward),
    "forward: no barrier in the epilogue": (FORWARD, BARRIER, "", 5, forward),
    "forward: an operand across": (FORWARD, PRODUCT, r"\1{\3, \2}", 0, forward),
    "forward: bias of the neighbours": (FORWARD, LOAD, NEIGHBOURS, 0, forward),
    "forward: a bias is taken for none": (FORWARD, IS_NULL, "setp.ne.s64", None, forward),
    "forward: none is taken for a bias": (FORWARD, IS_NULL, "setp.ne.s64", None, no_bias),
    "forward: one factor without exponential": (FORWARD, EXPONENTIAL, ONE, 3, forward),
    "forward: rows behind the last are written": (FORWARD, GUARD, "st.global", None, forward),
    "forward: what lies outside is read": (FORWARD, COPY, r"\1, 16;", None, forward),
    "forward: what lies outside is not zeroed": (FORWARD, COPY, r"\1;", None, few_steps),
    "backward: gradient of the neighbours": (BACKWARD, LOAD, NEIGHBOURS, 1, backward),
    "backward: bias of the neighbours": (BACKWARD, LOAD, NEIGHBOURS, 0, backward),
    "backward: one slope without exponential": (BACKWARD, EXPONENTIAL, ONE, 3, backward),
    "backward: no barrier in the epilogue": (BACKWARD, BARRIER, "", 5, backward),
    "backward: rows behind the last are written": (BACKWARD, GUARD, "st.global", None, backward),
    "hopper: does not wait for the last steps": (
        HOPPER,
        LAST_STEPS,
        "wgmma.wait_group.sync.aligned 1;",
        0,
        hopper_short,
    ),
    "hopper: products start before their registers are ready": (HOPPER, r"wgmma\.fence\S+;", "", 0, hopper_short),
    "hopper: a stage is not released": (HOPPER, RELEASE, "", 0, hopper),
    "hopper: a stage is released early": (
        HOPPER,
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "wgmma.wait_group.sync.aligned 2;",
        0,
        hopper,
    ),
    "hopper: expects half of a stage": (HOPPER, EXPECT, r"\1, 8192;", 0, hopper_short),
    "hopper: expects more than a stage": (HOPPER, EXPECT, r"\1, 32768;", 0, hopper_short),
    "hopper: a gradient across": (HOPPER, TMA_LOAD, ACROSS, 0, hopper),
    "hopper: an operand across": (HOPPER, TMA_LOAD, ACROSS, 4, hopper),
    "hopper: bias of the neighbours": (HOPPER, SCALAR_BIAS, r"\1, [\2+2]", 0, hopper_short),
    "hopper: one slope without exponential": (HOPPER, EXPONENTIAL, ONE, 3, hopper_short),
    "hopper: a store does not see what was written": (HOPPER, PROXY_FENCE, "", 0, hopper_short),
    "hopper: no barrier behind the bias": (HOPPER, NAMED_BARRIER, "", 0, hopper_short),
    "hopper: no barrier before a store": (HOPPER, NAMED_BARRIER, "", 1, hopper_short),
    "hopper: ends before its stores": (HOPPER, r"cp\.async\.bulk\.wait_group\.read \d;", "", None, hopper_short),
    "hopper, wide: a store does not see what was written": (HOPPER_WIDE, PROXY_FENCE, "", 0, hopper_wide),
    "hopper, wide: bias of the neighbours": (HOPPER_WIDE, SCALAR_BIAS, r"\1, [\2+2]", 0, hopper_wide),
    "hopper, wide: expects half of a stage": (HOPPER_WIDE, EXPECT, r"\1, 24576;", 0, hopper_wide),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    assert_found(library, *MUTANTS[name])


@pytest.mark.parametrize("check_way", [forward, backward, no_bias, few_steps, hopper, hopper_short, hopper_wide])
def test_without_a_bug_the_checks_pass(library, check_way):
    check_way(library, 0)
