"""Compile gate for csrc/kernels: every .cu, every architecture, warnings as errors, no spills, no serialised wgmma.

Needs nvcc, not a GPU. Exits 0 with a printed reason when there is no kernel or no nvcc to compile it with.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import build_config

ROOT = Path(__file__).parent.parent
# wgmma diagnostics are `info` to ptxas, so no -Werror sees them: serialised or repaired wgmma, ignored setmaxnreg.
WGMMA_DIAGNOSTIC = re.compile(r"\(C75\d\d\)")


def compile_one(source: Path, arch: str, config: build_config.BuildConfig, out: Path) -> list[str]:
    command = [
        str(config.nvcc),
        "-c",
        str(source),
        "-o",
        str(out),
        "-std=c++17",
        "-O3",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        f"-I{ROOT / 'csrc' / 'include'}",
        "--expt-relaxed-constexpr",
        "-Werror=all-warnings",
        "-Xcompiler=-Wall",
        "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage",
    ]
    if config.cutlass_root is not None:
        command += ["-isystem", str(config.cutlass_root)]
    run = subprocess.run(command, capture_output=True, text=True)
    log = run.stdout + run.stderr
    problems = [line for line in log.splitlines() if WGMMA_DIAGNOSTIC.search(line)]
    if run.returncode != 0:
        problems.append(log)
    return problems


def main() -> int:
    sources = sorted((ROOT / "csrc" / "kernels").rglob("*.cu"))
    if not sources:
        print("kernels: no .cu in csrc/kernels yet, nothing to compile")
        return 0
    config = build_config.from_environment()
    if config.nvcc is None:
        print(f"kernels: SKIPPED, {len(sources)} .cu files and no nvcc on this machine")
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for source in sources:
            archs = ["90a"] if "sm90" in source.parts else ["80", "90a"]
            for arch in archs:
                problems = compile_one(source, arch, config, Path(scratch) / "kernel.o")
                print(f"kernels: {source.relative_to(ROOT)} sm_{arch}: {'FAILED' if problems else 'ok'}")
                for problem in problems:
                    print(problem)
                failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
