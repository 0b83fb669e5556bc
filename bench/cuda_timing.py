"""Times a case on a CUDA device, beside its peers and a plain copy: what a row of the results says.

Implementations are verified and timed one after the other, each alone in memory. A call is captured in a CUDA graph,
so that what is timed is the device and not Python; where a case is smaller than the caches, the graph runs over several
copies of its tensors in turn, so that none is found in the L2 cache.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch

from bench.cases import Case, Problem, differentiable
from vista_ext.testing import assert_as_good_as

COLD_FACTOR = 10  # the copies together are this many times the L2 cache
COPY_BYTES = 4 << 30  # of each of the two buffers of the plain copy
SECONDS = 0.5  # of measuring, unless MIN_ROUNDS take longer
MIN_ROUNDS, MAX_ROUNDS = 10, 100


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of the rounds, and the fastest and slowest of the middle 80 %."""

    ms: float
    low: float
    high: float


class Clock(Protocol):
    """Times calls that are run in turn, on a device."""

    device: str
    name: str
    cache_bytes: int

    def time(self, calls: Sequence[Callable[[], Any]], capturable: bool, seconds: float) -> Timing: ...


class CudaClock:
    def __init__(self) -> None:
        self.device = "cuda"
        self.name = torch.cuda.get_device_name()
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def time(self, calls: Sequence[Callable[[], Any]], capturable: bool, seconds: float = SECONDS) -> Timing:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        if capturable:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                # Results live until all calls are captured: each has memory of its own.
                results = [call() for call in calls]
            del results
            run: Callable[[], Any] = graph.replay
        else:

            def run() -> None:
                for call in calls:
                    call()

        first, *_ = self._rounds(run, 2)
        rounds = self._rounds(run, min(MAX_ROUNDS, max(MIN_ROUNDS, int(1e3 * seconds / first))))
        per_call = sorted(ms / len(calls) for ms in rounds)
        tenth = len(per_call) // 10
        return Timing(statistics.median(per_call), per_call[tenth], per_call[-1 - tenth])

    def _rounds(self, run: Callable[[], Any], count: int) -> list[float]:
        """Milliseconds of each round. All are enqueued before the first is awaited, so that none waits for the host."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
        for event in events[:-1]:
            event.record()
            run()
        events[-1].record()
        torch.cuda.synchronize()
        # The first round starts on an idle device, and waits for the host.
        return [begin.elapsed_time(end) for begin, end in pairwise(events[1:])]


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second of a plain copy on the device, read and written counted."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    timing = clock.time([lambda: target.copy_(source)], True, SECONDS)
    return 2 * COPY_BYTES / (timing.ms / 1e3)


def measure(case: Case, clock: Clock, bandwidth: float) -> dict[str, Any]:
    """The row of a case.

    Raises:
        AssertionError: if our result is wrong: then nothing is timed.
    """
    torch._dynamo.reset()
    copies = max(1, math.ceil(COLD_FACTOR * clock.cache_bytes / case.bytes))
    problems = [case.make(clock.device) for _ in range(copies)]
    first = problems[0]
    peaks: list[float] = []  # of the implementations that were timed
    exact, reference = first.exact(), first.reference()

    def verified(functions: Sequence[Callable[..., Any]]) -> Timing:
        assert_as_good_as(first.values(_call(case, first, functions[0])()), exact, reference)
        return _time(functions, True)

    def _time(functions: Sequence[Callable[..., Any]], capturable: bool) -> Timing:
        calls = [_call(case, problem, function) for problem, function in zip(problems, functions, strict=True)]
        timing = clock.time(calls, capturable, SECONDS)
        peaks.append(_peak_mib(calls[0]))
        return timing

    row: dict[str, Any] = {
        "op": case.op,
        "case": case.id,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backward": case.backward,
        "device": clock.device,
        "card": clock.name,
        "bytes": case.bytes,
        "flops": case.flops,
        "copies": copies,
        "verified": first.checked,
        "copy_bytes_per_s": bandwidth,
        "missing": {},
        "notes": {},
    }
    try:
        timing = verified([problem.ours for problem in problems])
    except AssertionError as error:
        raise AssertionError(f"ours is wrong, nothing was timed: {error}") from error
    floor_ms = 1e3 * case.bytes / bandwidth
    row.update(
        ours_ms=timing.ms,
        ours_low_ms=timing.low,
        ours_high_ms=timing.high,
        bytes_per_s=1e3 * case.bytes / timing.ms,
        flop_per_s=1e3 * case.flops / timing.ms,
        floor_ms=floor_ms,
        ratio_to_floor=timing.ms / floor_ms,
    )

    def compiled() -> Timing:
        # The copies differ in nothing that is compiled; if the compiler sees it otherwise, it may compile each.
        with torch._dynamo.config.patch(recompile_limit=2 * copies + 8):
            return verified([torch.compile(p.composition, dynamic=False, fullgraph=True) for p in problems])

    runs: dict[str, Callable[[], Timing]] = {
        "eager": lambda: verified([problem.composition for problem in problems]),
        "compile": compiled,
    }
    for name in set(runs) - set(case.peers):
        row["missing"][name] = case.why_missing
        del runs[name]
    foreign = [problem.foreign() for problem in problems]
    for name, peer in foreign[0].items():
        if isinstance(peer, str):
            row["missing"][name] = peer
            continue
        row["notes"][name] = peer.note
        run_all = [peers[name].run for peers in foreign]  # type: ignore[union-attr]
        runs[name] = partial(_time, run_all, peer.capturable)
    memory = [f"ours {peaks[-1]:.0f}"]
    for name, run in runs.items():
        _free()
        try:
            peer_ms = run().ms
        except Exception as error:  # a peer that fails is a finding about the peer: the row says which
            row["missing"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            row[f"{name}_ms"], row[f"ratio_to_{name}"] = peer_ms, peer_ms / timing.ms
            memory.append(f"{name} {peaks[-1]:.0f}")
    _free()
    if case.backward and clock.device == "cuda":
        row["notes"]["ours"] = f"MiB that a call takes beside its inputs: {', '.join(memory)}"
    return row


def _peak_mib(call: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        return 0.0
    _free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _call(case: Case, problem: Problem, function: Callable[..., Any]) -> Callable[[], Any]:
    if not problem.inputs:
        return function
    grad = None
    if case.backward:  # made beforehand: the training step gets it from the next layer
        with torch.no_grad():
            grad = torch.full_like(function(*problem.inputs), 0.5)
    return lambda: differentiable(function, problem.inputs, case.backward, grad)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
