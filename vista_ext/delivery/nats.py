"""NATS JetStream as a queue: a stream with one subject for each user, a durable pull consumer for each group."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from vista_ext._extras import require
from vista_ext.delivery.message import Message
from vista_ext.delivery.queue import Consumer, Producer, QueueError, check_fits, window
from vista_ext.store import StoreSpec

T = TypeVar("T")
_RETRY_SECONDS = 0.1  # the first pause, which doubles
_ANSWER_SECONDS = 2.0  # for an answer, before it is asked for again; the longest pause
_AT_ONCE = 256  # messages whose acknowledgements are awaited together: more would only time out while they queue
_STUCK_SECONDS = 3.0  # without a connection, after which the client's own reconnecting is not waited for
_WEEK = 7 * 24 * 3600.0
_STREAM_FULL = 10077  # the server's code of an error that time, or a larger stream, heals

log = logging.getLogger(__name__)


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


class _Connection:
    """A connection whose event loop runs in a thread of its own, for callers that are not asynchronous.

    Args:
        options: of `nats.connect`, such as `user_credentials`; files for TLS as `tls_ca`, `tls_cert` and `tls_key`.
        patience: seconds that a server may be out of reach before a call is an error.
    """

    def __init__(self, servers: Sequence[str], stream: str, options: Mapping[str, Any], patience: float) -> None:
        self._nats = require("nats", extra="nats")
        self.errors = (require("nats.errors", extra="nats").Error, OSError, asyncio.TimeoutError)
        self.where = f"nats stream {stream} at {', '.join(servers)}"
        self.stream, self.patience = stream, patience
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats", daemon=True)
        self._thread.start()
        self._servers, self._options = list(servers), dict(options)
        self._lost = 0.0  # when the connection was first missed
        self._reviving = asyncio.Lock()
        self.client: Any = None
        try:
            self.run(self._connect(patience))
        except BaseException:
            self.close()
            raise

    async def _connect(self, seconds: float) -> None:
        options = dict(self._options)
        tls = {name: options.pop(f"tls_{name}", None) for name in ("ca", "cert", "key")}
        if any(tls.values()):
            options["tls"] = ssl.create_default_context(cafile=tls["ca"])
            if tls["cert"]:
                options["tls"].load_cert_chain(tls["cert"], tls["key"])

        said = ""

        async def report(error: Exception) -> None:
            nonlocal said
            if _text(error) != said:  # the client tries ten times a second
                said = _text(error)
                log.info("%s: %s", self.where, said)

        connecting = self._nats.connect(
            self._servers, error_cb=report, max_reconnect_attempts=-1, reconnect_time_wait=_RETRY_SECONDS, **options
        )
        try:
            self.client = await asyncio.wait_for(connecting, seconds)
        except TimeoutError:
            raise TimeoutError(f"no connection within {seconds:g} s: {said or 'no answer'}") from None
        self.jetstream = self.client.jetstream(timeout=_ANSWER_SECONDS)

    async def revive(self) -> None:
        """Replace a client that has been without a connection for a while: one whose server goes while it reconnects
        may stop trying, and does not say so."""
        async with self._reviving:
            now = time.monotonic()
            if self.client.is_connected:
                self._lost = 0.0
            elif not self._lost:
                self._lost = now
            elif now - self._lost > _STUCK_SECONDS:
                old = self.client
                try:
                    await self._connect(_ANSWER_SECONDS)
                    await asyncio.wait_for(old.close(), _ANSWER_SECONDS)
                except self.errors as error:
                    log.info("%s: %s", self.where, _text(error))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the loop and wait; a failure is a QueueError that names the stream."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except self.errors as error:
            raise QueueError(f"{self.where}: {_text(error)}") from error
        except BaseException:  # such as an interrupt: do not leave it running
            future.cancel()
            raise

    async def patiently(self, request: Callable[[], Coroutine[Any, Any, T]], until: float) -> T:
        """Ask until there is an answer, or the clock says `until`. An answer that refuses is final, unless the
        stream was full or the server is still starting."""
        pause = _RETRY_SECONDS
        while True:
            try:
                return await request()
            except self.errors as error:
                if self.refuses(error) or time.monotonic() >= until:
                    raise
            await asyncio.sleep(pause)
            await self.revive()
            pause = min(2 * pause, _ANSWER_SECONDS)

    def refuses(self, error: BaseException) -> bool:
        """Whether an error is the server's final word, rather than a matter of time."""
        if not isinstance(error, require("nats.js.errors", extra="nats").APIError):
            return False
        return error.code != 503 and error.err_code != _STREAM_FULL

    def ask(self, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """`patiently`, from outside the loop."""
        return self.run(self.patiently(request, time.monotonic() + self.patience))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result(2 * _ANSWER_SECONDS)
        except (*self.errors, TimeoutError) as error:
            log.info("%s: closing: %s", self.where, _text(error))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        try:
            if self.client is not None:
                await asyncio.wait_for(self.client.close(), _ANSWER_SECONDS)
        finally:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)


def create_stream(
    connection: _Connection, *, max_bytes: int | None = None, max_age: float = _WEEK, replicas: int = 1
) -> None:
    """Make the stream, if it is not there: on disk, keeping messages for `max_age` seconds, and refusing new ones,
    instead of dropping old ones, once it holds `max_bytes`."""
    api = require("nats.js.api", extra="nats")
    config = api.StreamConfig(
        name=connection.stream,
        subjects=[f"{connection.stream}.*"],
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.NEW,
        max_age=max_age,
        max_bytes=-1 if max_bytes is None else max_bytes,
        num_replicas=replicas,
    )

    async def make() -> None:
        try:
            await connection.jetstream.stream_info(connection.stream)
        except require("nats.js.errors", extra="nats").NotFoundError:
            await connection.jetstream.add_stream(config)

    connection.ask(make)


class NatsProducer(Producer):
    """Publishes into a JetStream stream, which is made if it is not there.

    Args:
        servers: such as "nats://127.0.0.1:4222".
        stream: its name; a user's subject is `<stream>.<user id>`.
        spec: the layout of the records.
        options: of the connection.
        patience: seconds that `publish` gives each window of messages.
        stream_options: `max_bytes`, `max_age` in seconds and `replicas`, of a stream that is made.
    """

    def __init__(
        self,
        servers: Sequence[str],
        stream: str,
        spec: StoreSpec,
        *,
        options: Mapping[str, Any] | None = None,
        patience: float = 30.0,
        stream_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._connection = _Connection(servers, stream, options or {}, patience)
        try:
            check_fits(self._connection.where, spec, self._connection.client.max_payload, "the server's max_payload")
            create_stream(self._connection, **(stream_options or {}))
        except BaseException:
            self.close()
            raise
        self._window = min(window(spec), _AT_ONCE)

    def publish(self, messages: Sequence[Message]) -> None:
        """As in `Producer`."""
        for begin in range(0, len(messages), self._window):
            self._connection.run(self._publish(messages[begin : begin + self._window]))

    async def _publish(self, messages: Sequence[Message]) -> None:
        # Of one user one after the other: a message that is asked for again must not overtake a later one.
        users: dict[bytes, list[Message]] = {}
        for message in messages:
            users.setdefault(message.key, []).append(message)
        until = time.monotonic() + self._connection.patience
        await asyncio.gather(*(self._publish_user(queue, until) for queue in users.values()))

    async def _publish_user(self, messages: Sequence[Message], until: float) -> None:
        stream = self._connection.stream
        for message in messages:
            send = partial(self._send, f"{stream}.{int(message.key)}", message.value)
            await self._connection.patiently(send, until)

    async def _send(self, subject: str, value: bytes) -> None:
        await self._connection.jetstream.publish(subject, value, stream=self._connection.stream)

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()


class NatsConsumer(Consumer):
    """Takes from a JetStream stream. Consumers of one group share its messages.

    Args:
        servers, stream, spec, options, stream_options: as of `NatsProducer`.
        group: a name; what the group has not acknowledged is kept under it in the server.
        redeliver_after: seconds after which a message that was polled and not committed comes again, to any consumer of
            the group. More than a batch takes.
        patience: seconds without a server after which `poll` gives up.
    """

    def __init__(
        self,
        servers: Sequence[str],
        stream: str,
        spec: StoreSpec,
        group: str,
        *,
        options: Mapping[str, Any] | None = None,
        redeliver_after: float = 30.0,
        patience: float = 30.0,
        stream_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._connection = _Connection(servers, stream, options or {}, patience)
        self._group, self._window = group, window(spec)
        self._polled: list[Any] = []
        self._reached = time.monotonic()
        api = require("nats.js.api", extra="nats")
        self._config = api.ConsumerConfig(
            ack_policy=api.AckPolicy.EXPLICIT, ack_wait=redeliver_after, max_ack_pending=4 * self._window
        )
        try:
            create_stream(self._connection, **(stream_options or {}))
            self._connection.ask(self._subscribe)
            self._warn_of_expired()
        except BaseException:
            self.close()
            raise

    async def _subscribe(self) -> None:
        # No limit on the client's side: a message that it drops would come again, but late.
        limits = {"pending_msgs_limit": -1, "pending_bytes_limit": -1}
        client, stream = self._connection.client, self._connection.stream
        self._subscription = await self._connection.jetstream.pull_subscribe(
            "", durable=self._group, stream=stream, config=self._config, **limits
        )
        self._client = client

    def poll(self, timeout: float) -> list[Message]:
        """As in `Consumer`."""
        messages = self._connection.run(self._fetch(max(timeout, 0.01)))
        self._polled += messages
        return [self._message(m) for m in messages]

    async def _fetch(self, timeout: float) -> list[Any]:
        connection, messages = self._connection, []
        try:
            if self._client is not connection.client:
                await self._subscribe()
            messages = await self._subscription.fetch(self._window, timeout)
        except TimeoutError:
            pass
        except connection.errors as error:
            if connection.refuses(error):
                raise
        if messages or connection.client.is_connected:
            self._reached = time.monotonic()
        elif time.monotonic() - self._reached > connection.patience:
            raise QueueError(f"{connection.where}: out of reach for {connection.patience:g} s")
        else:
            await asyncio.sleep(min(timeout, _RETRY_SECONDS))
            await connection.revive()
        return list(messages)

    def _message(self, message: Any) -> Message:
        key = message.subject.removeprefix(self._connection.stream + ".").encode()
        return Message(key, message.data, f"{message.subject} at {message.metadata.sequence.stream}")

    def commit(self) -> None:
        """As in `Consumer`. An acknowledgement that is lost with the server only makes its message come again."""
        polled, self._polled = self._polled, []

        async def acknowledge() -> None:
            for message in polled:
                await message.ack()
            await self._connection.client.flush()

        try:
            self._connection.run(acknowledge())
        except QueueError as error:
            log.info("%s; what was to be committed comes again", error)

    def lag(self) -> int:
        """As in `Consumer`."""
        info = self._connection.ask(self._info)
        return int(info.num_pending + info.num_ack_pending)

    async def _info(self) -> Any:
        return await self._connection.jetstream.consumer_info(self._connection.stream, self._group)

    def _warn_of_expired(self) -> None:
        connection = self._connection
        group = connection.ask(self._info)
        stream = connection.ask(lambda: connection.jetstream.stream_info(connection.stream))
        missed = stream.state.first_seq - 1 - group.ack_floor.stream_seq
        if missed > 0 and group.ack_floor.stream_seq > 0:
            log.warning(
                "%s: group %s missed up to %d messages that the stream no longer keeps: load a snapshot",
                connection.where, self._group, missed,
            )  # fmt: skip

    def close(self) -> None:
        """Give the connection back; the group stays in the server."""
        self._connection.close()
