"""The CMake project as the package and the kernel gate both build it: one folder and one list of arguments.

What the gate compiled, the package finds compiled.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import build_config

ROOT = Path(__file__).parent.parent.resolve()


def folder(config: build_config.BuildConfig) -> Path:
    """One per interpreter and backend: going back and forth between a CPU and a CUDA build compiles nothing anew."""
    return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-cuda' if config.cuda else ''}"


def configure(config: build_config.BuildConfig, *extra: str) -> Path:
    """`extra` arguments stay in the folder's cache: a later call without them keeps them."""
    import pybind11

    if config.torch_root is None:
        raise build_config.BuildConfigError("vista: torch >= 2.10 is needed to build, found none")
    args = [
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DVISTA_TORCH_ROOT={config.torch_root}",
        f"-DVISTA_CUDA={'ON' if config.cuda else 'OFF'}",
    ]
    if config.cuda:
        if config.cutlass_root is None:
            raise build_config.BuildConfigError(
                "vista: CUDA kernels need the headers of CUTLASS, found none: pip install --no-deps -r "
                "requirements-cuda.txt, or set VISTA_CUTLASS_ROOT to the folder that holds cutlass/ and cute/"
            )
        args += [
            f"-DCMAKE_CUDA_COMPILER={config.nvcc}",
            f"-DVISTA_CUDA_ARCHS={config.cuda_archs}",
            f"-DVISTA_CUTLASS_ROOT={config.cutlass_root}",
        ]
    build = folder(config)
    run("-G", "Ninja", "-S", ROOT, "-B", build, *args, *extra)
    return build


def run(*args: str | Path) -> None:
    subprocess.run([_tool("cmake"), *args], check=True, env=build_config.tool_environment())


def _tool(name: str) -> str:
    found = build_config.find_tool(name)
    if found is None:
        raise build_config.BuildConfigError(f"vista: {name} is needed to build, found none: pip install {name}")
    return found
