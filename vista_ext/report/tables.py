"""Tables on the terminal and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vista_ext._extras import require


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; a cell that is not defined is NaN or None."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def show(self) -> None:
        """Print it."""
        table = require("rich.table", extra="run").Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(_cell(value) for value in row))
        console = require("rich.console", extra="run").Console()
        if not console.is_terminal:
            console.width = 1000  # more than any table takes: a file has no width
        console.print(table)

    def records(self) -> list[dict[str, Any]]:
        """One dict a row; what is not defined is None."""
        return [{name: defined(value) for name, value in zip(self.columns, row, strict=True)} for row in self.rows]


def save_tables(path: Path, tables: Sequence[Table]) -> None:
    """Write tables as JSON, by title."""
    save_json(path, {table.title: table.records() for table in tables})


def save_json(path: Path, values: Any) -> None:
    """Write values that JSON knows, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)


def markdown(table: Table) -> str:
    """A table for a page."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def replace_section(page: Path, name: str, text: str) -> None:
    """Put generated text into a Markdown page, between marks that carry a name; what was between them goes.

    Raises:
        ValueError: the page has a beginning mark without an end.
    """
    begin, end = f"<!-- begin {name}: generated -->", f"<!-- end {name} -->"
    content = page.read_text() if page.exists() else ""
    before, mark, rest = content.partition(begin)
    if mark and end not in rest:
        raise ValueError(f"{page}: expected {end!r} after {begin!r}, found the end of the page")
    after = rest.partition(end)[2] if mark else "\n"
    before = before if mark or not before else before.rstrip("\n") + "\n\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    inside = text.strip("\n")
    page.write_text(f"{before}{begin}\n\n{inside}\n\n{end}{after}")


def defined(value: Any) -> Any:
    """A value as JSON may hold it: None for a number that is not one."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 or value == 0 else f"{value:.3g}"
