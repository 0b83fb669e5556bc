"""The evaluation of a run as tables: beside the floors, from the store, by precision, by staleness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vista_ext.data.dataset import EventDataset
from vista_ext.data.floors import floors
from vista_ext.models import Vista
from vista_ext.report.latency import measure
from vista_ext.report.pictures import draw_all
from vista_ext.report.tables import Table
from vista_ext.runs import Run
from vista_ext.serve.compare import Comparison, by_precision, by_staleness
from vista_ext.serve.scorer import from_store, predict_from
from vista_ext.store import LmdbStore
from vista_ext.train.evaluate import Predictions, Quality, predict, quality

METRICS = ("AUC", "NE", "gAUC")


def cells(found: Quality) -> list[float]:
    """In the order of `METRICS`."""
    return [found.auc, found.ne, found.gauc]


def floor_rows(dataset: EventDataset, split: str, item_prior: float) -> list[list[object]]:
    """The scores that need no history, of the main task: each item's and user's mean, and the sum of their logits."""
    samples = dataset.samples(split)
    task = dataset.schema.tasks[0]
    found = floors(dataset, task, test_split=split, item_prior=item_prior)
    return [
        [f"floor: {name}", *cells(quality(Predictions(logits[:, None], samples.labels[:, :1], samples.users)))]
        for name, logits in found.items()
    ]


def comparison_table(title: str, rows: Sequence[Comparison]) -> Table:
    """Ways of delivery beside each other."""
    columns = ("summaries", *METRICS, "mean change", "largest change")
    return Table(title, columns, [[row.name, *cells(row.quality), row.mean_change, row.max_change] for row in rows])


def evaluation(run: Run, split: str, missing: Sequence[int]) -> list[Table]:
    """Every table that applies to a run's model. The store takes part if `vista summarize --split` made one."""
    dataset, model, config = run.dataset, run.model, run.config.data
    direct = predict(model, dataset, split, config)
    main, *others = dataset.schema.tasks
    rows = floor_rows(dataset, split, config.floor_item_prior)
    rows.append([f"{model.encoder.name}, from histories", *cells(quality(direct))])
    store_path = run.split_store_path(split)
    if isinstance(model, Vista) and store_path.exists():
        with LmdbStore.open(store_path, spec=run.store_spec()) as store:
            stored = predict_from(from_store(store), model, dataset, split, config)
        rows.append([f"vista, from the store ({store.spec.scheme})", *cells(quality(stored))])
    tables = [Table(f"{main} on {split}", ("score", *METRICS), rows)]
    if others:
        by_task = [[name, *cells(quality(direct, index))] for index, name in enumerate(others, 1)]
        tables.append(Table(f"other tasks on {split}", ("task", *METRICS), by_task))
    if isinstance(model, Vista):
        precision = by_precision(model, dataset, config, split)
        tables.append(comparison_table("by precision (changes of probability, beside float32)", precision))
        staleness = by_staleness(model, dataset, config, split, missing)
        tables.append(comparison_table("by staleness (changes of probability, beside the first row)", staleness))
    return tables


def draw(run: Run) -> list[Path]:
    """The pictures of a run, in its folder."""
    folder = Path(run.config.folder)
    return draw_all(folder / "pictures", folder, run.vista, run.dataset, measure(run.vista))
