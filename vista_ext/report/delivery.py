"""Quality under delivery: what summaries of each precision and age are worth beside scoring from the histories, by
history length, over several runs: seeds, and models with and without the recent-events branch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vista_ext.config import ConfigError
from vista_ext.report.tables import Table, defined, save_json
from vista_ext.runs import Run
from vista_ext.serve.compare import PRECISIONS, Delivery, deliveries, probability_change
from vista_ext.serve.staleness import Age

LENGTHS = (10, 30, 100, 300)
ALL = "all"
SMALL = 1e-4  # the unit of changes in tables


@dataclass(frozen=True)
class Measured:
    """What was measured of one run.

    Args:
        seed: of the run.
        recent: newest raw events that its model reads beside the summary; 0 for none.
        records: one for each precision, age and bucket of history lengths (`records_of`).
    """

    seed: int
    recent: int
    records: list[dict[str, Any]]

    @property
    def variant(self) -> str:
        """What tables call its model."""
        return f"summary + {self.recent} newest events" if self.recent else "summary alone"

    def record(self, precision: str, age: str, bucket: str = ALL) -> dict[str, Any]:
        """The one record of a way."""
        wanted = precision, age, bucket
        return next(r for r in self.records if (r["precision"], r["age"], r["events before"]) == wanted)

    def values(self, name: str) -> list[str]:
        """The different values of one column, in their order."""
        return list(dict.fromkeys(record[name] for record in self.records))


def buckets(lengths: torch.Tensor, edges: Sequence[int]) -> dict[str, torch.Tensor]:
    """Which rows have histories of which length, bools `[m]`; every row is in one bucket, and in "all"."""
    found = {ALL: torch.ones_like(lengths, dtype=torch.bool)}
    for low, high in zip((0, *edges), (*edges, None), strict=True):
        name = f"{low}+" if high is None else f"{low}-{high - 1}"
        found[name] = (lengths >= low) & (lengths < (high or 2**62))
    return found


def records_of(delivery: Delivery, edges: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """Metrics for each precision, age and bucket of history lengths, those of the direct scores beside them."""
    records = []
    for bucket, rows in buckets(delivery.lengths, edges).items():
        if not rows.any():
            continue
        direct = {f"direct {name}": value for name, value in asdict(delivery.quality(delivery.direct, rows)).items()}
        for (precision, age), logits in delivery.ways.items():
            mean, most = probability_change(delivery.direct[rows], logits[rows])
            records.append(
                {
                    "precision": precision,
                    "age": str(age),
                    "age events": age.events,
                    "age seconds": age.seconds,
                    "events before": bucket,
                    "rows": int(rows.sum()),
                    **asdict(delivery.quality(logits, rows)),
                    **direct,
                    "mean change": mean,
                    "largest change": most,
                }
            )
    return records


def measure_delivery(run: Run, split: str, ages: Sequence[Age], edges: Sequence[int] = LENGTHS) -> Measured:
    """All ways of delivery of a run; what was measured before, with these weights, is not measured again."""
    what = {
        "split": split,
        "ages": [str(age) for age in ages],
        "lengths": list(edges),
        "precisions": list(PRECISIONS),
        "weights": run.checkpoint.manifest["crc32"]["model"],
        "data": asdict(run.config.data),
    }
    file = Path(run.config.folder) / f"delivery-{split}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("what") != what:
        found = deliveries(run.vista, run.dataset, run.config.data, split, ages=ages)
        records = [{k: defined(v) for k, v in record.items()} for record in records_of(found, edges)]
        kept = {"what": what, "records": records}
        save_json(file, kept)
    records = [{k: float("nan") if v is None else v for k, v in record.items()} for record in kept["records"]]
    return Measured(run.config.seed, run.vista.config.recent_events, records)


def delivery_tables(measured: Sequence[Measured], split: str) -> list[Table]:
    """By age, by age and precision, by history length: mean and sample standard deviation over the runs of a variant.
    None of an empty split.

    Raises:
        ConfigError: the runs are of different data.
    """
    if len({tuple(m.values("events before")) for m in measured}) > 1 or len({_rows(m) for m in measured}) > 1:
        raise ConfigError("--beside must be runs on the same data, found splits of other sizes")
    variants = by_variant(measured)
    if not _rows(measured[0]):
        return []
    return [_by_age(variants, split), _by_precision(variants), _by_length(variants)]


def by_variant(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The runs of each variant, the summary alone first."""
    ordered = sorted(measured, key=lambda m: (m.recent, m.seed))
    return {m.variant: [other for other in ordered if other.variant == m.variant] for m in ordered}


def _rows(measured: Measured) -> int:
    return int(measured.records[0]["rows"]) if measured.records else 0


def _by_age(variants: dict[str, list[Measured]], split: str) -> Table:
    first = next(iter(variants.values()))[0]
    metrics = ("AUC", "NE", "gAUC")
    ages = first.values("age")
    rows: list[list[object]] = [["from the history"]]
    rows += [[f"summary, {age}" if age == "fresh" else f"summary, {age} old"] for age in ages]
    for runs in variants.values():
        for name in map(str.lower, metrics):
            rows[0].append(spread([m.record("float32", ages[0])[f"direct {name}"] for m in runs]))
            for row, age in zip(rows[1:], ages, strict=True):
                row.append(spread([m.record("float32", age)[name] for m in runs]))
    columns = ["", *(f"{variant}: {name}" for variant in variants for name in metrics)]
    return Table(f"by age, float32, on {split}, {_runs(variants)}", columns, rows)


def _by_precision(variants: dict[str, list[Measured]]) -> Table:
    first = next(iter(variants.values()))[0]
    precisions = first.values("precision")
    rows: list[list[object]] = []
    for metric in ("auc", "ne"):
        for age in first.values("age"):
            row: list[object] = [f"{metric.upper()}, {age}"]
            for runs in variants.values():
                row += [change_of(runs, metric, precision, age) for precision in precisions]
            rows.append(row)
    columns = ["", *(f"{variant}: {precision}" for variant in variants for precision in precisions)]
    return Table("change against scoring from the history, in 0.0001", columns, rows)


def _by_length(variants: dict[str, list[Measured]]) -> Table:
    first = next(iter(variants.values()))[0]
    ages, all_rows = first.values("age"), _rows(first)
    rows: list[list[object]] = []
    for bucket in first.values("events before"):
        share = f"{100 * first.record('float32', ages[0], bucket)['rows'] / all_rows:.1f} %"
        for variant, runs in variants.items():
            direct = spread([m.record("float32", ages[0], bucket)["direct ne"] for m in runs])
            rows.append([bucket, share, variant, direct])
            rows[-1] += [change_of(runs, "ne", "float32", age, bucket) for age in ages]
    columns = ["events before", "rows", "model", "NE from the history", *ages]
    return Table("by history length, float32: change of NE, in 0.0001", columns, rows)


def changes(runs: Sequence[Measured], metric: str, precision: str, age: str, bucket: str = ALL) -> list[float]:
    """How a metric of each run differs from that of its own direct scores."""
    records = [m.record(precision, age, bucket) for m in runs]
    return [record[metric] - record[f"direct {metric}"] for record in records]


def change_of(runs: Sequence[Measured], metric: str, precision: str, age: str, bucket: str = ALL) -> str:
    """The same as a cell, in units of 0.0001."""
    return spread([change / SMALL for change in changes(runs, metric, precision, age, bucket)], 1)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and, of several, sample standard deviation."""
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    mean = round(statistics.mean(values), digits) + 0.0  # no minus before a zero
    return f"{mean:.{digits}f}{more}"


def _runs(variants: dict[str, list[Measured]]) -> str:
    seeds = {name: ", ".join(str(m.seed) for m in runs) for name, runs in variants.items()}
    same = len(set(seeds.values())) == 1
    return f"seeds {next(iter(seeds.values()))}" if same else "; ".join(f"{n}: seeds {s}" for n, s in seeds.items())
