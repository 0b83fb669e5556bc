"""Faults planted into the PTX of the cross attention kernels: the checks of test_cross_attn.py find each of them."""

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import DeviceTrap, EmulatedLibrary

from .cached_cross_attn_checks import Cached, CachedCall, check_cached
from .cross_attn_checks import Call, Case, build_library, check_backward, check_forward
from .emulated import assert_found, library_of

library = library_of(build_library)

# More tiles than stages, so that places in shared memory are used again; an empty sequence; padding rows.
LONG = {"q_lengths": [70, 0, 20], "kv_lengths": [200, 0, 33], "kv_index": [0, 0, 2], "q_heads": 1, "kv_heads": 1}


def forward(library: EmulatedLibrary, seed: int) -> None:
    check_forward(Case(**LONG), library, seed)


def backward(library: EmulatedLibrary, seed: int) -> None:
    check_backward(Case(**LONG), library, seed)


def backward_exact(library: EmulatedLibrary, seed: int) -> None:
    """A sequence of one key: gradients that cancel."""
    case = Case([3, 43], [1, 40], [1, 0], d=16, e=24, q_heads=4, own=False, dtype=torch.float32)
    check_backward(case, library, seed)


def shared_sequence(library: EmulatedLibrary, seed: int) -> None:
    check_backward(Case([3] * 40, [2, 9], [1, 0] * 20, q_heads=1, kv_heads=1), library, seed)


def many_readers(library: EmulatedLibrary, seed: int) -> None:
    check_backward(Case([4200], [3], q_heads=1, kv_heads=1, own=False), library, seed)


def runs(library: EmulatedLibrary, seed: int) -> None:
    check_forward(Case([300], [70], q_heads=1, kv_heads=1, own=False), library, seed)


def cached(library: EmulatedLibrary, seed: int) -> None:
    check_cached(Cached([150, 20], [1, -1], 70, options={"q_heads": 1, "kv_heads": 1}), library, seed)


def bad_slot(library: EmulatedLibrary, seed: int) -> None:
    with pytest.raises(DeviceTrap):
        CachedCall(Cached([5, 4], [0, 3], 9), library, trap=True).forward()


def bad_offsets(library: EmulatedLibrary, seed: int) -> None:
    call = Call(Case([5, 4], [5, 4], [1, 0]), library)
    call.put("kv_offsets", np.array([0, 5, 13]))
    with pytest.raises(DeviceTrap):
        call.forward()


def bad_index(library: EmulatedLibrary, seed: int) -> None:
    call = Call(Case([5, 4], [5, 4], [1, 2]), library)
    with pytest.raises(DeviceTrap):
        call.forward()


def narrow(kernel: str) -> str:
    return f"cross_attn_{kernel}INS0_7MmaMathINS0_8BFloat16EEELi32E"


FORWARD, QUERIES, KEYS = narrow("forward") + "NS0_10PackedKeys", narrow("backward_queries"), narrow("backward_keys")
CACHED, REDUCE = narrow("forward") + "NS0_10CachedKeys", "cross_attn_reduce_keysINS0_8BFloat16E"
FP32_QUERIES, PREPARE = "cross_attn_backward_queriesINS0_7FmaMathELi32E", "cross_attn_prepareINS0_8BFloat16E"

BARRIER = r"bar\.sync\s+0;"
SHUFFLE = r"shfl\.sync\.\w+\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;"
ALONE = r"mov.b32 \1, \2;"
ZEROS = r"st\.global\.cg\.v4\.u32 \[%rd\d+\], \{(%r\d+),\1,\1,\1\};"
TRANSPOSED = r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans"
MINUS_INFINITE = r"0fFF800000"
WAIT_0, WAIT_2 = r"wait_group 0;", r"wait_group 2;"
COUNT = r"(?:atom|red)\.global\.add\.u32[^;]*;"
ONE = r"mov.f32\1, 0f3F800000;"
EXPONENTIAL = r"ex2\.approx\.ftz\.f32(\s+%f\d+), %f\d+;"
SUM = r"add\.f32(\s+%f\d+), (%f\d+), (%f\d+);"
HALF = r"cvt\.f32\.f16(\s+%f\d+), %rs\d+;"

MUTANTS = {
    "plan: contents are not checked": ("cross_attn_plan", r"trap;", "", None, bad_offsets),
    "plan: kv_index is not checked": ("cross_attn_plan", r"trap;", "", None, bad_index),
    "plan: no barriers": ("cross_attn_plan", BARRIER, "", None, shared_sequence),
    "plan: readers are not counted": ("cross_attn_plan", COUNT, "", None, shared_sequence),
    "plan: a warp does not add up": ("cross_attn_plan", SHUFFLE, ALONE, None, backward),
    "plan: readers are not sorted": ("cross_attn_plan", r"st\.shared\.u32[^;]*;", "", None, shared_sequence),
    "plan: bad slots are not checked": ("cross_attn_plan", r"trap;", "", None, bad_slot),
    "plan: bad slots are not counted": ("cross_attn_plan", r"st\.global\.u64[^;]*;", "", None, cached),
    "forward: does not wait for keys": (FORWARD, WAIT_0, "wait_group 3;", None, forward),
    "forward: does not wait for queries": (FORWARD, WAIT_2, "wait_group 3;", None, runs),
    "forward: no barrier behind the keys": (FORWARD, BARRIER, "", None, forward),
    "cached: no barrier behind the keys": (CACHED, BARRIER, "", None, cached),
    "cached: scales are one": (CACHED, HALF, ONE, None, cached),
    "forward: maximum and sum of too few columns": (FORWARD, SHUFFLE, ALONE, None, forward),
    "forward: keys behind the last count": (FORWARD, MINUS_INFINITE, "0f00000000", None, forward),
    "forward: an operand across": (FORWARD, TRANSPOSED, r"\1", 0, forward),
    "forward: padding is not written": (FORWARD, ZEROS, "", None, forward),
    "prepare: a dot product of too few": (PREPARE, SHUFFLE, ALONE, 0, backward),
    "prepare: no gradient of own items": (PREPARE, r"st\.global\.cg[^;]*;", "", 0, backward),
    "prepare: own items weigh one": (PREPARE, EXPONENTIAL, ONE, 0, backward),
    "backward_queries: does not wait": (QUERIES, WAIT_0, "wait_group 1;", 0, backward),
    "backward_queries: no barrier": (QUERIES, BARRIER, "", 0, backward),
    "backward_queries: an operand across": (QUERIES, TRANSPOSED, r"\1", 0, backward),
    "backward_queries: padding is not written": (QUERIES, ZEROS, "", None, backward),
    "backward_queries: delta of too few columns": (FP32_QUERIES, SHUFFLE, ALONE, None, backward_exact),
    "backward_keys: does not wait": (KEYS, WAIT_0, "wait_group 1;", 0, backward),
    "backward_keys: no barrier": (KEYS, BARRIER, "", 0, backward),
    "backward_keys: an operand across": (KEYS, TRANSPOSED, r"\1", 0, backward),
    "backward_keys: padding is not written": (KEYS, ZEROS, "", None, backward),
    "reduce_keys: the last chunk only": (REDUCE, SUM, r"mov.f32\1, \3;", None, many_readers),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_found(library, name):
    assert_found(library, *MUTANTS[name])


@pytest.mark.parametrize(
    "check",
    [
        *(forward, runs, cached, backward, backward_exact, shared_sequence, many_readers),
        *(bad_offsets, bad_index, bad_slot),
    ],
)
def test_without_a_bug_the_checks_pass(library, check):
    check(library, 0)
