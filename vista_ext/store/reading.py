"""The end of every read: what was fetched is checked, and the reader's policy decides about the rest."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor

from vista_ext.store.base import (
    ExpiredError,
    Found,
    MissingUserError,
    ReadPolicy,
    StoreSpec,
    VersionMismatchError,
)
from vista_ext.store.checks import check_tensor
from vista_ext.store.record import Landing

_log = logging.getLogger(__name__)


def landing_for(spec: StoreSpec, n: int, out: Tensor | None) -> Landing:
    """Room for n records, with the rows in `out` if given.

    Raises:
        ValueError: `out` has another type or shape, or is not contiguous.
    """
    if out is not None:
        check_tensor("find", "out", out, torch.uint8, (n, spec.row_bytes))
        if not out.is_contiguous():
            raise ValueError("find: out must be contiguous")
    return Landing(spec, n, out)


def settle(policy: ReadPolicy, users: np.ndarray, landing: Landing, *, unavailable: bool = False) -> Found:
    """Judge what landed. What is not a hit has a row of zeros.

    Args:
        users: int64 `[n]`, who was asked for.
        unavailable: nothing landed, since the store did not answer.

    Raises:
        As `SummaryStore.find`.
    """
    n, spec = len(users), landing.spec
    hits = landing.sizes >= 0
    other = hits & (landing.versions != spec.model_version)
    if other.any() and policy.on_version_mismatch == "raise":
        what = f"have summaries, but none of model version {spec.model_version}"
        raise VersionMismatchError(users[other].tolist(), n, what)
    if policy.on_version_mismatch == "miss":
        hits &= ~other
    damage = {i: error for i, error in landing.damage(users).items() if hits[i]}
    damaged = np.zeros(n, dtype=bool)
    for i in sorted(damage):
        if policy.on_damage == "raise":
            raise damage[i]
        _log.warning("%s; taken for a miss", damage[i])
        damaged[i] = True
    hits &= ~damaged
    times = np.where(hits, landing.headers["event_time"], -1)
    expired = hits & is_expired(policy, times)
    if expired.any() and policy.on_expired == "raise":
        raise ExpiredError(users[expired].tolist(), n, f"have no summary of the last {policy.max_age} seconds")
    hits &= ~expired
    away = np.full(n, unavailable)
    if not hits.all():
        if policy.on_miss == "raise":
            why = why_missing(damaged=damaged, expired=expired, unavailable=away)
            raise MissingUserError(users[~hits].tolist(), n, why)
        landing.rows.numpy()[~hits] = 0
        times[~hits] = -1
    versions = np.where(hits, landing.versions, -1)
    return Found(landing.rows, *map(torch.from_numpy, (hits, times, versions, damaged, expired, away)))


def why_missing(**causes: np.ndarray) -> str:
    """For the message about users without a summary: how many of them for which cause, by its mask."""
    counts = [f"{int(mask.sum())} {name}" for name, mask in causes.items() if mask.any()]
    return "have no summary" + (f" that can be used ({', '.join(counts)})" if counts else "")


def is_expired(policy: ReadPolicy, event_times: np.ndarray) -> np.ndarray:
    """Which of some event times lie further back than the policy allows."""
    if policy.max_age is None:
        return np.zeros(len(event_times), dtype=bool)
    return event_times < int(time.time()) - policy.max_age
