"""Whose rows they are: a run notes the ids behind its row numbers, and refuses a data set in which rows have moved.

Stores, queues, erasures and a model's item table know users and items by their row in the data set, not by the id of
the origin. So a run's data set may only grow: what is known keeps its row, what is new comes behind.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from vista_ext.data.folder import read_ids
from vista_ext.data.tables import DataError

FILE = "ids.json"


def check_known(run: Path, data: Path, users: list[str] | None = None, items: list[str] | None = None) -> None:
    """Refuse a data set whose users or items are not those that a run noted, with or without new ones behind.

    Args:
        run: its folder; one without a note, as earlier versions left it, takes any data set.
        data: the folder of the data set.
        users, items: its ids, by row; read if they are not given.

    Raises:
        DataError: naming the file, what was expected and what was found.
    """
    noted = _read(run / FILE)
    if noted is None:
        return
    if users is None or items is None:
        users, items = read_ids(data)
    for name, ids in (("users", users), ("items", items)):
        count, expected = noted[name]
        file, rows = (
            data / f"{name}.parquet",
            f"the {count} {name} of {run / FILE} in their rows (CRC-32 {expected:08x})",
        )
        if len(ids) < count:
            raise DataError(file, "source_id", rows, f"{len(ids)} {name}")
        if (found := _crc32(ids[:count])) != expected:
            hint = "`vista import generic --update` keeps rows; a run of other data needs a folder of its own"
            raise DataError(file, "source_id", rows, f"other ids there (CRC-32 {found:08x}): {hint}")


def note_known(run: Path, users: list[str], items: list[str]) -> None:
    """Note the ids of a data set, which `check_known` has passed, before anything is written by their rows."""
    note = json.dumps({name: [len(ids), _crc32(ids)] for name, ids in (("users", users), ("items", items))}) + "\n"
    unfinished = run / f".{FILE}.{os.getpid()}.tmp"
    unfinished.write_text(note)
    unfinished.replace(run / FILE)


def _crc32(ids: list[str]) -> int:
    return zlib.crc32("\0".join(ids).encode())


def _read(file: Path) -> dict[str, tuple[int, int]] | None:
    try:
        values = json.loads(file.read_text())
        return {name: (int(values[name][0]), int(values[name][1])) for name in ("users", "items")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(file, None, "numbers and checksums of users and items", repr(error)) from error
