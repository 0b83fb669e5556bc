"""Kernel sources as they ship, built for the emulator: host code against the fake runtime, device code as PTX."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from .decode import Program
from .parser import Module, parse

ROOT = Path(__file__).parent.parent.parent
CACHE = ROOT / "build" / "emulated"
FAKE_RUNTIME = Path(__file__).parent / "fake_cudart.cpp"

sys.path.insert(0, str(ROOT / "tools"))
import build_config  # noqa: E402


def toolkit() -> Path | None:
    """nvcc, None where there is none: tests skip then."""
    return build_config.from_environment().nvcc


def release_flags() -> list[str]:
    """Those of CMakeLists.txt (Release) that matter for the generated code."""
    cutlass = build_config.from_environment().cutlass_root
    flags = [
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        f"-I{ROOT / 'csrc' / 'include'}",
        f"-I{ROOT / 'csrc'}",
        "--expt-relaxed-constexpr",
    ]
    return flags + (["-isystem", str(cutlass)] if cutlass else [])


class BuildError(Exception):
    pass


def _run(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise BuildError(" ".join(command) + "\n" + run.stdout + run.stderr)
    return run.stdout


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def _headers(source: Path) -> list[Path]:
    """Every file that a source could include from us: those beside it and those of the kernels."""
    folders = (source.parent, ROOT / "csrc" / "include", ROOT / "csrc" / "kernels")
    return sorted({path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh")})


def _architecture(source: Path) -> str:
    """As CMakeLists.txt: files in a folder sm90/ hold instructions that only 90a has."""
    return "90a" if "sm90" in source.parts else "80"


def _compile(source: Path, flags: Sequence[str]) -> tuple[Path, Path]:
    """An object with PTX alone in it, which spares ptxas, and that PTX."""
    nvcc = toolkit()
    if nvcc is None:
        raise BuildError("no nvcc on this machine")
    arch = _architecture(source)
    all_flags = [*release_flags(), *flags]
    version = _run([str(nvcc), "--version"])
    stem = CACHE / f"{source.stem}-{_digest(source.name, source, *_headers(source), all_flags, version)}"
    built, ptx = stem.with_suffix(".o"), stem.with_suffix(".ptx")
    if not (built.exists() and ptx.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            fresh = Path(scratch) / "object.o"
            command = [str(nvcc), "-c", str(source), "-o", str(fresh), "-Xcompiler=-fPIC", "--keep"]
            _run([*command, f"--keep-dir={scratch}", f"-gencode=arch=compute_{arch},code=compute_{arch}", *all_flags])
            os.replace(next(Path(scratch).glob("*.ptx")), ptx)
            os.replace(fresh, built)
    return built, ptx


def _include_folder() -> Path:
    nvcc = toolkit()
    assert nvcc is not None
    listing = subprocess.run([str(nvcc), "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    match = re.search(r"^#\$ INCLUDES=.*?\"-I(.*?)\"", listing, re.MULTILINE)
    if match is None:
        raise BuildError("nvcc does not say where its headers are")
    return Path(match[1].strip())


class EmulatedLibrary:
    """Host code to call and PTX to interpret."""

    def __init__(self, path: Path, ptx: Sequence[str]):
        self.path = path
        self.ptx = list(ptx)  # one text per source
        self._programs: dict[str, Program] = {}

    @classmethod
    def build(
        cls,
        sources: Sequence[str | Path],
        entry: str | Path | None = None,
        defines: Sequence[str] = (),
        flags: Sequence[str] = (),
    ) -> EmulatedLibrary:
        """`sources` are .cu files, `entry` a .cpp file with `extern "C"` functions; relative to the repository."""
        given = [*flags, *(f"-D{define}" for define in defines)]
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            compiled = list(workers.map(lambda source: _compile(ROOT / source, given), sources))
        objects = [built for built, _ in compiled]
        host = [FAKE_RUNTIME, *([ROOT / entry] if entry else [])]
        name = Path(entry or sources[0]).stem
        key = _digest(*objects, *host, *[h for path in host for h in _headers(path)], given)
        library = CACHE / f"{name}-{key}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                fresh = Path(scratch) / "library.so"
                include = ["-isystem", str(_include_folder()), f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}"]
                command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
                shared_flags = [flag for flag in given if flag.startswith(("-I", "-D"))]
                _run([*command, *include, *shared_flags, *map(str, host), *map(str, objects), "-o", str(fresh)])
                os.replace(fresh, library)
        return cls(library, [ptx.read_text() for _, ptx in compiled])

    @cached_property
    def modules(self) -> list[Module]:
        return [parse(text) for text in self.ptx]

    @cached_property
    def host(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(self.path))

    def program(self, kernel: str) -> Program:
        if kernel not in self._programs:
            module = next((module for module in self.modules if kernel in module.names), None)
            if module is None:
                raise KeyError(f"kernel {kernel} is not in the PTX")
            self._programs[kernel] = Program(module, module.kernel(kernel))
        return self._programs[kernel]

    def mutate(
        self, pattern: str, replacement: str, kernel: str = "", occurrence: int | None = None
    ) -> EmulatedLibrary:
        """The same host code with other device code: re.sub on the PTX, of kernels whose name has `kernel` in it.

        `occurrence` picks one match, from 0 in the order of the text. It is an error if nothing matches.
        """
        seen = 0

        def replace(match: re.Match[str]) -> str:
            nonlocal seen
            seen += 1
            return match.expand(replacement) if occurrence in (None, seen - 1) else match[0]

        texts = []
        for text in self.ptx:
            parts = re.split(r"(?=^(?:\.visible )?\.entry )", text, flags=re.MULTILINE)
            for i, part in enumerate(parts):
                name = re.match(r"(?:\.visible )?\.entry\s+([\w$]+)", part)
                if name and kernel in name[1]:
                    parts[i] = re.sub(pattern, replace, part)
            texts.append("".join(parts))
        if texts == self.ptx:
            raise ValueError(f"{pattern!r} changes nothing: {seen} places in the PTX")
        return EmulatedLibrary(self.path, texts)
