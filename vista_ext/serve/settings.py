"""How a scoring service runs: a YAML file and command-line overrides, checked against these dataclasses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vista_ext.serve.package import MAX_CANDIDATES, MAX_REQUESTS
from vista_ext.store import LmdbStore, RedisConfig, RedisStore, StoreSpec, SummaryStore
from vista_ext.yaml_config import ConfigError, read_config


@dataclass
class Limits:
    """What a call may ask for, and how much is worked on at a time.

    Args:
        requests: in a call.
        candidates: in a call, all requests together.
        body_bytes: of a call.
        waiting: calls that wait for a worker; one more is refused with status 429.
        connections: open at a time; one more is refused.
        timeout: seconds from the arrival of a call to its answer, or else status 503.
        drain: seconds that calls get to end after SIGTERM.
    """

    requests: int = 64
    candidates: int = 10_000
    body_bytes: int = 1 << 20
    waiting: int = 16
    connections: int = 1000
    timeout: float = 1.0
    drain: float = 10.0


@dataclass
class CacheSettings:
    """The hot cache of a worker; see `HotCache`.

    Args:
        slots: summaries that fit.
        refresh_after: seconds after which a summary is read from the store again.
        stale_for: seconds after its reading that a summary is served while the store does not answer.
        retry_after: seconds after the store did not answer in which it is not asked again.
    """

    slots: int = 10_000
    refresh_after: float = 600.0
    stale_for: float = 7200.0
    retry_after: float = 5.0


@dataclass
class Policy:
    """What a request gets whose summary cannot be used as it is: "raise", an error; "default", scores from the summary
    of a user without a history; "accept", scores from that summary. All but the first mark the answer as degraded.

    Args:
        unknown_user: the store has no summary of the user.
        store_unavailable: it does not answer, and the cache has none.
        damaged: what is stored is torn, corrupt or of another layout.
        other_version: there is only one that another model made.
        expired: its event time is more than `max_age` seconds ago.
        stale: it is overdue, and the store does not answer.
        max_age: seconds; None for no limit.
    """

    unknown_user: str = "default"
    store_unavailable: str = "default"
    damaged: str = "default"
    other_version: str = "default"
    expired: str = "accept"
    stale: str = "accept"
    max_age: int | None = None


REASONS = ("unknown_user", "store_unavailable", "damaged", "other_version", "expired", "stale")
_ACCEPTABLE = ("other_version", "expired", "stale")  # where there is a summary


@dataclass
class RedisSettings:
    """How to reach a store on a server; see `RedisConfig`. VISTA_REDIS_USERNAME and _PASSWORD are read where these are
    not given; a file can name a variable of the environment as `${oc.env:NAME}`."""

    cluster: bool = False
    prefix: str = "vista"
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    timeout: float = 0.25
    retries: int = 0
    tls: dict[str, Any] = field(default_factory=dict)


@dataclass
class ServiceConfig:
    """A service.

    Args:
        host, port: to listen on.
        workers: processes that score, each with its own cache.
        threads: of torch in each.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    threads: int = 1
    limits: Limits = field(default_factory=Limits)
    cache: CacheSettings = field(default_factory=CacheSettings)
    policy: Policy = field(default_factory=Policy)
    redis: RedisSettings = field(default_factory=RedisSettings)


def load_service_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> ServiceConfig:
    """Read a service's configuration; arguments and errors as in `vista_ext.config.load_config`."""
    config = read_config(ServiceConfig, path, overrides)
    limits, cache = config.limits, config.cache
    positive = {f"limits.{name}": value for name, value in asdict(limits).items() if name not in ("waiting", "drain")}
    positive |= {"workers": config.workers, "threads": config.threads, "cache.slots": cache.slots}
    positive |= {"redis.timeout": config.redis.timeout}
    not_negative = {f"cache.{name}": value for name, value in asdict(cache).items() if name != "slots"}
    not_negative |= {"port": config.port, "limits.waiting": limits.waiting, "limits.drain": limits.drain}
    not_negative |= {"policy.max_age": config.policy.max_age or 0, "redis.retries": config.redis.retries}
    for values, least in ((positive, "above 0"), (not_negative, "at least 0")):
        for name, value in values.items():
            fine = value > 0 if least == "above 0" else value >= 0
            if not fine or value == float("inf"):  # a NaN compares false
                raise ConfigError(f"{name} must be a finite number {least}, found {value}")
    for name, value, most in (
        ("port", config.port, 65535),
        ("limits.requests", limits.requests, min(cache.slots, MAX_REQUESTS)),
        ("limits.candidates", limits.candidates, MAX_CANDIDATES),
    ):
        if value > most:
            raise ConfigError(f"{name} must be at most {most}, found {value}")
    for reason in REASONS:
        allowed = ("raise", "default", "accept") if reason in _ACCEPTABLE else ("raise", "default")
        if (choice := getattr(config.policy, reason)) not in allowed:
            raise ConfigError(f"policy.{reason} must be one of {', '.join(allowed)}, found {choice!r}")
    return config


def open_store(address: str, spec: StoreSpec, redis: RedisSettings) -> SummaryStore:
    """The store at an address, a folder or a URL as `RedisConfig` takes it ("": VISTA_REDIS_URL), to read `spec`.

    Raises:
        ValueError: an address with credentials in it, which every process list would show.
        StoreError: there is no such store. StoreUnavailableError: the server does not answer.
    """
    if address and "://" not in address:
        return LmdbStore.open(Path(address), spec=spec)
    if "@" in address:
        raise ValueError("--store: credentials belong into the environment or the configuration, found some in the URL")
    given = asdict(redis) | {"url": address or None}
    options = {name: value for name, value in given.items() if value is not None}
    return RedisStore.open(RedisConfig.from_environment(**options), spec=spec)


def store_address(given: str, of_run: Path | None) -> str:
    """Where the summaries are, for `open_store`: as given, else of the run, else as the environment says.

    Raises:
        ValueError: none of these.
    """
    if given or of_run is not None:
        return given or str(of_run)
    if "VISTA_REDIS_URL" in os.environ:
        return ""
    raise ValueError("--store: expected a folder or a URL (or VISTA_REDIS_URL), found neither")
