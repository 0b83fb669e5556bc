"""Rates of delivery beside those of the disk: store, snapshot, feed and queue, with the memory each takes.

    python -m bench.delivery_rates FOLDER --users 100000 [--tokens 128 --dim 256] [--cold]
        [--nats nats://127.0.0.1:4222/rates]

FOLDER is made and removed again; it takes about four times the rows. Every stage runs in a process of its own, and what
it wrote is read back and compared before its rate counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vista_ext.delivery import FeedConsumer, FeedProducer, deliver
from vista_ext.delivery.address import open_consumer, open_producer
from vista_ext.delivery.snapshot import Snapshot, diff, export_snapshot, import_snapshot
from vista_ext.store import LmdbStore, StoreSpec, Summaries

BATCH = 1024


def synthetic(spec: StoreSpec, users: int) -> Iterator[Summaries]:
    """Summaries by ascending user id, of bytes that no compression would shrink."""
    noise = torch.randint(
        0, 256, (BATCH, spec.row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for first in range(0, users, BATCH):
        ids = torch.arange(first, min(users, first + BATCH)) * 1_000_003
        rows = noise[: len(ids)] ^ (first // BATCH % 256)
        yield Summaries(ids, rows, torch.full_like(ids, 1), torch.zeros_like(ids))


def anonymous_memory() -> int:
    """Bytes of this process that are not pages of files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


def drop_page_cache() -> None:
    """Make the next reads come from disk: of everybody on this machine, so it is asked for, and takes root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def disk(folder: Path, spec: StoreSpec, users: int) -> int:
    """Write a file as large as the rows (at most 4 GiB), synced; what the disk itself does."""
    size = min(users * spec.row_bytes, 4 << 30)
    block = os.urandom(8 << 20)
    with (folder / "plain").open("wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return (size + len(block) - 1) // len(block) * len(block)


def disk_read(folder: Path, spec: StoreSpec, users: int) -> int:
    """Read that file from beginning to end."""
    block, total = bytearray(8 << 20), 0
    with (folder / "plain").open("rb") as file:
        while n := file.readinto(block):
            total += n
    return total


def fill(folder: Path, spec: StoreSpec, users: int) -> int:
    """Write the store."""
    with LmdbStore.create(folder / "store", spec) as store:
        assert sum(map(store.add, synthetic(spec, users))) == users
    return users * spec.row_bytes


def export(folder: Path, spec: StoreSpec, users: int) -> int:
    """Store to snapshot."""
    with LmdbStore.open(folder / "store") as store:
        assert export_snapshot(store, folder / "snapshot", spec) == users
    return users * spec.row_bytes


def read(folder: Path, spec: StoreSpec, users: int) -> int:
    """Read and check the snapshot."""
    assert sum(len(batch) for batch in Snapshot(folder / "snapshot").read()) == users
    return users * spec.row_bytes


def read_range(folder: Path, spec: StoreSpec, users: int) -> int:
    """Read and check a hundredth of its users."""
    first, last = users // 2 * 1_000_003, (users // 2 + users // 100) * 1_000_003
    found = sum(len(batch) for batch in Snapshot(folder / "snapshot").read(first, last))
    assert found == users // 100 + 1
    return found * spec.row_bytes


def compare(folder: Path, spec: StoreSpec, users: int) -> int:
    """Compare the snapshot with itself; the rate is of the rows that need not be read."""
    snapshot = Snapshot(folder / "snapshot")
    assert sum(changes.same for changes in diff(snapshot, snapshot)) == users
    return 2 * users * spec.row_bytes


def load(folder: Path, spec: StoreSpec, users: int) -> int:
    """Snapshot to store."""
    with LmdbStore.create(folder / "loaded", spec) as store:
        assert import_snapshot(Snapshot(folder / "snapshot"), store) == users == len(store)
    return users * spec.row_bytes


def feed(folder: Path, spec: StoreSpec, users: int) -> int:
    """Store to store through a change feed, the building of the feed included."""
    with LmdbStore.open(folder / "store", readonly=False) as source, LmdbStore.create(folder / "fed", spec) as target:
        assert deliver(FeedConsumer(source, "rates"), spec, target, idle_seconds=0).written == users == len(target)
    return users * spec.row_bytes


def write_with_feed(folder: Path, spec: StoreSpec, users: int) -> int:
    """Rewrite a tenth of a store that has a feed, scattered users."""
    with LmdbStore.open(folder / "store", readonly=False) as store:
        FeedProducer(store)
        return rewrite(store, spec, users)


def write_without_feed(folder: Path, spec: StoreSpec, users: int) -> int:
    """Rewrite a tenth of a store that has none."""
    with LmdbStore.open(folder / "loaded", readonly=False) as store:
        return rewrite(store, spec, users)


def rewrite(store: LmdbStore, spec: StoreSpec, users: int) -> int:
    chosen = torch.randperm(users, generator=torch.Generator().manual_seed(0))[: max(1, users // 10)]
    for ids in (chosen * 1_000_003).split(BATCH):
        rows = torch.zeros(len(ids), spec.row_bytes, dtype=torch.uint8)
        assert store.add(Summaries(ids, rows, torch.full_like(ids, 2), torch.zeros_like(ids))) == len(ids)
    return len(chosen) * spec.row_bytes


def publish(address: str, folder: Path, spec: StoreSpec, users: int) -> int:
    """Store to queue, acknowledged."""
    with (
        LmdbStore.open(folder / "store", readonly=False) as source,
        open_producer(address, spec) as producer,
    ):
        assert deliver(FeedConsumer(source, "publish"), spec, producer, idle_seconds=0).messages == users
    return users * spec.row_bytes


def consume(address: str, folder: Path, spec: StoreSpec, users: int) -> int:
    """Queue to store."""
    with LmdbStore.create(folder / "consumed", spec) as target, open_consumer(address, spec, "rates") as consumer:
        deliver(consumer, spec, target, idle_seconds=1)
        assert len(target) == users
    return users * spec.row_bytes


def measured(report: Any, stage: Callable[..., int], *arguments: Any) -> None:
    """Run a stage and send its bytes, seconds and the most memory it had beyond what it began with."""
    before = most = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    try:
        moved = stage(*arguments)
    finally:
        seconds = time.perf_counter() - begun
        done.set()
        watcher.join()
    report.send((moved, seconds, most - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--nats", default="")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each stage")
    given = parser.parse_args()
    spec = StoreSpec(given.scheme, given.tokens, given.dim)
    stages: list[Any] = [disk, disk_read, fill, export, read, read_range, compare, load, write_without_feed, feed]
    stages += [write_with_feed]
    given.folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    print(
        f"{given.users} users, {given.scheme}, {spec.row_bytes} bytes a row, {'cold' if given.cold else 'warm'}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print("| stage | MB | s | MB/s | memory beyond the process, MB |\n|---|---|---|---|---|")
    try:
        for stage in [*stages, *((publish, consume) if given.nats else ())]:
            if given.cold:
                drop_page_cache()
            mine, theirs = context.Pipe(duplex=False)
            first = (given.nats,) if stage in (publish, consume) else ()
            worker = context.Process(target=measured, args=(theirs, stage, *first, given.folder, spec, given.users))
            worker.start()
            theirs.close()
            moved, seconds, memory = mine.recv()
            worker.join()
            what = (stage.__doc__ or "").splitlines()[0].rstrip(".")
            print(f"| {what} | {moved / 1e6:.0f} | {seconds:.2f} | {moved / 1e6 / seconds:.0f} | {memory / 1e6:.0f} |")
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
