"""What the C library keeps of freed memory.

PyTorch asks for memory aligned to 64 bytes. glibc before 2.38 seldom finds such a block among those it has freed (its
bug 14581: the slivers that alignment cuts off stay in a thread's cache and keep neighbours from merging). So a loop
that allocates and frees a few megabytes a turn grows without end although it holds nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# Turns between two releases: the next turn maps its pages anew, which can take it half as long again.
_TURNS = 16


def released(turns: Iterable[T]) -> Iterator[T]:
    """`turns`, with what their bodies freed given back to the system every now and then; elsewhere than on glibc just
    `turns`."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    for number, turn in enumerate(turns, 1):
        yield turn
        if trim is not None and number % _TURNS == 0:
            trim(0)
