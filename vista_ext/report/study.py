"""Several models with several seeds on one data set, everything else equal: one table with the spread."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vista_ext.config import ConfigError, RunConfig, check_config
from vista_ext.data.dataset import EventDataset
from vista_ext.report.delivery import spread
from vista_ext.report.evaluation import METRICS, cells, floor_rows
from vista_ext.report.pictures import draw_seed_counts
from vista_ext.report.tables import Table
from vista_ext.train.evaluate import Quality, predict, quality
from vista_ext.train.trainer import train, what_matters

log = logging.getLogger("vista")


@dataclass(frozen=True)
class Variant:
    """A model of a study: its name, and for VISTA the number of summary rows, None for the configuration's own."""

    model: str
    num_seeds: int | None = None

    def __str__(self) -> str:
        return self.model if self.num_seeds is None else f"{self.model}, {self.num_seeds} summary rows"

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        """`base` with this model and a seed, in a folder of its own."""
        own = {} if self.num_seeds is None else {"num_seeds": self.num_seeds}
        name = "-".join(map(str, [self.model, *own.values(), seed]))
        model = replace(base.model, name=self.model, options=base.model.options | own)
        return replace(base, folder=str(Path(base.folder) / name), seed=seed, model=model)


def study(
    base: RunConfig,
    models: Sequence[str],
    seeds: Sequence[int],
    split: str = "test",
    *,
    seed_counts: Sequence[int] = (),
) -> Table:
    """Train and score each model with each seed, in `base.folder`; what is there already is not done again.

    Args:
        seed_counts: numbers of summary rows (`num_seeds`): VISTA is trained with each of them, and a picture of AUC
            over their number is drawn into `base.folder`.

    Returns:
        The floors, then each model's metrics of the main task as mean and sample standard deviation over seeds.

    Raises:
        ConfigError: naming a model or a number that cannot be.
        CheckpointError: if a run in `base.folder` is of another configuration.
    """
    if seed_counts and "vista" not in models:
        raise ConfigError(f"seed counts are for vista, expected it among the models, found {', '.join(models)}")
    dataset = EventDataset(base.data.path)
    variants = [
        Variant(name, count)
        for name in models
        for count in (seed_counts if name == "vista" and seed_counts else [None])
    ]
    runs = {variant: [variant.config(base, seed) for seed in seeds] for variant in variants}
    for configs in runs.values():
        for config in configs:
            check_config(config)
    found = {variant: [_one(config, dataset, split) for config in configs] for variant, configs in runs.items()}
    floors = floor_rows(dataset, split, base.data.floor_item_prior)
    rows: list[list[object]] = [[name, *map(_four, values)] for name, *values in floors]
    for variant, qualities in found.items():
        rows.append([str(variant), *map(spread, zip(*map(cells, qualities), strict=True))])
    if seed_counts:
        aucs = {variant: [quality.auc for quality in qualities] for variant, qualities in found.items()}
        by_count = {variant.num_seeds: values for variant, values in aucs.items() if variant.num_seeds is not None}
        others = {str(variant): values for variant, values in aucs.items() if variant.num_seeds is None}
        picture = Path(base.folder) / "auc_over_num_seeds.png"
        draw_seed_counts(picture, by_count, others)
        log.info("drawn: %s", picture)
    return Table(f"{dataset.schema.tasks[0]} on {split} of {dataset.name}, {len(seeds)} seeds", ("", *METRICS), rows)


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
