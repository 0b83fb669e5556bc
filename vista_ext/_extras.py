"""Optional packages: imported where they are used, through one function that names the extra which brings them."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says which extra brings it."""


def require(module: str, *, extra: str = "", command: str = "") -> Any:
    """Import an optional module.

    Args:
        module: dotted name, e.g. "pyarrow.parquet".
        extra: the extra of this package that brings it.
        command: what installs it, where no extra can.

    Raises:
        MissingExtraError: naming the module and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but fails on an import of its own is not "missing": let that error speak.
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        command = command or f"pip install '.[{extra}]' in vista_ext's checkout"
        raise MissingExtraError(f"'{module}' is needed here and is not installed: {command}") from error
