"""The configuration of a run: a YAML file and command-line overrides, checked against these dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vista_ext._extras import require
from vista_ext.models.config import PRESETS, VistaConfig
from vista_ext.store import StoreSpec
from vista_ext.yaml_config import ConfigError, read_config

FILE = "run.yaml"  # of a run's folder


@dataclass
class DataConfig:
    """What a model reads.

    Args:
        path: folder of an event data set.
        max_history: newest events of a history that training and evaluation read.
        request_window: seconds within which a user's candidates share one history.
        floor_item_prior: strength of the prior in the floors' item means (`vista_ext.data.floors`).
    """

    path: str = ""
    max_history: int = 512
    request_window: int = 0
    floor_item_prior: float = 20.0


@dataclass
class ModelChoice:
    """Which model.

    Args:
        name: "vista", "din" or "mean".
        preset: of `vista_ext.models.PRESETS`, the start for `options`.
        options: fields of `VistaConfig`.
    """

    name: str = "vista"
    preset: str = "tiny"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """How a model is trained (AdamW; binary cross entropy, mean over tasks).

    Args:
        epochs: passes over the training split, at most.
        requests_per_batch: requests in a step, over all processes; such that share a history count as one.
        share_window: seconds within which requests of a user share one history, read at the first one's moment: stage 1
            runs once for all of them. 0 for a history each.
        loss_weighting: "candidate" (all candidates count alike), "request" (all requests alike, whatever the number of
            their candidates) or "history" (all histories alike, whatever the requests that share them).
        parallel: how several processes train together: "ddp" (each has all of the model), "fsdp" (each keeps a part
            of parameters and optimizer state, and has the whole for the time of a step) or "torchrec" (as "ddp", but
            each keeps a part of the rows of the items' table, never has the whole, and asks the others for theirs).
        learning_rate, weight_decay: of everything but the embedding tables.
        table_learning_rate, table_weight_decay: of the embedding tables.
        precision: "float32" or "bfloat16", of the layers; parameters, gradients and optimizer are float32 either way,
            and so is whatever judges or serves the model.
        main_task_weight: weight of the first task's loss; the others have 1.
        patience: epochs without a better AUC of the main task on "valid" before training stops.
        checkpoint_steps: steps between checkpoints, besides one at the end of each epoch.
        log_steps: steps between records of the loss.
    """

    epochs: int = 10
    requests_per_batch: int = 256
    share_window: int = 0
    loss_weighting: str = "candidate"
    parallel: str = "ddp"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    table_learning_rate: float = 1e-3
    table_weight_decay: float = 1e-2
    precision: str = "float32"
    main_task_weight: float = 1.0
    patience: int = 2
    checkpoint_steps: int = 500
    log_steps: int = 20


@dataclass
class StoreConfig:
    """How summaries are kept.

    Args:
        path: of the store, relative to the run's folder.
        scheme: "int8", "int4" or "fp8_e4m3".
        group: values that share a scale; 0 for the scheme's default.
        users_per_batch: users summarized and written at a time.
        users_per_shard: users of a shard, the piece that `vista summarize` gives to a process and repeats when it was
            interrupted in it.
        max_history: newest events summarized; 0 for all.
    """

    path: str = "store"
    scheme: str = "int8"
    group: int = 0
    users_per_batch: int = 256
    users_per_shard: int = 4096
    max_history: int = 0


@dataclass
class RunConfig:
    """Everything that determines a run.

    Args:
        folder: where the run's files go.
        seed: of weights, order and dropout; below 2^63.
        threads: of torch; 0 leaves its own choice.
    """

    folder: str = "runs/default"
    seed: int = 0
    threads: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelChoice = field(default_factory=ModelChoice)
    train: TrainConfig = field(default_factory=TrainConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    def vista(self) -> VistaConfig:
        """The model's own configuration.

        Raises:
            ConfigError: naming the option.
        """
        if self.model.preset not in PRESETS:
            raise ConfigError(f"model.preset must be one of {', '.join(PRESETS)}, found {self.model.preset!r}")
        base = PRESETS[self.model.preset].to_dict()
        options = dict(self.model.options)
        embedding = options.get("embedding", {})
        if not isinstance(embedding, dict):
            raise ConfigError(f"model.options.embedding must be keys and values, found {embedding!r}")
        options["embedding"] = base["embedding"] | embedding
        try:
            return VistaConfig.from_dict(base | options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model.options: {error}") from error


_POSITIVE = (
    "data.max_history", "train.epochs", "train.requests_per_batch", "train.learning_rate", "train.table_learning_rate",
    "train.patience", "train.checkpoint_steps", "train.log_steps", "store.users_per_batch",
    "store.users_per_shard",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "threads", "data.request_window", "data.floor_item_prior", "train.share_window", "train.weight_decay",
    "train.table_weight_decay", "train.main_task_weight", "store.group", "store.max_history",
)  # fmt: skip


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a YAML file; None for the defaults.
        overrides: such as "train.epochs=3" or "model.options.num_seeds=32"; they win over the file.

    Raises:
        ConfigError: for a file or an override that cannot be read, a key that does not exist, a value of the wrong
            type or out of range.
    """
    config = read_config(RunConfig, path, overrides)
    check_config(config)
    return config


def save_config(config: RunConfig) -> None:
    """Write the configuration into the run's folder."""
    omegaconf = require("omegaconf", extra="run").OmegaConf
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    omegaconf.save(omegaconf.structured(config), folder / FILE)


def check_config(config: RunConfig) -> None:
    """Ranges and names; the types are the dataclasses'.

    Raises:
        ConfigError: naming the key, what was expected and what was found.
    """
    for names, least in ((_POSITIVE, "above 0"), (_NOT_NEGATIVE, "at least 0")):
        for name in names:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            fine = value > 0 if least == "above 0" else value >= 0
            if not fine or value == float("inf"):  # a NaN compares false
                raise ConfigError(f"{name} must be a finite number {least}, found {value}")
    if config.model.name not in ("vista", "din", "mean"):
        raise ConfigError(f"model.name must be vista, din or mean, found {config.model.name!r}")
    if config.train.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"train.precision must be float32 or bfloat16, found {config.train.precision!r}")
    if config.train.loss_weighting not in ("candidate", "request", "history"):
        found = f"{config.train.loss_weighting!r}"
        raise ConfigError(f"train.loss_weighting must be candidate, request or history, found {found}")
    if config.train.parallel not in ("ddp", "fsdp", "torchrec"):
        raise ConfigError(f"train.parallel must be ddp, fsdp or torchrec, found {config.train.parallel!r}")
    if config.store.scheme not in ("int8", "int4", "fp8_e4m3"):
        raise ConfigError(f"store.scheme must be int8, int4 or fp8_e4m3, found {config.store.scheme!r}")
    if config.seed >= 2**63:
        raise ConfigError(f"seed must be below 2^63, found {config.seed}")
    vista = config.vista()
    if config.model.name == "vista":
        try:
            StoreSpec(config.store.scheme, vista.num_seeds, vista.dim, config.store.group or None)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"store.scheme, store.group: {error}") from error
