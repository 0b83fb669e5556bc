"""The smoke run of the benchmarks: it verifies every op against its reference and records what a report needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.needs import program

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_smoke_run(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "bench/", "--quick", "-q", f"--benchmark-json={report}"]
    program("redis-server", "valkey-server", package="redis-server")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [bench["extra_info"] for bench in json.loads(report.read_text())["benchmarks"]]
    of_attention = {"qla", "projected_qla", "jagged_cross_attn", "cached_cross_attn"}
    of_rows = {"cache_gather", "quantize_rows", "linear_silu", "sglu"}
    of_model = {"training_step", "layer", "summarize", "score"}
    assert {row["op"] for row in rows} == of_attention | of_rows | of_model | {"store_find"}
    stores = [row for row in rows if row["op"] == "store_find"]
    peers = {row["case"]: [key for key in row if key.startswith("ratio_to_")] for row in stores}
    assert peers == {
        "256-users-warm": ["ratio_to_py_lmdb"],
        "256-users-cold": ["ratio_to_py_lmdb"],
        "256-users-server": ["ratio_to_redis_py"],
        "256-users-hot-by-slot": ["ratio_to_lmdb"],
    }
    for row in (row for row in rows if row not in stores):
        for key in ("threads", "bytes", "flops", "bytes_per_s", "flop_per_s", "ours_ms"):
            assert row[key] > 0, f"{row['case']}: {key}"
        for peer in ("eager",) if row["op"] == "training_step" else ("eager", "compile"):
            assert row[f"{peer}_ms"] > 0
            assert row[f"ratio_to_{peer}"] == pytest.approx(row[f"{peer}_ms"] / row["ours_ms"])
    assert "ours against its peers" in done.stdout
