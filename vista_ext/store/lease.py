"""Slots of a hot cache in the hands of a request, and the order of work on them on a device."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.store.base import StoreSpec


class Lease:
    """Slots of a cache that keep their summaries until the lease is given back: a context manager.

    Attributes:
        rows: uint8 `[slots, row_bytes]`, the whole cache, on its device: what `ops.cache_gather`, or an attention that
            reads quantized rows, takes together with `slots`.
        slots: int64 `[n]` on the same device, of each user asked for; -1 where there is no hit.
        hits, event_times, versions, damaged, expired, unavailable: as in `Found`, on the CPU.
        stale: bool `[n]`, hits that were overdue, served because the store did not answer.
    """

    def __init__(
        self,
        spec: StoreSpec,
        rows: Tensor,
        state: dict[str, np.ndarray],
        inverse: np.ndarray,
        give_back: Callable[[np.ndarray], None],
    ) -> None:
        self.rows = rows
        self.slots, self.event_times, self.versions, self.damaged, self.expired, self.unavailable, self.stale = (
            torch.from_numpy(state[name][inverse])
            for name in ("slots", "event_times", "versions", "damaged", "expired", "unavailable", "stale")
        )
        self.hits = self.slots >= 0
        self.slots = self.slots.to(rows.device)
        self._spec, self._give_back = spec, give_back
        self._held = state["slots"][state["slots"] >= 0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[n, tokens, dim]` on the cache's device; zeros where there is no hit."""
        spec = self._spec
        layout: dict[str, Any] = {"scheme": spec.scheme, "group": spec.group}
        return ops.cache_gather(self.rows, self.slots, spec.tokens, spec.dim, **layout, dtype=dtype, policy="zero")[0]

    def release(self) -> None:
        """Give the slots back; twice is fine. On a CUDA device what the current stream has queued still reads them."""
        held, self._held = self._held, np.empty(0, dtype=np.int64)
        self._give_back(held)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class StreamOrder:
    """Keeps the work of CUDA streams on a slot in order, where its users are on different streams."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._written: np.ndarray = np.full(slots, None, dtype=object)
        self._read: np.ndarray = np.full(slots, None, dtype=object)

    def before_writing(self, slots: np.ndarray) -> None:
        """The current stream waits for those that still read what lies there."""
        self._wait(self._read[slots])

    def after_writing(self, slots: np.ndarray) -> None:
        """Others may wait for what the current stream has written."""
        self._written[slots] = self._stream().record_event()

    def before_reading(self, slots: np.ndarray) -> None:
        """The current stream waits for what others are writing."""
        self._wait(self._written[slots])

    def after_reading(self, slots: np.ndarray) -> None:
        """Others may wait until the current stream has read."""
        self._read[slots] = self._stream().record_event()

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def _wait(self, events: np.ndarray) -> None:
        for event in set(events.tolist()) - {None}:
            self._stream().wait_event(event)
