"""Checks of arguments: a ValueError names the call, the argument, what was expected and what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from vista_ext.store.base import Summaries


def check_tensor(call: str, name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """A CPU tensor as a contiguous numpy array; None in `shape` is any size, called n in the message.

    Raises:
        ValueError: naming call, argument, expected and found.
    """
    wanted = f"{str(dtype).removeprefix('torch.')} [{', '.join('n' if s is None else str(s) for s in shape)}] on cpu"
    if not isinstance(value, Tensor):
        raise ValueError(f"{call}: {name} must be a tensor, {wanted}, found {type(value).__name__}")
    fits = value.dim() == len(shape) and all(s is None or s == have for s, have in zip(shape, value.shape, strict=True))
    if value.dtype != dtype or value.device.type != "cpu" or not fits:
        found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
        raise ValueError(f"{call}: {name} must be {wanted}, found {found}")
    return value.detach().contiguous().numpy()


def check_summaries(
    call: str, summaries: Summaries, row_bytes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """User ids, versions, rows and event times as contiguous numpy arrays.

    Raises:
        ValueError: naming call, argument, expected and found.
    """
    users = check_tensor(call, "user_ids", summaries.user_ids, torch.int64, (None,))
    n = len(users)
    versions = check_tensor(call, "versions", summaries.versions, torch.int64, (n,))
    for version in versions[versions < 0][:1]:
        raise ValueError(f"{call}: versions must be at least 0, found {version}")
    rows = check_tensor(call, "rows", summaries.rows, torch.uint8, (n, row_bytes))
    return users, versions, rows, check_tensor(call, "event_times", summaries.event_times, torch.int64, (n,))


def check_choice(call: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{call}: {name} must be one of {', '.join(map(repr, allowed))}, found {value!r}")


def check_integer(call: str, name: str, value: int, least: int, most: int = 2**63 - 1) -> None:
    """Raises ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{call}: {name} must be an integer from {least} to {most}, found {value!r}")
