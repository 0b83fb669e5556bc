"""Faults planted into the PTX of the linear_silu kernels: the checks of test_gemm.py find each of them."""

import pytest

from python_tests.ptx_emulator import EmulatedLibrary, EmulationError, toolkit

from .gemm_checks import Case, build_library, check


def forward(library: EmulatedLibrary, seed: int) -> None:
    """More steps than stages, rows and columns that end within a tile."""
    check(Case(70, 264, 136), library, seed=seed)


def backward(library: EmulatedLibrary, seed: int) -> None:
    check(Case(70, 264, 136, backward=True), library, seed=seed)


def no_bias(library: EmulatedLibrary, seed: int) -> None:
    check(Case(5, 32, 64, bias=False), library, seed=seed)


def few_steps(library: EmulatedLibrary, seed: int) -> None:
    check(Case(5, 96, 72), library, seed=seed)


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
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(name):
    if toolkit() is None:
        pytest.skip("no nvcc on this machine")
    kernel, pattern, replacement, occurrence, check_way = MUTANTS[name]
    mutant = build_library().mutate(pattern, replacement, kernel=kernel, occurrence=occurrence)
    with pytest.raises((EmulationError, AssertionError)):
        for seed in range(2):
            check_way(mutant, seed)


@pytest.mark.parametrize("check_way", [forward, backward, no_bias, few_steps])
def test_without_a_bug_the_checks_pass(check_way):
    if toolkit() is None:
        pytest.skip("no nvcc on this machine")
    check_way(build_library(), 0)
