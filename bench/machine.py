"""What the numbers of a run depend on: processor, caches, instruction set, torch, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from vista_ext import _C

# Of some hundred flags those that choose a kernel, ours or a peer's.
FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "bf16", "sve",
)  # fmt: skip


def collect_facts() -> dict[str, Any]:
    """JSON values. `kind` names the kind of machine: only runs of one kind are compared."""
    cpu = _cpuinfo()
    build = _C.build_info()
    facts: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "vendor": cpu.get("vendor_id", platform.machine()),
        "family": cpu.get("cpu family", ""),
        "model": cpu.get("model", ""),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", cpu.get("Features", "")).split()],
        "isa": build["cpu_isa"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release().split('-')[0]}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compiler": build["compiler"],
        "commit": commit(),
    }
    return facts | {"kind": kind_of(facts)}


class Neighbours:
    """What else computes on this machine, from now on."""

    def __init__(self) -> None:
        self._began, self._all, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Cores that other processes, or other guests of the host, kept busy on average; None where nothing tells."""
        now = _busy_seconds()
        if now is None or self._all is None:
            return None
        others = now - self._all - (_own_seconds() - self._own)
        return round(max(0.0, others / (time.perf_counter() - self._began)), 2)


def _busy_seconds() -> float | None:
    """Of all cores since the start of the machine, taken (stolen) time included."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def kind_of(facts: dict[str, Any]) -> str:
    """The name of a kind of machine, fit for a file: processor, instruction set of our kernels, cores."""
    parts = facts["vendor"], facts["family"], facts["model"], facts["isa"], f"{facts['cores']}cores"
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


def commit() -> str:
    """Of the checkout, with a plus if files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""


def _cpuinfo() -> dict[str, str]:
    """Of the first processor, as Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level}{'' if kind == 'Unified' else kind[0].lower()}"] = size
    return found


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
