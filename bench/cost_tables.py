"""What kernels cost, as tables: predicted, or beside what a profiler saw. `python -m bench.cost_tables`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.costs import (
    COPY,
    GROUPS,
    Part,
    group_of,
    layer,
    layer_in_torch,
    scoring_request,
    summarize,
    training_step,
    training_step_in_torch,
)
from vista_ext.models import PRESETS


@dataclass
class Line:
    """A line of a table: a part, or all parts of a group, and what a profiler saw of it. Times in seconds."""

    name: str
    kernels: str
    bytes: int = 0
    flops: int = 0
    launches: int = 0
    floor: float = 0.0
    predicted: float = 0.0
    seen: int = 0
    measured: float = 0.0

    def add(self, part: Part, copy: float) -> None:
        self.bytes += part.bytes
        self.flops += part.flops
        self.launches += part.launches
        self.floor += part.floor_at(copy)
        self.predicted += part.predicted


def by_part(parts: Sequence[Part]) -> list[Line]:
    lines = [Line(part.name, part.group) for part in parts]
    for line, part in zip(lines, parts, strict=True):
        line.add(part, COPY)
    return lines


def by_group(parts: Sequence[Part], kernels: Iterable[tuple[str, int, float]] = (), copy: float = COPY) -> list[Line]:
    """The parts' groups beside what was measured of them.

    Args:
        kernels: name, launches and milliseconds of each kernel of a run.
        copy: bytes per second of a plain copy on the card.
    """
    lines = {name: Line(name, name) for name in GROUPS}
    for part in parts:
        lines[part.group].add(part, copy)
    for name, count, ms in kernels:
        line = lines[group_of(name)]
        line.seen, line.measured = line.seen + count, line.measured + ms / 1e3
    return [line for line in lines.values() if line.launches or line.seen]


def markdown(lines: Sequence[Line]) -> str:
    """The predicted table of lines, with the shares of the whole."""
    whole = Line("**all**", "")
    for line in lines:
        for name in ("bytes", "flops", "launches", "floor", "predicted"):
            setattr(whole, name, getattr(whole, name) + getattr(line, name))
    text = ["| part | launches | MB | GFLOP | floor us | predicted us | share |", "|---|---|---|---|---|---|---|"]
    for line in [*lines, whole]:
        of = f" x {line.kernels}" if line.kernels not in (line.name, "") else ""
        times = f"{1e6 * line.floor:,.0f} | {1e6 * line.predicted:,.0f} | {line.predicted / whole.predicted:.0%}"
        text.append(
            f"| {line.name} | {line.launches}{of} | {line.bytes / 1e6:,.1f} | {line.flops / 1e9:,.1f} | {times} |"
        )
    return "\n".join(text)


def tables() -> dict[str, str]:
    """The tables of docs/kernels_layer.md, by title."""
    config = PRESETS["production"]
    in_torch = layer_in_torch(512, 2000, config, 2, backward=True)
    return {
        "Layer, forward and backward": markdown(by_part(layer(512, 2000, config, 2, backward=True))),
        "The same in torch's operators, compiled": markdown(by_part(in_torch)),
        "Scoring request, 512 users x 500 candidates": markdown(by_part(scoring_request(512, 500, config, 2))),
        "Scoring request, 1 user x 500 candidates": markdown(by_group(scoring_request(1, 500, config, 2))),
        "1,000,000 events of a user, end to end": markdown(by_group(summarize(1, 1_000_000, config, 2))),
        "Training step, 512 users x 2,000 events x 16 candidates": markdown(
            by_group(training_step(512, 2000, 16, config, 2))
        ),
        "The step in torch's operators, compiled": markdown(by_group(training_step_in_torch(512, 2000, 16, config, 2))),
    }


def main() -> None:
    for title, table in tables().items():
        print(f"### {title}\n\n{table}\n")


if __name__ == "__main__":
    main()
