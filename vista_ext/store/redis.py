"""Summaries on a Redis or Valkey server, or a cluster of them: the same records as in the embedded store.

A user is one hash, so that all its model versions lie on one node: key `<prefix>:u:<user id>`, a field per model
version (in decimal), the record as its value. `<prefix>:spec` is what the store was published with.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista_ext._extras import require
from vista_ext.store import record
from vista_ext.store.base import StoreError, StoreSpec, StoreUnavailableError
from vista_ext.store.checks import check_integer, check_tensor
from vista_ext.store.environment import new_folder
from vista_ext.store.keyed import KeyedStore

# Users of a pipeline: more only makes replies queue up in the server's and the client's memory.
BATCH_RECORDS = 256
_TIME = record.HEADER.fields["event_time"][1]  # type: ignore[index]

# One round trip decides and writes, whoever else writes. KEYS: the user; ARGV: version, record, newest_wins,
# only_present. A stored record whose header is not that of this key is damage, which is overwritten. Times are compared
# as two words, since Lua's numbers do not hold all of int64. EVAL, not EVALSHA: a pipeline of a cluster has no other,
# and beside a record the script's text is nothing.
_WRITE = f"""
local stored, new = redis.call('HGET', KEYS[1], ARGV[1]), ARGV[2]
if not stored and ARGV[4] == '1' then return 0 end
if stored and ARGV[3] == '1' and #stored == #new and stored:sub(1, {_TIME}) == new:sub(1, {_TIME}) then
  local low, high = struct.unpack('<I4i4', stored, {_TIME + 1})
  local new_low, new_high = struct.unpack('<I4i4', new, {_TIME + 1})
  if high > new_high or (high == new_high and low > new_low) then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], new)
return 1
"""
_ERASE = "local n = redis.call('HLEN', KEYS[1]) redis.call('UNLINK', KEYS[1]) return n"


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
        self._call(lambda client: client.set(f"{self._config.prefix}:spec", self.spec.to_json()))

    def erase(self, user_ids: Tensor) -> int:
        """As in `SummaryStore`."""
        users = np.unique(check_tensor("erase", "user_ids", user_ids, torch.int64, (None,)))
        return sum(self._pipelined(users, lambda key, _: ("EVAL", _ERASE, 1, key)))

    def erase_version(self, model_version: int) -> int:
        """Remove all summaries of one model version, after a roll-out; returns how many there were."""
        check_integer("erase_version", "model_version", model_version, 0)
        return sum(
            sum(self._pipelined(users, lambda key, _: ("HDEL", key, model_version)))
            for users in self._batches_of_users()
        )

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
            for file in inside.iterdir():
                file.rename(folder / file.name)
            inside.rmdir()

    def __len__(self) -> int:
        return sum(sum(self._pipelined(users, lambda key, _: ("HLEN", key))) for users in self._batches_of_users())

    def close(self) -> None:
        """Close the connections; closing twice is fine."""
        self._closed = True
        self._client.close()

    def _fetch(self, users: np.ndarray, versions: np.ndarray, newest: bool, landing: record.Landing) -> None:
        for begin in range(0, len(users), self._batch):
            part = slice(begin, begin + self._batch)
            wanted = versions[part].copy()
            values = self._get(users[part], wanted)
            missing = [i for i, value in enumerate(values) if value is None]
            if missing and newest:
                others = self._pipelined(users[part][missing], lambda key, _: ("HKEYS", key))
                wanted[missing] = [max(map(self._version, fields), default=-1) for fields in others]
                missing = [i for i in missing if wanted[i] >= 0]
                for i, value in zip(missing, self._get(users[part][missing], wanted[missing]), strict=True):
                    values[i] = value
            landing.take(values, begin)
            landing.versions[part] = np.where(landing.sizes[part] >= 0, wanted, -1)

    def _get(self, users: np.ndarray, versions: np.ndarray) -> list[bytes | None]:
        fields = versions.tolist()
        return self._pipelined(users, lambda key, i: ("HGET", key, fields[i]))

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
        fields, options = versions.tolist(), (int(newest_wins), int(only_present))

        return sum(
            self._pipelined(users, lambda key, i: ("EVAL", _WRITE, 1, key, fields[i], records[i].data, *options))
        )

    def _batches_of_users(self) -> Iterator[np.ndarray]:
        """All users in order: eight bytes of each are held at a time, since a server yields them in none."""
        pattern = re.compile(re.escape(f"{self._config.prefix}:u:").encode() + rb"(0|-?[1-9]\d*)")
        found = self._call(lambda client: list(client.scan_iter(match=f"{self._config.prefix}:u:*", count=1000)))
        ids = (int(match[1]) for match in map(pattern.fullmatch, found) if match)
        # A scan may yield a key twice.
        users = np.unique(np.fromiter((i for i in ids if -(2**63) <= i < 2**63), dtype=np.int64))
        for begin in range(0, len(users), self._batch):
            yield users[begin : begin + self._batch]

    def _batches_of_keys(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for users in self._batches_of_users():
            fields = self._pipelined(users, lambda key, _: ("HKEYS", key))
            versions = [sorted(map(self._version, names)) for names in fields]
            together = np.fromiter(itertools.chain.from_iterable(versions), dtype=np.int64)
            yield np.repeat(users, [len(v) for v in versions]), together

    def _version(self, name: bytes) -> int:
        if not re.fullmatch(rb"\d{1,19}", name) or int(name) >= 2**63:
            raise StoreError(f"store {self._config.where}: a field must be a model version, found {name[:40]!r}")
        return int(name)

    def _pipelined(self, users: np.ndarray, command: Callable[[str, int], tuple[Any, ...]]) -> list[Any]:
        """The replies to a command for each user, `command(key, index)`, in one round trip (of a cluster, one to each
        node)."""
        keys = [f"{self._config.prefix}:u:{user}" for user in users.tolist()]
        commands = [command(key, i) for i, key in enumerate(keys)]
        execute = _execute_in_cluster if self._config.cluster else _execute
        replies: list[Any] = []
        for begin in range(0, len(commands), self._batch):
            replies += self._call(execute, commands[begin : begin + self._batch])
        return replies

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
