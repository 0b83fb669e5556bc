"""Build backend: setuptools' own hooks, with the target environment in reach.

pip builds in an isolated environment and hides the one it installs into. A package that compiles against torch must see
the torch that will run it, so the target's site-packages are put back on sys.path, and only what is missing from both
is requested.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

for _key in ("purelib", "platlib"):
    if sysconfig.get_path(_key) not in sys.path:
        sys.path.append(sysconfig.get_path(_key))

sys.path.insert(0, str(Path(__file__).parent))
import build_config  # noqa: E402

MIN_CMAKE = (3, 24)
MIN_SETUPTOOLS = (70, 1)  # from here on it builds wheels without the wheel package


def _has_setuptools() -> bool:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= MIN_SETUPTOOLS


def _has_cmake() -> bool:
    exe = build_config.find_tool("cmake")
    if exe is None:
        return False
    out = subprocess.run([exe, "--version"], capture_output=True, text=True, env=build_config.tool_environment()).stdout
    match = re.search(r"(\d+)\.(\d+)", out)
    return match is not None and (int(match[1]), int(match[2])) >= MIN_CMAKE


def _missing(config_settings: object = None) -> list[str]:
    def absent(module: str) -> bool:
        return importlib.util.find_spec(module) is None

    need = []
    if not _has_setuptools():
        need.append("setuptools>=70.1")
    if absent("pybind11"):
        need.append("pybind11>=2.12")
    if build_config.find_tool("ninja") is None:
        need.append("ninja")
    if not _has_cmake():
        need.append("cmake>=3.24")
    config = build_config.from_environment()
    if config.torch_root is None:
        need.append("torch>=2.10")
    if config.cuda and config.cutlass_root is None:  # its dependencies come too, into pip's temporary environment only
        need.append("nvidia-cutlass>=4.2,<5")
    return need


get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = _missing


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    from setuptools import build_meta

    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    from setuptools import build_meta

    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):  # type: ignore[no-untyped-def]
    from setuptools import build_meta

    return build_meta.build_sdist(sdist_directory, config_settings)
