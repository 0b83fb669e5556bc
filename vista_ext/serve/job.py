"""The batch refresh of everybody: cut into shards, shared among processes, taken up where it was cut off."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vista_ext.data.dataset import EventDataset
from vista_ext.models import Vista
from vista_ext.processes import Processes
from vista_ext.progress import track
from vista_ext.serve.summarize import refresh
from vista_ext.store import ReadPolicy, SummaryStore

log = logging.getLogger("vista")

_REPORT_SECONDS = 10.0
_LENIENT = ReadPolicy(on_miss="flag", on_version_mismatch="miss", on_damage="miss")


@dataclass(frozen=True)
class Summarized:
    """What a batch refresh did, over all processes.

    Args:
        users: summarized.
        written: summaries that are in the store now; the others were overtaken by newer ones.
        resumed: of the users, those whose shards an interrupted run had finished.
    """

    users: int
    written: int
    resumed: int

    def __str__(self) -> str:
        earlier = f" ({self.resumed} users by an interrupted run)" if self.resumed else ""
        return f"{self.written} summaries written{earlier}"


class Journal:
    """The finished shards of a job: a file for each, made when the store has the rows. It knows nothing of processes,
    so a job may go on with another number of them.

    Args:
        folder: of the journals of a store. Of several jobs on one store only the latest can go on: what it finds of
            another one it removes, since that one's shards may be overwritten now.
        job: what makes two runs the same job, as JSON holds it.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        text = json.dumps(job, sort_keys=True)
        self.folder = folder / f"{zlib.crc32(text.encode()):08x}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for other in folder.iterdir():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        (self.folder / "job.json").write_text(text + "\n")

    def finished(self, shard: int) -> int | None:
        """How many summaries were written of a shard; None if it is not finished."""
        try:
            return int((self.folder / f"shard-{shard}").read_text())
        except (OSError, ValueError):  # a torn file, after a loss of power: the shard is done again
            return None

    def finish(self, shard: int, written: int) -> None:
        """Note a shard that the store has."""
        unfinished = self.folder / f"shard-{shard}.{os.getpid()}.tmp"
        unfinished.write_text(f"{written}\n")
        unfinished.rename(self.folder / f"shard-{shard}")

    def close(self) -> None:
        """Forget the job, which is complete; any process may, and all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # another process was faster, or has begun another job
            self.folder.parent.rmdir()


def summarize_all(
    model: Vista,
    dataset: EventDataset,
    store: SummaryStore,
    journal: Path,
    *,
    before: Tensor | None = None,
    max_history: int = 0,
    users_per_batch: int = 256,
    users_per_shard: int = 4096,
    processes: Processes | None = None,
) -> Summarized:
    """Summarize all users into a store. Killed at any moment and begun again, with any number of processes, it goes on
    with the shards that are not finished and ends with the same bytes in the store. A finished shard of which the
    store has lost somebody is done again.

    Shard i is the task of process i modulo their number. Batches never reach beyond a shard, so what a summary's
    rounding depends on does not depend on the processes.

    Args:
        journal: folder for the notes of finished shards; removed when everything is done.
        before: int64 `[users]`, seconds: only earlier events are read; all by default.
        max_history: newest events read of each user; 0 for all.
        users_per_shard: what is repeated at most, by each process, after an interruption.
        processes: among which the work is shared, joined if there are several; this one alone by default.

    Returns:
        The exact counts over all processes, in each of them.
    """
    processes = processes or Processes()
    everybody = torch.arange(dataset.num_users)
    moments = dataset.end_of_events(everybody) if before is None else before
    spec = store.spec
    notes = Journal(
        journal,
        {
            "model_version": spec.model_version,
            "layout": [spec.scheme, spec.tokens, spec.dim, spec.group],
            "users": dataset.num_users,
            "events": dataset.num_events,
            "moments": zlib.crc32(moments.numpy().tobytes()),
            "max_history": max_history,
            "users_per_shard": users_per_shard,
        },
    )
    shards = list(enumerate(everybody.split(users_per_shard)))[processes.rank :: processes.size]
    share, users, written, resumed = sum(len(who) for _, who in shards), 0, 0, 0
    begun = reported = time.monotonic()
    for shard, who in track(shards, "all users", share, unit="users", size=lambda s: len(s[1])):
        done = notes.finished(shard)
        if done is None or not _has_all(store, who):
            done = refresh(
                model,
                dataset,
                store,
                users=who,
                before=moments[who],
                max_history=max_history,
                users_per_batch=users_per_batch,
            )
            notes.finish(shard, done)
        else:
            resumed += len(who)
        users, written, now = users + len(who), written + done, time.monotonic()
        if now - reported > _REPORT_SECONDS or users == share:
            reported = now
            rate = (users - resumed) / max(now - begun, 1e-9)
            log.info(
                "process %d of %d: %d of %d users, %.0f users/s", processes.rank, processes.size, users, share, rate
            )
    totals = processes.sum(torch.tensor([users, written, resumed])).tolist()
    # Nobody gets here before everybody has finished.
    notes.close()
    return Summarized(*totals)


def _has_all(store: SummaryStore, users: Tensor) -> bool:
    return bool(store.find(users, _LENIENT).hits.all())
