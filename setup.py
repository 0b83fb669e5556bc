"""Drives CMake, nothing else: which torch, which CUDA is decided in tools/build_config.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
import build_config  # noqa: E402


def _tool(name: str) -> str:
    found = build_config.find_tool(name)
    if found is None:
        raise build_config.BuildConfigError(f"vista: {name} is needed to build, found none: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        config = build_config.from_environment()
        if config.torch_root is None:
            raise build_config.BuildConfigError("vista: torch >= 2.10 is needed to build, found none")
        package_dir = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # One build folder per interpreter and torch: switching environments must not reuse the other's cache.
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        args = [
            f"-DCMAKE_INSTALL_PREFIX={package_dir}",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVISTA_VERSION={self.distribution.get_version()}",
            f"-DVISTA_TORCH_ROOT={config.torch_root}",
            f"-DVISTA_CUDA={'ON' if config.cuda else 'OFF'}",
        ]
        if config.cuda:
            if config.cutlass_root is None:
                raise build_config.BuildConfigError(
                    "vista: a CUDA build needs CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0, "
                    "or VISTA_CUTLASS_ROOT"
                )
            args += [
                f"-DCMAKE_CUDA_COMPILER={config.nvcc}",
                f"-DVISTA_CUDA_ARCHS={config.cuda_archs}",
                f"-DVISTA_CUTLASS_ROOT={config.cutlass_root}",
            ]
        cmake, env = _tool("cmake"), build_config.tool_environment()
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", build_dir, *args], check=True, env=env)
        subprocess.run([cmake, "--build", build_dir], check=True, env=env)
        subprocess.run([cmake, "--install", build_dir], check=True, env=env)

    def copy_extensions_to_source(self) -> None:
        """In place and editable: setuptools copies `_C` into the source tree, and `_ops` belongs beside it."""
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib) / "vista_ext" / "_ops.so", ROOT / "vista_ext")


# One Extension stands for the whole CMake project; `_C` is the file that Python imports, `_ops` travels beside it.
setup(ext_modules=[Extension("vista_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
