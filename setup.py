"""Drives CMake, nothing else: what to build is decided in tools/build_config.py, how in tools/cmake_build.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
import build_config  # noqa: E402
import cmake_build  # noqa: E402


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        package_dir = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build_dir = cmake_build.configure(
            build_config.from_environment(), f"-DVISTA_VERSION={self.distribution.get_version()}"
        )
        cmake_build.run("--build", build_dir)
        cmake_build.run("--install", build_dir, "--prefix", package_dir)

    def copy_extensions_to_source(self) -> None:
        """In place and editable: setuptools copies `_C` into the source tree, and `_ops` belongs beside it."""
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib) / "vista_ext" / "_ops.so", ROOT / "vista_ext")


# One Extension stands for the whole CMake project; `_C` is the file that Python imports, `_ops` travels beside it.
setup(ext_modules=[Extension("vista_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
