"""The evaluation of a run as tables and as a page: beside the floors, from the store, and under delivery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vista_ext.data.dataset import EventDataset
from vista_ext.data.floors import floors
from vista_ext.models import Vista
from vista_ext.report.delivery import Measured, delivery_tables, measure_delivery
from vista_ext.report.latency import measure
from vista_ext.report.pictures import draw_all, draw_delivery
from vista_ext.report.tables import Table, markdown, replace_section
from vista_ext.runs import Run
from vista_ext.serve.compare import Comparison
from vista_ext.serve.scorer import from_store, predict_from
from vista_ext.serve.staleness import Age
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


def evaluation(run: Run, split: str) -> list[Table]:
    """Quality of a run's model beside the floors. The store takes part if `vista summarize --split` made one."""
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
    return tables


def delivery(runs: Sequence[Run], split: str, ages: Sequence[Age]) -> tuple[list[Measured], list[Table]]:
    """Quality under delivery of runs on the same data: other seeds, other models with or without recent events.

    Raises:
        ConfigError: one is a baseline, or they are of different data.
    """
    measured = [measure_delivery(run, split, ages) for run in runs]
    return measured, delivery_tables(measured, split)


def write_page(page: Path, runs: Sequence[Run], measured: Sequence[Measured], tables: Sequence[Table]) -> list[Path]:
    """Put the tables and the curves of quality under delivery into a Markdown page, as the section of the data set;
    the picture lies in `pictures` beside it."""
    dataset = runs[0].dataset
    picture = page.parent / "pictures" / f"delivery_{dataset.name}.svg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_delivery(picture, dataset.name, measured)
    first, *others = (run.config.folder for run in runs)
    lines = [f"    vista evaluate {first} --page {page}", *(f"      --beside {folder}" for folder in others)]
    parts = [f"## {dataset.name}", " \\\n".join(lines)]
    parts += [f"![NE over the age of summaries, {dataset.name}](pictures/{picture.name})"]
    for table in tables:
        parts += [f"### {dataset.name}: {table.title}", markdown(table)]
    replace_section(page, dataset.name, "\n\n".join(parts))
    return [page, picture]


def draw(run: Run) -> list[Path]:
    """The pictures of a run, in its folder."""
    folder = Path(run.config.folder)
    return draw_all(folder / "pictures", folder, run.vista, run.dataset, measure(run.vista))
