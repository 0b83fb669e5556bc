"""Faults planted into the PTX of the cache row kernels: the checks of test_cache_rows.py find each of them."""

import re
from functools import partial

import pytest
import torch

from python_tests.ptx_emulator import Device, EmulatedLibrary

from .cache_rows_checks import (
    build_library,
    check_dequantize,
    check_gather,
    check_gather_traps,
    check_not_finite,
    check_quantize,
    check_scatter,
    check_scatter_traps,
)
from .emulated import library_of

library = library_of(build_library)

BF16, INT8, INT4 = "I13__nv_bfloat16", "LNS_9RowSchemeE0E", "LNS_9RowSchemeE1E"
VECTORS = f"quantize_vectors{BF16}{INT8}Li1E"
FLOAT_VECTORS = f"quantize_vectorsIf{INT8}Li4E"
LOOSE = f"quantize_values{BF16}{INT8}"
READ4 = f"dequantize_vectors{BF16}{INT4}Li8E"
READ8 = f"dequantize_vectors{BF16}{INT8}Li8E"
COPY = "copy_rowsI5uint4"

float_quantize = partial(check_quantize, dtype=torch.float32)
loose = partial(check_quantize, tokens=3, dim=33, group=33)
two_slots = partial(check_dequantize, n=1, tokens=15)
gather4 = partial(check_gather, scheme="int4")
sparse_scatter = partial(check_scatter, row_bytes=16, num_slots=100_000)  # slots that collide in the table
long_scatter = partial(check_scatter, row_bytes=12288, num_slots=3, n=3)

SHUFFLE = r"shfl\.sync\.bfly\.b32\s+(%r\d+)\|%p\d+, (%r\d+), .*;"
NEGATIVE = r"setp\.lt\.s64\s+(%p\d+), (%rd\d+), 0;"
NOT_NEGATIVE = r"setp\.gt\.s64\s+(%p\d+), (%rd\d+), -1;"
REMAINDER = r"(neg\.f32\s+%f\d+, %f\d+;\s+)fma\.rn\.f32\s+(%f\d+),[^;]*;"

# The kernel, a pattern in its PTX, the replacement, which match (None: all), and the check that notices.
MUTANTS = {
    "a lane leaves its neighbours out": (VECTORS, SHUFFLE, r"mov.b32 \1, \2;", 0, check_quantize),
    "a group past the user's last": (VECTORS, r"setp\.ge\.s32", "setp.gt.s32", None, check_quantize),
    "a NaN is dropped": (VECTORS, r"max\.NaN\.f32", "max.f32", None, check_not_finite),
    "a sign is kept": (VECTORS, r"abs\.f32", "mov.f32", None, check_quantize),
    "the scale of another group": (VECTORS, r"(selp\.f32\s+%f\d+,) (%f\d+), (%f\d+)", r"\1 \3, \2", 0, check_quantize),
    "no padding": (VECTORS, r"st\.global\.u8[^;]*;", "", None, check_quantize),
    "a quotient is rounded twice": (FLOAT_VECTORS, REMAINDER, r"\1mov.f32 \2, 0f00000000;", None, float_quantize),
    "codes are not clamped": (FLOAT_VECTORS, r"min\.f32(\s+%f\d+, %f\d+), %f\d+;", r"mov.f32\1;", None, float_quantize),
    "loose: a lane is left out": (LOOSE, SHUFFLE, r"mov.b32 \1, \2;", 0, loose),
    "loose: a group past the last": (LOOSE, r"setp\.ge\.s64", "setp.gt.s64", 0, loose),
    "loose: a value is left out": (LOOSE, r"st\.global\.u8\s+\[%rd\d+\+32\][^;]*;", "", 0, loose),
    "loose: half a scale": (LOOSE, r"st\.global\.u8[^;]*;", "", 0, loose),
    "a scale of the next group": (READ8, r"(ld\.global\.u16\s+%rs\d+, \[%rd\d+)\]", r"\1+2]", None, check_dequantize),
    "a vector past the user's last": (READ8, r"setp\.(ge|lt)\.s32", "setp.gt.s32", None, check_dequantize),
    "a store is misplaced": (READ8, r"(st\.global\.v4\.u32\s+\[%rd\d+)\+4096\]", r"\1+4112]", None, two_slots),
    "a bias is dropped": (READ4, r"(fma\.rn\.f32\s+%f\d+, %f\d+, %f\d+), %f\d+", r"\1, 0f00000000", 2, gather4),
    "a negative slot is read": (READ4, NOT_NEGATIVE, r"setp.eq.s64 \1, \2, \2;", 0, gather4),
    "bad slots are not counted": (READ4, r"atom\.global\.add[^;]*;", "", None, gather4),
    "every thread counts": (READ4, r"(setp\.ne\.s32\s+%p\d+), (%r\d+), 0;", r"\1, \2, \2;", 0, gather4),
    "gather: no trap": (READ8, r"\btrap;", "", None, check_gather_traps),
    "the first row stays": ("resolve_slots", r"atom\.global\.max", "atom.global.min", None, check_scatter),
    "a collision is not seen": ("resolve_slots", r"@%p8 bra", "bra", None, sparse_scatter),
    "a row is forgotten": ("resolve_slots", r"atom\.global\.max[^;]*;", "", None, check_scatter),
    "a negative slot is written": ("resolve_slots", NEGATIVE, r"setp.ne.s64 \1, \2, \2;", None, check_scatter),
    "scatter: no trap": ("resolve_slots", r"\btrap;", "", None, check_scatter_traps),
    "every row is written": (COPY, r"(setp\.ne\.s64\s+%p\d+), (%rd\d+), %rd\d+", r"\1, \2, \2", None, check_scatter),
    "a copy goes past the row": (COPY, r"setp\.ge\.s64", "setp.gt.s64", None, check_scatter),
    "a step of a copy is missing": (COPY, r"st\.global\.v4\.u32\s+\[%rd\d+\+8192\][^;]*;", "", None, long_scatter),
}  # fmt: skip


def only(library: EmulatedLibrary, kernel: str) -> EmulatedLibrary:
    """Without the kernels of the same file, whose parsing would take longer than the test."""
    texts = []
    for text in library.ptx:
        head, *kernels = re.split(r"(?=^(?:\.visible )?\.entry )", text, flags=re.MULTILINE)
        keep = [part for part in kernels if kernel in part.partition("(")[0]]
        # Scatter is a chain of kernels.
        texts.append(head + "".join(kernels if keep and "resolve_slots" in text else keep))
    return EmulatedLibrary(library.path, texts)


@pytest.mark.parametrize("name", MUTANTS)
def test_is_found(library, name):
    kernel, pattern, replacement, occurrence, check = MUTANTS[name]
    sound = only(library, kernel)
    check(Device(sound))
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # the latter: what should have raised did not
        check(Device(sound.mutate(pattern, replacement, kernel, occurrence)))
