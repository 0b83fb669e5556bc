"""Verifies, times and reports a case. Ours and the peers take turns, so that a noisy machine disturbs all alike.

On a CUDA device (`--device cuda`) there are other cases (gpu_cases.py) and another way to time (cuda_timing.py).
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cached_cases, cases, cuda_timing, gpu_cases, model_cases, row_cases
from bench.cases import Case, differentiable
from vista_ext.testing import assert_as_good_as

MAX_ROUNDS = 25
MAX_SECONDS = 2.0  # of a case's rounds, unless MIN_ROUNDS take longer
MIN_ROUNDS = 5
ROWS = pytest.StashKey[list[dict[str, Any]]]()  # of a CUDA device; pytest-benchmark keeps those of the CPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a smoke run: the small cases only, few rounds")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="what runs the cases")
    parser.addoption(
        "--rows",
        type=Path,
        help="with --device cuda: append each row here, as JSON lines; cases in it that this card ran are left out",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each bench file names its ops in OPS; its `case` argument runs over their cases."""
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        on_cpu = [*cases.CASES, *row_cases.CASES, *cached_cases.CASES, *model_cases.CASES]
        every = gpu_cases.CASES if option("--device") == "cuda" else on_cpu
        done = _cases_in(option("--rows"))
        chosen = [case for case in every if case.op in metafunc.module.OPS and case.quick == option("--quick")]
        chosen = [case for case in chosen if (case.op, case.id) not in done]
        metafunc.parametrize("case", chosen, ids=[f"{case.op}-{case.id}" for case in chosen])


def _cases_in(path: Path | None) -> set[tuple[str, str]]:
    if path is None or not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["op"], row["case"]) for row in rows if row["card"] == torch.cuda.get_device_name()}


@pytest.fixture(scope="session", autouse=True)
def _warm_allocator() -> None:
    """Freed memory stays with the process: page faults would cost whoever allocates more temporaries, the peers."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of glibc's malloc.h
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


@pytest.fixture(scope="session")
def clock_and_bandwidth() -> tuple[cuda_timing.Clock, float]:
    clock = cuda_timing.CudaClock()
    return clock, cuda_timing.copy_bandwidth(clock)


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], None]]:
    """A function that runs one case and keeps its numbers: in the benchmark's `extra_info`, on a GPU as a row."""
    if request.config.getoption("--device") == "cuda":
        yield lambda case: _measure(case, request.config, *request.getfixturevalue("clock_and_bandwidth"))
        return
    benchmark = request.getfixturevalue("benchmark")
    threads = torch.get_num_threads()
    yield lambda case: _compare(case, benchmark, request.config)
    torch.set_num_threads(threads)


def _measure(case: Case, config: pytest.Config, clock: cuda_timing.Clock, bandwidth: float) -> None:
    row = cuda_timing.measure(case, clock, bandwidth)
    config.stash[ROWS].append(row)
    path = config.getoption("--rows")
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _compare(case: Case, benchmark: Any, config: pytest.Config) -> None:
    torch.set_num_threads(case.threads or torch.get_num_threads())
    threads = torch.get_num_threads()
    torch._dynamo.reset()  # compiled code of other cases would count towards the limit of recompilations
    problem = case.make("cpu")

    # Compiled code carries its number of threads; naming it here makes it part of the compile cache's key.
    with torch._inductor.config.patch({"cpp.threads": threads}):
        compiled = torch.compile(problem.composition, dynamic=False, fullgraph=True)
        functions = {"ours": problem.ours, "eager": problem.composition, "compile": compiled}
        runs = {name: _runner(case, problem.inputs, functions[name]) for name in ("ours", *case.peers)}
        exact, reference = problem.exact(), problem.reference()
        for name, run in runs.items():
            try:
                assert_as_good_as(problem.values(run()), exact, reference)
            except AssertionError as error:
                raise AssertionError(f"{name} is wrong, nothing was timed: {error}") from error
    del exact, reference

    ours = runs.pop("ours")
    best = dict.fromkeys(runs, float("inf"))

    def time_peers() -> None:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)

    begin = time.perf_counter()
    time_peers()
    ours()
    rounds = int(MAX_SECONDS / (time.perf_counter() - begin))
    rounds = 2 if config.getoption("--quick") else min(MAX_ROUNDS, max(MIN_ROUNDS, rounds))
    benchmark.group = case.op
    benchmark.pedantic(ours, setup=time_peers, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    mine = benchmark.stats.stats.min
    benchmark.extra_info.update(
        op=case.op,
        case=case.id,
        threads=threads,
        bytes=case.bytes,
        flops=case.flops,
        bytes_per_s=case.bytes / mine,
        flop_per_s=case.flops / mine,
        ours_ms=1e3 * mine,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in best.items()},
        **{f"ratio_to_{name}": seconds / mine for name, seconds in best.items()},
    )


def _runner(case: Case, inputs: tuple[torch.Tensor, ...], function: Callable[..., Any]) -> Callable[[], Any]:
    if inputs:
        return lambda: differentiable(function, inputs, case.backward)
    return function


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("per op and shape: GPU time, and its ratio to a plain copy of as many bytes")
        for row in config.stash[ROWS]:
            peers = [f"{key.removeprefix('ratio_to_')} x{row[key]:.2f}" for key in row if key.startswith("ratio_to_")]
            terminalreporter.write_line(
                f"{row['op']:<14} {row['case']:<40} {row['ours_ms']:9.3f} ms  {', '.join(peers)}"
            )
        return
    session = getattr(config, "_benchmarksession", None)
    rows = [bench.extra_info for bench in session.benchmarks if bench.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("ours against its peers: best of the rounds; a ratio above 1 means ours is faster")
    line = "{:<18} {:<34} {:>2} {:>9} {:>9} {:>9} {:>8} {:>8} {:>7} {:>7}".format
    peers = ("eager", "compile")
    heads = "op", "case", "t", "ours ms", "eager ms", "comp. ms", "/eager", "/compile", "GB/s", "GFLOP/s"
    terminalreporter.write_line(line(*heads))
    for row in rows:
        times = [row.get(f"{name}_ms") for name in ("ours", *peers)]
        ratios = [row.get(f"ratio_to_{name}") for name in peers]
        numbers = [f"{x:.2f}" if x is not None else "-" for x in (*times, *ratios)]
        rates = [f"{row['bytes_per_s'] / 1e9:.1f}", f"{row['flop_per_s'] / 1e9:.0f}"]
        others = [key for key in row if key.startswith("ratio_to_") and key.removeprefix("ratio_to_") not in peers]
        text = "".join(f"  {key.removeprefix('ratio_to_')} x{row[key]:.2f}" for key in others)
        terminalreporter.write_line(line(row["op"], row["case"], row["threads"], *numbers, *rates) + text)
