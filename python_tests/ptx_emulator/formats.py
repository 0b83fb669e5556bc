"""Number formats and roundings that numpy lacks."""

from __future__ import annotations

import numpy as np

_F32_MIDPOINT = np.uint64(1 << 28)
_F32_TAIL = np.uint64((1 << 29) - 1)


def _to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """A float64 sum whose rounding error is known, made odd where it is inexact: rounding it again is then exact."""
    bits = rounded.view(np.int64)
    inexact = (error != 0) & np.isfinite(rounded) & ((bits & 1) == 0)
    outward = np.where((error > 0) == (rounded > 0), 1, -1)
    return np.where(inexact, bits + outward, bits).view(np.float64)


def _exact_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    virtual = total - a
    error = (a - (total - virtual)) + (b - virtual)
    return total, np.where(np.isfinite(total), error, 0)


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c for operands of at most 24 bits: not float64's own rounding, but one that survives another rounding."""
    return _to_odd(*_exact_sum(a * b, c))


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = a.astype(np.float64) * b  # exact
    total = product + c
    # Rounding twice is wrong only if the first ends up on a tie of the second.
    if ((total.view(np.uint64) & _F32_TAIL) == _F32_MIDPOINT).any():
        total = _to_odd(*_exact_sum(product, c.astype(np.float64)))
    return total.astype(np.float32)


def directed(values: np.ndarray, rounding: str, dtype: type) -> np.ndarray:
    """float64 to a narrower float by "rz", "rm" (down) or "rp" (up). `values` exact, or rounded to odd."""
    nearest = values.astype(dtype)
    wide = nearest.astype(np.float64)
    toward = np.array({"rz": 0.0, "rm": -np.inf, "rp": np.inf}[rounding], dtype)
    past = {"rz": np.abs(wide) > np.abs(values), "rm": wide > values, "rp": wide < values}[rounding]
    return np.where(past, np.nextafter(nearest, toward), nearest)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_to_f64(bits: np.ndarray) -> np.ndarray:
    return bf16_to_f32(bits).astype(np.float64)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest, ties to even; NaN becomes the canonical one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f64_to_bf16(values: np.ndarray) -> np.ndarray:
    """By way of a float32 rounded to odd, so that only one rounding shows."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.int32)
    wide = nearest.astype(np.float64)
    beyond = (np.abs(wide) > np.abs(values)) & np.isfinite(values)
    odd = np.where((wide != values) & ~np.isnan(values), (bits - beyond) | 1, bits)
    return f32_to_bf16(odd.astype(np.int32).view(np.float32))


def f32_to_tf32(values: np.ndarray) -> np.ndarray:
    """Nearest, ties away from zero, as float32 bits whose low 13 are zero."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits & np.uint32(0xFFFFE000))
