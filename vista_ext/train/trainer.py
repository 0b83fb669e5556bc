"""The training loop: seeded, resumable after a kill, with early stopping on the validation split."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vista_ext.config import RunConfig, save_config
from vista_ext.data.batch import Batch
from vista_ext.data.dataset import EventDataset
from vista_ext.models import Ranker, build_model
from vista_ext.progress import track
from vista_ext.train.checkpoint import CheckpointError, open_checkpoint, restore_optimizer, save_checkpoint
from vista_ext.train.evaluate import predict, quality
from vista_ext.train.precision import PRECISIONS, call_in
from vista_ext.train.records import Records

log = logging.getLogger("vista")


@dataclass
class Position:
    """Where a run stands: what it takes to go on from a checkpoint exactly as if nothing had happened."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_auc: float = -1.0
    best_epoch: int = -1


def train(config: RunConfig, dataset: EventDataset, *, device: torch.device | str = "cpu") -> Ranker:
    """Train a model, or go on with the run that was begun in `config.folder`.

    Returns:
        The model of the epoch with the best AUC of the main task on "valid" (of the last epoch without that split);
        also in the run's folder as checkpoint "best", beside the configuration.

    Raises:
        CheckpointError: if the folder holds a checkpoint that is damaged, or of another configuration or more epochs.
        ValueError: if there is nothing to train on.
        FloatingPointError: if the loss is not finite.
    """
    if not dataset.split_size("train"):
        raise ValueError(f"{dataset.path}: the train split is empty, expected samples to train on")
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.folder)
    checkpoints = folder / "checkpoints"
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, dataset.schema, config.vista(), dataset.item_features).to(device)
    optimizer = make_optimizer(config, model)
    position = _resume(config, checkpoints, model, optimizer)
    save_config(config)  # not before: the file of a run that cannot go on like this stays as it is
    with Records(folder, position.step) as records:
        while position.epoch < config.train.epochs and not _is_done(config, position):
            _train_epoch(config, dataset, model, optimizer, position, records, checkpoints)
            _judge(config, dataset, model, position, records, checkpoints)
            position.epoch, position.batch = position.epoch + 1, 0
            _save(config, checkpoints, model, optimizer, position)
    return open_checkpoint(checkpoints / "best").model().to(device)


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with a learning rate and a decay of their own for the embedding tables."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(module.weight) for module in modules}
    choice = config.train
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in model.parameters() if id(p) not in tables],
            "lr": choice.learning_rate,
            "weight_decay": choice.weight_decay,
        },
        {
            "params": [p for p in model.parameters() if id(p) in tables],
            "lr": choice.table_learning_rate,
            "weight_decay": choice.table_weight_decay,
        },
    ]
    return torch.optim.AdamW(groups)


def loss_of(
    model: Ranker, batch: Batch, main_task_weight: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch with the layers in `dtype`, and its parts by name."""
    output = call_in(model, dtype, batch.histories, batch.candidates, batch.kv_index)
    logits = output.logits.float()
    by_task = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none").mean(0)
    weights = torch.ones_like(by_task)
    weights[0] = main_task_weight
    total = (by_task * weights).sum() / weights.sum().clamp(min=1e-9)
    parts = {f"loss/{task}": float(value) for task, value in zip(model.schema.tasks, by_task.detach(), strict=True)}
    for name, value in output.losses.items():
        total = total + value
        parts[f"loss/{name}"] = float(value.detach())
    return total, parts


def _train_epoch(
    config: RunConfig,
    dataset: EventDataset,
    model: Ranker,
    optimizer: torch.optim.Optimizer,
    position: Position,
    records: Records,
    checkpoints: Path,
) -> None:
    choice, device = config.train, next(model.parameters()).device
    model.train()
    begun, rows = time.monotonic(), 0
    for batch in _shuffled(config, dataset, position):
        loss, parts = loss_of(model, batch.to(device), choice.main_task_weight, PRECISIONS[choice.precision])
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"step {position.step}: the loss is {loss.item()}; checkpoints hold earlier steps")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rows += len(batch.users)
        position.step += 1
        position.batch += 1
        if position.step % choice.log_steps == 0:
            records.write(position.step, loss=loss.item(), **parts)
        if position.step % choice.checkpoint_steps == 0:
            _save(config, checkpoints, model, optimizer, position)
    seconds = time.monotonic() - begun
    log.info("epoch %d: %d rows in %.0f s (%.0f rows/s)", position.epoch, rows, seconds, rows / max(seconds, 1e-9))


def _shuffled(config: RunConfig, dataset: EventDataset, position: Position) -> Iterator[Batch]:
    choice = config.train
    total = dataset.num_batches("train", choice.requests_per_batch, config.data.request_window)
    batches = dataset.batches(
        "train",
        requests_per_batch=choice.requests_per_batch,
        max_history=config.data.max_history,
        request_window=config.data.request_window,
        shuffle_seed=config.seed * 10_000 + position.epoch,
        start_batch=position.batch,
    )
    return track(batches, f"epoch {position.epoch}", total - position.batch, unit="batches")


def _judge(
    config: RunConfig, dataset: EventDataset, model: Ranker, position: Position, records: Records, checkpoints: Path
) -> None:
    """Measure an epoch, and keep it if it is the best so far."""
    auc = float("nan")
    if dataset.split_size("valid"):
        # In batches of the training's size: no more memory than it, and caches hold the temporaries of small ones.
        found = quality(predict(model, dataset, "valid", config.data, config.train.requests_per_batch))
        auc = found.auc
        records.write(position.step, **{f"valid/{name}": value for name, value in asdict(found).items()})
        log.info("epoch %d: valid AUC %.4f, NE %.4f, gAUC %.4f", position.epoch, found.auc, found.ne, found.gauc)
    # Without a verdict (no validation split, or one class in it) the latest epoch is kept.
    if not auc <= position.best_auc:
        position.best_auc = auc if auc == auc else position.best_auc
        position.best_epoch = position.epoch
        save_checkpoint(checkpoints / "best", model, None, {"epoch": position.epoch, "valid_auc": position.best_auc})


def _is_done(config: RunConfig, position: Position) -> bool:
    return position.best_epoch >= 0 and position.epoch - 1 - position.best_epoch >= config.train.patience


def _save(
    config: RunConfig, checkpoints: Path, model: Ranker, optimizer: torch.optim.Optimizer, position: Position
) -> None:
    path = checkpoints / f"step-{position.step:09d}"
    save_checkpoint(path, model, optimizer, {"position": asdict(position), "run": what_matters(config)})
    for older in _steps(checkpoints)[:-2]:
        shutil.rmtree(older)


def _resume(config: RunConfig, checkpoints: Path, model: Ranker, optimizer: torch.optim.Optimizer) -> Position:
    steps = _steps(checkpoints)
    if not steps:
        return Position()
    checkpoint = open_checkpoint(steps[-1])
    begun, wanted = checkpoint.manifest.get("run"), what_matters(config)
    if begun != wanted:
        differing = [k for k, v in wanted.items() if not isinstance(begun, dict) or begun.get(k) != v]
        raise CheckpointError(
            f"{checkpoint.path}: expected a run with this configuration, found another {', '.join(differing)}: "
            "choose another folder or remove this one"
        )
    position = Position(**checkpoint.manifest["position"])
    if position.epoch > config.train.epochs:
        raise CheckpointError(
            f"{checkpoint.path}: expected a run of at most train.epochs = {config.train.epochs} epochs, found one of "
            f"{position.epoch}: choose another folder or remove this one"
        )
    model.load_state_dict(checkpoint.tensors("model"))
    restore_optimizer(optimizer, checkpoint)
    log.info("going on at epoch %d, step %d", position.epoch, position.step)
    return position


def what_matters(config: RunConfig) -> dict[str, Any]:
    """What must not change between a run and its continuation; more epochs and another pace of records may."""
    train = {k: v for k, v in asdict(config.train).items() if k not in ("epochs", "checkpoint_steps", "log_steps")}
    model = {"name": config.model.name, **config.vista().to_dict()}
    return {"seed": config.seed, "data": asdict(config.data), "model": model, "train": train}


def _steps(checkpoints: Path) -> list[Path]:
    found = checkpoints.iterdir() if checkpoints.exists() else ()
    return sorted(path for path in found if re.fullmatch(r"step-\d{9,}", path.name))
