"""An LMDB environment, made safe: one per process, growing on its own, and an error where LMDB would crash.

Two named databases: "meta" holds the store's spec, "records" the records; two more the change feed of a store that has
one (feed.py). LMDB gives readers of any process a consistent view without blocking the writer, and makes a commit
durable before it returns.
"""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vista_ext.store import liblmdb
from vista_ext.store.base import StoreError, StoreSpec
from vista_ext.store.feed import LAST, TABLES, FeedTables

_SPEC_KEY = b"spec"
_DATABASES = 2 + len(TABLES)
_META_BYTES = 2 * 4096  # two pages, of at least this size, say where everything else is
# Sparse bytes kept behind the last page, more than a transaction of ours takes: see Environment._reserve_tail.
_TAIL_BYTES = 64 << 20

# LMDB's locks break when a process opens an environment twice, also by another path: keyed by device and inode.
_open: weakref.WeakValueDictionary[tuple[int, int], Environment] = weakref.WeakValueDictionary()
_open_lock = threading.Lock()


class Published(Protocol):
    """What an environment says of what it holds."""

    def to_json(self) -> bytes:
        """As it is kept."""


class Environment:
    """The environment at `path`, open for reading or for writing. Every failure is a StoreError naming the path."""

    def __init__(self, path: Path, *, readonly: bool) -> None:
        self.path, self.readonly = path, readonly
        self._data = path / "data.mdb"
        self._lmdb = liblmdb.engine()
        self._lock = threading.RLock()  # growing the map is only allowed while this process has no transaction
        self._pid = os.getpid()
        self._env: Any = None
        self.feed: FeedTables | None = None
        with _open_lock:
            self._open()

    def _open(self) -> None:
        # Before LMDB sees it: an empty file would be initialized, a short one mapped.
        if self._size() < _META_BYTES:
            raise StoreError(
                f"store {self.path}: data.mdb is truncated: expected at least {_META_BYTES} bytes, found {self._size()}"
            )
        stat = os.stat(self._data)
        identity = stat.st_dev, stat.st_ino
        other = _open.get(identity)
        if other is not None and other._env is not None:
            raise StoreError(f"store {self.path}: already open in this process (as {other.path}): share that object")
        with self._errors():
            # A map of 0 bytes asks for the size that the environment was left with.
            self._env = self._lmdb.open(
                str(self.path), map_size=0, max_dbs=_DATABASES, max_readers=512, readonly=self.readonly, create=False
            )
        try:
            self._check_size()
            try:
                self.meta, self.records = (self._env.open_db(n, create=False) for n in (b"meta", b"records"))
            except self._lmdb.NotFoundError:
                raise StoreError(f"store {self.path}: an LMDB environment, but not a summary store") from None
            except self._lmdb.Error as error:
                raise StoreError(f"store {self.path}: {error}") from error
            if not self.readonly:
                self._env.reader_check()  # slots of killed readers would keep old pages from being reused
        except BaseException:
            self.close()
            raise
        _open[identity] = self

    @classmethod
    def create(cls, path: Path, spec: Published, map_size: int) -> None:
        """Make a new environment; it appears at `path` complete or not at all."""
        lmdb = liblmdb.engine()
        with new_folder(path, "store") as folder:
            try:
                env = lmdb.open(str(folder), map_size=map_size, max_dbs=_DATABASES)
                try:
                    meta = env.open_db(b"meta")
                    env.open_db(b"records")
                    with env.begin(write=True, db=meta) as txn:
                        txn.put(_SPEC_KEY, spec.to_json())
                finally:
                    env.close()
            except lmdb.Error as error:
                raise StoreError(f"store {path}: {error} (map_size is {map_size})") from error

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._env is None

    def close(self) -> None:
        """Give the environment back; closing twice is fine."""
        with self._lock:
            env, self._env = self._env, None
            if env is not None:
                env.close()

    def published(self) -> bytes:
        """What it was published with, as JSON."""
        with self.read(self.meta) as txn:
            data = txn.get(_SPEC_KEY)
            return b"{}" if data is None else bytes(data)

    def read_spec(self) -> StoreSpec:
        """The spec it was published with; StoreError if that cannot be read."""
        return StoreSpec.from_json(self.published(), f"store {self.path}")

    def write_spec(self, spec: StoreSpec) -> None:
        """Replace the spec, durably."""
        self.write(lambda txn: txn.put(_SPEC_KEY, spec.to_json(), db=self.meta))

    def open_feed(self, *, create: bool) -> None:
        """Open the tables of the change feed, if they are not open yet.

        Raises:
            StoreError: there are none, and they are not to be made.
        """
        with self._lock, self._errors():
            if self.feed is not None:
                return
            with self.read(self.meta) as txn:
                present = txn.get(LAST) is not None
            if not (present or create):
                raise StoreError(f"store {self.path}: it has no change feed; opened for writing it can get one")
            while True:
                try:
                    feed, changed = (self._env.open_db(name, create=not present) for name in TABLES)
                    break
                except self._lmdb.MapFullError:
                    self._grow()
            self.feed = FeedTables(self.meta, feed, changed)
        if not present:
            # From here on every writer keeps the feed, those of other processes too.
            self.write(self.feed.note, ())

    def entries(self) -> int:
        """Number of records."""
        with self.read() as txn:
            return int(txn.stat(self.records)["entries"])

    @contextmanager
    def read(self, db: Any = None) -> Iterator[Any]:
        """A read transaction. Keep it short: pages that it may see cannot be reused by the writer."""
        with self._transaction(db, write=False) as txn:
            yield txn

    def write(self, work: Callable[..., int], *args: Any) -> int:
        """Run `work(transaction, *args)` in a write transaction and return its result once it is durable.

        `work` runs again, on a larger map, when the map is full: whatever it did before is undone.
        """
        if self.readonly:
            raise StoreError(f"store {self.path}: open for reading; to write, open it with readonly=False")
        while True:
            try:
                with self._transaction(None, write=True) as txn:
                    self._reserve_tail()
                    if self.feed is not None or txn.get(LAST, db=self.meta) is None:
                        result = work(txn, *args)
                        commits = True
                    else:  # another process has given the store a feed
                        commits = False
                if commits:
                    return result
                self.open_feed(create=False)
            except self._lmdb.MapFullError:
                self._grow()

    def _grow(self) -> None:
        with self._lock, self._errors():
            if self._env.reader_check() == 0:  # no killed reader holds pages that could be had instead
                self._env.set_mapsize(2 * self._env.info()["map_size"])

    def copy(self, folder: Path) -> None:
        """Write a consistent copy into an empty folder."""
        with self._lock:
            with self.read():
                pass  # adopts a map that another process has grown
            with self._errors():
                self._env.copy(str(folder))

    @contextmanager
    def _transaction(self, db: Any, *, write: bool) -> Iterator[Any]:
        with self._lock, self._errors():
            if self._env is None:
                raise StoreError(f"store {self.path}: closed")
            if self._pid != os.getpid():
                raise StoreError(
                    f"store {self.path}: opened by process {self._pid} and used in its fork {os.getpid()}: "
                    "open it after forking, or start processes by spawn"
                )
            self._check_size()
            try:
                txn = self._env.begin(db or self.records, write=write, buffers=True)
            except self._lmdb.MapResizedError:  # another process has grown the map
                self._env.set_mapsize(0)
                txn = self._env.begin(db or self.records, write=write, buffers=True)
            with txn:
                yield txn

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._lmdb.MapFullError:
            raise
        except (self._lmdb.Error, OSError) as error:
            raise StoreError(f"store {self.path}: {error}") from error

    def _size(self) -> int:
        try:
            return os.stat(self._data).st_size
        except OSError as error:
            raise StoreError(f"store {self.path}: no data.mdb can be read there ({error.strerror})") from error

    def _check_size(self) -> None:
        """A read behind the end of a mapped file kills the process (SIGBUS): find out before."""
        expected = _META_BYTES if self._size() < _META_BYTES else self._end_of_pages()
        size = self._size()  # asked last: a writer may just have made the file longer
        if size < expected:
            raise StoreError(
                f"store {self.path}: data.mdb is truncated: expected at least {expected} bytes, found {size}"
            )

    def _end_of_pages(self) -> int:
        return (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]

    def _reserve_tail(self) -> None:
        """Keep the file longer than its last page will be, without using disk space; the writer's lock is held.

        Pages that a transaction takes and drops again are counted but never written, so a sound file could end before
        its last page. With the tail, a file that does is truncated for certain.
        """
        needed = self._end_of_pages() + _TAIL_BYTES
        if self._size() < needed:
            os.truncate(self._data, needed)


@contextmanager
def new_folder(path: Path, what: str) -> Iterator[Path]:
    """A folder to fill that becomes `path`, synced, if the body succeeds, and disappears if it does not."""
    path = path.absolute()
    if os.path.lexists(path):
        raise StoreError(f"{what} {path}: expected a path where nothing is, found something")
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        for inside in folder.iterdir():
            _sync(inside)
        _sync(folder)
        folder.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise StoreError(f"{what} {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
