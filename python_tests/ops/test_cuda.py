"""What only a CUDA device can show: graphs, streams, devices, and that the host is never awaited."""

import pytest
import torch

from python_tests.ops.gpu_calls import GROUPS
from vista_ext import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("group", GROUPS)
def test_graph_replay_equals_eager(group):
    """Capture fails if an op synchronizes; what an op enqueues on another stream is missing from the graph."""
    for name, call in GROUPS[group]("cuda"):
        eager = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(2):
            for result in captured:
                result.fill_(77)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True)), name


@pytest.mark.parametrize("group", GROUPS)
def test_no_host_synchronization(group):
    calls = list(GROUPS[group]("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_device_of_its_tensors(group):
    """The current device is another one."""
    for (name, here), (_, there) in zip(GROUPS[group]("cuda:0"), GROUPS[group]("cuda:1"), strict=True):
        assert all(torch.equal(a, b.to(a.device)) for a, b in zip(here(), there(), strict=True)), name
        assert torch.cuda.current_device() == 0


def test_runs_on_the_current_stream():
    """The input arrives late on a side stream; the default stream is idle and would be too early."""
    x = torch.randn(64, 5, 192, device="cuda")
    q, right = x.reshape(-1, 4, 48), ops.quantize_rows(x)
    offsets = torch.tensor([0, len(q)], device="cuda")
    right_out = ops.qla(q, q, q, offsets, len(q))
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: some 60 ms
        late.copy_(x)
        rows = ops.quantize_rows(late)
        late_q = late.view_as(q)
        out = ops.qla(late_q, late_q, late_q, offsets, len(q))
    side.synchronize()
    assert torch.equal(rows, right) and torch.equal(out, right_out)


def test_index_contents_stay_on_the_device():
    """Offsets that are only there when the kernel runs: the host cannot have read them."""
    q = torch.randn(100, 2, 32, device="cuda")
    offsets = torch.tensor([0, 40, 100], device="cuda")
    right = ops.qla(q, q, q, offsets, 60)
    late, side = torch.zeros_like(offsets), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(offsets)
        out = ops.qla(q, q, q, late, 60)
    side.synchronize()
    assert torch.equal(out, right)
