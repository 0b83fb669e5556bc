"""What the emulator's own tests run."""

from __future__ import annotations

import numpy as np

from python_tests.ptx_emulator import Device, EmulatedLibrary
from python_tests.ptx_emulator.formats import f32_to_bf16

FOLDER = "python_tests/ptx_emulator/tests/kernels"


def bf16(values: np.ndarray) -> np.ndarray:
    return f32_to_bf16(values.astype(np.float32))


def run_gemm(library: EmulatedLibrary, seed: int, m: int = 72, n: int = 64, k: int = 96, shift: int = 0):
    """The device and the two factors and the product; the first factor's pointer moved by `shift` elements."""
    random = np.random.default_rng(0)
    a, b = bf16(random.standard_normal((m, k))), bf16(random.standard_normal((n, k)))
    device = Device(library, seed)
    c = device.empty((m, n), np.float32)
    assert device.call("run_tile_gemm", device.array(a).pointer + 2 * shift, device.array(b), c, m, n, k) == 0
    return device, a, b, c.numpy()


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(x).max(axis=1) / np.float32(127)
    safe = np.where(scales > 0, scales, 1)[:, None]
    return np.where(scales[:, None] > 0, np.rint(x / safe), 0).astype(np.int8), scales
