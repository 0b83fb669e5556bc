"""Faults planted into the PTX of the kernels of projected QLA: the checks of test_projected_qla.py find them."""

import pytest

from .emulated import assert_found, library_of
from .projected_qla_checks import KERNELS, Case, build_library, check

library = library_of(build_library)

# More slabs than places in the ring, more tiles than one, more chunks than one, a tile that is not full.
CASE = {"lengths": [150, 0, 40], "dim": 128, "chunk_rows": 128}

# The norm would multiply such rows by zero, and a SiLU of zero is zero.
WITHOUT_NORM = {"norm_eps": None, "activation": "shifted_elu"}

ELEMENT = "INS0_8BFloat16E"
INSTANCES = {
    "state": "projected_qla_stateINS0_10StateShape" + ELEMENT + "Li32ELi32ELi2E",
    "apply": "projected_qla_applyINS0_10ApplyShape" + ELEMENT + "Li32ELi4E",
    "state_backward": "projected_qla_state_backwardINS0_18StateBackwardShape" + ELEMENT + "Li32ELi2E",
    "apply_backward": "projected_qla_apply_backwardINS0_18ApplyBackwardShape" + ELEMENT + "Li32E",
}

BARRIER = r"bar\.sync\s+0;"
SHUFFLE = r"shfl\.sync\.\w+\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;"
ALONE = r"mov.b32 \1, \2;"
COPY_SIZE = r"selp\.b32(\s+%r\d+), 16, 0, %p\d+;"
ALWAYS_COPY = r"mov.b32\1, 16;"
ZEROS = r"st\.global\.cg\.v4\.u32 \[%rd\d+\], \{(%r\d+),\1,\1,\1\};"
TRANSPOSED = r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans"
ROOT = r"rsqrt\.approx\.f(tz\.f)?32(\s+%f\d+), %f\d+;"
ONE = r"mov.f32\2, 0f3F800000;"
WAIT_1 = r"wait_group 1;"

EVERYWHERE = {
    "waits for too little": (WAIT_1, "wait_group 2;", None),
    "no barrier behind the copies": (BARRIER, "", 0),
    "no barrier behind the factors": (BARRIER, "", 1),
    "squares of a part of the row": (SHUFFLE, ALONE, 0),
    "no norm": (ROOT, ONE, None),
}
MUTANTS = {f"{kernel}: {fault}": (kernel, *edit) for kernel in KERNELS for fault, edit in EVERYWHERE.items()} | {
    # Elsewhere nobody uses what is made of such rows.
    "state: rows behind the last": ("state", COPY_SIZE, ALWAYS_COPY, None),
    "apply_backward: rows behind the last": ("apply_backward", COPY_SIZE, ALWAYS_COPY, None),
    "state: no barrier behind keys and values": ("state", BARRIER, "", 2),
    "state: an operand across": ("state", TRANSPOSED, r"\1", 0),
    "state: half the result": ("state", r"st\.global\.cg\.v2\.f32[^;]*;", "", 0),
    "apply: an operand across": ("apply", TRANSPOSED, r"\1", 0),
    "apply: padding is not written": ("apply", ZEROS, "", None),
    "state_backward: no barrier behind keys and values": ("state_backward", BARRIER, "", 2),
    "state_backward: no barrier before the results": ("state_backward", BARRIER, "", 3),
    "state_backward: no barrier behind the results": ("state_backward", BARRIER, "", 4),
    "state_backward: an operand across": ("state_backward", TRANSPOSED, r"\1", 0),
    "state_backward: padding is not written": ("state_backward", ZEROS, "", None),
    "apply_backward: no barrier behind the queries": ("apply_backward", BARRIER, "", 2),
    "apply_backward: no barrier before the results": ("apply_backward", BARRIER, "", 3),
    "apply_backward: no barrier behind the results": ("apply_backward", BARRIER, "", 4),
    "apply_backward: an operand across": ("apply_backward", TRANSPOSED, r"\1", 0),
    "apply_backward: padding is not written": ("apply_backward", ZEROS, "", None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    kernel, *fault = MUTANTS[name]
    case = Case(**CASE, **(WITHOUT_NORM if COPY_SIZE in fault else {}))
    assert_found(library, INSTANCES[kernel], *fault, lambda mutant, seed: check(case, mutant, kernel, seed))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, WITHOUT_NORM], ids=["norm", "plain"])
def test_without_a_bug_the_checks_pass(library, kernel, options):
    check(Case(**CASE, **options), library, kernel)
