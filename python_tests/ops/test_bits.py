"""Results depend on nothing but the inputs: not on the run, nor on what was in the memory of the outputs."""

import pytest
import torch

from python_tests.ops.gpu_calls import GROUPS


@pytest.fixture
def poisoned_memory():
    """Every uninitialised tensor of torch's is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("group", GROUPS)
def test_bits_repeat(device, group):
    for name, call in GROUPS[group](device):
        first = call()
        for _ in range(19 if device == "cuda" else 1):
            assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)), name


@pytest.mark.parametrize("group", GROUPS)
def test_every_element_is_written(device, group, poisoned_memory):
    """The poison would show in a result, were it read from there or never overwritten."""
    assert torch.empty(4, device=device).isnan().all() and (torch.empty(4, dtype=int, device=device) == 2**63 - 1).all()
    for name, call in GROUPS[group](device):
        poisoned = call()
        torch.use_deterministic_algorithms(False)
        clean = call()
        torch.use_deterministic_algorithms(True)
        for i, (a, b) in enumerate(zip(poisoned, clean, strict=True)):
            assert a.isfinite().all(), f"{name}, result {i}"
            assert torch.equal(a, b), f"{name}, result {i}"
