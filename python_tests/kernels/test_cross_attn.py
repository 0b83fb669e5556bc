"""The cross attention kernels in the emulator: as exact as torch in the same precision, with no finding."""

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import DeviceTrap

from .cross_attn_checks import Call, Case, build_library, check_backward, check_forward
from .emulated import library_of

library = library_of(build_library)

# None, one, a tile and a few; a sequence with one key, with none, with several tiles, and one that nobody reads.
Q_LENGTHS, KV_LENGTHS, KV_INDEX = [3, 0, 70, 1, 33], [1, 0, 130, 65], [2, 0, 2, 1, 0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ANY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BOTH_WAYS = pytest.mark.parametrize("check_way", [check_forward, check_backward], ids=["forward", "backward"])


@ANY_DTYPE
@BOTH_WAYS
@pytest.mark.parametrize(("heads", "own"), [((2, 2), True), ((4, 2), True), ((3, 1), False)])
def test_ugly_lengths(library, check_way, heads, own, dtype):
    case = Case(Q_LENGTHS, KV_LENGTHS, KV_INDEX, q_heads=heads[0], kv_heads=heads[1], own=own, dtype=dtype)
    call = check_way(case, library)
    if check_way is check_backward:
        unread = slice(sum(KV_LENGTHS[:3]), None)
        assert not call.result("grad_k")[unread].any() and not call.result("grad_v")[unread].any()


@ANY_DTYPE
@BOTH_WAYS
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("d", "e"), [(64, 64), (40, 16), (16, 64), (104, 128), (200, 256), (256, 24)])
def test_head_dimensions(library, check_way, d, e, own, dtype):
    case = Case([19, 3], [37, 2], d=d, e=e, q_heads=1, kv_heads=1, padding=1, dtype=dtype, own=own)
    check_way(case, library, seed=d)


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules(library, check_way, seed, dtype):
    check_way(Case([33, 70], [150, 20], [0, 0], d=64, e=64, q_heads=2, kv_heads=1, dtype=dtype), library, seed)


@BOTH_WAYS
@ANY_DTYPE
def test_options(library, check_way, dtype):
    case = Case([20, 70], [9, 40], dtype=dtype, indices=np.int32, scale=0.7, grad_lse=False, padding=70, seed=1)
    check_way(case, library)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [100, 200])
def test_runs_of_queries(library, keys, dtype, seed):
    """The same bits whether blocks take short runs or long ones, with keys that stay in shared memory and without."""
    case = Case([300], [keys], d=64, e=64, q_heads=1, kv_heads=1, dtype=dtype)
    long = check_forward(case, library, seed)
    case.enough_blocks = 512
    short = check_forward(case, library, seed)
    assert all(torch.equal(long.result(name), short.result(name)) for name in ("out", "lse"))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales(library, dtype, scale):
    check_forward(Case([20], [70], dtype=dtype, scale=scale), library)


def test_large_scores(library):
    case = Case([5], [70], own=False, dtype=torch.float32)
    case.tensors["q"] *= 1000
    check_forward(case, library)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("padding", [0, 3, 130])
@pytest.mark.parametrize(
    ("q_lengths", "kv_lengths", "kv_index"),
    [([], [], None), ([0, 0], [0, 0], None), ([], [3], []), ([5, 0], [0], [0, 0]), ([3], [0], None)],
)
def test_nothing_to_see(library, q_lengths, kv_lengths, kv_index, padding, own):
    case = Case(q_lengths, kv_lengths, kv_index, padding=padding, own=own, dtype=torch.float32)
    call = Call(case, library)
    assert call.forward() == 0 and call.backward() == 0
    rows = sum(q_lengths)
    assert not call.result("out")[rows:].any() and not call.result("lse")[rows:].any()
    for name in ("grad_k", "grad_v"):
        assert not call.result(name).any()
    if own:
        assert torch.equal(call.result("out")[:rows], case.tensors["self_v"][:rows]), "one entry: its value"
        torch.testing.assert_close(call.result("grad_self_v")[:rows], case.tensors["grad_out"][:rows])
        assert not call.result("grad_self_v")[rows:].any() and not call.result("grad_self_k")[rows:].any()
    else:
        assert not call.result("out").any() and call.result("lse")[:rows].isneginf().all()
        assert not call.result("grad_q").any()


def test_more_groups_than_planning_threads(library):
    """1100 groups on 1050 sequences, most of both without rows; the order of readers matters in the last bits only."""
    q_lengths, kv_lengths = [0] * 1100, [0] * 1050
    for g, n in {3: 5, 500: 1, 1023: 2, 1024: 70, 1099: 1}.items():
        q_lengths[g] = n
    kv_lengths[7], kv_lengths[1049] = 40, 66
    index = [(g * 7) % 1050 for g in range(1100)]
    index[3] = index[1024] = index[1099] = 1049
    index[500] = index[1023] = 7
    check_backward(Case(q_lengths, kv_lengths, index, q_heads=1, kv_heads=1, indices=np.int32), library)


def test_many_groups_read_one_sequence(library):
    groups = 70
    check_backward(Case([g % 4 for g in range(groups)], [3, 70, 1], [1] * groups, q_heads=1, kv_heads=1), library)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)])
@pytest.mark.parametrize("kv_index", [None, [1, 0, 1, 1, 1]])
def test_more_readers_than_a_block_takes(library, kv_index, heads):
    """A sequence's gradients do not depend on whether another one takes several chunks of rows."""
    q_lengths = [70, 4200] if kv_index is None else [2000, 70, 0, 5, 2195]
    options = {"own": False, "indices": np.int32}
    case = Case(q_lengths, [20, 3], kv_index, q_heads=heads[0], kv_heads=heads[1], **options)
    whole = check_backward(case, library)
    few = slice(0, 70) if kv_index is None else slice(2000, 2070)
    alone = check_backward(_part(case, few, slice(0, 20), ([70], [20]), **options), library)
    for name in ("grad_k", "grad_v"):
        assert torch.equal(whole.result(name)[:20], alone.result(name)), name


def _part(case: Case, queries: slice, keys: slice, lengths: tuple[list[int], list[int]], **options) -> Case:
    part = Case(*lengths, q_heads=case.q_heads, kv_heads=case.kv_heads, dtype=case.dtype, padding=0, **options)
    part.tensors = {name: x[keys if name in ("k", "v") else queries] for name, x in case.tensors.items()}
    return part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_batch_nor_on_groups(library, dtype):
    case = Case([20, 90, 7], [9, 70], [0, 1, 1], q_heads=2, kv_heads=1, dtype=dtype)
    whole = check_backward(case, library, seed=1)
    queries, keys = slice(20, 117), slice(9, 79)
    alone = check_backward(_part(case, queries, keys, ([90, 7], [70]), kv_index=[0, 0]), library, seed=2)
    for name in ("out", "lse", "grad_q", "grad_self_k", "grad_self_v", "grad_k", "grad_v"):
        rows = keys if name in ("grad_k", "grad_v") else queries
        assert torch.equal(alone.result(name), whole.result(name)[rows]), name
    split = check_backward(_part(case, queries, keys, ([37, 60], [70]), kv_index=[0, 0]), library, seed=3)
    for name in ("out", "lse", "grad_q", "grad_self_k", "grad_self_v"):
        assert torch.equal(split.result(name), whole.result(name)[queries]), name


def test_candidates_do_not_leak(library):
    changed = 11
    case = Case([30], [70], dtype=torch.bfloat16)
    case.tensors["grad_out"][changed] = 0
    case.tensors["grad_lse"][changed] = 0

    def run() -> Call:
        call = Call(case, library)
        assert call.forward() == 0 and call.backward() == 0
        return call

    before = run()
    for name in ("q", "self_k", "self_v"):
        case.tensors[name][changed] = 3
    after = run()
    others = torch.arange(len(case.tensors["q"])) != changed
    for name in ("out", "lse", "grad_q", "grad_self_k", "grad_self_v"):
        assert torch.equal(before.result(name)[others], after.result(name)[others]), name
    for name in ("grad_k", "grad_v"):
        assert torch.equal(before.result(name), after.result(name)), name
    assert not torch.equal(before.result("out")[changed], after.result("out")[changed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "self_k", "self_v"])
def test_nan_stays_where_it_matters(library, name, dtype):
    case = Case([3, 20, 5], [9, 70], [1, 0, 1], dtype=dtype)
    row = 24  # of the third group, and of the second sequence, which groups 0 and 2 read
    case.tensors[name][row, 1] = float("nan")
    call = Call(case, library)
    assert call.forward() == 0
    out, lse = call.result("out"), call.result("lse")
    expected = torch.zeros(out.shape[:2], dtype=torch.bool)
    if name in ("k", "v"):
        expected[0:3, 1] = expected[23:28, 1] = True
    else:
        expected[row, 1] = True
    assert torch.equal(out.isnan().any(2), expected) and torch.equal(out.isnan().all(2), expected)
    assert torch.equal(lse.isnan(), expected if name not in ("v", "self_v") else torch.zeros_like(expected))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        {"q_offsets": [1, 5, 9]},
        {"q_offsets": [0, 6, 5]},
        {"q_offsets": [0, 5, 13]},
        {"q_offsets": [0, 2**40, 9]},
        {"kv_offsets": [1, 5, 9]},
        {"kv_offsets": [0, 6, 5]},
        {"kv_offsets": [0, 5, 13]},
        {"kv_index": [0, 2]},
        {"kv_index": [-1, 0]},
        {"kv_index": [0, 2**32]},
        {"max_q_len": 4},
        {"max_kv_len": 4},
    ],
    ids=str,
)
def test_bad_contents_trap(library, bad, backward):
    case = Case([5, 4], [5, 4], [1, 0])
    lengths = {"max_q_len": 9, "max_kv_len": 9} | {name: x for name, x in bad.items() if name.startswith("max")}
    call = Call(case, library, **lengths)
    if backward:
        good = Call(case, library)
        assert good.forward() == 0
        call.put("out", good.arrays["out"].numpy())
        call.put("lse", good.arrays["lse"].numpy())
    for name, values in bad.items():
        if not name.startswith("max"):
            call.put(name, np.array(values))
    with pytest.raises(DeviceTrap):
        call.backward() if backward else call.forward()


def test_what_is_not_built_is_named(library, capfd):
    for overrides, message in [
        ({"d": 20}, "multiples of 8"),
        ({"e": 264}, "16 to 256"),
        ({"dtype": 3}, "float32"),
        ({"kv_heads": 3}, "divide"),
        ({"sequences": 2}, "as many groups"),
    ]:
        assert Call(Case([5], [5]), library, **overrides).forward() == -1
        assert message in capfd.readouterr().err
    call = Call(Case([5], [5]), library)
    call.arrays["k"] = call.device.array(call.arrays["k"].numpy(), misalign=8)
    assert call.forward() == -1
    assert "16 bytes" in capfd.readouterr().err


# fp32 accumulators meet shared memory as pairs that are 4 banks apart: two wavefronts for one.
MOST_CONFLICTS = {torch.float32: 1.4, torch.bfloat16: 1.1, torch.float16: 1.1}


@pytest.mark.parametrize(
    ("dtype", "d"), [*((dtype, 64) for dtype in DTYPES), (torch.bfloat16, 32), (torch.bfloat16, 128)]
)
def test_memory_is_met_in_whole_sectors_and_without_bank_conflicts(library, dtype, d):
    call = check_backward(Case([130], [70], d=d, e=d, q_heads=1, kv_heads=1, dtype=dtype), library)
    kernels = {name: metrics for name, metrics in call.device.metrics.items() if "Math" in name}
    assert len(kernels) == 3
    for name, metrics in kernels.items():
        assert metrics.bank_conflict_ratio < MOST_CONFLICTS[dtype], (name, metrics.worst(metrics.shared)[:3])
        assert metrics.sector_ratio < 1.1, (name, metrics.worst(metrics.global_)[:3])


def test_rows_are_read_once(library):
    """Sectors of cp.async at d = 64: own rows once; streamed rows once in the forward, else once for each tile."""
    case = Case([128], [128], d=64, e=64, q_heads=1, kv_heads=1, padding=0)
    metrics = check_backward(case, library).device.metrics
    for kernel, row_passes in [("forward", 2 + 2), ("backward_queries", 3 + 2 * 2), ("backward_keys", 2 + 2 * 2)]:
        parts = metrics[f"cross_attn_{kernel}INS0_7MmaMath"].global_.items()
        assert sum(part.actual for text, part in parts if "cp.async" in text) == row_passes * 128 * 64 * 2 / 32, kernel
