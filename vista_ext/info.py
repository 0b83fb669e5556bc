"""What is installed here: `python -m vista_ext.info`, also `vista info`."""

from __future__ import annotations

import importlib.util
import json

import torch

import vista_ext
from vista_ext import _C

EXTRAS = (
    "typer", "rich", "omegaconf", "pyarrow", "lmdb", "safetensors", "tensorboard", "matplotlib", "sklearn",
)  # fmt: skip


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
        "missing optional packages": [name for name in EXTRAS if importlib.util.find_spec(name) is None],
    }


def _is_ours(schema: torch._C.FunctionSchema) -> bool:
    return schema.name.startswith("vista::")


if __name__ == "__main__":
    print(json.dumps(collect(), indent=2))
