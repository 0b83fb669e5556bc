"""Faults planted into the PTX of the QLA kernels: the checks of test_qla.py find each of them."""

import numpy as np
import pytest

from python_tests.ptx_emulator import DeviceTrap, EmulatedLibrary

from .emulated import assert_found, library_of
from .qla_checks import Call, Case, build_library, check_backward, check_forward

library = library_of(build_library)

# More tiles than stages of a ring, so that places in shared memory are used again; then several chunks.
LONG = {"lengths": [200, 40], "targets": [20, 3], "heads": 1, "chunk_rows": 2048}
CHUNKED = {"lengths": [149, 0, 5], "targets": [40, 0, 2], "heads": 1}
WIDE = {"lengths": [70], "targets": [5], "heads": 1, "d": 256, "e": 136, "chunk_rows": 2048}


def forward_long(library: EmulatedLibrary, seed: int) -> None:
    check_forward(Case(**LONG), library, seed)


def forward_chunked(library: EmulatedLibrary, seed: int) -> None:
    check_forward(Case(**CHUNKED), library, seed)


def backward_long(library: EmulatedLibrary, seed: int) -> None:
    check_backward(Case(**LONG), library, seed)


def backward_chunked(library: EmulatedLibrary, seed: int) -> None:
    check_backward(Case(**CHUNKED, scale=[0.2, 1.0, 0.2]), library, seed, grad_state=False)


def backward_wide(library: EmulatedLibrary, seed: int) -> None:
    check_backward(Case(**WIDE), library, seed)


def bad_offsets(library: EmulatedLibrary, seed: int) -> None:
    call = Call(Case([5, 4], [0, 0]), library, seed)
    call.put("seq_offsets", np.array([0, 5, 13]))
    call.outputs("state_out")
    with pytest.raises(DeviceTrap):
        call.launch("state")


def narrow(kernel: str) -> str:
    return f"qla_{kernel}INS0_7MmaMathINS0_8BFloat16EEELi32E"


STATE, APPLY = narrow("state"), narrow("apply")
APPLY_BACKWARD, STATE_BACKWARD = narrow("apply_backward"), narrow("state_backward")
PULL = narrow("pull").replace("Li32E", "Li256E")

BARRIER = r"bar\.sync\s+0;"
SHUFFLE = r"shfl\.sync\.\w+\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;"
ALONE = r"mov.b32 \1, \2;"
COPY_SIZE = r"selp\.b32(\s+%r\d+), 16, 0, %p\d+;"
ALWAYS_COPY = r"mov.b32\1, 16;"
ZEROS = r"st\.global\.cg\.v4\.u32 \[%rd\d+\], \{(%r\d+),\1,\1,\1\};"
TRANSPOSED = r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans"
STRAIGHT = r"(ldmatrix\.sync\.aligned\.m8n8\.x4)(\.shared)"
FIRST_GROUP_SUM = r"(ld\.shared\.v4\.f32[^;]*\+)1024\]"
SIGMOID = r"ex2\.approx\.ftz\.f32(\s+%f\d+), %f\d+;"
SWAPPED = rf"(?s)(cp\.async\.wait_group 1;)(.*?)({BARRIER})"
ONE_AT_LEAST = r"max\.s64(\s+%rd\d+, %rd\d+), 1;"
DIVISION = r"div\.(s64|u32)(\s+%\w+, %\w+), %\w+;"
WAIT_0, WAIT_1 = r"wait_group 0;", r"wait_group 1;"

MUTANTS = {
    "plan: offsets are not checked": ("qla_plan", r"trap;", "", None, bad_offsets),
    "plan: no barrier in the scan": ("qla_plan", BARRIER, "", None, forward_chunked),
    "plan: a warp does not add up": ("qla_plan", SHUFFLE, ALONE, None, forward_chunked),
    "plan: nobody for an empty sequence": ("qla_plan", ONE_AT_LEAST, r"mov.u64\1;", None, forward_chunked),
    "reduce: no barrier": ("qla_reduce", BARRIER, "", 0, forward_chunked),
    "reduce: a group twice": ("qla_reduce", FIRST_GROUP_SUM, r"\g<1>512]", None, forward_chunked),
    "reduce: chunks of too few rows": ("qla_reduce", DIVISION, r"div.\1\2, 128;", None, forward_chunked),
    "reduce: no result": ("qla_reduce", r"st\.global\.cg[^;]*;", "", None, forward_chunked),
    "reduce: W stays W": ("qla_reduce", SIGMOID, r"mov.f32\1, 0f3F800000;", None, backward_chunked),
    "state: waits for too little": (STATE, WAIT_1, "wait_group 2;", None, forward_long),
    "state: does not wait": (STATE, r"cp\.async\.wait_group 1;", "", None, forward_long),
    "state: no barrier": (STATE, BARRIER, "", None, forward_long),
    "state: barrier before the wait": (STATE, SWAPPED, r"\3\1\2", 0, forward_long),
    "state: copies in one group": (STATE, r"cp\.async\.commit_group;", "", 0, forward_long),
    "state: rows behind the last": (STATE, COPY_SIZE, ALWAYS_COPY, None, forward_long),
    "state: an operand across": (STATE, TRANSPOSED, r"\1", 0, forward_long),
    "state: half the result": (STATE, r"st\.global\.cg\.v2\.f32[^;]*;", "", 0, forward_chunked),
    "apply: waits for too little": (APPLY, WAIT_1, "wait_group 2;", None, forward_long),
    "apply: no barrier behind the map": (APPLY, BARRIER, "", None, forward_long),
    "apply: an operand across": (APPLY, TRANSPOSED, r"\1", 1, forward_long),
    "apply: rows are mixed up": (APPLY, STRAIGHT, r"\1.trans\2", 0, forward_long),
    "apply: a dot product of too few": (APPLY, SHUFFLE, ALONE, 0, forward_long),
    "apply: padding is not written": (APPLY, ZEROS, "", None, forward_long),
    "apply_backward: waits for too little": (APPLY_BACKWARD, WAIT_1, "wait_group 2;", None, backward_long),
    "apply_backward: no barrier behind the copies": (APPLY_BACKWARD, BARRIER, "", 0, backward_long),
    "apply_backward: no barrier behind phi(Q)": (APPLY_BACKWARD, BARRIER, "", 1, backward_long),
    "apply_backward: a dot product of too few": (APPLY_BACKWARD, SHUFFLE, ALONE, 0, backward_long),
    "apply_backward: rows behind the last": (APPLY_BACKWARD, COPY_SIZE, ALWAYS_COPY, None, backward_long),
    "apply_backward: padding is not written": (APPLY_BACKWARD, ZEROS, "", None, backward_long),
    "state_backward: does not wait": (STATE_BACKWARD, WAIT_0, "wait_group 1;", None, backward_long),
    "state_backward: no barrier behind the matrix": (STATE_BACKWARD, BARRIER, "", None, backward_long),
    "state_backward: padding is not written": (STATE_BACKWARD, ZEROS, "", None, backward_long),
    "state_backward: an operand across": (STATE_BACKWARD, TRANSPOSED, r"\1", 0, backward_long),
    "pull: does not wait": (PULL, WAIT_0, "wait_group 1;", None, backward_wide),
    "pull: no barrier behind the matrix": (PULL, BARRIER, "", None, backward_wide),
    "pull: a dot product of too few": (PULL, SHUFFLE, ALONE, 0, backward_wide),
    "pull: padding is not written": (PULL, ZEROS, "", None, backward_wide),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    assert_found(library, *MUTANTS[name])


CHECKS = [forward_long, forward_chunked, backward_long, backward_chunked, backward_wide, bad_offsets]


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_the_checks_pass(library, check):
    check(library, 0)
