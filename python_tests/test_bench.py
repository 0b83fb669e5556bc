"""The smoke run of the benchmarks: it verifies every op against its reference and records what a report needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import baseline, page, results
from bench.conftest import rounds_by
from python_tests.needs import program

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_smoke_run(tmp_path, capsys, monkeypatch):
    report, run, folder = (tmp_path / name for name in ("report.json", "run.json", "baselines"))
    command = [sys.executable, "-m", "pytest", "bench/", "--quick", "-q", f"--benchmark-json={report}"]
    command += ["--results", str(run), "--compare", str(folder)]
    program("redis-server", "valkey-server", package="redis-server")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # No benchmark failed; but there is nothing to compare with, and that is said.
    assert done.returncode == 1 and " failed" not in done.stdout, done.stdout + done.stderr
    assert "NOT COMPARED: no baseline of this kind of machine" in done.stdout
    record = json.loads(report.read_text())
    rows = [row for bench in record["benchmarks"] for row in bench["extra_info"].get("rows", [bench["extra_info"]])]
    of_attention = {"qla", "projected_qla", "jagged_cross_attn", "cached_cross_attn"}
    of_rows = {"cache_gather", "quantize_rows", "linear_silu", "sglu"}
    of_model = {"training_step", "layer", "summarize", "score"}
    of_serving = {"store_find", "request", "summarize_job"}
    assert {row["op"] for row in rows} == of_attention | of_rows | of_model | of_serving
    stores = [row for row in rows if row["op"] == "store_find"]
    peers = {row["case"]: [key for key in row if key.startswith("ratio_to_")] for row in stores}
    assert peers == {
        "256-users-warm": ["ratio_to_py_lmdb"],
        "256-users-cold": ["ratio_to_py_lmdb"],
        "256-users-server": ["ratio_to_redis_py"],
        "256-users-hot-by-slot": ["ratio_to_lmdb"],
    }
    for row in (row for row in rows if row["op"] not in of_serving):
        for key in ("threads", "bytes", "flops", "bytes_per_s", "flop_per_s", "ours_ms", "ratio_to_floor"):
            assert row[key] > 0, f"{row['case']}: {key}"
        for peer in {"eager", "compile"} - set(row["missing"]):
            assert row[f"ratio_to_{peer}"] == pytest.approx(row[f"{peer}_ms"] / row["ours_ms"])
    assert [row["events"] for row in rows if row["op"] == "request"] == [20, 200, 1000]
    assert "ours against its peers" in done.stdout

    # The same rows, with the facts of the machine, are what baselines and pages are made of.
    found = results.read([run])
    facts = record["machine_info"]["vista"]
    assert found.machine["isa"] == facts["isa"] and found.floors == facts["floors"]
    assert set(found.rows) == {results.key_of(row) for row in rows}
    assert "Floors" in page.page(found)
    assert baseline.main([str(run), "--baseline", str(folder), "--update"]) == 0
    monkeypatch.setattr(baseline, "MAX_NOISE", float("inf"))  # tests share the machine
    monkeypatch.setattr(baseline, "MAX_OTHERS", float("inf"))
    assert baseline.main([str(run), "--baseline", str(folder)]) == 0
    assert "0 lost" in capsys.readouterr().out


def test_a_round_starts_without_the_results_of_the_last(benchmark):
    class Result:
        alive = 0

        def __init__(self):
            Result.alive += 1

        def __del__(self):
            Result.alive -= 1

    found = []
    rounds_by(benchmark)(Result, lambda: found.append(Result.alive), 4)
    assert found and not any(found)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_freed_memory_stays_however_much_it_is():
    code = """
import ctypes
from bench.cpu_timing import keep_freed_memory
libc = ctypes.CDLL(None)
libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes, libc.malloc.argtypes = [ctypes.c_void_p], [ctypes.c_size_t]
keep_freed_memory()
libc.free(libc.malloc(5 << 29))  # 2.5 GiB, never touched
end = libc.sbrk(0)
libc.free(libc.malloc(5 << 29))
assert end == libc.sbrk(0)
libc.malloc_trim(0)
print(end - libc.sbrk(0) >> 29)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "5\n"
