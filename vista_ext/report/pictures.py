"""The figures worth drawing from a trained model (paper section 4 and appendix), as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vista_ext._extras import require
from vista_ext.data.batch import Candidates
from vista_ext.data.dataset import EventDataset
from vista_ext.models import Vista
from vista_ext.nn import QlaBlock, TargetBlock
from vista_ext.progress import track
from vista_ext.reference.qla import ACTIVATIONS
from vista_ext.report.delivery import ALL, Measured, by_variant, changes
from vista_ext.report.latency import Latency
from vista_ext.train.records import read_records


def draw_all(
    folder: Path, run: Path, model: Vista, dataset: EventDataset, latencies: Sequence[Latency], seed: int = 0
) -> list[Path]:
    """Draw every picture that the run has data for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    pictures: list[Callable[[], Path | None]] = [
        partial(_reconstruction, folder, run),
        partial(_latency, folder, latencies),
        *(partial(draw, folder, model, dataset, seed) for draw in (_summaries, _similarity, _attention)),
    ]
    files = [draw() for draw in track(pictures, "drawing", len(pictures), unit="pictures")]
    return [file for file in files if file is not None]


def draw_seed_counts(
    path: Path, by_count: Mapping[int, Sequence[float]], others: Mapping[str, Sequence[float]]
) -> None:
    """AUC over the number of summary rows: the AUCs of the runs with each number, and of models without summaries."""
    figure, axes = _axes()
    axis, counts = axes[0, 0], sorted(by_count)
    axis.plot(counts, [statistics.mean(by_count[count]) for count in counts], "o-", label="vista, mean of its runs")
    runs = [(count, auc) for count in counts for auc in by_count[count]]
    axis.plot(*zip(*runs, strict=True), "_", color="gray", label="vista, each run")
    for number, (name, aucs) in enumerate(others.items(), 1):
        axis.axhline(statistics.mean(aucs), color=f"C{number}", linestyle="--", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, labels=counts)
    axis.set(xlabel="summary rows", ylabel="AUC", title="Quality over the number of summary rows")
    axis.legend()
    _save(figure, path)


def draw_delivery(path: Path, title: str, measured: Sequence[Measured]) -> Path:
    """Quality over the age of float32 summaries, by events and by time, beside scores from the histories; and where
    it is lost, by history length. Bars are standard deviations over the runs of a variant."""
    figure, axes = _axes(3)
    variants = by_variant(measured)
    ages = [r for r in measured[0].records if (r["precision"], r["events before"]) == ("float32", ALL)]
    lengths = [name for name in measured[0].values("events before") if name != ALL]
    by_events = [r["age"] for r in ages if not r["age seconds"]]
    by_time = [r["age"] for r in ages if not r["age events"]]
    for number, (variant, runs) in enumerate(variants.items()):
        for axis, names in ((axes[0, 0], by_events), (axes[0, 1], by_time)):
            values = [[m.record("float32", age)["ne"] for m in runs] for age in names]
            axis.errorbar(names, *_spreads(values), fmt="o-", capsize=3, color=f"C{number}", label=variant)
            direct = statistics.mean(m.record("float32", ages[0]["age"])["direct ne"] for m in runs)
            axis.axhline(direct, color=f"C{number}", linestyle=":", label=f"{variant}, from the history")
        for age, line in zip([name for name in by_events if name != "fresh"][-2:], ("--", "-"), strict=False):
            values = [changes(runs, "ne", "float32", age, bucket) for bucket in lengths]
            style = {"fmt": f"o{line}", "capsize": 3, "color": f"C{number}"}
            axes[0, 2].errorbar(lengths, *_spreads(values), **style, label=f"{variant}, {age} old")
    axes[0, 0].set(ylabel="NE", xlabel="age of the summary", title=f"{title}: by events missed")
    axes[0, 1].set(ylabel="NE", xlabel="age of the summary", title="by time")
    axes[0, 2].set(ylabel="NE lost", xlabel="events before the request", title="by history length")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return _save(figure, path)


def _spreads(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations."""
    return [statistics.mean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]


def _axes(columns: int = 1) -> tuple[Any, Any]:
    # Text stays text in an SVG, which is small then; and what does not change gives the same bytes.
    matplotlib = require("matplotlib", extra="run")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "vista"})
    return require("matplotlib.pyplot", extra="run").subplots(1, columns, figsize=(5.5 * columns, 4), squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    require("matplotlib.pyplot", extra="run").close(figure)
    return path


def _reconstruction(folder: Path, run: Path) -> Path | None:
    points = [(r["step"], r["loss/reconstruction"]) for r in read_records(run) if r.get("loss/reconstruction")]
    if not points:
        return None
    figure, axes = _axes()
    axes[0, 0].plot(*zip(*points, strict=True))
    axes[0, 0].set(xlabel="step", ylabel="reconstruction loss", yscale="log", title="Reconstruction loss in training")
    return _save(figure, folder / "reconstruction_loss.png")


def _latency(folder: Path, latencies: Sequence[Latency]) -> Path | None:
    if not latencies:
        return None
    figure, axes = _axes()
    events = [latency.events for latency in latencies]
    axes[0, 0].plot(events, [latency.direct_ms for latency in latencies], "o-", label="from the history")
    axes[0, 0].plot(events, [latency.store_ms for latency in latencies], "o-", label="from the store")
    axes[0, 0].set(xlabel="events of the user", ylabel="ms a request", xscale="log", yscale="log")
    axes[0, 0].set_title("Time of a request over history length")
    axes[0, 0].legend()
    return _save(figure, folder / "latency.png")


def _some_users(dataset: EventDataset, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(dataset.num_users, generator=generator)[:count].sort().values


def _categories(dataset: EventDataset) -> tuple[str, Tensor] | None:
    """The first item feature, a category of each item."""
    names = list(dataset.schema.item_features)
    return (names[0], dataset.item_features[:, 0]) if names else None


@torch.no_grad()
def _summaries(folder: Path, model: Vista, dataset: EventDataset, seed: int) -> Path | None:
    users = _some_users(dataset, 1000, seed)
    if len(users) < 3:
        return None
    histories = dataset.histories(users, None, 2000)
    flat = model.summarize(histories).flatten(1)
    flat = flat - flat.mean(0)
    left, scale, _ = torch.linalg.svd(flat, full_matrices=False)
    spread = scale.square() / scale.square().sum().clamp(min=1e-30)
    points = left[:, :2] * scale[:2]
    colour, label = torch.zeros(len(users)), ""
    if (category := _categories(dataset)) is not None:
        label = f"most frequent {category[0]}"
        owner = torch.repeat_interleave(histories.seq_offsets.diff())
        counts = torch.zeros(len(users), int(category[1].max()) + 1)
        counts.index_put_((owner, category[1][histories.items]), torch.ones(len(owner)), accumulate=True)
        colour = counts.argmax(1).float()
    figure, axes = _axes()
    dots = axes[0, 0].scatter(points[:, 0], points[:, 1], c=colour, s=6, cmap="tab20")
    axes[0, 0].set(xlabel=f"PC 1 ({100 * spread[0]:.0f} %)", ylabel=f"PC 2 ({100 * spread[1]:.0f} %)")
    axes[0, 0].set_title("Summaries of users")
    if label:
        figure.colorbar(dots, label=label)
    return _save(figure, folder / "summaries_pca.png")


@torch.no_grad()
def _similarity(folder: Path, model: Vista, dataset: EventDataset, seed: int) -> Path | None:
    """Cosine similarity of stage 2's outputs for one user, between items of one category and of two."""
    category = _categories(dataset)
    users = _some_users(dataset, 20, seed)
    if category is None or not len(users):
        return None
    generator = torch.Generator().manual_seed(seed)
    count = min(200, dataset.schema.num_items)
    items = torch.randperm(dataset.schema.num_items, generator=generator)[:count] + 1
    context = torch.zeros(count, len(dataset.schema.context), dtype=torch.int64)
    histories = dataset.histories(users, None, 2000)
    summaries = model.summarize(histories)
    same = category[1][items][:, None] == category[1][items]
    apart = ~torch.eye(count, dtype=torch.bool)
    within, across = [], []
    for user in range(len(users)):
        candidates = Candidates(torch.tensor([0, count]), count, items, context)
        memory = model.encoder.stage2.target.memory(summaries[user : user + 1])
        rows = model.encoder.stage2.target(model.items(items), candidates, memory, torch.tensor([0]))
        rows = torch.nn.functional.normalize(rows, dim=1)
        similarity = rows @ rows.T
        within.append(similarity[same & apart])
        across.append(similarity[~same])
    figure, axes = _axes()
    for values, label in ((within, f"one {category[0]}"), (across, f"two {category[0]} values")):
        joined = torch.cat(values)
        axes[0, 0].hist(joined, bins=60, density=True, alpha=0.6, label=f"{label}, mean {joined.mean():.2f}")
    axes[0, 0].set(xlabel="cosine similarity of target outputs", ylabel="density", title="Candidates of one user")
    axes[0, 0].legend()
    return _save(figure, folder / "target_similarity.png")


@torch.no_grad()
def _attention(folder: Path, model: Vista, dataset: EventDataset, seed: int) -> Path | None:
    """Both stages for the user with the longest history of a few: what each seed reads, what each candidate reads."""
    histories = dataset.histories(_some_users(dataset, 50, seed), None, 200)
    if not len(histories.items):
        return None
    chosen = int(histories.seq_offsets.diff().argmax())
    history = histories.rows(chosen, chosen + 1)
    summarizer, phi = model.encoder.summarizer, ACTIVATIONS[model.config.activation]
    first = cast(QlaBlock, summarizer.layers[0])
    keys, values = first.keys_values(model.embed(history).rows)
    queries = first.query(first.norm(summarizer.seeds)).view(-1, first.heads, first.head_dim)
    # QLA has no matrix of weights; <phi1(q), phi1(k)> times the size of v is what an event adds to a seed before phi2.
    reads = torch.einsum("shd,nhd->hsn", phi(queries), phi(keys)) * values.norm(dim=2).T[:, None]
    summary = model.summarize(history)
    block = cast(TargetBlock, model.encoder.stage2.target.layers[0])
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, dataset.schema.num_items + 1, (40,), generator=generator)
    memory_keys, _ = block.keys_values(summary[0])
    asks = block.query(block.norm(model.items(items))).view(-1, block.heads, block.head_dim)
    weights = (torch.einsum("chd,shd->hcs", asks, memory_keys) / block.head_dim**0.5).softmax(-1)
    figure, axes = _axes(2)
    for axis, values, labels in (
        (
            axes[0, 0],
            reads.mean(0),
            ("event, oldest first", "seed", "Stage 1, first layer: what an event adds to a seed"),
        ),
        (axes[0, 1], weights.mean(0), ("seed", "candidate", "Stage 2, first layer: attention on the summary")),
    ):
        figure.colorbar(axis.imshow(values, aspect="auto", interpolation="nearest"))
        axis.set(xlabel=labels[0], ylabel=labels[1], title=labels[2])
    return _save(figure, folder / "attention.png")
