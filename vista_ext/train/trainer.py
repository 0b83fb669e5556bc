"""The training loop: seeded, resumable after a kill, with early stopping on the validation split."""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vista_ext.config import RunConfig, save_config
from vista_ext.data.batch import Batch
from vista_ext.data.dataset import EventDataset
from vista_ext.data.known import check_known, note_known
from vista_ext.models import Ranker, build_model
from vista_ext.processes import Processes
from vista_ext.progress import track
from vista_ext.train.checkpoint import Checkpoint, CheckpointError, open_checkpoint, restore_optimizer, save_checkpoint
from vista_ext.train.evaluate import predict, quality
from vista_ext.train.loss import Objective
from vista_ext.train.parallel import parallelize
from vista_ext.train.records import Records
from vista_ext.train.sharded import unsharded

log = logging.getLogger("vista")


@dataclass
class Position:
    """Where a run stands: what it takes to go on from a checkpoint exactly as if nothing had happened."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_auc: float = -1.0
    best_epoch: int = -1


def train(
    config: RunConfig,
    dataset: EventDataset,
    *,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> Ranker:
    """Train a model, or go on with the run that was begun in `config.folder`.

    Args:
        processes: joined, if there are several. Each trains on its part of every batch, and averages gradients with the
            others as `train.parallel` says; the first one validates (with "torchrec" all do, as one) and writes. All
            must see the same folder.

    Returns:
        The model of the epoch with the best AUC of the main task on "valid" (of the last epoch without that split), on
        the device ("torchrec": in the host's memory); also in the run's folder as checkpoint "best", beside the
        configuration.

    Raises:
        CheckpointError: if the folder holds a checkpoint that is damaged, or of another configuration, of more epochs,
            or of another number of processes.
        DataError: if the folder is that of a run of other users or items (`data.known`).
        ValueError: if there is nothing to train on; `train.parallel` "torchrec" in a process alone.
        MissingExtraError: "torchrec" without TorchRec.
        FloatingPointError: if the loss is not finite.
    """
    if not dataset.split_size("train"):
        raise ValueError(f"{dataset.path}: the train split is empty, expected samples to train on")
    check_known(Path(config.folder), dataset.path, dataset.user_sources, dataset.item_sources)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, dataset.schema, config.vista(), dataset.item_features)
    return _Training(config, dataset, model, torch.device(device), processes or Processes()).run()


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


class _Training:
    """A run in one of its processes."""

    def __init__(
        self, config: RunConfig, dataset: EventDataset, model: Ranker, device: torch.device, processes: Processes
    ) -> None:
        self.config, self.dataset, self.model, self.processes = config, dataset, model, processes
        self.device = device
        self.folder = Path(config.folder)
        self.checkpoints = self.folder / "checkpoints"
        self.position = Position()
        checkpoint = _begun(config, self.checkpoints, processes)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.tensors("model"))
        self.loss = parallelize(Objective(model, config.train, processes), device, processes)
        self.optimizer = make_optimizer(config, model)
        if processes.rank:  # the weights are those of the first process, dropout is its own
            torch.manual_seed(config.seed + (processes.rank << 32))
        if checkpoint is not None:
            restore_optimizer(self.optimizer, checkpoint, processes.rank)
            self.position = Position(**checkpoint.manifest["position"])
            self._tell("going on at epoch %d, step %d", self.position.epoch, self.position.step)
        self.records: Records | None = None

    def run(self) -> Ranker:
        """Train until it is done; the best model."""
        config, position = self.config, self.position
        with ExitStack() as stack:
            if not self.processes.rank:
                save_config(config)  # not before: the file of a run that cannot go on like this stays as it is
                note_known(self.folder, self.dataset.user_sources, self.dataset.item_sources)
                self.records = stack.enter_context(Records(self.folder, position.step))
            while position.epoch < config.train.epochs and not _is_done(config, position):
                self._train_epoch()
                self._judge()
                position.epoch, position.batch = position.epoch + 1, 0
                self._save()
        self.processes.sum(torch.zeros(()))  # the first process has written what all read now
        best = open_checkpoint(self.checkpoints / "best").model()
        return best if config.train.parallel == "torchrec" else best.to(self.device)

    def _train_epoch(self) -> None:
        choice, position = self.config.train, self.position
        self.model.train()
        begun, rows = time.monotonic(), 0
        for batch in self._shuffled():
            share, told = self.loss(batch.to(self.device))
            if not math.isfinite(told["loss"]):
                raise FloatingPointError(
                    f"step {position.step}: the loss is {told['loss']}; checkpoints hold earlier steps"
                )
            self.optimizer.zero_grad(set_to_none=True)
            share.backward()
            self.optimizer.step()
            rows += len(batch.users)
            position.step += 1
            position.batch += 1
            if position.step % choice.log_steps == 0:
                self._record(**told)
            if position.step % choice.checkpoint_steps == 0:
                self._save()
        seconds = time.monotonic() - begun
        rows = int(self.processes.sum(torch.tensor(rows)))
        self._tell(
            "epoch %d: %d rows in %.0f s (%.0f rows/s)", position.epoch, rows, seconds, rows / max(seconds, 1e-9)
        )

    def _shuffled(self) -> Iterator[Batch]:
        config, choice, position = self.config, self.config.train, self.position
        windows = {"request_window": config.data.request_window, "share_window": choice.share_window}
        total = self.dataset.num_batches("train", choice.requests_per_batch, **windows)
        batches = self.dataset.batches(
            "train",
            requests_per_batch=choice.requests_per_batch,
            max_history=config.data.max_history,
            shuffle_seed=config.seed * 10_000 + position.epoch,
            start_batch=position.batch,
            part=(self.processes.rank, self.processes.size),
            **windows,
        )
        return track(batches, f"epoch {position.epoch}", total - position.batch, unit="batches")

    def _judge(self) -> None:
        """Measure an epoch, and keep it if it is the best so far."""
        config, position, first = self.config, self.position, not self.processes.rank
        auc = torch.tensor(math.nan if first else 0.0, dtype=torch.float64)
        if self.dataset.split_size("valid"):
            with unsharded(self.loss):
                # Batches of the training's size take no more memory than it, and caches hold the temporaries of small
                # ones.
                size = config.train.requests_per_batch
                judges = first or config.train.parallel == "torchrec"  # the look-ups of one need the others
                found = quality(predict(self.model, self.dataset, "valid", config.data, size)) if judges else None
            if found is not None and first:
                auc.fill_(found.auc)
                self._record(**{f"valid/{name}": value for name, value in asdict(found).items()})
                self._tell(
                    "epoch %d: valid AUC %.4f, NE %.4f, gAUC %.4f", position.epoch, found.auc, found.ne, found.gauc
                )
        verdict = float(self.processes.sum(auc))  # the others add nothing, and wait
        # Without a verdict (no validation split, or one class in it) the latest epoch is kept.
        if not verdict <= position.best_auc:
            position.best_auc = verdict if verdict == verdict else position.best_auc
            position.best_epoch = position.epoch
            notes = {"epoch": position.epoch, "valid_auc": position.best_auc}
            save_checkpoint(self.checkpoints / "best", self.model, None, notes, write=first)

    def _save(self) -> None:
        random, first = self.processes.gather(torch.get_rng_state()), not self.processes.rank
        notes = {
            "position": asdict(self.position),
            "run": what_matters(self.config),
            "processes": self.processes.size,
        }
        path = self.checkpoints / f"step-{self.position.step:09d}"
        save_checkpoint(path, self.model, self.optimizer, notes, random, write=first)
        for older in _steps(self.checkpoints)[:-2] if first else ():
            shutil.rmtree(older)

    def _record(self, **values: float) -> None:
        if self.records is not None:
            self.records.write(self.position.step, **values)

    def _tell(self, *message: Any) -> None:
        if not self.processes.rank:
            log.info(*message)


def _is_done(config: RunConfig, position: Position) -> bool:
    return position.best_epoch >= 0 and position.epoch - 1 - position.best_epoch >= config.train.patience


def _begun(config: RunConfig, checkpoints: Path, processes: Processes) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one."""
    steps = _steps(checkpoints)
    newest = steps[-1].name if steps else "none"
    seen = processes.gather(torch.tensor(int(newest.removeprefix("step-")) if steps else -1))
    if any(int(step) != int(seen[0]) for step in seen):
        raise CheckpointError(
            f"{checkpoints}: expected a folder that all processes share, found {newest} as the newest checkpoint of "
            f"process {processes.rank} and step {int(seen[0])} of process 0"
        )
    if not steps:
        return None
    checkpoint = open_checkpoint(steps[-1])
    begun, wanted = checkpoint.manifest.get("run"), what_matters(config)
    if begun != wanted:
        differing = [k for k, v in wanted.items() if not isinstance(begun, dict) or begun.get(k) != v]
        raise CheckpointError(
            f"{checkpoint.path}: expected a run with this configuration, found another {', '.join(differing)}: "
            "choose another folder or remove this one"
        )
    size = checkpoint.manifest.get("processes", 1)
    if size != processes.size:
        raise CheckpointError(
            f"{checkpoint.path}: expected a run of {processes.size} processes (WORLD_SIZE), found one of {size}: start "
            "as many, choose another folder or remove this one"
        )
    position = Position(**checkpoint.manifest["position"])
    if position.epoch > config.train.epochs:
        raise CheckpointError(
            f"{checkpoint.path}: expected a run of at most train.epochs = {config.train.epochs} epochs, found one of "
            f"{position.epoch}: choose another folder or remove this one"
        )
    return checkpoint


def what_matters(config: RunConfig) -> dict[str, Any]:
    """What must not change between a run and its continuation; more epochs and another pace of records may."""
    train = {k: v for k, v in asdict(config.train).items() if k not in ("epochs", "checkpoint_steps", "log_steps")}
    model = {"name": config.model.name, **config.vista().to_dict()}
    return {"seed": config.seed, "data": asdict(config.data), "model": model, "train": train}


def _steps(checkpoints: Path) -> list[Path]:
    found = checkpoints.iterdir() if checkpoints.exists() else ()
    return sorted(path for path in found if re.fullmatch(r"step-\d{9,}", path.name))
