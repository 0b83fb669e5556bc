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
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*(_cell(value) for value in row))
        require("rich.console", extra="run").Console().print(table)

    def records(self) -> list[dict[str, Any]]:
        """One dict a row; what is not defined is None."""
        return [{name: _defined(value) for name, value in zip(self.columns, row, strict=True)} for row in self.rows]


def save_tables(path: Path, tables: Sequence[Table]) -> None:
    """Write tables as JSON, by title."""
    path.write_text(json.dumps({table.title: table.records() for table in tables}, indent=1) + "\n")


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 or value == 0 else f"{value:.3g}"
