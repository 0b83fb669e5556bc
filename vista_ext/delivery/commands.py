"""The commands `vista publish`, `vista consume`, `vista erase` and `vista snapshot`."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from vista_ext._extras import require

typer = require("typer", extra="run")

snapshot_app = typer.Typer(no_args_is_help=True, help="A store as Parquet files: export, import, compare.")

Store = Annotated[Path, typer.Argument(help="folder of a store")]
SnapshotFolder = Annotated[Path, typer.Argument(help="folder of a snapshot")]
Address = Annotated[str, typer.Argument(help="nats://host:port/STREAM, kafka://host:port/TOPIC or feed:STORE")]
Options = Annotated[
    Path | None, typer.Option(help="YAML file: `options` of the client (TLS, credentials as ${oc.env:NAME}), patience")
]
Idle = Annotated[float | None, typer.Option(help="end after so many seconds without anything new; never by default")]
OnPoison = Annotated[str, typer.Option(help="raise or skip: a message or record that cannot be used")]

_REPORT_SECONDS = 10.0

log = logging.getLogger(__name__)


def publish(
    store: Store,
    address: Address,
    name: Annotated[str, typer.Option(help="remembers in the store what was published, by this name")] = "",
    idle: Annotated[float | None, typer.Option(help="go on until nothing changed for so many seconds")] = 0.0,
    follow: Annotated[bool, typer.Option("--follow", help="go on for ever")] = False,
    on_poison: OnPoison = "raise",
    options: Options = None,
) -> None:
    """Publish what changed in a store since the last time; all of it the first time."""
    from vista_ext.delivery.address import check_name, open_producer, parse
    from vista_ext.delivery.feed import FeedConsumer
    from vista_ext.store import LmdbStore

    group = check_name("--name", name or "-".join(("publish", *parse(address)[::2])))
    with (
        LmdbStore.open(store, readonly=False) as source,
        FeedConsumer(source, group) as changes,
        open_producer(address, source.spec, **_options(options)) as producer,
    ):
        print(_run(changes, source.spec, producer, on_poison, None if follow else idle, "publishing"))


def consume(
    address: Address,
    store: Store,
    group: Annotated[str, typer.Option(help="consumers of one group share the messages")] = "vista",
    idle: Idle = None,
    on_poison: OnPoison = "raise",
    options: Options = None,
    layout: Annotated[str, typer.Option(help="of a store that is made: scheme,tokens,dim[,group]; int8,128,256")] = "",
    model_version: Annotated[int, typer.Option(help="of a store that is made: what its readers ask for")] = 0,
) -> None:
    """Fill a store from a queue: newest event time wins, written before it is committed."""
    from vista_ext.delivery.address import open_consumer
    from vista_ext.store import LmdbStore

    if not store.exists():
        if not layout:
            raise ValueError(f"store {store} is not there; --layout, such as int8,128,256, makes it")
        LmdbStore.create(store, _layout(layout, model_version)).close()
    with (
        LmdbStore.open(store, readonly=False) as target,
        open_consumer(address, target.spec, group, **_options(options)) as messages,
    ):
        print(_run(messages, target.spec, target, on_poison, idle, "consuming"))


@snapshot_app.command("export")
def snapshot_export(
    store: Store,
    folder: SnapshotFolder,
    buckets: Annotated[int, typer.Option(help="partitions, a power of two; 4 MiB of memory each")] = 16,
) -> None:
    """Write a store as Parquet; the folder appears when it is complete."""
    from vista_ext.delivery.snapshot import export_snapshot
    from vista_ext.progress import track
    from vista_ext.store import LmdbStore

    with LmdbStore.open(store) as source, _rate(source.spec.row_bytes) as done:
        batches = track(source, f"writing {folder}", len(source), unit="users", size=len)
        done(export_snapshot(batches, folder, source.spec, buckets, erasures=source.erasures))


@snapshot_app.command("import")
def snapshot_import(
    folder: SnapshotFolder,
    store: Store,
    first: Annotated[int | None, typer.Option(help="smallest user id")] = None,
    last: Annotated[int | None, typer.Option(help="largest user id")] = None,
) -> None:
    """Merge a snapshot, or some of its users, into a store, which is made if it is not there. Who is erased in the
    snapshot is erased in the store."""
    from vista_ext.delivery.snapshot import Snapshot, import_snapshot
    from vista_ext.progress import working
    from vista_ext.store import LmdbStore

    snapshot = Snapshot(folder)
    if not store.exists():
        LmdbStore.create(store, snapshot.spec).close()
    with LmdbStore.open(store, readonly=False) as target, _rate(snapshot.spec.row_bytes) as done:
        target.spec.require_layout_of(snapshot.spec, f"snapshot {folder}")
        with working(f"reading {folder}", len(snapshot), "users") as advance:
            written = import_snapshot(snapshot, target, first, last, on_batch=advance)
        done(written)


@snapshot_app.command("diff")
def snapshot_diff(
    before: SnapshotFolder,
    after: SnapshotFolder,
    users: Annotated[bool, typer.Option("--users", help="name each changed summary: a CSV on the terminal")] = False,
) -> None:
    """What changed between two snapshots: added, removed, newer, older, rewritten, and users erased."""
    from vista_ext.delivery.snapshot import Snapshot, diff, erased_since
    from vista_ext.progress import track

    old, new = Snapshot(before), Snapshot(after)
    counts: Counter[str] = Counter()
    if users:
        print("user_id,model_version,change,event_time_before,event_time_after")
    for changes in track(diff(old, new), "comparing", len(old.files), unit="buckets"):
        kinds = changes.kinds
        counts["same"] += changes.same
        counts.update(kinds)
        for kind, a, b in zip(kinds, changes.before.tolist(), changes.after.tolist(), strict=True) if users else ():
            user, version = (b if kind == "added" else a)[:2]
            print(f"{user},{version},{kind},{'' if kind == 'added' else a[2]},{'' if kind == 'removed' else b[2]}")
    erased = erased_since(old, new)
    counts["erased"] = len(erased)
    if users:
        for user, until in zip(erased.user_ids.tolist(), erased.until.tolist(), strict=True):
            print(f"{user},,erased,,{until}")
    else:
        kinds_of_all = ("same", "added", "removed", "newer", "older", "rewritten", "erased")
        print(", ".join(f"{counts[kind]} {kind}" for kind in kinds_of_all))


def erase(
    store: Store,
    users: Annotated[
        list[str] | None,
        typer.Argument(
            help="user ids of the store: row numbers of users.parquet, not the ids that `vista score` takes"
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="a user id on each line")] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="folder of the run: user ids are those of the source, as `vista score` takes them"),
    ] = None,
    until: Annotated[int | None, typer.Option(help="event time in seconds; by default now, of this clock")] = None,
) -> None:
    """Erase users, here and, through feed, queue and snapshots, wherever their summaries went. Nothing of them with an
    event time up to `until` is accepted again."""
    import torch

    from vista_ext.store import LmdbStore
    from vista_ext.store.checks import check_integer

    given = [("users", user) for user in users or ()] + (_ids(file) if file else [])
    ids = _rows_of(run, given) if run else [_integer(where, text) for where, text in given]
    for user in ids:
        check_integer("erase", "users", user, -(2**63))
    chosen = torch.tensor(ids, dtype=torch.int64)
    if not len(chosen):
        raise ValueError("erase: expected user ids or --file, found neither")
    moment = int(time.time()) if until is None else until
    with LmdbStore.open(store, readonly=False) as target:
        removed = target.erase(chosen, torch.full_like(chosen, moment))
    print(f"{len(chosen.unique())} users erased until {moment}, {removed} summaries removed")


def register(app: Any) -> None:
    """Add the commands to the command line."""
    app.command()(publish)
    app.command()(consume)
    app.command()(erase)
    app.add_typer(snapshot_app, name="snapshot")


def _run(consumer: Any, spec: Any, target: Any, on_poison: str, idle: float | None, what: str) -> str:
    """Deliver under a bar until idle or told to stop; the lag is reported every few seconds."""
    from vista_ext.delivery.deliver import Delivered, deliver
    from vista_ext.progress import working

    begun = reported = time.monotonic()

    with working(what, None if idle is None else consumer.lag(), "users") as advance, _stopped_by_signals() as stop:

        def on_batch(done: Delivered, messages: int) -> None:
            nonlocal reported
            advance(messages)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                log.info("%s: %s; lag %d", what, done, consumer.lag())

        done = deliver(
            consumer, spec, target, on_poison=on_poison, idle_seconds=idle, stop=stop, on_batch=on_batch  # type: ignore[arg-type]
        )  # fmt: skip
        lag = consumer.lag()
    return f"{done}; lag {lag}; {done.bytes / 1e6 / (time.monotonic() - begun):.0f} MB/s"


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and an interrupt set, so that the batch at hand is finished and committed."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _rate(row_bytes: int) -> Iterator[Callable[[int], None]]:
    begun = time.monotonic()

    def done(summaries: int) -> None:
        seconds = time.monotonic() - begun
        print(f"{summaries} summaries written in {seconds:.1f} s, {summaries * row_bytes / 1e6 / seconds:.0f} MB/s")

    yield done


def _options(path: Path | None) -> dict[str, Any]:
    """Arguments of the engine's class in `vista_ext.delivery`; its `options` are the client's own."""
    if path is None:
        return {}
    omegaconf = require("omegaconf", extra="run")
    try:
        values = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(path), resolve=True)
    except Exception as error:  # of YAML, of an interpolation, of the file
        raise ValueError(f"--options: {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--options: {path}: expected key: value pairs, found {type(values).__name__}")
    return values


def _ids(path: Path) -> list[tuple[str, str]]:
    """Where a user id stands, and the id."""
    try:
        lines = path.read_text().split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--file: {path}: {error}") from error
    stripped = enumerate(map(str.strip, lines), 1)
    return [(f"--file: {path}: line {number}", text) for number, text in stripped if text]


def _integer(where: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{where} must be a user id, found {text[:40]!r} (--run takes ids of the source)") from error


def _rows_of(run: Path, given: list[tuple[str, str]]) -> list[int]:
    """The users of a store by their ids of the source."""
    from vista_ext.runs import Run

    rows = Run.open(run).user_rows()
    if unknown := [f"{where} {text[:40]!r}" for where, text in given if text not in rows]:
        raise ValueError(f"--run {run}: expected ids of its data set, found others: {', '.join(unknown[:5])}")
    return [rows[text] for _, text in given]


def _layout(text: str, model_version: int) -> Any:
    from vista_ext.store import StoreSpec

    scheme, *numbers = text.split(",")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--layout must look like int8,128,256 or int4,128,256,64, found {text!r}")
    group = int(numbers[2]) if len(numbers) == 3 else None
    return StoreSpec(scheme, int(numbers[0]), int(numbers[1]), group, model_version)  # type: ignore[arg-type]
