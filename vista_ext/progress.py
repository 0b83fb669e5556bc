"""Progress of whatever takes over a second: a bar with rate and time left on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from vista_ext._extras import require
from vista_ext.processes import Processes

T = TypeVar("T")

# What is on the terminal now. There can be one display only, so what begins within another becomes a line of it.
_display: Any = None


def track(
    items: Iterable[T], what: str, total: int | None, *, unit: str = "it", size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield `items` under a bar; `size` says by how many of `total` `unit`s each moves it."""
    with working(what, total, unit) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextmanager
def working(what: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; the value moves it. Without a total it only tells that work goes on."""
    global _display
    if _display is not None:
        display = _display
        task = display.add_task(what, total=total, unit=unit)
        try:
            yield partial(display.advance, task)
        finally:
            display.remove_task(task)
        return
    console = require("rich.console", extra="run").Console(stderr=True)
    if not console.is_terminal or Processes.from_environment().rank:  # there can be one bar on a terminal
        yield lambda _: None
        return
    with _progress(console) as _display:
        try:
            with working(what, total, unit) as advance:
                yield advance
        finally:
            _display = None


def _progress(console: Any) -> Any:
    progress: Any = require("rich.progress", extra="run")
    text = require("rich.text", extra="run")

    class Count(progress.MofNCompleteColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.fields["unit"] else text.Text("")

    class Rate(progress.ProgressColumn):
        def render(self, task: Any) -> Any:
            speed, unit = task.finished_speed or task.speed, task.fields["unit"]
            return text.Text(f"{f'{speed:,.0f}' if speed else '-'} {unit}/s" if unit else "")

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        Count(),
        Rate(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console, transient=True)
