"""Compile gate for csrc/kernels: every .cu, every architecture, nothing that nvcc or ptxas would warn about.

Needs nvcc, not a GPU. It builds the CMake target that the package links, strictly (VISTA_WERROR in CMakeLists.txt), so
that the package compiles no kernel again. Exits 0 with a printed reason when there is nothing to compile, or no nvcc.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import build_config
import cmake_build


def main() -> int:
    sources = sorted((cmake_build.ROOT / "csrc" / "kernels").rglob("*.cu"))
    config = build_config.from_environment()
    if not sources:
        print("kernels: no .cu in csrc/kernels yet, nothing to compile")
        return 0
    if config.nvcc is None:
        print(f"kernels: SKIPPED, {len(sources)} .cu files and no nvcc on this machine")
        return 0
    try:
        build = cmake_build.configure(dataclasses.replace(config, cuda=True), "-DVISTA_WERROR=ON")
        cmake_build.run("--build", build, "--target", "vista_kernels", "--", "-k", "0")  # every failure at once
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"kernels: {len(sources)} .cu files ok for {config.cuda_archs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
