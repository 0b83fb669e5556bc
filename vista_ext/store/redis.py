"""Summaries on a Redis or Valkey server, or a cluster of them: the same records as in the embedded store.

A record is a string under `<prefix>:{<user id>}:<model version>`, both in decimal; the braces put a user's keys on one
node. `<prefix>:spec` is what the store was published with, `<prefix>:versions` the set of model versions that were
written. A write sends the record to a key of its own, and a script gives it its name if nothing newer has that: large
values never pass through Lua, which would cost several times the write. `<prefix>:{<user id>}:erased` is an erasure.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vista_ext._extras import require
from vista_ext.store import erasure, record
from vista_ext.store import redis_scripts as scripts
from vista_ext.store.base import Erasures, StoreError, StoreSpec, StoreUnavailableError
from vista_ext.store.checks import check_integer
from vista_ext.store.environment import new_folder
from vista_ext.store.keyed import KeyedStore

# Users of a pipeline: more only makes replies queue up in the server's and the client's memory.
BATCH_RECORDS = 256
_UNNAMED_SECONDS = 300  # what a writer that died has sent goes away after this


@dataclass(frozen=True)
class RedisConfig:
    """Where a store is and how to get there. Nothing secret is ever shown or logged.

    Args:
        url: `redis://host:port/db`, or `rediss://` for TLS; of a cluster, any node's.
        cluster: whether it is a cluster.
        prefix: of all keys, letters, digits, and any of `._-`: several stores can share a server.
        username, password: of the server's user.
        timeout: seconds to wait for a connection, and for each reply.
        retries: how often a call is tried again at once when the connection breaks; writes may be repeated.
        tls: passed on to redis-py with `rediss://`: `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, ...

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """

    url: str = field(default="redis://127.0.0.1:6379/0", repr=False)
    cluster: bool = False
    prefix: str = "vista"
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    timeout: float = 5.0
    retries: int = 1
    tls: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not re.match(r"(rediss?|unix)://", self.url):
            raise ValueError("redis: url must start with redis://, rediss:// or unix://, found another scheme")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.prefix):
            raise ValueError(f"redis: prefix must be 1 to 64 letters, digits or any of ._-, found {self.prefix!r}")
        if not self.timeout > 0:
            raise ValueError(f"redis: timeout must be above 0, found {self.timeout}")
        check_integer("redis", "retries", self.retries, 0)
        if self.tls and not self.url.startswith("rediss://"):
            raise ValueError("redis: tls options need a url that starts with rediss://")
        for name in self.tls:
            if not name.startswith("ssl_"):
                raise ValueError(f"redis: tls options are those of redis-py that start with ssl_, found {name!r}")

    @classmethod
    def from_environment(cls, **changes: Any) -> RedisConfig:
        """With VISTA_REDIS_URL, VISTA_REDIS_USERNAME and VISTA_REDIS_PASSWORD where they are set; `changes` win."""
        names = {name: f"VISTA_REDIS_{name.upper()}" for name in ("url", "username", "password")}
        return cls(**({n: os.environ[v] for n, v in names.items() if v in os.environ} | changes))

    @property
    def where(self) -> str:
        """For messages: scheme, host and prefix, without credentials."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.split('?')[0].rpartition('@')[2]} ({self.prefix})"


class RedisStore(KeyedStore):
    """Summaries on a server. Made by `create` or `open`; may be shared between threads, which do not wait for another.

    What was written is acknowledged by the server when a call returns; how durable it is then is the server's
    configuration (appendonly, appendfsync, replicas). Each summary is written atomically, a call is not. An older
    event time never overwrites a newer one, whoever writes: the server decides. It compares a stored record's header,
    not its checksum, which readers do.
    """

    def __init__(self, client: Any, config: RedisConfig, spec: StoreSpec) -> None:
        super().__init__(spec, BATCH_RECORDS)
        self._client, self._config = client, config
        self._closed = False

    @classmethod
    def create(cls, config: RedisConfig, spec: StoreSpec) -> RedisStore:
        """Make a store and open it.

        Raises:
            StoreError: there is one already with this prefix. StoreUnavailableError: the server does not answer.
        """
        client = _connect(config)
        with _errors(config):
            if not client.set(f"{config.prefix}:spec", spec.to_json(), nx=True):
                raise StoreError(f"store {config.where}: expected a prefix where nothing is, found a store")
        return cls(client, config, spec)

    @classmethod
    def open(cls, config: RedisConfig, *, spec: StoreSpec | None = None) -> RedisStore:
        """Open an existing store.

        Args:
            spec: what the caller can read, as in `LmdbStore.open`. None: as the store was published.

        Raises:
            StoreError: no store there, or one of another layout. StoreUnavailableError: the server does not answer.
        """
        client = _connect(config)
        where = f"store {config.where}"
        with _errors(config):
            text = client.get(f"{config.prefix}:spec")
        if text is None:
            raise StoreError(f"{where}: no store with this prefix")
        return cls(client, config, StoreSpec.from_json(text, where).for_reader(spec, f"open: {where}"))

    def publish(self) -> None:
        """Make this object's spec (model version and `extra`) the one that `open` takes by default from now on."""
        self._call(lambda client: client.set(self._name("spec"), self.spec.to_json()))

    def _erase(self, users: np.ndarray, until: np.ndarray | None) -> int:
        if until is None:
            versions = self._versions()
            return self._unlink(np.repeat(users, len(versions)), np.tile(versions, len(users)))
        kept = list(zip(users.tolist(), (value.tobytes() for value in erasure.pack(users, until)), strict=True))
        parts = [kept[begin : begin + self._batch] for begin in range(0, len(kept), self._batch)]
        # First what keeps older summaries out, then what is there: with a version that was written until then.
        for part in parts:
            self._execute([("EVAL", scripts.KEEP_ERASURE, 1, self._erasure_key(user), value) for user, value in part])
        versions = self._versions()
        erased = 0
        for part in parts if len(versions) else ():
            names = {user: self._keys(np.full(len(versions), user), versions) for user, _ in part}
            commands = [("EVAL", scripts.ERASE, len(versions), *names[user], value) for user, value in part]
            erased += sum(self._execute(commands))
        return erased

    def erasures(self) -> Erasures:
        """As in `SummaryStore`."""
        return erasure.checked(f"store {self._config.where}", list(self._all_erasures().values()))

    def drop_erasures(self, before: int) -> int:
        """As in `SummaryStore`."""
        check_integer("drop_erasures", "before", before, -(2**63))
        found = self._all_erasures()
        erasure.checked(f"store {self._config.where}", list(found.values()))
        old = [(key, value) for key, value in found.items() if erasure.time_of(value) < before]
        parts = (old[begin : begin + self._batch] for begin in range(0, len(old), self._batch))
        return sum(sum(self._execute([("EVAL", scripts.DROP, 1, key, value) for key, value in part])) for part in parts)

    def erase_version(self, model_version: int) -> int:
        """Remove all summaries of one model version, after a roll-out; returns how many there were."""
        check_integer("erase_version", "model_version", model_version, 0)
        users, versions = self._all_keys()
        erased = self._unlink(users[versions == model_version], versions[versions == model_version])
        self._call(lambda client: client.srem(self._name("versions"), model_version))
        return erased

    def save_snapshot(self, path: Path | str) -> None:
        """Write all summaries into an embedded store at `path`; it is there completely or not at all.

        Each summary is whole. Those written while this runs may be in the copy or not.
        """
        from vista_ext.store.lmdb import LmdbStore

        with new_folder(Path(path), "snapshot") as folder:
            inside = folder / "store"
            with LmdbStore.create(inside, self.spec) as snapshot:
                for summaries in self:
                    snapshot.add(summaries)
                erased = self.erasures()
                snapshot.erase(erased.user_ids, erased.until)
            for file in inside.iterdir():
                file.rename(folder / file.name)
            inside.rmdir()

    def __len__(self) -> int:
        return len(self._all_keys()[0])

    def close(self) -> None:
        """Close the connections; closing twice is fine."""
        self._closed = True
        self._client.close()

    def _fetch(self, users: np.ndarray, versions: np.ndarray, newest: bool, landing: record.Landing) -> None:
        for begin in range(0, len(users), self._batch):
            part = slice(begin, begin + self._batch)
            found = versions[part].copy()
            values = self._execute([("GET", key) for key in self._keys(users[part], found)])
            for version in self._versions()[::-1] if newest and None in values else ():
                missing = [i for i, value in enumerate(values) if value is None]
                keys = self._keys(users[part][missing], np.full(len(missing), version))
                for i, value in zip(missing, self._execute([("GET", key) for key in keys]), strict=True):
                    values[i], found[i] = value, version
            landing.take(values, begin)
            landing.versions[part] = np.where(landing.sizes[part] >= 0, found, -1)

    def _write(
        self,
        users: np.ndarray,
        versions: np.ndarray,
        rows: np.ndarray,
        times: np.ndarray,
        newest_wins: bool,
        only_present: bool,
    ) -> int:
        records = record.pack(self.spec, users, versions, times, rows)
        nonce, flags = secrets.token_hex(8), (int(newest_wins), int(only_present))
        # Known before it is written: in a cluster the nodes keep no order, and an erasure looks for known versions.
        self._execute([("SADD", self._name("versions"), *np.unique(versions).tolist())])
        commands: list[tuple[Any, ...]] = []
        for user, key, value in zip(users.tolist(), self._keys(users, versions), records, strict=True):
            unnamed = self._name(f"{{{user}}}:new:{nonce}")
            header = value[: record.HEADER_BYTES].tobytes()
            commands += [
                ("SET", unnamed, value.data, "EX", _UNNAMED_SECONDS),
                ("EVAL", scripts.NAME, 3, unnamed, key, self._erasure_key(user), header, *flags),
            ]
        return sum(self._execute(commands)[1::2])

    def _unlink(self, users: np.ndarray, versions: np.ndarray) -> int:
        keys = self._keys(users, versions)
        parts = (keys[begin : begin + self._batch] for begin in range(0, len(keys), self._batch))
        return sum(sum(self._execute([("UNLINK", key) for key in part])) for part in parts)

    def _name(self, name: str) -> str:
        return f"{self._config.prefix}:{name}"

    def _keys(self, users: np.ndarray, versions: np.ndarray) -> list[str]:
        pairs = zip(users.tolist(), versions.tolist(), strict=True)
        return [self._name(f"{{{user}}}:{version}") for user, version in pairs]

    def _erasure_key(self, user: int) -> str:
        return self._name(f"{{{user}}}:erased")

    def _all_erasures(self) -> dict[bytes, bytes]:
        """Keys and values of all erasures; who is gone when it is fetched is left out."""
        keys = self._call(lambda client: list(client.scan_iter(match=self._name("{*}:erased"), count=1000)))
        found: dict[bytes, bytes] = {}
        for begin in range(0, len(keys), self._batch):
            part = keys[begin : begin + self._batch]
            values = self._execute([("GET", key) for key in part])
            found |= {key: value for key, value in zip(part, values, strict=True) if value is not None}
        return found

    def _versions(self) -> np.ndarray:
        """Model versions that were written, ascending."""
        names = self._call(lambda client: client.smembers(self._name("versions")))
        for name in names:
            if not re.fullmatch(rb"\d{1,19}", name) or int(name) >= 2**63:
                raise StoreError(f"store {self._config.where}: versions must be model versions, found {name[:40]!r}")
        return np.array(sorted(map(int, names)), dtype=np.int64)

    def _all_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and versions of all records, in order: held at once, since a server yields them in none."""
        pattern = re.compile(re.escape(self._name("")).encode() + rb"\{(0|-?[1-9]\d*)\}:(0|[1-9]\d*)")
        found = self._call(lambda client: list(client.scan_iter(match=self._name("{*}:*"), count=1000)))
        pairs = ((int(match[1]), int(match[2])) for match in map(pattern.fullmatch, found) if match)
        limit = 2**63
        keys = [(user, version) for user, version in pairs if -limit <= user < limit and version < limit]
        table = np.unique(np.array(keys, dtype=np.int64).reshape(-1, 2), axis=0)  # a scan may yield a key twice
        return table[:, 0].copy(), table[:, 1].copy()

    def _batches_of_keys(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        users, versions = self._all_keys()
        for begin in range(0, len(users), self._batch):
            yield users[begin : begin + self._batch], versions[begin : begin + self._batch]

    def _execute(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies to some commands, in one round trip (of a cluster, one to each node)."""
        execute = _execute_in_cluster if self._config.cluster else _execute
        return list(self._call(execute, commands)) if commands else []

    def _call(self, work: Callable[..., Any], *args: Any) -> Any:
        if self._closed:
            raise StoreError(f"store {self._config.where}: closed")
        with _errors(self._config):
            return work(self._client, *args)


def _execute(client: Any, commands: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
    pipe = client.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    return pipe.execute()


def _execute_in_cluster(client: Any, commands: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
    """One pipeline to each node. redis-py would send what failed again, one by one: a node that hangs would cost a
    timeout for each command. We send one of them alone, by which the client learns of a slot that has moved or a node
    that was replaced, and the others, if that went well, together once more.
    """
    cluster = require("redis.cluster", extra="redis")
    replies: list[Any] = [None] * len(commands)
    left = list(range(len(commands)))
    while left:
        stack = [cluster.PipelineCommand(commands[i], position=at) for at, i in enumerate(left)]
        pipe = client.pipeline(transaction=False)
        for i, reply in zip(left, pipe.send_cluster_commands(stack, False, False), strict=True):
            replies[i] = reply
        left = [i for i in left if isinstance(replies[i], Exception)]
        if left:
            first = left.pop(0)
            replies[first] = client.execute_command(*commands[first])
    return replies


def _connect(config: RedisConfig) -> Any:
    redis = require("redis", extra="redis")
    backoff, retry = (require(f"redis.{name}", extra="redis") for name in ("backoff", "retry"))
    options: dict[str, Any] = {"socket_timeout": config.timeout, "socket_connect_timeout": config.timeout}
    options["retry"] = retry.Retry(backoff.NoBackoff(), config.retries)
    options |= {n: v for n in ("username", "password") if (v := getattr(config, n)) is not None}
    with _errors(config):
        make = redis.RedisCluster if config.cluster else redis.Redis
        return make.from_url(config.url, **options, **config.tls)


@contextmanager
def _errors(config: RedisConfig) -> Iterator[None]:
    """redis-py's errors as the store's."""
    errors = require("redis.exceptions", extra="redis")
    refused = (errors.AuthenticationError, errors.AuthorizationError)
    away = (errors.ConnectionError, errors.TimeoutError, errors.ClusterDownError, errors.RedisClusterException)
    try:
        yield
    except refused as error:  # which redis-py counts among the errors of connecting
        raise StoreError(f"store {config.where}: {error}") from error
    except away as error:
        raise StoreUnavailableError(f"store {config.where}: {error}") from error
    except (errors.RedisError, OSError) as error:
        raise StoreError(f"store {config.where}: {error}") from error
