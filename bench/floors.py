"""What no implementation undercuts on this machine: the time of a copy of as many bytes, or of as many FLOPs.

Both are measured in turns with the case that they are the floor of, so that a noisy machine disturbs all alike. The
copy is the fastest of torch's, a plain one and one with non-temporal stores, of about as many bytes as the case moves:
what a small case moves lies in the caches. FLOPs are the faster of torch's product in the case's dtype and
multiply-adds out of registers.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

STEP, SMALLEST, LARGEST = 4, 1 << 20, 1 << 30  # bytes read and written by the copies that are measured
MIN_SECONDS = 0.002  # of a copy or product in a round; a shorter one is repeated
PRODUCT = 1024  # rows and columns of the matrix products
ROUNDS = 1_000_000  # of the multiply-adds
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-x", "c++")
Key = tuple[str, int, str]  # kind, threads, of what


class Floors:
    """Rates of this machine: the best of each kind that any probe saw."""

    def __init__(self) -> None:
        self.native: ctypes.CDLL | None
        self.native, self.without = _compile()
        self._best: dict[Key, tuple[float, str]] = {}

    def probe(self, moved: int, dtype: torch.dtype, threads: int) -> Probe:
        """For a case that moves so many bytes and computes in this dtype, on so many threads, which torch uses now."""
        return Probe(self, moved, dtype, threads)

    def saw(self, key: Key, rate: float, by: str) -> None:
        if rate > self._best.get(key, (0.0, ""))[0]:
            self._best[key] = rate, by

    def rows(self) -> list[dict[str, Any]]:
        """What was measured so far."""
        return [
            {"kind": kind, "threads": threads, "of": of, "per_s": rate, "by": by}
            for (kind, threads, of), (rate, by) in sorted(self._best.items())
        ]


class Probe:
    """A copy and products, measured as often as it is run."""

    def __init__(self, floors: Floors, moved: int, dtype: torch.dtype, threads: int) -> None:
        steps = round(math.log(max(moved, 1) / SMALLEST, STEP))
        self._size = min(LARGEST, max(SMALLEST, SMALLEST * STEP**steps))
        # Of what has no products of its own, float32's.
        products = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        self._floors, self._moved, self._threads = floors, moved, threads
        self._copy: Key = "copy", threads, f"{self._size >> 20} MiB"
        self._product: Key = "products", threads, str(products).removeprefix("torch.")
        self._calls = [*self._copies(), *self._products(products)]
        self._repeats = [_repeats(call) for _, _, _, call in self._calls]
        self._rates = {"copy": 0.0, "products": 0.0}

    def run(self) -> None:
        for (key, by, work, call), repeats in zip(self._calls, self._repeats, strict=True):
            rate = work * repeats / _seconds(call, repeats)
            self._rates[key[0]] = max(self._rates[key[0]], rate)
            self._floors.saw(key, rate, by)

    def seconds(self, flops: int) -> float:
        """The floor of the case, if it computes so much, by the best of the runs; one at least must have been."""
        return max(self._moved / self._rates["copy"], flops / self._rates["products"])

    def _copies(self) -> Iterator[tuple[Key, str, int, Callable[[int], object]]]:
        source = torch.ones(self._size // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)
        yield self._copy, "torch", self._size, _repeated(lambda: target.copy_(source))
        part = len(source) // self._threads // 64 * 64
        starts = [(target.data_ptr() + i * part, source.data_ptr() + i * part) for i in range(self._threads)]
        for name in ("copy_past_caches", "copy_through_caches") if self._floors.native else ():
            copy = getattr(self._floors.native, name)

            def run(repeats: int, copy: Any = copy, kept: object = (source, target)) -> None:
                _at_once([partial(copy, *start, part, repeats) for start in starts])

            yield self._copy, name, self._size, run

    def _products(self, dtype: torch.dtype) -> Iterator[tuple[Key, str, int, Callable[[int], object]]]:
        a, b = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
        yield self._product, "torch's product", 2 * PRODUCT**3, _repeated(lambda: a @ b)
        native = self._floors.native
        if native is not None:

            def run(repeats: int) -> None:
                _at_once([partial(native.multiply_add, 1.0, ROUNDS * repeats)] * self._threads)

            yield self._product, "multiply-adds", self._threads * ROUNDS * native.flops_of_a_round(), run


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


def _seconds(call: Callable[[int], object], repeats: int) -> float:
    begin = time.perf_counter()
    call(repeats)
    return time.perf_counter() - begin


def _repeats(call: Callable[[int], object]) -> int:
    """How often a call is repeated in a round: so often that starting threads takes no part."""
    few = 4
    call(1)
    return max(1, int(few * MIN_SECONDS / _seconds(call, few)))


def _repeated(call: Callable[[], object]) -> Callable[[int], object]:
    def run(repeats: int) -> None:
        for _ in range(repeats):
            call()

    return run


def _at_once(calls: list[Callable[[], object]]) -> None:
    if len(calls) == 1:
        calls[0]()
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()
