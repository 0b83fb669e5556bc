"""Results of benchmark runs: one JSON file, to which runs of several files and several days may be added.

`{"runs": [{"machine": facts, "floors": [...], "rows": [...]}]}`. Read together, a case's last row counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Key = tuple[str, str, int]


class ResultsError(ValueError):
    """A file that is not one of results, or results that do not go together; says which file."""


def key_of(row: Row) -> Key:
    """What makes two rows the same measurement: op, case, threads."""
    return row["op"], row["case"], row["threads"]


@dataclass(frozen=True)
class Results:
    """Runs on one kind of machine, seen as one."""

    machine: Mapping[str, Any]  # of the last run
    commits: Sequence[str]
    floors: Sequence[Row]
    rows: Mapping[Key, Row]

    def of(self, *ops: str) -> list[Row]:
        """Rows of some ops, in the order in which they were first measured."""
        return [row for row in self.rows.values() if row["op"] in ops]


def read(paths: Iterable[Path]) -> Results:
    """All runs of some files, seen as one.

    Raises:
        ResultsError: a file that cannot be read, no run at all, or runs of different kinds of machine.
    """
    runs = [run for path in paths for run in read_runs(path)]
    if not runs:
        raise ResultsError("no runs in these results")
    kinds = sorted({run["machine"]["kind"] for run in runs})
    if len(kinds) > 1:
        raise ResultsError(f"results of different kinds of machine do not go together: {', '.join(kinds)}")
    rows = {key_of(row): row for run in runs for row in run["rows"]}
    floors = {(floor["kind"], floor["of"], floor["threads"]): floor for run in runs for floor in run["floors"]}
    commits = dict.fromkeys(run["machine"]["commit"] for run in runs)
    return Results(runs[-1]["machine"], list(commits), [floors[key] for key in sorted(floors)], rows)


def read_runs(path: Path) -> list[dict[str, Any]]:
    try:
        runs = json.loads(path.read_text())["runs"]
        for run in runs:
            _ = run["machine"]["kind"], run["machine"]["commit"], run["floors"], [key_of(row) for row in run["rows"]]
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not results of `pytest bench/ --results`: {error!r}") from error
    return list(runs)


class Writer:
    """Adds a run to a file, which is complete after each row: a run cut short has lost nothing."""

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self.path = path
        self._before = read_runs(path) if path.exists() else []
        self.run: dict[str, Any] = {"machine": dict(machine), "floors": [], "rows": []}

    def measured(self) -> set[Key]:
        """What earlier runs of this commit on this kind of machine hold."""
        same = ("kind", "commit")
        runs = [run for run in self._before if all(run["machine"][x] == self.run["machine"][x] for x in same)]
        return {key_of(row) for run in runs for row in run["rows"]}

    def add(self, row: Row, floors: Sequence[Row]) -> None:
        self.run["rows"].append(dict(row))
        self.run["floors"] = [dict(floor) for floor in floors]
        write(self.path, [*self._before, self.run])


def write(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file, as one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    os.replace(partial, path)
