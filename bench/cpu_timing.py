"""Times a case on the CPU: what a row of the results says. Its sibling for a GPU is cuda_timing.py.

Ours, the peers and the floor take turns, so that a noisy machine disturbs all alike; a time is the fastest of the
rounds, and its spread says how far above it the fastest quarter ended. Nothing is timed before it was compared with
float64.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Problem, differentiable
from bench.floors import Floors
from bench.machine import Neighbours
from bench.peers import Peer
from vista_ext.testing import assert_as_good_as, rms

MAX_ROUNDS, MIN_ROUNDS, QUICK_ROUNDS = 25, 5, 2
MAX_SECONDS = 2.0  # of a case's rounds, unless MIN_ROUNDS take longer; if one does,
SLOW_ROUNDS = 3
COLD_ROUNDS = 5
PEER_TOLERANCE = 0.05  # of bfloat16 gradients that are small sums of large terms
COMPOSITIONS = "eager", "compile"

Rounds = Callable[[Callable[[], Any], Callable[[], None], int], Sequence[float]]


def take_turns(ours: Callable[[], Any], before: Callable[[], None], rounds: int) -> list[float]:
    """Seconds of each round of ours."""
    found = []
    for _ in range(rounds):
        before()
        begin = time.perf_counter()
        ours()
        found.append(time.perf_counter() - begin)
    return found


def measure(case: Case, floors: Floors, *, rounds: int | None = None, by: Rounds = take_turns) -> dict[str, Any]:
    """The row of a case.

    Args:
        rounds: how many; by default as many as fit MAX_SECONDS.
        by: what runs and times them. If it times nothing, there is no row.

    Raises:
        AssertionError: if ours or a composition in torch is wrong: then nothing is timed.
    """
    with _threads(case.threads) as threads:
        problem = case.make("cpu")
        missing, notes, runs = _peers(case, problem, threads)
        ours = _runner(case, problem, problem.ours)
        # Compiled code carries its number of threads; naming it here makes it part of the compile cache's key.
        with torch._inductor.config.patch({"cpp.threads": threads}):
            memory = _verify(problem, {"ours": ours, **{name: runs[name] for name in COMPOSITIONS if name in runs}})
        peers: dict[str, list[float]] = {name: [] for name in runs}
        probe = floors.probe(case.bytes, case.dtype, threads)

        def time_peers() -> None:
            probe.run()
            for name, run in runs.items():
                peers[name].append(_seconds(run))

        begin = time.perf_counter()
        time_peers()
        ours()
        fitting = int(MAX_SECONDS / (time.perf_counter() - begin))
        neighbours = Neighbours()
        least = MIN_ROUNDS if fitting else SLOW_ROUNDS
        times = by(ours, time_peers, rounds or min(MAX_ROUNDS, max(least, fitting)))
        if not times:
            return {}
        others = neighbours.cores()
        cold = _from_a_cold_allocator({"ours": ours, **runs}) if case.cold else {}
    fastest, floor = min(times), probe.seconds(case.flops)
    row: dict[str, Any] = {
        "op": case.op,
        "case": case.id,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backward": case.backward,
        "threads": threads,
        "bytes": case.bytes,
        "flops": case.flops,
        "verified": problem.checked,
        "rounds": len(times),
        "bytes_per_s": case.bytes / fastest,
        "flop_per_s": case.flops / fastest,
        "ours_ms": 1e3 * fastest,
        "ours_spread": spread(times),
        "others": others,
        "floor_ms": 1e3 * floor,
        "ratio_to_floor": fastest / floor,
        "missing": missing,
        "notes": notes,
        **memory,
        **cold,
    }
    if case.items:
        row |= {"items": case.items, "item": case.item, "ns_per_item": 1e9 * fastest / case.items}
    for name, seconds in peers.items():
        row[f"{name}_ms"], row[f"{name}_spread"] = 1e3 * min(seconds), spread(seconds)
        row[f"ratio_to_{name}"] = min(seconds) / fastest
    return row


def spread(times: Sequence[float]) -> float:
    """How far above the fastest the fastest quarter ended, relative to it: the noise of the fastest."""
    if len(times) < 2:
        return 0.0
    return statistics.quantiles(times, n=4, method="inclusive")[0] / min(times) - 1


def keep_freed_memory() -> None:
    """Freed memory stays with the process: page faults would cost whoever allocates more temporaries, the peers."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of glibc's malloc.h
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mallopt(trim_threshold, -1)  # however much is freed: a long history's results are some GB
        mallopt(mmap_max, 0)


def give_back_memory() -> None:
    """All freed memory to the system: what is allocated next is cold."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def memory_grown_by(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """A call's result, and by how many bytes the process was larger at its peak, the result among them; None where the
    system does not tell."""
    give_back_memory()
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    except OSError:
        return run(), None
    result = run()
    return result, max(0, _status("VmHWM") - before)


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    torch._dynamo.reset()  # compiled code of other cases would count towards the limit of recompilations
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _peers(
    case: Case, problem: Problem, threads: int
) -> tuple[dict[str, str], dict[str, str], dict[str, Callable[[], Any]]]:
    """Why a peer is missing, in what one differs, and what runs the others."""
    missing = {name: case.why_missing for name in COMPOSITIONS if name not in case.peers}
    notes: dict[str, str] = {}
    functions: dict[str, Callable[..., Any]] = {}
    if "eager" in case.peers:
        functions["eager"] = problem.composition
    if "compile" in case.peers:
        functions["compile"] = torch.compile(problem.composition, dynamic=False, fullgraph=True)
    foreign: Mapping[str, Peer | str] = problem.foreign() if set(case.peers) - set(COMPOSITIONS) else {}
    for name in case.peers:
        if name in COMPOSITIONS:
            continue
        peer = foreign[name]
        if isinstance(peer, str):
            missing[name] = peer
        else:
            notes[name], functions[name] = peer.note, peer.run
    return missing, notes, {name: _runner(case, problem, function) for name, function in functions.items()}


def _runner(case: Case, problem: Problem, function: Callable[..., Any]) -> Callable[[], Any]:
    if problem.inputs:
        return lambda: differentiable(function, problem.inputs, case.backward)
    return function


def _verify(problem: Problem, runs: Mapping[str, Callable[[], Any]]) -> dict[str, int | None]:
    """Compares all, and tells what memory a call of ours took."""
    exact, reference = problem.exact(), problem.reference()
    memory: dict[str, int | None] = {}
    for name, run in runs.items():
        if name == "ours":
            result, memory["grown_bytes"] = memory_grown_by(run)
            memory["result_bytes"] = _bytes_of(result)
            try:
                assert_as_good_as(problem.values(result), exact, reference)
            except AssertionError as error:
                raise AssertionError(f"ours is wrong, nothing was timed: {error}") from error
            del result
        else:
            _is_the_same_function(name, problem.values(run()), exact)
    return memory


def _is_the_same_function(peer: str, found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """What compiled code sums one by one may be off by more than twice what naive sums in torch are."""
    for i, (theirs, right) in enumerate(zip(found, exact, strict=True)):
        if theirs.numel() and not rms(theirs - right) <= PEER_TOLERANCE * rms(right):
            error = float(rms(theirs - right) / rms(right))
            raise AssertionError(f"{peer} computes something else, nothing was timed: result {i} is off by {error:.3g}")


def _from_a_cold_allocator(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds where all memory that a call allocates comes fresh from the system, page by page."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(COLD_ROUNDS):
        for name, run in runs.items():
            give_back_memory()
            best[name] = min(best[name], _seconds(run))
    return {f"{name}_cold_ms": 1e3 * seconds for name, seconds in best.items()}


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    del result  # what it takes to free it is nobody's
    return seconds


def _bytes_of(result: Any) -> int:
    tensors = [result] if isinstance(result, torch.Tensor) else result
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def _status(name: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")
