"""The page of a GPU check: its record (gpu_check.json) as Markdown tables, and the targets with met or not met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.markdown import remarks, table

Row = Mapping[str, Any]
PEERS = ("eager", "compile", "cublas", "unfused", "unquantized", "flex", "varlen", "fla", "fbgemm")


@dataclass(frozen=True)
class Target:
    text: str
    op: str
    shapes: tuple[str, ...]  # as in the case's shape, or its beginning
    backward: bool
    value: Callable[[Row], float | None]
    met: Callable[[float], bool]


def _of_floor(limit: float) -> dict[str, Any]:
    return {"value": lambda row: row["ratio_to_floor"], "met": lambda value: value <= limit}


def _within_ms(limit: float) -> dict[str, Any]:
    return {"value": lambda row: row["ours_ms"], "met": lambda value: value <= limit}


def _faster(peer: str, times: float = 1.0) -> dict[str, Any]:
    return {"value": lambda row: row.get(f"ratio_to_{peer}"), "met": lambda value: value >= times}


def _stated(name: str) -> dict[str, Any]:
    """A number that is asked for, without a limit."""
    return {"value": lambda row: row[name], "met": lambda value: True}


CANDIDATES, ROWS = ("512 x 4000",), ("int8 512 x 4000",)
QLA_SHAPES = ("512 x 2000", "512 x 16000", "1 x 1000000")
SGLU_SHAPES = ("1024000 x 256",)
PRODUCTS = ("2048000 x 256 to 512", "1024000 x 256 to 768", "16384 x 4096 to 4096")
USERS = ("int8 512 ", "int8 4096 ", "int8 65536 ")
EVENTS = ("1 x 1000000 by 1000000", "1 x 1000000 by 8192")
# Those of bfloat16, stated for an H100.
TARGETS = [
    *[
        target
        for backward, name in ((False, "forward"), (True, "forward + backward"))
        for target in (
            Target(f"QLA {name}: at most 1.25 x floor", "qla", QLA_SHAPES, backward, **_of_floor(1.25)),
            Target(f"QLA {name}: at least 2.5 x faster than fla", "qla", QLA_SHAPES, backward, **_faster("fla", 2.5)),
            Target(
                f"SGLU {name}: faster than three cuBLAS products", "sglu", SGLU_SHAPES, backward, **_faster("eager")
            ),
            Target(f"SGLU {name}: faster than torch.compile", "sglu", SGLU_SHAPES, backward, **_faster("compile")),
        )
    ],
    Target("SGLU forward in one kernel: at most 0.65 ms", "sglu", SGLU_SHAPES, False, **_within_ms(0.65)),
    Target("projections + QLA forward: at most 0.75 ms", "projected_qla", ("512 x 2000",), False, **_within_ms(0.75)),
    Target("linear + SiLU: at least 85 % of cuBLAS alone", "linear_silu", PRODUCTS, False, **_faster("cublas", 0.85)),
    Target("linear + SiLU: faster than cuBLAS and a SiLU", "linear_silu", PRODUCTS, False, **_faster("eager")),
    # 0.88 ms at 2.11 GB are 1.25 times the floor of a card that copies 3.0 TB/s.
    Target("target attention: at most 0.88 ms", "jagged_cross_attn", CANDIDATES, False, **_within_ms(0.88)),
    *[
        Target(f"target attention: faster than {peer}", "jagged_cross_attn", CANDIDATES, False, **_faster(peer))
        for peer in ("flex", "varlen", "eager")
    ],
    Target(
        "target attention on int8 rows: no slower than on bfloat16 ones",
        "cached_cross_attn",
        ROWS,
        False,
        **_faster("unquantized"),
    ),
    # 80 % of copy bandwidth is 1.25 times the floor.
    Target("gather + dequantize: at most 1.25 x floor, cold", "cache_gather", USERS, False, **_of_floor(1.25)),
    Target("quantize: at most 1.25 x floor, cold", "quantize_rows", USERS, False, **_of_floor(1.25)),
    Target(
        "training step of the production model: at least 3 x faster than torch.compile",
        "training_step",
        ("512 x 2000 x 16", "512 x 2000 x 16 compiled"),
        True,
        value=lambda row: row.get("ratio_to_compile"),
        met=lambda value: value >= 3,
    ),
    Target("1,000,000 events of a user to a summary: ms", "summarize", EVENTS, False, **_stated("ours_ms")),
    Target("1,000,000 events of a user to a summary: x floor", "summarize", EVENTS, False, **_stated("ratio_to_floor")),
]


def page(record: Mapping[str, Any]) -> str:
    stages = record["stages"]
    rows = stages.get("bench", {}).get("rows", [])
    parts = [
        f"# GPU check of commit {record.get('commit', 'unknown')}",
        _facts(stages.get("facts", {}).get("facts")),
        "## Stages",
        table(("stage", "result", "seconds", "budget"), _stage_lines(stages)),
        "## Targets (bfloat16, stated for an H100)",
        table(("target", "shape", "found", ""), _target_lines(rows)),
        "## Times",
        "Device time of one call (median), with cold caches. Floor: the bytes (each operand once) at the bandwidth of "
        "a plain copy on this card in the same run. A peer's number is its time over ours: above 1, ours is faster.",
        table(
            ("op", "case", "ms", "10-90 %", "GB/s", "x floor", "peak GB", *PEERS, "verified"),
            [_time_line(row) for row in rows],
        ),
        *_kernels(rows),
        *_remarks(rows),
        *_failures(stages),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "The facts of the card were not recorded."
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
        lines.append((name, _plain(value)))
    return table(("fact", ""), lines)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _stage_lines(stages: Mapping[str, Row]) -> Iterable[Sequence[Any]]:
    for name, stage in stages.items():
        yield name, stage["status"], stage["seconds"], stage["budget"]
        for tool, result in stage.get("tools", {}).items():
            yield f"{name}: {tool}", result["status"], result["seconds"], ""


def _target_lines(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    for target in TARGETS:
        for shape in target.shapes:
            found = [
                target.value(row)
                for row in rows
                if (row["op"], row["dtype"], row["backward"]) == (target.op, "bfloat16", target.backward)
                and (row["shape"] == shape or (shape.endswith(" ") and row["shape"].startswith(shape)))
            ]
            value = found[0] if found else None
            verdict = "not measured" if value is None else "met" if target.met(value) else "NOT MET"
            yield target.text, shape.strip(), "-" if value is None else f"{value:.2f}", verdict


def _time_line(row: Row) -> Sequence[str]:
    def peer(name: str) -> str:
        ratio = row.get(f"ratio_to_{name}")
        return f"{ratio:.2f}" if ratio is not None else "-"

    return (
        row["op"],
        row["case"],
        f"{row['ours_ms']:.4f}",
        f"{row['ours_low_ms']:.4f}-{row['ours_high_ms']:.4f}",
        f"{row['bytes_per_s'] / 1e9:.0f}",
        f"{row['ratio_to_floor']:.2f}",
        _gigabytes(row, "ours"),
        *[peer(name) for name in PEERS],
        row["verified"],
    )


def _gigabytes(row: Row, name: str) -> str:
    peak = row.get(f"{name}_peak_bytes")
    return f"{peak / 1e9:.1f}" if peak is not None else "-"


def _kernels(rows: Sequence[Row]) -> Iterable[str]:
    """Cases of many kernels: memory beside the peers', and the share of each kind of kernel."""
    for row in rows:
        if not row.get("kernels"):
            continue
        whole = sum(line["measured"] for line in row["kernels"]) or float("nan")
        peaks = [f"{name} {_gigabytes(row, name)}" for name in ("ours", *PEERS) if _gigabytes(row, name) != "-"]
        yield f"## Where the time goes: {row['op']} {row['case']}"
        if peaks:
            yield f"Peak memory, inputs included, GB: {', '.join(peaks)}."
        yield table(
            ("kernels", "launches", "counted", "MB", "GFLOP", "floor us", "predicted us", "measured us", "share"),
            [
                (
                    line["name"],
                    line["seen"],
                    line["launches"],
                    f"{line['bytes'] / 1e6:.1f}",
                    f"{line['flops'] / 1e9:.1f}",
                    *(f"{1e6 * line[key]:.0f}" for key in ("floor", "predicted", "measured")),
                    f"{line['measured'] / whole:.0%}",
                )
                for line in row["kernels"]
            ],
        )


def _remarks(rows: Sequence[Row]) -> Iterable[str]:
    if not rows:
        return
    copies = sorted({round(row["copy_bytes_per_s"] / 1e9) for row in rows})
    cards = sorted({row["card"] for row in rows})
    yield f"Measured on {', '.join(cards)}; plain copy, read and written: {', '.join(map(str, copies))} GB/s."
    yield from remarks(rows)


def _failures(stages: Mapping[str, Row]) -> Iterable[str]:
    for name, stage in stages.items():
        results = {name: stage, **{f"{name}: {tool}": result for tool, result in stage.get("tools", {}).items()}}
        for label, result in results.items():
            if result["status"] != "passed":
                yield f"## {label}: {result['status']}\n\n```\n{result['tail'].strip()}\n```"
