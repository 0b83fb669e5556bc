"""What to build, from the environment: the one place where build variables are read, strictly."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CUDA_ARCHS = "80;90a"


class BuildConfigError(SystemExit):
    pass


@dataclass(frozen=True)
class BuildConfig:
    torch_root: Path | None  # folder of the torch package, None when absent
    cutlass_root: Path | None  # folder holding cutlass/ and cute/ headers, None when absent
    nvcc: Path | None
    cuda: bool
    cuda_archs: str  # CMake list, such as "80;90a"


def _package_dir(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)  # finds without importing: importing torch costs seconds
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _directory(name: str) -> Path | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not Path(value).is_dir():
        raise BuildConfigError(f"vista: {name} must name an existing folder, found {value!r}")
    return Path(value)


def _tristate(name: str) -> bool | None:
    value = os.environ.get(name)
    if value in (None, "auto"):
        return None
    if value in ("0", "1"):
        return value == "1"
    raise BuildConfigError(f"vista: {name} must be 0, 1 or auto, found {value!r}")


def _archs(name: str) -> str:
    value = os.environ.get(name, DEFAULT_CUDA_ARCHS)
    if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", value):
        raise BuildConfigError(f"vista: {name} must be a list such as {DEFAULT_CUDA_ARCHS!r}, found {value!r}")
    return value


def _find_nvcc() -> Path | None:
    candidates = [Path(os.environ[var]) / "bin" / "nvcc" for var in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(var)]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if path.is_file()), None)


def _torch_is_cuda(torch_root: Path) -> bool:
    version = (torch_root / "version.py").read_text()
    return re.search(r"^cuda[^=]*=\s*['\"]", version, re.MULTILINE) is not None


def from_environment() -> BuildConfig:
    torch_root = _directory("VISTA_TORCH_ROOT") or _package_dir("torch")
    if torch_root is not None and not (torch_root / "version.py").is_file():
        raise BuildConfigError(f"vista: VISTA_TORCH_ROOT must name the folder of a torch package, found {torch_root}")
    cutlass_root = _directory("VISTA_CUTLASS_ROOT")
    if cutlass_root is None:
        package = _package_dir("cutlass_library")
        cutlass_root = package / "source" / "include" if package else None
    elif not (cutlass_root / "cutlass" / "version.h").is_file():
        raise BuildConfigError(f"vista: VISTA_CUTLASS_ROOT must hold cutlass/ and cute/, found {cutlass_root}")
    nvcc = _find_nvcc()
    wanted = _tristate("VISTA_CUDA")
    if wanted and nvcc is None:
        raise BuildConfigError("vista: VISTA_CUDA=1 needs nvcc (looked at CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    if wanted is None:
        # A visible GPU is no reason: containers are built without one. The torch that will load the kernels is. Without
        # any, pip fetches one for the build, which may be a CUDA build: what that needs is to be fetched with it.
        wanted = nvcc is not None and (torch_root is None or _torch_is_cuda(torch_root))
    return BuildConfig(torch_root, cutlass_root, nvcc, wanted, _archs("VISTA_CUDA_ARCHS"))


def find_tool(name: str) -> str | None:
    """The binary of cmake or ninja: the one that a pip package in reach brings, else the one on PATH.

    The package's script on PATH is no use here: it imports the package, which pip's isolated builds hide from it.
    """
    try:
        package = importlib.import_module(name)
    except ImportError:
        return shutil.which(name)
    binary = Path(getattr(package, f"{name.upper()}_BIN_DIR", getattr(package, "BIN_DIR", ""))) / name
    return str(binary) if binary.is_file() else shutil.which(name)


def tool_environment() -> dict[str, str]:
    """For running tools: without what pip's isolated builds set, under which another environment's scripts break."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
