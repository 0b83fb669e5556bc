"""A run's folder: `run.yaml`, checkpoints, metrics, the store. What every command after `train` starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from vista_ext.config import FILE, ConfigError, RunConfig, load_config
from vista_ext.data.batch import FeatureSchema
from vista_ext.data.dataset import DataError, EventDataset
from vista_ext.data.folder import read_ids
from vista_ext.data.known import check_known, note_known
from vista_ext.models import Ranker, Vista
from vista_ext.ops.cache_rows import Scheme
from vista_ext.serve.summarize import store_spec
from vista_ext.store import StoreSpec
from vista_ext.store.states import StateSpec
from vista_ext.train.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Run:
    """A trained run.

    Args:
        config: as it was trained, with later overrides.
        device: for the model.
    """

    config: RunConfig
    device: str = "cpu"

    @classmethod
    def open(cls, folder: Path | str, overrides: Sequence[str] = (), device: str = "cpu") -> Run:
        """Open a run's folder, wherever it lies now.

        Raises:
            ConfigError: if it holds no configuration.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise ConfigError(f"{folder}: expected the folder of a run, with a {FILE}, found none")
        config = load_config(file, [*overrides, f"folder={folder}"])
        if config.threads:
            torch.set_num_threads(config.threads)
        return cls(config, device)

    @cached_property
    def dataset(self) -> EventDataset:
        """The data set that the configuration names. Items that came after the training are the unknown one, 0.

        Raises:
            DataError: it is damaged, or not the one that the run knows, grown or not (`data.known`).
        """
        trained = FeatureSchema.from_dict(self.checkpoint.manifest["schema"])
        dataset = EventDataset(self.config.data.path, known_items=trained.num_items)
        check_known(Path(self.config.folder), dataset.path, dataset.user_sources, dataset.item_sources)
        return dataset

    def user_rows(self) -> dict[str, int]:
        """The users' rows by their ids of the origin, without reading the rest of the data set; noted as by
        `note_users`, since something is to be written by them."""
        folder, data = Path(self.config.folder), Path(self.config.data.path)
        users, items = read_ids(data)
        check_known(folder, data, users, items)
        note_known(folder, users, items)
        return {user: row for row, user in enumerate(users)}

    def note_users(self) -> None:
        """Note whose row is whose, before summaries are written: later data sets must agree (`data.known`).

        Raises:
            DataError: as `dataset`; or it has actions that came after the training, for which nothing stands in.
        """
        trained, found = self.checkpoint.manifest["schema"]["num_actions"], self.dataset.schema.num_actions
        if found > trained:
            expected = f"at most the {trained} actions of the training"
            raise DataError(self.dataset.path / "meta.json", "schema: num_actions", expected, f"{found}: train again")
        note_known(Path(self.config.folder), self.dataset.user_sources, self.dataset.item_sources)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The best checkpoint."""
        return open_checkpoint(Path(self.config.folder) / "checkpoints" / "best")

    @cached_property
    def model(self) -> Ranker:
        """The model of the best checkpoint on the device, in evaluation mode."""
        return self.checkpoint.model().to(self.device)

    @property
    def vista(self) -> Vista:
        """The model, if it is one that summarizes.

        Raises:
            ConfigError: if it is a baseline.
        """
        if not isinstance(self.model, Vista):
            raise ConfigError(f"model.name must be vista for this command, found {self.model.encoder.name!r}")
        return self.model

    @property
    def store_path(self) -> Path:
        """Of the summaries to serve from."""
        return Path(self.config.folder) / self.config.store.path

    def split_store_path(self, split: str) -> Path:
        """Of the summaries that stop reading at a split, which measure and do not serve."""
        return self.store_path.with_name(f"{self.store_path.name}-{split}")

    def store_spec(self, scheme: Scheme | None = None) -> StoreSpec:
        """How this run's summaries are stored. Their version is the checksum of the weights: summaries of other
        weights are another version."""
        store = self.config.store
        chosen: Scheme = scheme or store.scheme  # type: ignore[assignment]  # check_config knows the names
        version = self.checkpoint.manifest["crc32"]["model"]
        return store_spec(self.vista.config, chosen, store.group if scheme is None else 0, version)

    def state_spec(self) -> StateSpec:
        """Of the additive states of this run's model."""
        model = self.vista.config
        return StateSpec(model.summary_layers, model.heads, model.head_dim, self.checkpoint.manifest["crc32"]["model"])

    @property
    def states_path(self) -> Path:
        """Of these states."""
        return self.store_path.with_name(f"{self.store_path.name}-states")
