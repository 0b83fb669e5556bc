"""Contents that only the device sees (offsets, targets, slots) end a process with an error, never with a result.

Each in a process of its own: a trap costs the CUDA context. All start at once, for most of their time is starting.
"""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

PROLOGUE = """
import torch
from vista_ext import ops
x = torch.randn(100, 2, 32, device="cuda", requires_grad=True)
rows = ops.quantize_rows(torch.randn(8, 5, 64, device="cuda"))
state = torch.zeros(2, 2, 32, 32, device="cuda")
half, weight = x[:, 0].detach().bfloat16().repeat(1, 2), torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
def ints(*values):
    return torch.tensor(values, device="cuda")
def qla(offsets, longest, **options):
    return ops.qla(x, x, x, offsets, longest, **options)
def attend(q_offsets, kv_offsets, *lengths, **options):
    return ops.jagged_cross_attn(x, x, x, q_offsets, kv_offsets, *lengths, **options)
def attend_cached(slots, q_offsets=ints(0, 40, 100), longest=60):
    with torch.no_grad():
        return ops.cached_cross_attn(x, rows, rows, slots, q_offsets, longest, 5, 2, value_dim=32)
qla(ints(0, 40, 100), 60, num_targets=ints(3, 60))  # good, and must pass
attend(ints(0, 40, 100), ints(0, 60, 100), 60, 60).sum().backward()
attend(ints(0, 40, 100), ints(0, 100), 60, 100, kv_index=ints(0, 0))
attend_cached(ints(0, 7))
ops.cache_gather(rows, ints(0, 7), 5, 64)
ops.cache_scatter_(rows, ints(7, 0), rows[:2].clone())
torch.cuda.synchronize()
print("the good calls passed", flush=True)
"""
EPILOGUE = """
torch.cuda.synchronize()
print("the bad call passed", flush=True)
"""
BAD = {
    "offsets do not start at 0": "qla(ints(1, 40, 100), 100)",
    "offsets fall": "qla(ints(0, 60, 40), 100)",
    "offsets beyond the rows": "qla(ints(0, 40, 101), 100)",
    "offsets beyond int32": "qla(ints(0, 40, 2**40), 100)",
    "a sequence longer than max_seq_len": "qla(ints(0, 40, 100), 59)",
    "negative num_targets": "qla(ints(0, 40, 100), 60, num_targets=ints(0, -1))",
    "more targets than rows": "qla(ints(0, 40, 100), 60, num_targets=ints(41, 0))",
    "offsets of qla_state": "ops.qla_state(x, x, ints(0, 40, 101), 100)",
    "offsets of qla_apply": "ops.qla_apply(x, state, torch.ones(2, device='cuda'), ints(0, 40, 101), 100)",
    "offsets of projected_qla_state": "ops.projected_qla_state(half, weight, weight, ints(0, 40, 101), 100, heads=2)",
    "offsets of projected_qla_apply": (
        "ops.projected_qla_apply(half, weight, state, torch.ones(2, device='cuda'), ints(0, 60, 40), 100)"
    ),
    "q_offsets beyond the rows": "attend(ints(0, 40, 101), ints(0, 60, 100), 100, 60)",
    "kv_offsets fall": "attend(ints(0, 40, 100), ints(0, 60, 40), 60, 100)",
    "a group longer than max_q_len": "attend(ints(0, 40, 100), ints(0, 60, 100), 59, 60)",
    "a sequence longer than max_kv_len": "attend(ints(0, 40, 100), ints(0, 60, 100), 60, 59)",
    "kv_index beyond the sequences": "attend(ints(0, 40, 100), ints(0, 60, 100), 60, 60, kv_index=ints(0, 2))",
    "a slot to attend to beyond the cache": "attend_cached(ints(0, 8))",
    "a negative slot to attend to": "attend_cached(ints(-1, 0))",
    "q_offsets of cached_cross_attn": "attend_cached(ints(0, 7), ints(0, 40, 101), 100)",
    "a slot to gather beyond the cache": "ops.cache_gather(rows, ints(0, 8), 5, 64)",
    "a negative slot to gather": "ops.cache_gather(rows, ints(-1, 0), 5, 64)",
    "a slot to scatter beyond the cache": "ops.cache_scatter_(rows, ints(0, 2**40), rows[:2].clone())",
}


@pytest.fixture(scope="module")
def processes():
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + call + EPILOGUE],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, call in BAD.items()
    }
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("name", BAD)
def test_bad_contents_are_an_error(processes, name):
    output, _ = processes[name].communicate(timeout=120)
    assert "the good calls passed" in output, output
    assert "the bad call passed" not in output, output
    assert processes[name].returncode != 0 and "CUDA error" in output, output
