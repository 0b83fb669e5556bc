"""VISTA: lifelong user histories in ranking models. Importing registers `torch.ops.vista.*`; no CUDA is initialised."""

__version__ = "0.1.0"

import torch  # noqa: F401  (the op library links against torch's own)

from vista_ext import _C  # isort: skip  (registers the schemas that vista_ext.ops adds to)
from vista_ext import ops

__all__ = ["_C", "__version__", "ops"]
