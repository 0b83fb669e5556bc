"""Several models with several seeds on one data set, everything else equal: one table with the spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vista_ext.config import RunConfig, check_config
from vista_ext.data.dataset import EventDataset
from vista_ext.report.evaluation import METRICS, cells, floor_rows
from vista_ext.report.tables import Table
from vista_ext.train.evaluate import Quality, predict, quality
from vista_ext.train.trainer import train, what_matters


def study(base: RunConfig, models: Sequence[str], seeds: Sequence[int], split: str = "test") -> Table:
    """Train and score each model with each seed, in `base.folder`; what is there already is not done again.

    Returns:
        The floors, then each model's metrics of the main task as mean and sample standard deviation over seeds.

    Raises:
        ConfigError: naming a model that does not exist.
        CheckpointError: if a run in `base.folder` is of another configuration.
    """
    dataset = EventDataset(base.data.path)
    runs = {
        (name, seed): replace(
            base, folder=str(Path(base.folder) / f"{name}-{seed}"), seed=seed, model=replace(base.model, name=name)
        )
        for name in models
        for seed in seeds
    }
    for config in runs.values():
        check_config(config)
    found = {key: _one(config, dataset, split) for key, config in runs.items()}
    floors = floor_rows(dataset, split, base.data.floor_item_prior)
    rows: list[list[object]] = [[name, *map(_four, values)] for name, *values in floors]
    for name in models:
        by_metric = zip(*(cells(found[name, seed]) for seed in seeds), strict=True)
        rows.append([name, *(_spread(values) for values in by_metric)])
    return Table(f"{dataset.schema.tasks[0]} on {split} of {dataset.name}, {len(seeds)} seeds", ("", *METRICS), rows)


def markdown(table: Table) -> str:
    """A table for a page."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _one(config: RunConfig, dataset: EventDataset, split: str) -> Quality:
    file = Path(config.folder) / f"quality-{split}.json"
    run = {**what_matters(config), "epochs": config.train.epochs}
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("run") != run:
        # Training goes on where only epochs were added, and refuses a folder of another configuration.
        measured = quality(predict(train(config, dataset), dataset, split, config.data))
        kept = {"run": run, "quality": asdict(measured)}
        file.write_text(json.dumps(kept) + "\n")
    return Quality(**kept["quality"])


def _four(value: object) -> str:
    return f"{value:.4f}"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"
