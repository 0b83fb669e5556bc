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
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch

from bench.cases import Case, Problem, differentiable
from bench.cost_tables import by_group
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

    def peak(self, call: Callable[[], Any]) -> tuple[Any, int | None]: ...

    def kernels(self, call: Callable[[], Any]) -> list[tuple[str, int, float]]: ...


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

    def peak(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """A call's result, and the most bytes of memory there were at a time, its inputs among them."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated()

    def kernels(self, call: Callable[[], Any]) -> list[tuple[str, int, float]]:
        """Name, launches and milliseconds of each kernel of a call, the longest first."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        found = [(e.key, e.count, e.self_device_time_total / 1e3) for e in profiled.key_averages()]
        return sorted((entry for entry in found if entry[2] > 0), key=lambda entry: -entry[2])

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
    exact, reference = first.exact(), first.reference()

    def verified(functions: Sequence[Callable[..., Any]]) -> tuple[Timing, int | None]:
        result, peak = clock.peak(_call(case, first, functions[0]))
        assert_as_good_as(first.values(result), exact, reference)
        del result
        return _time(functions, case.capturable), peak

    def measured(functions: Sequence[Callable[..., Any]], capturable: bool) -> tuple[Timing, int | None]:
        peak = clock.peak(_call(case, first, functions[0]))[1]
        return _time(functions, capturable), peak

    def _time(functions: Sequence[Callable[..., Any]], capturable: bool) -> Timing:
        calls = [_call(case, problem, function) for problem, function in zip(problems, functions, strict=True)]
        return clock.time(calls, capturable, SECONDS)

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
        timing, row["ours_peak_bytes"] = verified([problem.ours for problem in problems])
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

    if case.parts:
        kernels = clock.kernels(_call(case, first, first.ours))
        row["kernels"] = [asdict(line) for line in by_group(case.parts, kernels, bandwidth)]

    def compiled() -> tuple[Timing, int | None]:
        # The copies differ in nothing that is compiled; if the compiler sees it otherwise, it may compile each.
        with torch._dynamo.config.patch(recompile_limit=2 * copies + 8):
            return verified([torch.compile(p.composition, dynamic=False, fullgraph=True) for p in problems])

    runs: dict[str, Callable[[], tuple[Timing, int | None]]] = {
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
        runs[name] = partial(measured, run_all, peer.capturable)
    for name, run in runs.items():
        _free()
        try:
            peer_timing, peak = run()
        except Exception as error:  # a peer that fails is a finding about the peer: the row says which
            row["missing"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            row[f"{name}_ms"], row[f"ratio_to_{name}"] = peer_timing.ms, peer_timing.ms / timing.ms
            row[f"{name}_peak_bytes"] = peak
    _free()
    return row


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
