"""Queues by address: `nats://host:port/STREAM`, `kafka://host:port,host:port/TOPIC`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from vista_ext.delivery.queue import Consumer, Producer
from vista_ext.store import StoreSpec

_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_SERVERS = re.compile(r"[A-Za-z0-9._:\[\],-]+")


def parse(address: str) -> tuple[str, str, str]:
    """Kind, servers and name of an address.

    Raises:
        ValueError: naming what was expected and found. A password is not shown.
    """
    parts = urlsplit(address)
    name = parts.path.removeprefix("/")
    if "@" in parts.netloc:
        raise ValueError("address: credentials belong into the options, found some in the address")
    if parts.scheme not in ("nats", "kafka"):
        raise ValueError(f"address must begin with nats:// or kafka://, found {address!r}")
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


def open_producer(address: str, spec: StoreSpec, options: Mapping[str, Any] | None = None) -> Producer:
    """A producer for records of a layout; `options` are those of the engine's class."""
    kind, servers, name = parse(address)
    if kind == "nats":
        from vista_ext.delivery.nats import NatsProducer

        return NatsProducer(_urls(servers), name, spec, options=options)
    from vista_ext.delivery.kafka import KafkaProducer

    return KafkaProducer(servers, name, spec, options=options)


def open_consumer(address: str, spec: StoreSpec, group: str, options: Mapping[str, Any] | None = None) -> Consumer:
    """A consumer of a group; `options` are those of the engine's class."""
    kind, servers, name = parse(address)
    check_name("group", group)
    if kind == "nats":
        from vista_ext.delivery.nats import NatsConsumer

        return NatsConsumer(_urls(servers), name, spec, group, options=options)
    from vista_ext.delivery.kafka import KafkaConsumer

    return KafkaConsumer(servers, name, spec, group, options=options)


def _urls(servers: str) -> list[str]:
    return [f"nats://{server}" for server in servers.split(",")]
