"""Tables of the generated pages, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"

    return "\n".join([line(head), line("---" for _ in head), *map(line, lines)])


def remarks(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What rows say of their peers, each remark once; nothing if they say nothing."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, text in [*row.get("notes", {}).items(), *row.get("missing", {}).items()]:
            reasons.setdefault((name, text), []).append(f"{row['op']} {row['case']}")
    if reasons:
        yield "## Peers: what differs, or why there is no number"
        yield table(("peer", "remark", "cases"), [(*key, _some(where)) for key, where in sorted(reasons.items())])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)}, from {names[0]} to {names[-1]}"
