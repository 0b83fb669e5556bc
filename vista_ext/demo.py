"""`vista demo`: the whole job at a size for a laptop, on synthetic data whose attainable scores are known."""

from __future__ import annotations

import csv
import logging
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vista_ext.config import ConfigError, DataConfig, ModelChoice, RunConfig, TrainConfig, check_config
from vista_ext.data.dataset import EventDataset
from vista_ext.data.synthetic import SyntheticTruth, make_synthetic
from vista_ext.report.evaluation import METRICS, cells, comparison_table, floor_rows
from vista_ext.report.latency import measure
from vista_ext.report.pictures import draw_all
from vista_ext.report.tables import Table, save_tables
from vista_ext.runs import Run
from vista_ext.serve.compare import by_precision
from vista_ext.serve.requests import Request, score_requests
from vista_ext.serve.scorer import from_store, predict_from
from vista_ext.serve.summarize import first_moments, open_for_writing, refresh
from vista_ext.store import LmdbStore
from vista_ext.train.evaluate import Quality, predict, quality
from vista_ext.train.trainer import train

log = logging.getLogger("vista")
MARK = "demo.json"  # its presence allows the demo to clear the folder


@dataclass(frozen=True)
class Baseline:
    """A model to compare with: its name, its row's label, epochs, newest events it reads, requests in a step."""

    model: str
    label: str
    epochs: int
    history: int
    requests: int


# The newest 50 events say nothing about the labels: the point of the data. DIN pays for candidates x events, so on the
# whole history it gets one epoch, in small steps: their temporaries fit into caches, and it learns from more of them.
BASELINES = (
    Baseline("mean", "mean pooling, whole history", 3, 400, 128),
    Baseline("din", "DIN, newest 50 events", 2, 50, 128),
    Baseline("din", "DIN, whole history", 1, 400, 32),
)


def run_demo(folder: Path, *, users: int, epochs: int, seed: int) -> None:
    """Everything from data to pictures in `folder`, which is cleared first if an earlier demo made it.

    Raises:
        ConfigError: if the folder holds something else, or an option is out of range.
    """
    begun = time.monotonic()
    base = _config(folder, seed, epochs)
    check_config(base)
    if users < 1:
        raise ConfigError(f"--users must be at least 1, found {users}")
    _clear(folder)
    log.info("making %d users with a long-range interest in %s", users, folder / "data")
    truth = make_synthetic(folder / "data", users=users, seed=seed)
    dataset = EventDataset(folder / "data")
    rows = floor_rows(dataset, "test", base.data.floor_item_prior)
    for baseline in BASELINES:
        log.info("baseline: %s", baseline.label)
        rows.append([baseline.label, *cells(_measure(baseline, base, dataset))])

    log.info("VISTA: training both stages")
    train(base, dataset)
    run = Run.open(folder / "vista")
    direct = predict(run.vista, dataset, "test", base.data)
    rows.append(["VISTA, from histories", *cells(quality(direct))])

    log.info("summarizing every user into %s", run.store_path)
    with open_for_writing(run.store_path, run.store_spec()) as store:
        refresh(run.vista, dataset, store, before=first_moments(dataset, "test"))
    with LmdbStore.open(run.store_path, spec=run.store_spec()) as store:
        stored = predict_from(from_store(store), run.vista, dataset, "test", base.data)
        size = f"{len(store)} summaries of {run.store_spec().row_bytes} bytes"
    rows.append([f"VISTA, from the store ({base.store.scheme})", *cells(quality(stored))])
    rows.append(["the labels' own probabilities", truth.oracle_auc, None, None])
    precision = by_precision(run.vista, dataset, base.data, "test")
    tables = [
        Table("Clicks on the test split", ("score", *METRICS), rows),
        comparison_table("Scores from quantized summaries (changes of probability)", precision),
    ]
    difference = _score_elsewhere(run, dataset)
    latencies = measure(run.vista)
    timing = [[one.events, one.direct_ms, one.store_ms] for one in latencies]
    tables.append(
        Table("Milliseconds for 100 candidates", ("events of the user", "from history", "from store"), timing)
    )
    files = draw_all(folder / "pictures", folder / "vista", run.vista, dataset, latencies, seed)

    for table in tables:
        table.show()
    save_tables(folder / MARK, tables)
    _conclude(truth, size, difference, files, time.monotonic() - begun)


def _config(folder: Path, seed: int, epochs: int) -> RunConfig:
    return RunConfig(
        folder=str(folder / "vista"),
        seed=seed,
        data=DataConfig(str(folder / "data"), max_history=400),
        model=ModelChoice("vista", "tiny"),
        train=TrainConfig(epochs=epochs, requests_per_batch=128, learning_rate=3e-3, table_learning_rate=3e-3),
    )


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise ConfigError(f"--folder must be new, empty, or made by an earlier demo, found other files in {folder}")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("{}\n")


def _measure(baseline: Baseline, base: RunConfig, dataset: EventDataset) -> Quality:
    config = replace(
        base,
        folder=str(Path(base.folder).with_name(f"{baseline.model}-{baseline.history}")),
        data=replace(base.data, max_history=baseline.history),
        model=replace(base.model, name=baseline.model),
        train=replace(base.train, epochs=baseline.epochs, requests_per_batch=baseline.requests),
    )
    return quality(predict(train(config, dataset), dataset, "test", config.data, baseline.requests))


def _score_elsewhere(run: Run, dataset: EventDataset) -> float:
    """Let another process score requests by `vista score` from the store; the largest difference to this process."""
    samples = dataset.samples("test")
    chosen = torch.arange(0, len(samples), max(1, len(samples) // 200))
    pairs = zip(samples.users[chosen].tolist(), samples.items[chosen].tolist(), strict=True)
    requests: list[Request] = [(dataset.user_sources[user], dataset.item_sources[item - 1], {}) for user, item in pairs]
    folder = Path(run.config.folder)
    asked, answered = folder / "requests.csv", folder / "scores.csv"
    with asked.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item"])
        writer.writerows(request[:2] for request in requests)
    log.info("another process scores %d candidates from the store", len(requests))
    command = ["score", str(folder), "--requests", str(asked), "--output", str(answered)]
    subprocess.run([sys.executable, "-m", "vista_ext.cli", *command], check=True)
    with answered.open() as file:
        theirs = torch.tensor([float(row[dataset.schema.tasks[0]]) for row in csv.DictReader(file)])
    ours = torch.tensor([scores[0] for _, _, scores in score_requests(run, requests)])
    return float((theirs - ours).abs().max())


def _conclude(truth: SyntheticTruth, size: str, difference: float, files: list[Path], seconds: float) -> None:
    print(truth)
    print(f"Store: {size}. Another process scored from it; largest difference to this one: {difference:.1e}.")
    print("Pictures: " + ", ".join(str(file) for file in files))
    print(f"All of it in {seconds:.0f} s.")
