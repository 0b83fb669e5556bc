"""Runs the cases: verifies, times and reports them, and compares with a baseline.

    pytest bench/ --results build/bench.json             # every CPU case; the file is complete after each of them
    pytest bench/ --results build/bench.json --resume    # those that this commit has not measured on this machine
    pytest bench/ --compare                              # fails on a loss against the baseline of this kind of machine

On a CUDA device (`--device cuda`) there are other cases (gpu_cases.py) and another way to time (cuda_timing.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import baseline, cpu_cases, cpu_timing, cuda_timing, gpu_cases, machine
from bench.cases import Case
from bench.floors import Floors
from bench.results import Writer

ROWS = pytest.StashKey[list[dict[str, Any]]]()  # of a CUDA device
FLOORS, WRITER = pytest.StashKey[Floors](), pytest.StashKey[Writer | None]()
FACTS = pytest.StashKey[Mapping[str, Any]]()
VERDICT = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a smoke run: the small cases only, few rounds")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="what runs the cases")
    parser.addoption(
        "--rows",
        type=Path,
        help="with --device cuda: append each row here, as JSON lines; cases in it that this card ran are left out",
    )
    parser.addoption("--results", type=Path, help="add this run to a JSON file of results")
    parser.addoption("--resume", action="store_true", help="leave out what --results holds of this commit and machine")
    parser.addoption(
        "--compare",
        nargs="?",
        type=Path,
        const=baseline.FOLDER,
        metavar="BASELINE",
        help="fail if a ratio is worse than in the baseline of this kind of machine (in bench/baselines by default)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.addinivalue_line("markers", "op(name): the op of the rows that a benchmark without a `case` leaves")
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device here")
        for option in ("results", "compare"):
            if config.getoption(option) is not None:
                raise pytest.UsageError(f"--{option}: is for a CPU; --device cuda has --rows")
        return
    path = config.getoption("--results")
    if config.getoption("--resume") and path is None:
        raise pytest.UsageError("--resume: needs --results, the file that knows what was measured")
    config.stash[FACTS] = machine.collect_facts()
    config.stash[WRITER] = None if path is None else Writer(path, config.stash[FACTS])
    config.stash[FLOORS] = Floors()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each bench file names its ops in OPS; its `case` argument runs over their cases."""
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        every = gpu_cases.CASES if option("--device") == "cuda" else cpu_cases.CASES
        chosen = [case for case in every if case.op in metafunc.module.OPS and case.quick == option("--quick")]
        done = _cases_in(option("--rows"))
        if option("--resume"):
            writer = metafunc.config.stash[WRITER]
            done |= {key[:2] for key in writer.measured()} if writer else set()
        chosen = [case for case in chosen if (case.op, case.id) not in done]
        metafunc.parametrize("case", chosen, ids=[f"{case.op}-{case.id}" for case in chosen])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --resume: benchmarks without a `case` name the op of their rows by a marker."""
    if not config.getoption("--resume"):
        return
    writer = config.stash[WRITER]
    measured = {op for op, _, _ in writer.measured()} if writer else set()
    done = [item for item in items if (mark := item.get_closest_marker("op")) and mark.args[0] in measured]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]


def _cases_in(path: Path | None) -> set[tuple[str, str]]:
    if path is None or not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["op"], row["case"]) for row in rows if row["card"] == torch.cuda.get_device_name()}


@pytest.fixture(scope="session", autouse=True)
def _warm_allocator() -> None:
    cpu_timing.keep_freed_memory()


@pytest.fixture(scope="session")
def clock_and_bandwidth() -> tuple[cuda_timing.Clock, float]:
    clock = cuda_timing.CudaClock()
    return clock, cuda_timing.copy_bandwidth(clock)


@pytest.fixture
def floors(request: pytest.FixtureRequest) -> Floors:
    return request.config.stash[FLOORS]


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """A function that runs one case and keeps its numbers: in the benchmark's `extra_info`, on a GPU as a row."""
    if request.config.getoption("--device") == "cuda":
        return lambda case: _measure(case, request.config, *request.getfixturevalue("clock_and_bandwidth"))
    benchmark = request.getfixturevalue("benchmark")
    return lambda case: _compare(case, benchmark, request.config)


@pytest.fixture(autouse=True)
def _kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a benchmark leaves in `extra_info`, a row or `rows`, goes to the results."""
    writer = request.config.stash.get(WRITER, None)
    benchmark = request.getfixturevalue("benchmark") if writer else None
    yield
    if writer is not None:
        for row in _rows_of(benchmark):
            writer.add(row, request.config.stash[FLOORS].rows())


def _measure(case: Case, config: pytest.Config, clock: cuda_timing.Clock, bandwidth: float) -> None:
    row = cuda_timing.measure(case, clock, bandwidth)
    config.stash[ROWS].append(row)
    path = config.getoption("--rows")
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _compare(case: Case, benchmark: Any, config: pytest.Config) -> None:
    benchmark.group = case.op
    rounds = cpu_timing.QUICK_ROUNDS if config.getoption("--quick") else None
    row = cpu_timing.measure(case, config.stash[FLOORS], rounds=rounds, by=rounds_by(benchmark))
    benchmark.extra_info.update(row)


def rounds_by(benchmark: Any) -> cpu_timing.Rounds:
    """Rounds timed by pytest-benchmark. It would hold a round's results in the next one, whose own then took memory
    that no call has warmed: gigabytes of a long history."""

    def take_turns(ours: Callable[[], Any], before: Callable[[], None], rounds: int) -> Sequence[float]:
        results: list[Any] = []

        def setup() -> None:
            results.clear()
            before()

        benchmark.pedantic(lambda: results.append(ours()), setup=setup, rounds=rounds)
        return () if benchmark.stats is None else benchmark.stats.stats.data  # none with --benchmark-disable

    return take_turns


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    if FACTS in config.stash:
        facts = config.stash[FACTS]
        machine_info["vista"] = {**facts, "floors": config.stash[FLOORS].rows()}


def _measured(config: pytest.Config) -> list[dict[str, Any]]:
    session = getattr(config, "_benchmarksession", None)
    return [row for bench in session.benchmarks for row in _rows_of(bench)] if session else []


def _rows_of(bench: Any) -> list[dict[str, Any]]:
    return bench.extra_info.get("rows", [bench.extra_info]) if bench.extra_info else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    path = config.getoption("--compare")
    if path is None or FACTS not in config.stash:
        return
    judged = baseline.judge(_measured(config), config.stash[FACTS], path)
    config.stash[VERDICT] = judged.text
    if not judged.passed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("per op and shape: GPU time, and its ratio to a plain copy of as many bytes")
        for row in config.stash[ROWS]:
            peers = [f"{key.removeprefix('ratio_to_')} x{row[key]:.2f}" for key in row if key.startswith("ratio_to_")]
            terminalreporter.write_line(
                f"{row['op']:<14} {row['case']:<40} {row['ours_ms']:9.3f} ms  {', '.join(peers)}"
            )
        return
    rows = _measured(config)
    if rows:
        terminalreporter.section("ours against its peers: fastest of the rounds; a ratio above 1 means ours is faster")
        for line in _table(rows):
            terminalreporter.write_line(line)
    if VERDICT in config.stash:
        terminalreporter.section("against the baseline")
        terminalreporter.write_line(config.stash[VERDICT])


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    line = "{:<18} {:<34} {:>2} {:>9} {:>7} {:>8} {:>8}".format
    yield line("op", "case", "t", "ours ms", "x floor", "/eager", "/compile")
    for row in rows:
        named = [row.get(name) for name in ("ratio_to_floor", "ratio_to_eager", "ratio_to_compile")]
        numbers = [f"{x:.2f}" if x is not None else "-" for x in (row["ours_ms"], *named)]
        shown = {"ratio_to_floor", "ratio_to_eager", "ratio_to_compile"}
        others = [key for key in row if key.startswith("ratio_to_") and key not in shown]
        text = "".join(f"  {key.removeprefix('ratio_to_')} x{row[key]:.2f}" for key in others)
        yield line(row["op"], row["case"], row["threads"], *numbers) + text
