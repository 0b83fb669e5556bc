"""Progress of whatever takes over a second: a bar with rate and time left on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from vista_ext._extras import require

T = TypeVar("T")


def track(
    items: Iterable[T], what: str, total: int | None, *, unit: str = "it", size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield `items` under a bar; `size` says by how many of `total` `unit`s each moves it."""
    progress = require("rich.progress", extra="run")
    rate = _rate_column(progress, unit)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        rate,
        progress.TimeRemainingColumn(),
    )
    console = require("rich.console", extra="run").Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task, size(item))


def _rate_column(progress: Any, unit: str) -> Any:
    text = require("rich.text", extra="run")

    class Rate(progress.ProgressColumn):
        def render(self, task: Any) -> Any:
            speed = task.finished_speed or task.speed
            return text.Text(f"{speed:,.0f} {unit}/s" if speed else f"- {unit}/s")

    return Rate()
