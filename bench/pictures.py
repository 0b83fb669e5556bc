"""The pictures of the results page, as SVG: roofline, ratios to the peers, cost over the length of a history."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.results import Results, Row

OPS = ("qla", "projected_qla", "jagged_cross_attn", "cached_cross_attn", "cache_gather", "quantize_rows", "sglu")
MARKS = "osD^vPX"


SHAPES = {"4096 x 20": 20, "8 x 2k-6k": 4096, "1 x 1000000": 1_000_000}  # mean length of the histories of a case


def rows_of(name: str, found: Results) -> list[Row]:
    """What a picture shows; it is not drawn where that is nothing."""
    if name == "requests":
        return _most_threads(found.of("request"))
    rows = _most_threads(found.of(*OPS))
    if name == "cost_over_n":
        return [row for row in rows if row["op"] == "qla" and row["shape"] in SHAPES]
    return [row for row in rows if (row["flops"] if name == "roofline" else "ratio_to_eager" in row)]


def draw_all(found: Results, folder: Path) -> list[Path]:
    """Draw every picture that the results have data for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = {"roofline": _roofline, "ratios": _ratios, "cost_over_n": _cost_over_n, "requests": _requests}
    rows = {name: rows_of(name, found) for name in draw}
    return [_save(draw[name](rows[name], found), folder / f"{name}.svg") for name in draw if rows[name]]


def _figure(width: float = 7, height: float = 4.5) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and ids do not change from run to run: small files, small diffs.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 8})
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, height))
    return figure, axis


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _most_threads(rows: Iterable[Row]) -> list[Row]:
    listed = list(rows)
    most = max((row["threads"] for row in listed), default=0)
    return [row for row in listed if row["threads"] == most]


def _rate(found: Results, kind: str, of: str | None = None) -> float:
    return max(
        (f["per_s"] for f in _most_threads(found.floors) if f["kind"] == kind and of in (None, f["of"])), default=0
    )


def _roofline(rows: list[Row], found: Results) -> Any:
    copies = [floor["per_s"] for floor in _most_threads(found.floors) if floor["kind"] == "copy"]
    figure, axis = _figure()
    reach = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(reach) / 2, max(reach) * 2
    for dtype, colour in (("float32", "C0"), ("bfloat16", "C1")):
        peak = _rate(found, "products", dtype)
        if peak:
            axis.axhline(peak / 1e9, color=colour, linewidth=0.8, label=f"products, {dtype}")
    for rate, style, text in ((min(copies), "--", "copy from memory"), (max(copies), ":", "copy in the caches")):
        axis.plot([low, high], [rate * low / 1e9, rate * high / 1e9], style, color="gray", linewidth=0.8, label=text)
    for op, mark in zip(OPS, MARKS, strict=True):
        for dtype, colour in (("float32", "C0"), ("bfloat16", "C1")):
            points = [
                (r["flops"] / r["bytes"], r["flop_per_s"] / 1e9) for r in rows if (r["op"], r["dtype"]) == (op, dtype)
            ]
            if points:
                label = op if dtype == "float32" else None
                axis.plot(*zip(*points, strict=True), mark, color=colour, markersize=4, label=label)
    axis.set(xscale="log", yscale="log", xlabel="FLOP a byte, each operand once", ylabel="GFLOP/s", xlim=(low, high))
    axis.set_title(f"Roofline, {rows[0]['threads']} threads: float32 blue, bfloat16 orange")
    axis.legend(fontsize=6, ncols=2)
    return figure


def _ratios(rows: list[Row], _: Results) -> Any:
    figure, axis = _figure(7, 0.6 + 0.19 * len(rows))
    for at, row in enumerate(rows):
        axis.barh(at + 0.2, row["ratio_to_eager"], 0.38, color="C0", label=None if at else "eager")
        if "ratio_to_compile" in row:
            axis.barh(at - 0.2, row["ratio_to_compile"], 0.38, color="C1", label=None if at else "torch.compile")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), labels=[f"{row['op']} {row['case']}" for row in rows], fontsize=6)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="time of the peer over ours: right of 1, ours is faster")
    axis.legend(fontsize=6)
    return figure


def _cost_over_n(rows: list[Row], _: Results) -> Any:
    figure, axis = _figure(6, 3.5)
    for dtype in ("float32", "bfloat16"):
        for backward, style in ((False, "o-"), (True, "s--")):
            some = [row for row in rows if (row["dtype"], row["backward"]) == (dtype, backward)]
            points = sorted((SHAPES[row["shape"]], row["ns_per_item"]) for row in some)
            if points:
                colour = "C0" if dtype == "float32" else "C1"
                label = f"{dtype}, forward{' and backward' * backward}"
                axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4, label=label)
    axis.set(xscale="log", xlabel="events of a user (mean)", ylabel="ns an event", ylim=(0, None))
    axis.set_title("qla: cost of an event over the length of the history")
    axis.legend(fontsize=7)
    return figure


def _requests(rows: list[Row], _: Results) -> Any:
    figure, axis = _figure(6, 3.5)
    events = [row["events"] for row in rows]
    axis.plot(events, [row["recompute_ms"] for row in rows], "s-", color="C1", label="from the events")
    axis.plot(events, [row["p99_ms"] for row in rows], "o--", color="C0", label="from the store, p99")
    axis.plot(events, [row["ours_ms"] for row in rows], "o-", color="C0", label="from the store, p50")
    axis.set(xscale="log", yscale="log", xlabel="events of the user", ylabel="ms a request")
    axis.set_title(f"A request of {rows[0]['items']} candidates")
    axis.legend(fontsize=7)
    return figure
