"""Queues by address: `nats://host:port/STREAM`, `kafka://host:port,host:port/TOPIC`, `feed:FOLDER_OF_A_STORE`."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from vista_ext.delivery.feed import FeedConsumer, FeedProducer
from vista_ext.delivery.queue import Consumer, Producer
from vista_ext.store import LmdbStore, StoreSpec

_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_SERVERS = re.compile(r"[A-Za-z0-9._:\[\],-]+")


def parse(address: str) -> tuple[str, str, str]:
    """Kind, servers and name of an address; of a feed, no servers and the folder.

    Raises:
        ValueError: naming what was expected and found. A password is not shown.
    """
    if address.startswith("feed:"):
        return "feed", "", address.removeprefix("feed:")
    parts = urlsplit(address)
    name = parts.path.removeprefix("/")
    if "@" in parts.netloc:
        raise ValueError("address: credentials belong into the options, found some in the address")
    if parts.scheme not in ("nats", "kafka"):
        raise ValueError(f"address must begin with nats://, kafka:// or feed:, found {address!r}")
    if not _SERVERS.fullmatch(parts.netloc) or not _NAME.fullmatch(name) or parts.query or parts.fragment:
        raise ValueError(f"address must look like {parts.scheme}://host:port,host:port/name, found {address!r}")
    return parts.scheme, parts.netloc, name


def check_name(what: str, name: str) -> str:
    """The name of a group, if it is one that every queue accepts.

    Raises:
        ValueError: naming `what`, expected and found.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} must be 1 to 200 letters, digits, _ and -, found {name!r}")
    return name


def open_producer(address: str, spec: StoreSpec, **options: Any) -> Producer:
    """A producer for records of a layout; `options` are further arguments of the engine's class."""
    kind, servers, name = parse(address)
    if kind == "feed":
        return FeedProducer(LmdbStore.open(name, readonly=False, spec=spec), owns=True)
    if kind == "nats":
        from vista_ext.delivery.nats import NatsProducer

        return NatsProducer(_urls(servers), name, spec, **options)
    from vista_ext.delivery.kafka import KafkaProducer

    return KafkaProducer(servers, name, spec, **options)


def open_consumer(address: str, spec: StoreSpec, group: str, **options: Any) -> Consumer:
    """A consumer of a group; `options` are further arguments of the engine's class."""
    kind, servers, name = parse(address)
    check_name("group", group)
    if kind == "feed":
        return FeedConsumer(LmdbStore.open(name, readonly=False, spec=spec), group, owns=True)
    if kind == "nats":
        from vista_ext.delivery.nats import NatsConsumer

        return NatsConsumer(_urls(servers), name, spec, group, **options)
    from vista_ext.delivery.kafka import KafkaConsumer

    return KafkaConsumer(servers, name, spec, group, **options)


def _urls(servers: str) -> list[str]:
    return [f"nats://{server}" for server in servers.split(",")]
