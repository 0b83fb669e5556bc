"""Scoring over HTTP: an event loop that accepts, bounds and counts calls, and worker processes that answer them."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any

from vista_ext._extras import require
from vista_ext.serve import worker
from vista_ext.serve.metrics import ServiceMetrics
from vista_ext.serve.settings import ServiceConfig
from vista_ext.serve.worker import CallError, Reply, ScoreCall, Settings, error_body
from vista_ext.store.metrics import CacheStats

fastapi = require("fastapi", extra="serve")
_requests = require("starlette.requests", extra="serve")
_log = logging.getLogger(__name__)

_RETRY_SECONDS = "1"  # what Retry-After says: a queue of this service is shorter than that


class Service:
    """The state behind the routes.

    Args:
        config: limits.
        make_pool: makes the executor whose workers were given their settings (`worker.configure`).
    """

    def __init__(self, config: ServiceConfig, make_pool: Callable[[], Executor]) -> None:
        self.config, self._make_pool = config, make_pool
        self._stats: dict[int, CacheStats] = {}
        self._lock = threading.Lock()
        self._open = 0  # calls given to the pool and not ended, those included for which nobody waits any more
        self._usual = 0.0  # seconds at work on a call, of late
        self.metrics = ServiceMetrics(lambda: self._open, lambda: list(self._stats.values()))
        self.facts: dict[str, Any] = {}
        self.ready = False
        self._pool = make_pool()

    def start(self) -> None:
        """Load model and store in all workers.

        Raises:
            What `worker.load` raises.
        """
        for loaded in [self._pool.submit(worker.load) for _ in range(self.config.workers)]:
            self._loaded(loaded)

    def stop(self) -> None:
        """End the workers, after what they are doing."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def score(self, request: Any) -> Any:
        """POST /score."""
        begin = time.monotonic()
        try:
            reply = await self._answer(request, begin + self.config.limits.timeout)
            status, body = reply.status, reply.body
            self._count(reply)
        except CallError as error:
            status, body = error.status, error_body(str(error))
        except Exception:  # of a worker that could not load, such as a store of another layout
            _log.exception("a call failed")
            status, body = 500, error_body("the call failed")
        self.metrics.calls.labels(str(status)).inc()
        self.metrics.seconds.observe(time.monotonic() - begin)
        headers = {"Retry-After": _RETRY_SECONDS} if status in (429, 503) else None
        return fastapi.Response(body, status, headers, "application/json")

    async def _answer(self, request: Any, deadline: float) -> Reply:
        pool = self._pool
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                body = await self._read(request)
                if self._is_full(deadline):
                    self.metrics.rejected.labels("overload").inc()
                    raise CallError(429, "too many calls at a time")
                reply = await self._submit(body, deadline)
        except TimeoutError:
            reply = None
        except _requests.ClientDisconnect:
            self.metrics.rejected.labels("disconnected").inc()
            raise CallError(400, "the connection was closed") from None
        except BrokenExecutor:
            self.metrics.rejected.labels("worker_lost").inc()
            self._restart(pool)
            raise CallError(503, "a worker was lost") from None
        if reply is None:
            self.metrics.rejected.labels("timeout").inc()
            raise CallError(503, f"no answer within {self.config.limits.timeout} seconds")
        return reply

    async def _read(self, request: Any) -> bytes:
        most, body = self.config.limits.body_bytes, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                self.metrics.rejected.labels("body").inc()
                raise CallError(413, f"the body must be at most {most} bytes")
        return bytes(body)

    def _submit(self, body: bytes, deadline: float) -> asyncio.Future[Reply | None]:
        job = self._pool.submit(worker.work, body, deadline)
        with self._lock:
            self._open += 1
        job.add_done_callback(self._ended)
        return asyncio.wrap_future(job)

    def _ended(self, job: Future[Reply | None]) -> None:
        reply = None if job.cancelled() or job.exception() else job.result()
        with self._lock:
            self._open -= 1
            if reply is not None:
                self._usual += (reply.seconds - self._usual) * (0.1 if self._usual else 1.0)

    def _is_full(self, deadline: float) -> bool:
        """Whether another call would find no place, or its answer come too late: work on those would be wasted, and a
        queue in which everybody waits almost too long answers nobody."""
        workers = self.config.workers
        expected = time.monotonic() + self._usual * (self._open // workers + 1)
        return self._open >= workers + self.config.limits.waiting or (self._open > 0 and expected > deadline)

    def _restart(self, pool: Executor) -> None:
        """New workers instead of a pool that lost one, which several calls may have seen."""
        if pool is not self._pool:
            return
        _log.error("a worker was lost; starting anew")
        self._set_ready(False)
        self._stats.clear()
        pool.shutdown(wait=False)
        self._pool = self._make_pool()
        for _ in range(self.config.workers):
            self._pool.submit(worker.load).add_done_callback(self._loaded)

    def _loaded(self, loaded: Future[dict[str, Any]]) -> None:
        self.facts = loaded.result()
        self.metrics.model.info({name: str(value) for name, value in self.facts.items()})
        self._set_ready(True)

    def _set_ready(self, ready: bool) -> None:
        self.ready = ready
        self.metrics.ready.set(ready)

    def _count(self, reply: Reply) -> None:
        metrics = self.metrics
        metrics.work.observe(reply.seconds)
        metrics.candidates.inc(reply.candidates)
        for reason, count in reply.reasons.items():
            metrics.degraded.labels(reason).inc(count)
        for age in reply.ages:
            metrics.ages.observe(age)
        if reply.status in (413, 422):
            metrics.rejected.labels("invalid").inc()
        self._stats[reply.process] = reply.stats
        if not self.ready:
            self._set_ready(True)


def create_app(service: Service) -> Any:
    """The routes of a service: POST /score, GET /health, /ready, /metrics, /openapi.json."""
    responses = require("fastapi.responses", extra="serve")
    app = fastapi.FastAPI(title="vista", docs_url=None, redoc_url=None)
    body = {"content": {"application/json": {"schema": ScoreCall.model_json_schema()}}, "required": True}

    async def score(request: fastapi.Request) -> Any:  # type: ignore[name-defined]
        return await service.score(request)

    async def health() -> Any:
        return {"alive": True}

    async def ready() -> Any:
        return responses.JSONResponse({"ready": service.ready} | service.facts, 200 if service.ready else 503)

    async def refused(_: Any, error: Any) -> Any:
        return fastapi.Response(error_body(str(error.detail)), error.status_code, error.headers, "application/json")

    async def metrics() -> Any:
        text, kind = service.metrics.text()
        return fastapi.Response(text, media_type=kind)

    # What the framework refuses before a route does, such as a path that is none.
    app.add_exception_handler(require("starlette.exceptions", extra="serve").HTTPException, refused)
    score.__annotations__ = {"request": fastapi.Request}  # as FastAPI reads it
    app.add_api_route("/score", score, methods=["POST"], openapi_extra={"requestBody": body})
    for path, route in (("/health", health), ("/ready", ready), ("/metrics", metrics)):
        app.add_api_route(path, route, methods=["GET"])
    return app


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or an interrupt: what is in flight is finished, nothing new accepted.

    Raises:
        What `worker.load` raises.
    """
    uvicorn = require("uvicorn", extra="serve")
    config = settings.config

    def make_pool() -> Executor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(config.workers, context, worker.configure, (settings,))

    service = Service(config, make_pool)
    try:
        service.start()
        # uvicorn handles the signal and then raises it again; by then everything is done.
        signal.signal(signal.SIGTERM, lambda *_: None)
        options = {"timeout_graceful_shutdown": config.limits.drain, "limit_concurrency": config.limits.connections}
        bound = {"host": config.host, "port": config.port, "server_header": False, "access_log": False}
        uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, **bound, **options)).run()
    finally:
        service.stop()
