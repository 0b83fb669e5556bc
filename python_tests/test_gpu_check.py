"""The GPU check without a GPU: stages end as they end and are recorded, and the page says what was found."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check
from bench.gpu_page import PEERS, page

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    run = gpu_check.Run(tmp_path / "out", commit="abc")
    run.work.mkdir(parents=True)
    return run


def step(run, code, seconds=30, **env):
    return gpu_check.run_step(run, "step", [sys.executable, "-c", code], seconds, **env)


def stub(monkeypatch, **stages):
    monkeypatch.setattr(gpu_check, "STAGES", stages)


def row(**changes):
    return {
        "op": "qla", "case": "512 x 2000-bfloat16-fwd", "shape": "512 x 2000", "dtype": "bfloat16", "backward": False,
        "card": "a card", "ours_ms": 0.8, "ours_low_ms": 0.79, "ours_high_ms": 0.82, "bytes_per_s": 2.6e12,
        "ratio_to_floor": 1.1, "ratio_to_eager": 9.0, "ratio_to_fla": 2.4, "copy_bytes_per_s": 3e12,
        "verified": "150 of 512 sequences", "missing": {"compile": "no room"}, "notes": {"fla": "causal"},
    } | changes  # fmt: skip


def test_no_gpu_is_said_and_changes_nothing(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == "vista: torch sees no CUDA device here: nothing was checked\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--stages", "install,benchmark"], "found 'benchmark'"),
        (["--budget", "bench"], "found 'bench'"),
        (["--budget", "bench=long"], "found 'bench=long'"),
        (["--wheel", "/nowhere"], "must be a folder, found '/nowhere'"),
    ],
)
def test_bad_options_are_named(capsys, option, message):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(option)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_step_is_recorded_however_it_ends(run):
    passed = step(run, "import os; print(os.environ['COLOR'])", COLOR="blue")
    assert (passed["status"], passed["tail"]) == ("passed", "blue\n")
    failed = step(run, "print('before'); raise SystemExit(3)")
    assert (failed["status"], failed["exit"], failed["tail"]) == ("failed", 3, "before\n")


def test_a_time_out_ends_the_processes_of_a_step(run):
    mark = run.out / "grandchild_was_here"
    grandchild = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = (
        f"import subprocess, sys; print('partial', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    result = step(run, code, seconds=1)
    assert result["status"] == "timed out" and result["seconds"] < 3 and result["tail"] == "partial\n"
    time.sleep(3)
    assert not mark.exists()


def test_results_are_written_after_each_stage_and_later_calls_add_to_them(run, monkeypatch):
    def look(run, seconds):
        written = json.loads((run.out / "gpu_check.json").read_text())["stages"]
        return {"status": "passed", "seconds": seconds, "tail": "", "seen": list(written)}

    def broken(run, seconds):
        raise OSError("no such card")

    stub(monkeypatch, tests=broken, bench=look)
    record = gpu_check.check(run, ["tests", "bench"], {"tests": 5, "bench": 7})
    assert record["stages"]["tests"]["tail"] == "OSError: no such card"
    assert record["stages"]["bench"]["seen"] == ["tests"]
    record = gpu_check.check(run, ["bench"], {"bench": 9})
    assert [record["stages"][name]["budget"] for name in ("tests", "bench")] == [5, 9]
    assert "| tests | failed |" in (run.out / "gpu_check.md").read_text()

    run.commit = "def"
    with pytest.raises(SystemExit, match="holds results of commit abc"):
        gpu_check.check(run, ["bench"], {"bench": 9})


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("not run", 0), ("failed", 1), ("timed out", 1)])
def test_exit_status(tmp_path, monkeypatch, status, code):
    stub(monkeypatch, facts=lambda run, seconds: {"status": status, "seconds": 0.1, "tail": ""})
    monkeypatch.setattr(gpu_check, "_device_count", lambda run: 1)
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--stages", "facts", "--commit", "abc"]) == code


def test_the_work_folder_has_tests_and_benchmarks_and_no_sources(run):
    gpu_check.prepare(run)
    assert (run.work / "bench" / "gpu_small.py").is_file() and (run.work / "python_tests" / "ops").is_dir()
    assert not (run.work / "vista_ext").exists()
    assert run.env["PYTHONPATH"].split(":")[0] == str(run.site)


def test_install_takes_the_carried_wheel(run, tmp_path, monkeypatch):
    gpu_check.prepare(run)
    run.wheel = tmp_path / "wheels"
    run.wheel.mkdir()
    assert "no wheel in" in gpu_check.install(run, 60)["tail"]
    command = [sys.executable, "-c", WHEEL, str(run.wheel / "vista_ext-0-py3-none-any.whl")]
    subprocess.run(command, check=True)
    installed = gpu_check.install(run, 60)
    assert installed["status"] == "passed", installed
    code = "import vista_ext; print(vista_ext.__file__)"
    assert step(run, code)["tail"].startswith(str(run.site))


# The smallest package that claims CUDA kernels, packed by hand.
WHEEL = """
import sys, zipfile
with zipfile.ZipFile(sys.argv[1], "w") as z:
    z.writestr("vista_ext/__init__.py", "from vista_ext import _C")
    z.writestr("vista_ext/_C.py", "def build_info(): return {'cuda_archs': ['80']}")
    info = "vista_ext-0.dist-info/"
    z.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: vista_ext\\nVersion: 0\\n")
    z.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    z.writestr(info + "RECORD", "")
"""


def test_a_missing_sanitizer_is_named(run, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    result = gpu_check.sanitizer(run, 10)
    assert result["status"] == "not run" and "compute-sanitizer is not found" in result["tail"]


def test_every_sanitizer_runs_and_the_worst_result_counts(run, tmp_path):
    binary = tmp_path / "bin" / "compute-sanitizer"
    binary.parent.mkdir()
    binary.write_text('#!/bin/sh\necho "$2"; test "$2" != racecheck || exit 99\n')
    binary.chmod(0o755)
    run.env["PATH"] = f"{binary.parent}:{run.env['PATH']}"
    result = gpu_check.sanitizer(run, 60)
    assert (result["status"], result["exit"], result["tail"]) == ("failed", 99, "racecheck\n")
    assert {tool: done["status"] for tool, done in result["tools"].items()} == {
        "memcheck": "passed", "racecheck": "failed", "initcheck": "passed", "synccheck": "passed",
    }  # fmt: skip


def test_facts_without_a_card_still_name_torch_and_the_build(run):
    gpu_check.prepare(run)
    result = gpu_check.facts(run, 60)
    assert result["status"] == "passed", result
    assert {"commit", "torch", "nvidia-smi", "build"} <= set(result["facts"])


def test_small_calls_run_without_a_card():
    command = [sys.executable, "-m", "bench.gpu_small", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "234 calls\n"


def test_page():
    stages = {
        "facts": {
            "status": "passed", "seconds": 2.0, "budget": 60, "tail": "",
            "facts": {"card": "a card", "build": {"cuda architectures": ["80", "90a"]}},
        },
        "sanitizer": {
            "status": "failed", "seconds": 9.0, "budget": 60, "tail": "a race",
            "tools": {"racecheck": {"status": "failed", "seconds": 9.0, "tail": "a race | at 0x7"}},
        },
        "bench": {
            "status": "timed out", "seconds": 9.0, "budget": 9, "tail": "so far",
            "rows": [row(), row(op="cache_gather", shape="int8 512 of 8192 users", ratio_to_floor=1.26)],
        },
    }  # fmt: skip
    text = page({"commit": "abc", "stages": stages})
    assert "| build | cuda architectures 80, 90a |" in text
    assert "| sanitizer: racecheck | failed | 9.0 |  |" in text
    assert "| QLA forward: at most 1.25 x floor | 512 x 2000 | 1.10 | met |" in text
    assert "| QLA forward: at least 2.5 x faster than fla | 512 x 2000 | 2.40 | NOT MET |" in text
    assert "| QLA forward: at most 1.25 x floor | 1 x 1000000 | - | not measured |" in text
    assert "| gather + dequantize: at most 1.25 x floor, cold | int8 512 | 1.26 | NOT MET |" in text
    peers = {"eager": "9.00", "fla": "2.40"}
    ratios = " | ".join(peers.get(name, "-") for name in PEERS)
    assert f"| qla | 512 x 2000-bfloat16-fwd | 0.8000 | 0.7900-0.8200 | 2600 | 1.10 | - | {ratios} |" in text
    assert "| compile | no room |" in text and "## bench: timed out" in text and "so far" in text


def test_every_target_has_a_case():
    from bench import gpu_cases, gpu_page

    rows = [
        row(
            op=case.op, shape=case.shape, backward=case.backward, dtype=str(case.dtype).removeprefix("torch."),
            ours_ms=0.5, ratio_to_floor=1.0, **{f"ratio_to_{name}": 4.0 for name in PEERS},
        )
        for case in gpu_cases.CASES
    ]  # fmt: skip
    assert {verdict for *_, verdict in gpu_page._target_lines(rows)} == {"met"}
