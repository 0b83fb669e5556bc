"""Comparisons for tests of low-precision kernels; public, because users test against the references too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms(x: Tensor) -> Tensor:
    """Root mean square in float64."""
    return x.double().square().mean().sqrt()


def assert_as_good_as(ours: Sequence[Tensor], exact: Sequence[Tensor], peer: Sequence[Tensor]) -> None:
    """Each of `ours` misses `exact` (float64) by at most twice what `peer` misses it, a peer of the same precision.

    Plus one rounding of the result: the peer may round by luck to no error at all.

    Raises:
        AssertionError: with the three errors.
    """
    for i, (mine, right, other) in enumerate(zip(ours, exact, peer, strict=True)):
        assert mine.dtype == other.dtype, f"result {i}: dtype {mine.dtype}, expected {other.dtype}"
        assert mine.shape == other.shape, f"result {i}: shape {tuple(mine.shape)}, expected {tuple(other.shape)}"
        if mine.numel() == 0:
            continue
        error, allowed = rms(mine - right), 2 * rms(other - right) + torch.finfo(mine.dtype).eps * rms(right)
        assert error <= allowed, f"result {i}: error {error:.3e}, peer {rms(other - right):.3e}, allowed {allowed:.3e}"
