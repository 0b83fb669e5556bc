"""Which LMDB serves a process: liblmdb through our own reader where it is found, else py-lmdb. Never both.

Our reader finds all values of a batch before it touches one, asks the kernel for all their pages at once and copies
them in parallel; py-lmdb faults them in one by one. Both offer the names that `environment` uses.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vista_ext import _C
from vista_ext._extras import MissingExtraError, require
from vista_ext.store.base import StoreError

CHOICES = ("auto", "native", "python")
VARIABLE = "VISTA_LMDB"


@functools.cache
def engine() -> Any:
    """The module to open environments with; the choice is made once per process.

    The environment variable VISTA_LMDB forces "native" (liblmdb) or "python" (py-lmdb).

    Raises:
        MissingExtraError: neither liblmdb nor py-lmdb is installed.
        StoreError: VISTA_LMDB asks for what is not there, or for something else.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise StoreError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, found {choice!r}")
    failures = []
    if choice != "python":
        for path, prefix in candidates():
            try:
                _C.lmdb.load(path, prefix)
                return _C.lmdb
            except _C.lmdb.Error as error:
                failures.append(str(error))
        if choice == "native":
            raise StoreError(f"{VARIABLE} is native, but no liblmdb 0.9 was found: {'; '.join(failures)}")
    try:
        return require("lmdb", extra="run")
    except MissingExtraError as error:
        raise MissingExtraError(f"{error} (or liblmdb itself, such as Debian's liblmdb0)") from error


def candidates() -> Iterator[tuple[str, str]]:
    """Shared libraries that may hold liblmdb, and the prefix of its functions there.

    The copy in py-lmdb's wheel first: it is what py-lmdb would use, and newer than what distributions ship. The wheel
    carries two versions, under names of its own. Then the system's library.
    """
    wheel = importlib.util.find_spec("lmdb")
    for folder in (wheel.submodule_search_locations if wheel else None) or ():
        for path in sorted(Path(folder).glob("cpython*.so")):
            yield str(path), "mdb09_"
            yield str(path), "mdb_"
    yield "liblmdb.so.0", "mdb_"
