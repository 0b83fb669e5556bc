"""One command for a bare machine with a GPU and torch: `python -m bench.gpu_check`, from a checkout.

Stages: install, facts, tests, sanitizer, emulator, bench. Each runs in processes of its own within a budget, and is
recorded however it ends; gpu_check.json and gpu_check.md are written after every stage. A later call with other
`--stages` and the same `--out` adds to them, and the bench stage goes on where it was cut short. Nothing else is
changed: GPU.md is edited by a person from that page.

Exit status: 0 if every stage asked for passed, 1 if one did not, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_page import page

ROOT = Path(__file__).parents[1]
BUDGETS = {"install": 420, "facts": 60, "tests": 300, "sanitizer": 400, "emulator": 60, "bench": 540}  # seconds
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
TAIL = 2000  # characters of a log that are kept


@dataclass
class Run:
    """One check: the folder it writes to, and the environment that the installed package is found in."""

    out: Path
    wheel: Path | None = None
    commit: str = "unknown"
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def work(self) -> Path:
        """A copy of tests and benchmarks without the sources beside them, which would hide the installed package."""
        return self.out / "work"

    @property
    def site(self) -> Path:
        return self.out / "site"


def run_step(run: Run, name: str, command: Sequence[object], seconds: float, **env: str) -> dict[str, Any]:
    """Run one process, its output in `<out>/<name>.log`; never raises, and never outlasts its budget."""
    log = run.out / f"{name}.log"
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=run.work,
            env={**run.env, **env},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a time-out ends what the process started, too
        )
        try:
            code = process.wait(max(1.0, seconds))
            status = PASSED if code == 0 else FAILED
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, status = process.wait(), TIMED_OUT
    return {
        "status": status,
        "exit": code,
        "seconds": round(time.monotonic() - begin, 1),
        "tail": log.read_text(errors="replace")[-TAIL:],
    }


def not_run(why: str) -> dict[str, Any]:
    return {"status": NOT_RUN, "seconds": 0.0, "tail": why}


def _has_kernels(run: Run) -> bool:
    code = "from vista_ext import _C; raise SystemExit(not _C.build_info()['cuda_archs'])"
    return subprocess.run([sys.executable, "-c", code], cwd=run.work, env=run.env, capture_output=True).returncode == 0


def install(run: Run, seconds: float) -> dict[str, Any]:
    """A carried wheel, else what is importable and has CUDA kernels, else a build from this checkout."""
    begin = time.monotonic()
    wheels = run.wheel
    if wheels is None and _has_kernels(run):
        return {"status": PASSED, "seconds": 0.0, "tail": "the importable vista_ext has CUDA kernels"}
    if wheels is None:
        wheels = run.out / "wheel"
        build = ["wheel", "--no-build-isolation", "--no-deps", "-w", wheels, ROOT]
        options = {"VISTA_CUDA": "1", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
        built = run_step(run, "build", [sys.executable, "-m", "pip", *build], seconds, **options)
        if built["status"] != PASSED:
            return built
    found = sorted(wheels.glob("*.whl"))
    if not found:
        return {"status": FAILED, "seconds": 0.0, "tail": f"no wheel in {wheels}"}
    command = ["-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", run.site, *found]
    done = run_step(run, "install", [sys.executable, *command], seconds - (time.monotonic() - begin))
    if done["status"] == PASSED and not _has_kernels(run):
        return {**done, "status": FAILED, "tail": "the installed vista_ext does not import, or has no CUDA kernels"}
    return {**done, "seconds": round(time.monotonic() - begin, 1)}


def facts(run: Run, seconds: float) -> dict[str, Any]:
    done = run_step(run, "facts", [sys.executable, "-m", "bench.gpu_facts"], seconds)
    if done["status"] == PASSED:
        text = (run.out / "facts.log").read_text()
        done["facts"] = {"commit": run.commit, **json.loads(text[text.index("{") :])}
        done["tail"] = ""
    return done


def tests(run: Run, seconds: float) -> dict[str, Any]:
    # The conftest of all tests needs packages that a bare machine may lack; that of the ops does not.
    options = ["python_tests/ops", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--confcutdir=python_tests/ops"]
    return run_step(run, "tests", [sys.executable, "-m", "pytest", *options], seconds)


def sanitizer(run: Run, seconds: float) -> dict[str, Any]:
    places = os.pathsep.join([run.env.get("PATH", ""), "/usr/local/cuda/bin", f"{run.env.get('CUDA_HOME', '')}/bin"])
    binary = shutil.which("compute-sanitizer", path=places)
    if binary is None:
        return not_run("compute-sanitizer is not found on PATH, in CUDA_HOME or in /usr/local/cuda")
    begin, tools = time.monotonic(), {}
    for i, tool in enumerate(SANITIZERS):
        share = (seconds - (time.monotonic() - begin)) / (len(SANITIZERS) - i)
        command = [binary, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "bench.gpu_small"]
        # An allocation for each tensor: what is out of bounds or not yet written is not hidden by a pool.
        tools[tool] = run_step(run, f"sanitizer_{tool}", command, share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    worst = next((done for done in tools.values() if done["status"] != PASSED), tools[SANITIZERS[0]])
    return {**worst, "seconds": round(time.monotonic() - begin, 1), "tools": tools}


def emulator(run: Run, seconds: float) -> dict[str, Any]:
    """Whether the card agrees with the instruction vectors that the emulator is tested with."""
    done = run_step(run, "emulator", [sys.executable, "-m", "python_tests.ptx_emulator.vectors", "--gpu"], seconds)
    shutil.copy2(run.work / "python_tests" / "ptx_emulator" / "vectors" / "vectors.json", run.out)
    return done


def bench(run: Run, seconds: float) -> dict[str, Any]:
    rows = run.out / "rows.jsonl"
    command = [sys.executable, "-m", "pytest", "bench", "--device", "cuda", "--rows", rows, "-v"]
    done = run_step(run, "bench", [*command, "-p", "no:cacheprovider"], seconds)
    lines = rows.read_text().splitlines() if rows.exists() else []
    return {**done, "rows": [json.loads(line) for line in lines]}


STAGES: dict[str, Callable[[Run, float], dict[str, Any]]] = {
    "install": install,
    "facts": facts,
    "tests": tests,
    "sanitizer": sanitizer,
    "emulator": emulator,
    "bench": bench,
}


def prepare(run: Run) -> None:
    run.work.mkdir(parents=True, exist_ok=True)
    for name in ("bench", "python_tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, run.work / name, dirs_exist_ok=True, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", run.work)
    search = [str(run.site), run.env.get("PYTHONPATH", "")]
    run.env["PYTHONPATH"] = os.pathsep.join(part for part in search if part)
    run.env["PYTHONUNBUFFERED"] = "1"


def check(run: Run, stages: Sequence[str], budgets: Mapping[str, float]) -> dict[str, Any]:
    """Run stages in order, writing the record after each; stages of earlier calls with this folder are kept."""
    record_path = run.out / "gpu_check.json"
    record: dict[str, Any] = json.loads(record_path.read_text()) if record_path.exists() else {"stages": {}}
    if record.setdefault("commit", run.commit) != run.commit:
        raise SystemExit(f"vista: {run.out} holds results of commit {record['commit']}: choose another --out")
    for name in stages:
        print(f"{name}: at most {budgets[name]:.0f} s", flush=True)
        try:
            result = STAGES[name](run, budgets[name])
        except Exception as error:  # a stage that breaks is a result like others; those after it still run
            result = {"status": FAILED, "seconds": 0.0, "tail": f"{type(error).__name__}: {error}"}
        record["stages"][name] = {"budget": budgets[name], **result}
        record_path.write_text(json.dumps(record, indent=1) + "\n")
        (run.out / "gpu_check.md").write_text(page(record))
        print(f"{name}: {result['status']} after {result['seconds']} s", flush=True)
    return record


def _device_count(run: Run) -> int:
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=run.env)
    return int(done.stdout) if done.returncode == 0 else 0


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        return "unknown"
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"), help="where results go")
    parser.add_argument("--wheel", type=Path, help="folder of wheels to install: vista_ext's, and peers if carried")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, separated by commas")
    parser.add_argument("--budget", action="append", default=[], metavar="STAGE=SECONDS", help="another time budget")
    parsed = parser.parse_args(arguments)
    parsed.stages = parsed.stages.split(",")
    budgets: dict[str, float] = dict(BUDGETS)
    for entry in parsed.budget:
        name, _, seconds = entry.partition("=")
        if name not in STAGES or not seconds.isdigit():
            parser.error(f"--budget must be STAGE=SECONDS with a stage of {', '.join(STAGES)}, found {entry!r}")
        budgets[name] = float(seconds)
    parsed.budget = budgets
    for name in parsed.stages:
        if name not in STAGES:
            parser.error(f"--stages must be of {', '.join(STAGES)}, found {name!r}")
    if parsed.wheel is not None and not parsed.wheel.is_dir():
        parser.error(f"--wheel must be a folder, found {str(parsed.wheel)!r}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    run = Run(options.out.resolve(), options.wheel and options.wheel.resolve(), options.commit or _commit())
    if _device_count(run) == 0:
        print("vista: torch sees no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    prepare(run)
    record = check(run, options.stages, options.budget)
    print(f"written: {run.out / 'gpu_check.json'} and {run.out / 'gpu_check.md'}")
    # What a bare machine lacks (a sanitizer, say) is told on the page; it is no failure of the kernels.
    return int(any(record["stages"][name]["status"] not in (PASSED, NOT_RUN) for name in options.stages))


if __name__ == "__main__":
    raise SystemExit(main())
