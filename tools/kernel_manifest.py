"""What nvcc made of each kernel: registers, shared memory, blocks per SM, and counts of the instructions that matter.

    python tools/kernel_manifest.py              compare the built kernels with the record
    python tools/kernel_manifest.py --update     write the record
    python tools/kernel_manifest.py --markdown   print it as a table

Reads the library that `make kernels` builds, and calls its launch functions for what only they know, the dynamic
shared memory (tools/kernel_launches.py). Needs no GPU.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import build_config
import cmake_build
import kernel_launches
import occupancy

RECORD = cmake_build.ROOT / "python_tests" / "kernels" / "kernel_manifest.json"

# Tensor cores, asynchronous copies, 16-byte accesses: a kernel that has them keeps them.
MUST_STAY = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "UTMASTG", "LDG.128", "STG.128")
# Spills and double precision.
MUST_BE_ABSENT = ("LDL", "STL", "DFMA", "DADD", "DMUL")
COUNTED = (*MUST_STAY, "LDG", "STG", "BAR", *MUST_BE_ABSENT)
# Cards on which an architecture's machine code runs.
RUNS_ON = {"sm_80": ("8.0", "8.6", "8.9"), "sm_90": ("9.0",), "sm_90a": ("9.0",)}

Kernel = dict[str, Any]
Manifest = dict[str, Any]  # "nvcc": version, then for each architecture {readable name: Kernel}


class Unavailable(Exception):
    """Why there is nothing to read."""


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in Path(folder).glob(f"*/bin/{name}"):
            return str(found)
    found_on_path = shutil.which(name)
    if found_on_path is None:
        raise Unavailable(f"{name} is not here: pip install nvidia-cuda-{name}")
    return found_on_path


def library() -> Path:
    """The archive of compiled kernels, if it is as new as the sources."""
    config = build_config.from_environment()
    if config.nvcc is None:
        raise Unavailable("no nvcc on this machine")
    archive = cmake_build.folder(dataclasses.replace(config, cuda=True)) / "libvista_kernels.a"
    if not archive.exists():
        raise Unavailable("kernels are not built: make kernels")
    sources = [path for path in (cmake_build.ROOT / "csrc" / "kernels").rglob("*") if path.is_file()]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > archive.stat().st_mtime:
        raise Unavailable(f"{newest.name} is newer than the built kernels: make kernels")
    return archive


def nvcc_version() -> str:
    nvcc = build_config.from_environment().nvcc
    if nvcc is None:
        raise Unavailable("no nvcc on this machine")
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", out)[1]  # type: ignore[index]


def _demangle(names: list[str]) -> dict[str, str]:
    """To `state_kernel<float, 64>`: neither namespaces of ours nor parameters, which templates already tell."""
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    readable = {}
    for mangled, name in zip(names, out.splitlines(), strict=True):
        name = re.sub(r"\(anonymous namespace\)::|vista::(cuda::)?", "", name.removeprefix("void "))
        readable[mangled] = re.sub(r"\((int|bool|unsigned int|long)\)", "", _without_parameters(name))
    return readable


def _without_parameters(name: str) -> str:
    depth = 0
    for at, char in enumerate(name):
        if char in "<>":
            depth += 1 if char == "<" else -1
        elif char == "(" and depth == 0:
            return name[:at]
    return name


def _read_cubin(cubin: Path) -> dict[str, Kernel]:
    """Kernels by mangled name."""
    # cuobjdump looks for nvdisasm on PATH.
    env = {**os.environ, "PATH": f"{Path(_tool('nvdisasm')).parent}:{os.environ.get('PATH', '')}"}

    def dump(option: str) -> str:
        command = [_tool("cuobjdump"), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    kernels: dict[str, Kernel] = {}
    resources = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *figures in re.findall(resources, dump("-res-usage")):
        registers, stack, shared, local = map(int, figures)
        if ".sm_90" in cubin.name:
            shared = max(0, shared - occupancy.SHARED_RESERVED)  # there the reading includes it, if there is any
        kernels[name] = {"registers": registers, "shared": shared, "stack": stack, "local": local}
    attributes = dump("-elf")
    for name, section in re.findall(r"\n\.nv\.info\.(\S+)\n(.*?)(?=\n\.\S|\Z)", attributes, re.DOTALL):
        threads = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(\w+) (\w+) (\w+)", section)
        if name in kernels and threads:
            x, y, z = (int(value, 16) for value in threads.groups())
            kernels[name]["bounds"] = x * y * z
    sections = re.split(r"Function : (\S+)", dump("-sass"))[1:]
    for name, code in zip(sections[::2], sections[1::2], strict=True):
        opcodes: collections.Counter[str] = collections.Counter()
        for opcode, modifiers in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z]\w+)(\S*)", code):
            opcodes[opcode] += 1
            opcodes[f"{opcode}.128"] += ".128" in modifiers
        kernels[name]["code"] = {op: opcodes[op] for op in COUNTED if opcodes[op]}
    return kernels


def read(archive: Path) -> Manifest:
    manifest: Manifest = {"nvcc": nvcc_version()}
    with tempfile.TemporaryDirectory() as scratch:
        launches = kernel_launches.record(archive, Path(scratch))
        subprocess.run([_tool("cuobjdump"), "-xelf", "all", archive], cwd=scratch, check=True, capture_output=True)
        cubins = sorted(Path(scratch).glob("*.cubin"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            read_cubins = list(pool.map(_read_cubin, cubins))
        for cubin, kernels in zip(cubins, read_cubins, strict=True):
            arch = cubin.suffixes[-2].removeprefix(".")
            readable = _demangle(list(kernels)) if kernels else {}
            for mangled, kernel in kernels.items():
                add_launch(kernel, arch, {card: seen[mangled] for card, seen in launches.items() if mangled in seen})
                known = manifest.setdefault(arch, {})
                if readable[mangled] in known:
                    raise ValueError(f"two kernels are called {readable[mangled]}")
                known[readable[mangled]] = kernel
    return manifest


def add_launch(kernel: Kernel, arch: str, launches: dict[str, kernel_launches.Launch]) -> None:
    """`launches`: of this kernel, by card."""
    if not launches:
        return
    here = {card: launches[card] for card in RUNS_ON.get(arch, ()) if card in launches}
    # Nowhere here if a sibling serves these cards; what it asks for is then what it asks for elsewhere.
    asked = (here or launches).values()
    kernel["dynamic"] = max(launch.dynamic for launch in asked)
    kernel["threads"] = max(launch.threads for launch in asked)
    kernel["blocks"] = {
        card: occupancy.blocks_per_sm(card, launch.threads, kernel["registers"], kernel["shared"] + launch.dynamic)
        for card, launch in here.items()
    }


def kernels_of(manifest: Manifest) -> list[tuple[str, str, Kernel]]:
    archs = sorted(key for key in manifest if key.startswith("sm_"))
    return [(arch, name, kernel) for arch in archs for name, kernel in sorted(manifest[arch].items())]


def broken_rules(manifest: Manifest, record: Manifest) -> list[str]:
    """What must hold whatever the compiler's version."""
    problems = []
    for arch, name, kernel in kernels_of(manifest):
        where, code = f"{arch} {name}", kernel["code"]
        problems += [f"{where}: {key} is {kernel[key]} bytes" for key in ("stack", "local") if kernel[key]]
        problems += [f"{where}: {code[op]} {op} instructions" for op in MUST_BE_ABSENT if op in code]
        # Tiles of TMA and wgmma begin at multiples of 1024 bytes. So does the window of shared memory; and the dynamic
        # part of it, which holds them, lies behind the static one, which the compiler fills up to that alignment.
        if ("UTMALDG" in code or "HGMMA" in code) and kernel["shared"] % 1024:
            problems.append(f"{where}: tiles begin {kernel['shared']} bytes into shared memory")
        if "bounds" not in kernel:
            problems.append(f"{where}: no launch bounds")
        if "threads" not in kernel:
            problems.append(f"{where}: no launch of it in every_launch.cpp")
        elif kernel["threads"] > kernel.get("bounds", kernel["threads"]):
            problems.append(f"{where}: launched with {kernel['threads']} threads, built for {kernel['bounds']}")
        recorded = record.get(arch, {}).get(name)
        if recorded is None:
            problems.append(f"{where}: is not in the record")
        else:
            problems += [f"{where}: lost its {op}" for op in MUST_STAY if op in recorded["code"] and op not in code]
        problems += [
            f"{where}: does not fit on {card}" for card, blocks in kernel.get("blocks", {}).items() if not blocks
        ]
    gone = [(arch, name) for arch, name, _ in kernels_of(record) if arch in manifest and name not in manifest[arch]]
    return problems + [f"{arch} {name}: is in the record only" for arch, name in gone]


def differences(manifest: Manifest, record: Manifest) -> list[str]:
    """Every figure, for a compiler of the record's version."""
    problems = []
    for arch, name, kernel in kernels_of(manifest):
        recorded = record.get(arch, {}).get(name)
        if recorded is not None and recorded != kernel:
            keys = [key for key in {**kernel, **recorded} if kernel.get(key) != recorded.get(key)]
            changes = (f"{key} {recorded.get(key)} -> {kernel.get(key)}" for key in keys)
            problems.append(f"{arch} {name}: {', '.join(changes)}")
    return problems


def load_record() -> Manifest:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"nvcc": "none"}


def to_json(manifest: Manifest) -> str:
    """One line per kernel, so that a diff reads."""
    parts = [f'"nvcc": {json.dumps(manifest["nvcc"])}']
    for arch in sorted(key for key in manifest if key.startswith("sm_")):
        lines = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(kernel)}" for name, kernel in sorted(manifest[arch].items())
        )
        parts.append(f'"{arch}": {{\n{lines}\n}}')
    return "{" + ",\n".join(parts) + "}\n"


def to_markdown(manifest: Manifest) -> str:
    rows = [
        "| kernel | arch | threads | registers | shared | blocks per SM | instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for arch, name, kernel in kernels_of(manifest):
        shared = f"{kernel['shared']} + {kernel.get('dynamic', '?')}"
        blocks = ", ".join(f"{count} ({card})" for card, count in kernel.get("blocks", {}).items()) or "?"
        code = ", ".join(f"{count} {op}" for op, count in kernel["code"].items())
        cells = [f"`{name}`", arch, kernel.get("threads", "?"), kernel["registers"], shared, blocks, code]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the record")
    parser.add_argument("--markdown", action="store_true", help="print the record as a table")
    args = parser.parse_args()
    record = load_record()
    if args.markdown:
        print(to_markdown(record), end="")
        return 0
    try:
        manifest = read(library())
    except Unavailable as reason:
        print(f"kernel manifest: SKIPPED, {reason}")
        return 0
    if args.update:
        RECORD.write_text(to_json(manifest))
        record = manifest
    problems = broken_rules(manifest, record) + differences(manifest, record)
    print(*problems, f"kernel manifest: {len(kernels_of(manifest))} kernels, {len(problems)} problems", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
