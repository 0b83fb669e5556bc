"""The batch refresh of everybody on a Ray cluster: Ray Data hands shards of users to actors, which write one server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vista_ext._extras import require
from vista_ext.runs import Run
from vista_ext.serve.job import Summarized
from vista_ext.serve.summarize import first_moments, open_on_server, refresh
from vista_ext.store import RedisConfig


class _Actor:
    """Opens model, data and store once; summarizes a batch of user ids."""

    def __init__(self, folder: str, server: RedisConfig, split: str, overrides: Sequence[str], device: str) -> None:
        self.run = Run.open(folder, overrides, device)
        self.store = open_on_server(server, self.run.store_spec())
        self.before = first_moments(self.run.dataset, split) if split else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        users = torch.from_numpy(batch["id"].astype(np.int64))
        choice = self.run.config.store
        written = refresh(
            self.run.vista,
            self.run.dataset,
            self.store,
            users=users,
            before=None if self.before is None else self.before[users],
            max_history=choice.max_history,
            users_per_batch=choice.users_per_batch,
        )
        return {"users": np.array([len(users)]), "written": np.array([written])}


def summarize_on_ray(
    folder: str,
    server: RedisConfig,
    *,
    actors: int = 1,
    split: str = "",
    overrides: Sequence[str] = (),
    device: str = "cpu",
) -> Summarized:
    """Summarize all users into a server with so many actors of the cluster that `ray.init` has joined (or a local one).

    Ray starts an actor that died again and repeats its shard. A job that is begun anew does everything again, which is
    harmless; for one that goes on where it was, `serve.job.summarize_all` under torchrun.

    Args:
        folder: of a trained run, which all nodes see, as they see its data.
        server: the store; made if it is not there.
        actors: each has the model and the data; with `device` "cuda" a GPU of its own.
        split: stop reading each user at its first sample of this split.
        overrides: of the run's configuration; `store.users_per_shard` is what an actor gets at a time.

    Returns:
        The exact counts.

    Raises:
        MissingExtraError: without the extra "ray".
    """
    data: Any = require("ray.data", extra="ray")
    run = Run.open(folder, overrides)
    run.note_users()
    done = data.range(run.dataset.num_users).map_batches(
        _Actor,
        fn_constructor_args=(folder, server, split, list(overrides), device),
        batch_size=run.config.store.users_per_shard,
        concurrency=actors,
        num_gpus=1 if device == "cuda" else 0,
    )
    rows = done.take_all()
    return Summarized(sum(int(row["users"]) for row in rows), sum(int(row["written"]) for row in rows), 0)
