"""What is installed here: `python -m vista_ext.info`, also `vista info`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence

import torch

import vista_ext
from vista_ext import _C

EXTRAS = {  # what each brings, by the names that are imported
    "run": (
        "typer", "rich", "omegaconf", "pyarrow", "lmdb", "safetensors", "tensorboard", "matplotlib", "sklearn",
    ),
    "redis": ("redis",),
    "nats": ("nats",),
    "kafka": ("confluent_kafka",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "ray": ("ray", "redis"),
}  # fmt: skip


def collect() -> dict[str, object]:
    """What was built, for which architectures, against what; and what runs it. Initialises no CUDA."""
    built = _C.build_info()
    return {
        "vista_ext": vista_ext.__version__,
        "built against torch": built["torch"],
        "running torch": torch.__version__,
        "compiler": built["compiler"],
        "cpu instruction sets": built["cpu_isas"],
        "cpu instruction set used here": built["cpu_isa"],
        "cuda architectures": built["cuda_archs"] or "none: no CUDA kernels in this build",
        "cuda compiler": built["cuda_compiler"] or "none",
        "ops": sorted({schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if _is_ours(schema)}),
        "extras that lack packages": {extra: lacks for extra, names in EXTRAS.items() if (lacks := _missing(names))},
    }


def _missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _is_ours(schema: torch._C.FunctionSchema) -> bool:
    return schema.name.startswith("vista::")


if __name__ == "__main__":
    print(json.dumps(collect(), indent=2))
