"""VISTA: lifelong user histories in ranking models. Importing registers `torch.ops.vista.*`; no CUDA is initialised."""

__version__ = "0.1.0"

import importlib.util

import torch  # noqa: F401  (the op library links against torch's own)

if importlib.util.find_spec("vista_ext._C") is None:
    raise ImportError(
        "vista_ext is not built in this folder: if it is a source checkout, leave it to use the installed package, or "
        "build in place with `pip install -e .`"
    )

from vista_ext import _C  # isort: skip  (registers the schemas that vista_ext.ops adds to)
from vista_ext import ops

__all__ = ["_C", "__version__", "ops"]
