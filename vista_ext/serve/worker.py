"""What a worker of the service does with a call: read it, look the summaries up, score, and say what was degraded.

A worker is a process: compiled stage 2 code holds the GIL while it runs, and would stop an event loop beside it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from vista_ext._extras import require
from vista_ext.serve.package import Manifest, Package, facts, is_package
from vista_ext.serve.settings import REASONS, ServiceConfig, open_store, store_address
from vista_ext.store import Found, HotCache, ReadPolicy, StoreError, StoreSpec, StoreUnavailableError, SummaryStore
from vista_ext.store.lease import Lease
from vista_ext.store.metrics import CacheStats

pydantic = require("pydantic", extra="serve")
_log = logging.getLogger(__name__)

_INT64 = Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)]
_FIRST = pydantic.Field(fail_fast=True)  # one error is enough: a megabyte of them would take seconds
_STRICT = pydantic.ConfigDict(strict=True, extra="forbid")
# Nothing is an error below the service's own policy, which says what a request gets.
_READ = ReadPolicy(on_miss="flag", on_version_mismatch="accept", on_damage="miss", on_unavailable="miss")


class ScoreRequest(pydantic.BaseModel):  # type: ignore[name-defined]
    """A user and the candidates to score: ids of the store and of the model. A context feature is one integer for all
    candidates, or a list with one for each; 0 where it is not given."""

    model_config = _STRICT
    user: _INT64
    items: Annotated[list[_INT64], _FIRST]
    context: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies defaults)


class ScoreCall(pydantic.BaseModel):  # type: ignore[name-defined]
    """The body of POST /score."""

    model_config = _STRICT
    requests: Annotated[list[ScoreRequest], pydantic.Field(min_length=1), _FIRST]


class CallError(Exception):
    """A call that gets an error with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Reply:
    """What a worker sends back: the answer, and what the service counts.

    Args:
        status, body: of the HTTP answer.
        candidates: scored.
        reasons: users by reason of degradation.
        ages: seconds since the event times of the summaries that were used.
        stats: of the worker's cache.
        process: the worker.
        seconds: at work.
    """

    status: int
    body: bytes
    stats: CacheStats
    candidates: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    ages: list[int] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)
    seconds: float = 0.0


class LateStore:
    """A store to read from that may not answer yet, and is opened when it does.

    Args:
        spec: of the rows.
        connect: opens the store.

    Raises:
        StoreError: what `connect` raises, unless the store does not answer.
    """

    def __init__(self, spec: StoreSpec, connect: Callable[[], SummaryStore]) -> None:
        self.spec, self._connect = spec, connect
        self._store: SummaryStore | None = None
        try:
            self._store = connect()
        except StoreUnavailableError as error:
            _log.warning("%s; it is tried again", error)

    def find(self, user_ids: Tensor, policy: ReadPolicy = _READ, *, out: Tensor | None = None) -> Found:
        """As `SummaryStore.find`; any trouble of the store is a StoreUnavailableError, and in the log."""
        try:
            if self._store is None:
                self._store = self._connect()
            return self._store.find(user_ids, policy, out=out)
        except StoreError as error:
            _log.warning("%s", error)
            raise StoreUnavailableError(str(error)) from error

    def close(self) -> None:
        """Close the store, if it is open."""
        if self._store is not None:
            self._store.close()


class Worker:
    """A stage 2 with its summaries.

    Args:
        stage2: a `Package` or a `LiveModel`.
        store: where summaries are.
        config: of the service.
    """

    def __init__(self, stage2: Any, store: LateStore, config: ServiceConfig) -> None:
        self.stage2, self.store, self.config = stage2, store, config
        self.manifest: Manifest = stage2.manifest
        cache = config.cache
        self.cache = HotCache(
            store,
            cache.slots,
            device=self.manifest.device,
            refresh_after=cache.refresh_after,
            stale_for=cache.stale_for,
            retry_after=cache.retry_after,
        )

    def answer(self, body: bytes) -> Reply:
        """The answer to a call; an error is one, too."""
        begin = time.monotonic()
        reply = Reply(200, b"", self.cache.stats())
        try:
            reply.body = json.dumps(self._score(self._parse(body), reply), allow_nan=False).encode()
        except CallError as error:
            reply.status, reply.body = error.status, error_body(str(error))
        except Exception:
            # Whatever it is, the next call may be fine. What went wrong is for the log, not for the caller.
            _log.exception("scoring failed")
            reply.status, reply.body = 500, error_body("scoring failed")
        reply.stats, reply.seconds = self.cache.stats(), time.monotonic() - begin
        return reply

    def _parse(self, body: bytes) -> list[ScoreRequest]:
        try:
            requests: list[ScoreRequest] = ScoreCall.model_validate_json(body).requests
        except pydantic.ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise CallError(422, f"{where}: {first['msg']}") from None
        limits = self.config.limits
        counts = {"requests": len(requests), "candidates": sum(len(request.items) for request in requests)}
        for name, found in counts.items():
            if found > (most := getattr(limits, name)):
                raise CallError(413, f"{name} of a call must be at most {most}, found {found}")
        for number, request in enumerate(requests):
            self._check_ids(f"requests.{number}", request)
        return requests

    def _check_ids(self, where: str, request: ScoreRequest) -> None:
        values = {"items": (request.items, self.manifest.num_items)}
        for name, given in request.context.items():
            if name not in self.manifest.context:
                raise CallError(422, f"{where}.context: expected {list(self.manifest.context)}, found {name!r}"[:500])
            listed = given if isinstance(given, list) else [given]
            fits = not isinstance(given, list) or len(given) == len(request.items)
            if not fits or not all(type(value) is int for value in listed):
                raise CallError(422, f"{where}.context.{name}: expected an integer, or one for each item")
            values[f"context.{name}"] = listed, self.manifest.context[name] - 1
        for name, (listed, last) in values.items():
            if listed and not (min(listed) >= 0 and max(listed) <= last):
                found = next(value for value in listed if not 0 <= value <= last)
                raise CallError(422, f"{where}.{name}: expected ids from 0 to {last}, found {found}")

    def _score(self, requests: list[ScoreRequest], reply: Reply) -> dict[str, Any]:
        users = torch.tensor([request.user for request in requests], dtype=torch.int64)
        distinct, kv_index = torch.unique(users, return_inverse=True)
        with self.cache.gather(distinct, _READ) as lease:
            reasons, used = self._judge(distinct.tolist(), lease)
            slots = lease.slots.masked_fill(~torch.tensor(used).to(lease.slots.device), -1)
            scores = self._run(requests, lease.rows, slots, kv_index)
        reply.candidates, reply.reasons = len(scores), Counter(reason for reason in reasons if reason)
        now = int(time.time())
        reply.ages = [now - when for when, use in zip(lease.event_times.tolist(), used, strict=True) if use]
        results, begin = [], 0
        for request, user in zip(requests, kv_index.tolist(), strict=True):
            end = begin + len(request.items)
            results.append(
                {
                    "user": request.user,
                    "scores": scores[begin:end],
                    "degraded": reasons[user] is not None,
                    "reason": reasons[user],
                    "event_time": int(lease.event_times[user]) if used[user] else None,
                }
            )
            begin = end
        return {"model_version": self.manifest.spec.model_version, "tasks": self.manifest.tasks, "results": results}

    def _judge(self, users: list[int], lease: Lease) -> tuple[list[str | None], list[bool]]:
        """For each user why its answer is degraded, and whether its own summary is used all the same.

        Raises:
            CallError: the policy does not allow to degrade.
        """
        policy = self.config.policy
        unlimited = policy.max_age is None
        oldest = 0 if unlimited else int(time.time()) - (policy.max_age or 0)
        masks = {
            "store_unavailable": lease.unavailable,
            "damaged": lease.damaged,
            "unknown_user": ~lease.hits,
            "other_version": lease.versions != self.manifest.spec.model_version,
            "expired": (lease.event_times < oldest) & (not unlimited),
            "stale": lease.stale,
        }
        flags = {reason: mask.tolist() for reason, mask in masks.items()}
        reasons = [next((reason for reason in flags if flags[reason][i]), None) for i in range(len(users))]
        for reason in REASONS:
            hit = [user for user, why in zip(users, reasons, strict=True) if why == reason]
            if hit and getattr(policy, reason) == "raise":
                status = 404 if reason == "unknown_user" else 503
                raise CallError(status, f"{reason}: {len(hit)} users, such as {hit[0]}")
        return reasons, [reason is None or getattr(policy, reason) == "accept" for reason in reasons]

    def _run(self, requests: list[ScoreRequest], cache: Tensor, slots: Tensor, kv_index: Tensor) -> list[list[float]]:
        """Probabilities of each candidate and task."""
        counts = [len(request.items) for request in requests]
        if not sum(counts):
            return []
        items = [item for request in requests for item in request.items]
        context = torch.zeros(len(items), len(self.manifest.context), dtype=torch.int64)
        begin = 0
        for request, count in zip(requests, counts, strict=True):
            for column, name in enumerate(self.manifest.context):
                context[begin : begin + count, column] = torch.tensor(request.context.get(name, 0))
            begin += count
        given = torch.tensor([0, *counts]).cumsum(0), torch.tensor(items, dtype=torch.int64), context, kv_index
        logits = self.stage2(cache, slots, *(tensor.to(cache.device) for tensor in given))
        if not logits.isfinite().all():
            raise CallError(500, "the model gave a score that is not finite")
        return logits.float().sigmoid().tolist()


def error_body(message: str) -> bytes:
    """An error as JSON."""
    return json.dumps({"error": message}).encode()


@dataclass(frozen=True)
class Settings:
    """Where a worker finds what it needs.

    Args:
        source: folder of a run or of an exported model.
        store: a folder or a URL; "" for the run's own.
        config: of the service.
        device: for a run's model; an exported one knows its own.
    """

    source: str
    store: str
    config: ServiceConfig
    device: str = "cpu"


_settings: Settings | None = None
_worker: Worker | None = None


def configure(settings: Settings) -> None:
    """What a worker does first. Loading comes later, where errors reach whoever waits."""
    global _settings
    _settings = settings
    parent = parent_process()
    if parent is None:
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # The service ends its workers, after their last answer, whatever the whole group is sent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # And none outlives a service that was killed.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def load() -> dict[str, Any]:
    """Load model and store, and score once; what the service tells about its model."""
    global _worker
    assert _settings is not None
    torch.set_num_threads(_settings.config.threads)
    stage2, of_run = open_stage2(_settings.source, _settings.device)
    spec, address = stage2.manifest.spec, store_address(_settings.store, of_run)
    store = LateStore(spec, lambda: open_store(address, spec, _settings.config.redis))
    worker = Worker(stage2, store, _settings.config)
    one = torch.zeros(1, dtype=torch.int64).to(worker.cache.rows.device)
    context = one.new_zeros(1, len(stage2.manifest.context))
    stage2(worker.cache.rows, one - 1, one.new_tensor([0, 1]), one, context, one)
    _worker = worker
    return facts(stage2.manifest)


def work(body: bytes, deadline: float) -> Reply | None:
    """Answer a call; None if nobody waits for it any more.

    Args:
        body: of the call.
        deadline: of `time.monotonic`, which all processes of a machine share.
    """
    if _worker is None:
        load()
    assert _worker is not None
    return None if time.monotonic() > deadline else _worker.answer(body)


def open_stage2(source: str, device: str = "cpu") -> tuple[Any, Path | None]:
    """A callable stage 2 of an exported model or of a run, and where the run's store is."""
    if is_package(source):
        return Package(source), None
    from vista_ext.data.known import check_known
    from vista_ext.runs import Run
    from vista_ext.serve.export import LiveModel

    run = Run.open(source, device=device)
    data = Path(run.config.data.path)
    if (data / "users.parquet").is_file():  # who serves may have no data; who has maps the ids of calls by it
        check_known(Path(source), data)
    return LiveModel(run), run.store_path
