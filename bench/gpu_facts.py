"""What the numbers depend on: card, driver, clocks, torch, build. Prints JSON; `python -m bench.gpu_facts`."""

from __future__ import annotations

import json
import platform
import subprocess

import torch

QUERY = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "power.limit", "temperature.gpu", "mig.mode.current",
)  # fmt: skip


def _nvidia_smi() -> dict[str, str] | str:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {error}"
    if done.returncode != 0:
        return f"not available: {(done.stdout + done.stderr).strip()}"
    return dict(zip(QUERY, (value.strip() for value in done.stdout.strip().split(",")), strict=False))


def _build() -> dict[str, object] | str:
    try:
        from vista_ext.info import collect
    except Exception as error:  # the facts of the card are wanted even where the package does not import
        return f"vista_ext does not import: {error}"
    return collect()


def collect_facts() -> dict[str, object]:
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda,
        "nvidia-smi": _nvidia_smi(),
        "build": _build(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["card"] = properties.name
        facts["devices"] = torch.cuda.device_count()
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["memory GiB"] = round(properties.total_memory / 2**30, 1)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["L2 MiB"] = round(properties.L2_cache_size / 2**20, 1)
    return facts


if __name__ == "__main__":
    print(json.dumps(collect_facts(), indent=2))
