"""What no implementation undercuts on this machine: the time of a copy of as many bytes, or of as many FLOPs.

Both are measured in the run that they are used in, for each number of threads. The copy is the fastest of torch's, a
plain one and one with non-temporal stores, of as many bytes as the case moves (rounded to a step), for what a small
case moves lies in the caches. FLOPs are the faster of torch's product in the case's dtype and multiply-adds out of
registers.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEP, SMALLEST, LARGEST = 4, 1 << 20, 1 << 30  # bytes read and written by the copies that are measured
ROUNDS, MIN_SECONDS = 7, 0.01  # of each measurement; of one round
PRODUCT = 2048  # rows and columns of the matrix products
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-x", "c++")


class Floors:
    """Rates of this machine, measured when first asked for."""

    def __init__(self) -> None:
        self._native: ctypes.CDLL | None
        self._native, self.without = _compile()
        self._rates: dict[tuple[str, int, str], tuple[float, str]] = {}

    def seconds(self, moved: int, flops: int, dtype: torch.dtype, threads: int) -> float:
        """Of work that moves so many bytes, each operand once, and computes so many FLOPs."""
        return max(moved / self.copy(moved, threads), flops / self.peak(dtype, threads) if flops else 0.0)

    def copy(self, moved: int, threads: int) -> float:
        """Bytes per second, read and written, of a copy that moves about so many."""
        steps = round(math.log(max(moved, 1) / SMALLEST, STEP))
        size = min(LARGEST, max(SMALLEST, SMALLEST * STEP**steps))
        return self._rate("copy", threads, f"{size >> 20} MiB", lambda: self._copies(size, threads))

    def peak(self, dtype: torch.dtype, threads: int) -> float:
        """FLOP per second of products of this dtype; of float32 for what has none."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            dtype = torch.float32
        name = str(dtype).removeprefix("torch.")
        return self._rate("products", threads, name, lambda: self._products(dtype, threads))

    def rows(self) -> list[dict[str, Any]]:
        """What was measured so far."""
        return [
            {"kind": kind, "threads": threads, "of": of, "per_s": rate, "by": by}
            for (kind, threads, of), (rate, by) in sorted(self._rates.items())
        ]

    def _rate(self, kind: str, threads: int, of: str, measure: Callable[[], dict[str, float]]) -> float:
        key = kind, threads, of
        if key not in self._rates:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found = measure()
            finally:
                torch.set_num_threads(before)
            by = max(found, key=lambda name: found[name])
            self._rates[key] = found[by], by
        return self._rates[key][0]

    def _copies(self, size: int, threads: int) -> dict[str, float]:
        source = torch.ones(size // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)
        found = {"torch": size / _best(lambda: target.copy_(source))}
        if self._native is not None:
            for name in ("copy_past_caches", "copy_through_caches"):
                found[name] = size * _split(getattr(self._native, name), target, source, threads)
        return found

    def _products(self, dtype: torch.dtype, threads: int) -> dict[str, float]:
        a, b = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
        found = {"torch's product": 2 * PRODUCT**3 / _best(lambda: a @ b)}
        if self._native is not None:
            rounds = 4_000_000
            run, flops = self._native.multiply_add, rounds * self._native.flops_of_a_round()
            seconds = _best(lambda: _at_once([lambda: run(1.0, rounds)] * threads))
            found["multiply-adds"] = threads * flops / seconds
        return found


def _compile() -> tuple[ctypes.CDLL | None, str]:
    """The library of floors.cpp, or why there is none: torch's own operators must do then."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floors.so"
        command = [compiler, *FLAGS, str(Path(__file__).with_name("floors.cpp")), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return None, f"{compiler}: {done.stderr.strip().splitlines()[0] if done.stderr else 'failed'}"
        native = ctypes.CDLL(str(library))
    native.multiply_add.argtypes, native.multiply_add.restype = [ctypes.c_float, ctypes.c_long], ctypes.c_float
    native.flops_of_a_round.restype = ctypes.c_long
    for name in ("copy_past_caches", "copy_through_caches"):
        getattr(native, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    return native, ""


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest call, after one that does not count."""
    run()
    begin = time.perf_counter()
    run()
    calls = max(1, int(MIN_SECONDS / (time.perf_counter() - begin + 1e-9)))
    best = math.inf
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best


def _split(copy: Any, target: Tensor, source: Tensor, threads: int) -> float:
    """Copies per second, each thread a part; repeated within the call, so that starting threads takes no part."""
    part = len(source) // threads // 64 * 64
    starts = [(target.data_ptr() + i * part, source.data_ptr() + i * part) for i in range(threads)]

    def run(repeats: int) -> float:
        begin = time.perf_counter()
        _at_once([partial(copy, *at, part, repeats) for at in starts])
        return time.perf_counter() - begin

    repeats = max(1, int(MIN_SECONDS / (run(1) + 1e-9)))
    return repeats / min(run(repeats) for _ in range(ROUNDS))


def _at_once(calls: list[Callable[[], object]]) -> None:
    if len(calls) == 1:
        calls[0]()
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()
