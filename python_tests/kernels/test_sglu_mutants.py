"""Faults planted into the PTX of the sglu kernels: the checks of test_sglu.py find each of them."""

import pytest

from python_tests.ptx_emulator import EmulatedLibrary

from .emulated import assert_found, library_of
from .sglu_checks import Case, build_library, check_backward, check_forward

library = library_of(build_library)


def forward(library: EmulatedLibrary, seed: int) -> None:
    # More chunks than stages, so that places in shared memory are used again, the last in a stage that the results
    # overwrite; a block with few rows.
    check_forward(Case(140, 64, 136), library, seed)


def backward(library: EmulatedLibrary, seed: int) -> None:
    check_backward(Case(70, 64, 104), library, seed)


def kernel(way: str) -> str:
    return f"sglu_{way}INS0_7MmaMathINS0_8BFloat16EEELi64E"


FORWARD, BACKWARD = (kernel("forward"), forward), (kernel("backward"), backward)
BARRIER = r"bar\.sync\s+0;"
MEETING = r"bar\.sync %r\d+, 64;"
WAIT_1 = r"wait_group 1;"
SHUFFLE = r"shfl\.sync\.\w+\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;"
ALONE = r"mov.b32 \1, \2;"
STRAIGHT, TRANSPOSED = r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans"
ROOT, ONE = r"rsqrt\.approx\.f32(\s+%f\d+), %f\d+;", r"mov.f32\1, 0f3F800000;"
STORE = r"st\.global\.cg\.v4\.u32[^;]*;"

MUTANTS = {
    "forward: waits for too little": (*FORWARD, WAIT_1, "wait_group 2;", None),
    "forward: no barrier behind the rows": (*FORWARD, BARRIER, "", 0),
    "forward: no barrier before the ring takes their place": (*FORWARD, BARRIER, "", 1),
    "forward: no barrier behind a chunk": (*FORWARD, BARRIER, "", 2),
    "forward: no barrier before the results take its place": (*FORWARD, BARRIER, "", 3),
    "forward: rows lie across": (*FORWARD, STRAIGHT, r"\1.trans.shared", 0),
    "forward: a weight lies across": (*FORWARD, STRAIGHT, r"\1.trans.shared", 4),
    "forward: a root of too few columns": (*FORWARD, SHUFFLE, ALONE, 0),
    "forward: some rows are not normalised": (*FORWARD, ROOT, ONE, 1),
    "backward: waits for too little": (*BACKWARD, WAIT_1, "wait_group 2;", None),
    "backward: no barrier behind the rows": (*BACKWARD, BARRIER, "", 0),
    "backward: no barrier before the ring takes their place": (*BACKWARD, BARRIER, "", 1),
    "backward: no barrier behind a chunk": (*BACKWARD, BARRIER, "", 2),
    "backward: no barrier before the results take its place": (*BACKWARD, BARRIER, "", 3),
    "backward: two warps do not meet": (*BACKWARD, MEETING, "", 0),
    "backward: two warps do not meet for the sums": (*BACKWARD, MEETING, "", 1),
    "backward: grad_out times down across": (*BACKWARD, STRAIGHT, r"\1.trans.shared", 10),
    "backward: gradients times up across": (*BACKWARD, TRANSPOSED, r"\1", 0),
    "backward: a product of x and t of too few columns": (*BACKWARD, SHUFFLE, ALONE, 4),
    "backward: some rows are not normalised": (*BACKWARD, ROOT, ONE, 0),
    "backward: grad_up_rows are not written": (*BACKWARD, STORE, "", 0),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    function, check, *fault = MUTANTS[name]
    assert_found(library, function, *fault, check)


@pytest.mark.parametrize("check", [forward, backward])
def test_without_a_bug_the_checks_pass(library, check):
    check(library, 0)
