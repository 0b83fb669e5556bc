"""The QLA kernels in the emulator: as exact as torch in the same precision, with no finding, for ugly shapes."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import DeviceTrap

from .emulated import library_of
from .qla_checks import Call, Case, backward, build_library, check, check_backward, check_forward, forward

library = library_of(build_library)

# None, one, a tile and a row, several chunks of 64 rows; targets in the middle of tiles, in two chunks, and alone.
LENGTHS, TARGETS = [5, 0, 1, 65, 17, 149], [2, 0, 1, 3, 17, 40]
MATHS = {
    "float32": {"dtype": torch.float32},
    "tf32": {"dtype": torch.float32, "tf32": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}
ANY_MATH = pytest.mark.parametrize("math", MATHS)
BOTH_WAYS = pytest.mark.parametrize("check_way", [check_forward, check_backward], ids=["forward", "backward"])
ACTIVATIONS = ["silu", "shifted_elu", "relu", "identity"]


@ANY_MATH
@BOTH_WAYS
def test_ugly_lengths(library, check_way, math):
    check_way(Case(LENGTHS, TARGETS, **MATHS[math]), library)


DIMENSIONS = [*((math, *dims) for math in MATHS for dims in [(64, 64), (40, 16), (16, 64), (104, 128)])]


@BOTH_WAYS
@pytest.mark.parametrize(("math", "d", "e"), [*DIMENSIONS, *((math, 136, 256) for math in MATHS if math != "float16")])
def test_head_dimensions(library, check_way, d, e, math):
    check_way(Case([19, 3], [2, 3], d=d, e=e, heads=1, padding=1, chunk_rows=16, **MATHS[math]), library, seed=d)


@BOTH_WAYS
@pytest.mark.parametrize(("math", "seed"), [*(("bfloat16", seed) for seed in range(1, 5)), ("float32", 1)])
def test_schedules(library, check_way, seed, math):
    check_way(Case([33, 70], [1, 20], d=64, e=64, heads=1, **MATHS[math]), library, seed)


@BOTH_WAYS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("state_activation", ACTIVATIONS)
def test_activations(library, check_way, activation, state_activation):
    scale = [0.1, 0.02, 0.03]
    options = {"activation": activation, "state_activation": state_activation, "scale": scale, "indices": np.int32}
    case = Case([9, 0, 19], [4, 0, 1], d=24, e=16, heads=1, dtype=torch.float32, chunk_rows=16, **options)
    check_way(case, library)


@BOTH_WAYS
@pytest.mark.parametrize("math", ["float32", "bfloat16"])
def test_no_targets(library, check_way, math):
    check_way(Case([20, 70], d=32, e=32, padding=70, **MATHS[math]), library)


@pytest.mark.parametrize("d", [32, 256])
def test_backward_without_gradient_of_the_state(library, d):
    check_backward(Case([9, 20], [1, 3], d=d, e=32, heads=1, chunk_rows=16), library, grad_state=False)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("padding", [0, 3, 130])
def test_nothing_but_padding(library, lengths, padding):
    case = Case(lengths, [0] * len(lengths), padding=padding)
    call = forward(case, library, max_seq_len=10**6)
    assert not call.result("out").any() and not call.result("state_out").any()
    call = backward(case, library)
    assert not any(call.result(name).any() for name in ("grad_q", "grad_k", "grad_v"))
    if lengths:
        assert torch.equal(call.result("grad_state_out"), case.tensors["grad_state"])


def test_more_sequences_than_planning_threads(library):
    lengths = [0] * 1100
    lengths[3], lengths[1023], lengths[1024], lengths[-1] = 5, 2, 70, 1
    case = Case(lengths, d=16, e=16, heads=1, indices=np.int32)
    call = Call(case, library)
    call.put("state", np.full((case.batch, 1, 16, 16), 0.5, np.float32))
    call.outputs("out")
    assert call.launch("apply") == 0
    sums = torch.nn.functional.silu(case.tensors["q"].double()).sum(-1, keepdim=True)
    for b in (3, 1023, 1024, 1099):
        rows = slice(case.offsets[b], case.offsets[b + 1])
        scaled = 0.5 / max(1, lengths[b])
        exact = sums[rows].expand(-1, -1, 16) * (scaled / (1 + np.exp(-scaled)))
        torch.testing.assert_close(call.result("out")[rows].double(), exact, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("d", [32, 256])
@pytest.mark.parametrize("math", ["float32", "bfloat16"])
def test_state_alone_leaves_targets_out(library, math, d):
    """Gradients of rows that are not summed are zero."""
    case = Case([9, 40], [4, 30], d=d, e=32, heads=1, chunk_rows=16, **MATHS[math])
    call = Call(case, library)
    call.own_term = False
    call.outputs("state_out", "grad_k", "grad_v")
    assert call.launch("state", "state_backward") == 0
    check(case, call, ["state_out"])
    k, v = (case.tensors[name].double().requires_grad_() for name in "kv")
    grad_state = case.tensors["grad_state"].double()
    loss = sum(
        (torch.einsum("nhd,nhe->hde", torch.nn.functional.silu(k[b : b + n]), v[b : b + n]) * g).sum()
        for b, n, g in zip((0, 9), (5, 10), grad_state, strict=True)
    )
    for name, exact in zip(("grad_k", "grad_v"), torch.autograd.grad(loss, (k, v)), strict=True):
        mine = call.result(name)
        error = (mine - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 4 * torch.finfo(case.dtype).eps
        assert not mine[exact == 0].any()


@pytest.mark.parametrize("d", [32, 256])
def test_apply_alone_writes_the_gradients_of_targets_only(library, d):
    """Candidates on a stored state: every row is a target, and there is no source row beside them."""
    case = Case([5, 20], [5, 20], d=d, e=32, heads=1, dtype=torch.float32, scale=[0.1, 0.02], chunk_rows=16)
    state = torch.randn(2, 1, d, 32, generator=torch.Generator().manual_seed(3))
    call = Call(case, library)
    call.put("state", state.numpy())
    del call.arrays["grad_state"]
    call.outputs("out", "grad_q", "grad_state_out")
    for name in ("grad_k", "grad_v"):  # as a caller prepares them: rows that are no targets stay
        like = call.arrays[{"grad_k": "k", "grad_v": "v"}[name]]
        call.put(name, np.full(like.shape, 7, like.dtype))
    assert call.launch("apply", "apply_backward") == 0

    q, k, v, z = (x.double().requires_grad_() for x in (*(case.tensors[name] for name in "qkv"), state))
    silu, rows = torch.nn.functional.silu, []
    for b, (begin, end) in enumerate(pairwise(case.offsets)):
        queries, keys = silu(q[begin:end]), silu(k[begin:end])
        own = case.scale[b] * (queries * keys).sum(-1, keepdim=True) * v[begin:end]
        rows.append(torch.einsum("nhd,hde->nhe", queries, silu(case.scale[b] * z[b])) + own)
    out = torch.cat(rows)
    grads = torch.autograd.grad((out * case.tensors["grad_out"][: len(out)]).sum(), (q, k, v, z))
    padding = slice(len(out), None)
    torch.testing.assert_close(call.result("out")[: len(out)].double(), out.detach(), rtol=1e-4, atol=1e-4)
    for name, exact in zip(("grad_q", "grad_k", "grad_v", "grad_state_out"), grads, strict=True):
        mine = call.result(name).double()
        if name in ("grad_k", "grad_v"):
            assert (mine[padding] == 7).all()
            mine[padding] = 0
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("math", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_batch(library, math):
    case = Case([20, 0, 149], [2, 0, 40], heads=1, **MATHS[math])
    whole, whole_back = forward(case, library, seed=1), backward(case, library, seed=2)
    rows = slice(case.offsets[2], case.offsets[3])
    alone = Case([149], [40], heads=1, padding=0, **MATHS[math])
    alone.tensors = {name: x[rows] for name, x in case.tensors.items()} | {"grad_state": case.tensors["grad_state"][2:]}
    one, one_back = forward(alone, library, seed=3), Call(alone, library, seed=4)
    assert torch.equal(one.result("out"), whole.result("out")[rows])
    assert torch.equal(one.result("state_out")[0], whole.result("state_out")[2])
    one_back.arrays.update({name: one_back.device.array(x) for name, x in _state(whole_back, 2).items()})
    one_back.outputs("grad_q", "grad_k", "grad_v", "grad_state_out")
    assert one_back.launch("apply_backward") == 0
    one_back.arrays["grad_state"] = one_back.arrays["grad_state_out"]
    assert one_back.launch("state_backward") == 0
    assert torch.equal(one_back.result("grad_state_out")[0], whole_back.result("grad_state_out")[2])
    for name in ("grad_q", "grad_k", "grad_v"):
        assert torch.equal(one_back.result(name), whole_back.result(name)[rows])


def _state(call: Call, b: int) -> dict[str, np.ndarray]:
    return {"state": call.arrays["state"].numpy()[b : b + 1]}


@pytest.mark.parametrize("d", [32, 256])
def test_targets_do_not_leak(library, d):
    case = Case([30], [14], d=d, e=32, heads=1)
    before = forward(case, library)
    changed = 20
    for name in "qkv":
        case.tensors[name][changed] = 7
    after = forward(case, library)
    others = torch.arange(case.total) != changed
    assert torch.equal(before.result("state_out"), after.result("state_out"))
    assert torch.equal(before.result("out")[others], after.result("out")[others])
    assert not torch.equal(before.result("out")[changed], after.result("out")[changed])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(library, name):
    case = Case([20, 20], [0, 0], heads=1, activation="relu")
    case.tensors[name][3] = float("nan")
    call = forward(case, library)
    out = call.result("out")
    assert out[3].isnan().all() if name == "q" else out[:20].isnan().any()
    assert not out[20:].isnan().any()


@pytest.mark.parametrize(
    ("offsets", "targets", "most"),
    [
        ([1, 5, 9], [0, 0], 9),
        ([0, 6, 5], [0, 0], 9),
        ([0, 5, 13], [0, 0], 9),
        ([0, 5, -1], [0, 0], 9),
        ([0, 5, 9], [0, 5], 9),
        ([0, 5, 9], [-1, 0], 9),
        ([0, 5, 9], [0, 0], 4),
        ([0, 2**40, 9], [0, 0], 9),
    ],
)
def test_bad_offsets_trap(library, offsets, targets, most):
    call = Call(Case([5, 4], [0, 0]), library, max_seq_len=most)
    call.put("seq_offsets", np.array(offsets))
    call.put("num_targets", np.array(targets))
    call.outputs("state_out")
    with pytest.raises(DeviceTrap):
        call.launch("state")


def test_what_is_not_built_is_named(library, capfd):
    for overrides, message in [({"d": 20}, "multiples of 8"), ({"e": 264}, "16 to 256"), ({"dtype": 3}, "float32")]:
        call = Call(Case([5]), library, **overrides)
        call.outputs("state_out")
        assert call.launch("state") == -1
        assert message in capfd.readouterr().err
    call = Call(Case([5]), library)
    call.outputs("state_out")
    call.arrays["k"] = call.device.array(call.arrays["k"].numpy(), misalign=8)
    assert call.launch("state") == -1
    assert "16 bytes" in capfd.readouterr().err


# fp32 accumulators meet shared memory as pairs that are 4 banks apart: two wavefronts for one. tf32 reads one operand
# of the state's backward across its rows. Rows of 64 bytes (d = 32) share a bank with the next as a matrix is written.
MOST_CONFLICTS = {"float32": 1.4, "tf32": 1.5, "bfloat16": 1.06, "float16": 1.02}


@BOTH_WAYS
@pytest.mark.parametrize(("math", "d"), [*((math, 64) for math in MATHS), ("bfloat16", 32), ("bfloat16", 128)])
def test_memory_is_met_in_whole_sectors_and_without_bank_conflicts(library, check_way, math, d):
    call = check_way(Case([65], d=d, e=d, heads=1, chunk_rows=2048, **MATHS[math]), library)
    kernels = {name: metrics for name, metrics in call.device.metrics.items() if "Math" in name}
    assert len(kernels) == 2
    for name, metrics in kernels.items():
        assert metrics.bank_conflict_ratio < MOST_CONFLICTS[math], (name, metrics.worst(metrics.shared)[:3])
        assert metrics.sector_ratio < 1.05, (name, metrics.worst(metrics.global_)[:3])


def test_rows_are_read_once(library):
    """Sectors of cp.async are those of K and V, of Q and dO: nothing is read twice at d = 64."""
    case = Case([128], d=64, e=64, heads=1, padding=0, chunk_rows=2048)
    of_forward, of_backward = forward(case, library).device.metrics, backward(case, library).device.metrics
    for metrics, kernel, tensors in [
        (of_forward, "qla_state", 2),
        (of_forward, "qla_apply", 1),
        (of_backward, "qla_apply_backward", 2),
        (of_backward, "qla_state_backward", 2),
    ]:
        parts = metrics[kernel + "INS0_7MmaMath"].global_.items()
        assert sum(part.actual for text, part in parts if "cp.async" in text) == tensors * 128 * 64 * 2 / 32, kernel
