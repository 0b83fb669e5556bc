"""Whatever is thrown at an op, it answers with a result of the right shape or with an error that names an argument."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vista_ext import ops

ROWS = 12
SMALL = st.integers(-3, ROWS + 3)
EDGES = st.one_of(SMALL, st.sampled_from([2**31 - 1, 2**31, 2**62, -(2**63), 2**63 - 1]))
OFFSETS = st.lists(EDGES, max_size=6)


def rows(heads=2, dim=16, count=ROWS, dtype=torch.float32):
    return torch.randn(count, heads, dim, dtype=dtype)


def monotone(offsets, limit):
    return len(offsets) >= 1 and offsets[0] == 0 and all(a <= b for a, b in pairwise(offsets)) and offsets[-1] <= limit


def longest(offsets):
    return max((b - a for a, b in pairwise(offsets)), default=0)


@settings(max_examples=300, deadline=None)
@given(OFFSETS, EDGES, st.one_of(st.none(), st.lists(EDGES, max_size=5)))
def test_qla_offsets_lengths_and_targets(offsets, max_seq_len, targets):
    right = monotone(offsets, ROWS) and longest(offsets) <= max_seq_len
    if targets is not None:
        lengths = [b - a for a, b in pairwise(offsets)]
        right = right and len(targets) == len(lengths)
        right = right and all(0 <= t <= n for t, n in zip(targets, lengths, strict=False))
    num_targets = None if targets is None else torch.tensor(targets, dtype=torch.int64)
    q, k, v = rows(), rows(), rows(dim=24)
    call = (q, k, v, torch.tensor(offsets, dtype=torch.int64), max_seq_len)
    if right:
        out, state = ops.qla(*call, num_targets=num_targets, return_state=True)
        assert out.shape == v.shape and out.isfinite().all() and state.shape == (len(offsets) - 1, 2, 16, 24)
    else:
        with pytest.raises(RuntimeError, match=r"seq_offsets|max_seq_len|num_targets"):
            ops.qla(*call, num_targets=num_targets)


@settings(max_examples=200, deadline=None)
@given(OFFSETS, EDGES, st.integers(-2, 5))
def test_projected_qla_offsets_lengths_and_heads(offsets, max_seq_len, heads):
    x, weight = torch.randn(ROWS, 8), torch.randn(32, 8)
    ends = torch.tensor(offsets, dtype=torch.int64)
    right = monotone(offsets, ROWS) and longest(offsets) <= max_seq_len and heads in (1, 2)
    if right:
        state = ops.projected_qla_state(x, weight, weight, ends, max_seq_len, heads=heads)
        out = ops.projected_qla_apply(x, weight, state, ops.mean_scale(ends), ends, max_seq_len)
        assert out.shape == (ROWS, heads, 32 // heads) and out.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r"seq_offsets|max_seq_len|heads|weight_k"):
            ops.projected_qla_state(x, weight, weight, ends, max_seq_len, heads=heads)


@settings(max_examples=300, deadline=None)
@given(OFFSETS, OFFSETS, EDGES, EDGES, st.one_of(st.none(), st.lists(EDGES, max_size=5)))
def test_cross_attn_offsets_lengths_and_index(q_offsets, kv_offsets, max_q_len, max_kv_len, index):
    right = monotone(q_offsets, ROWS) and longest(q_offsets) <= max_q_len
    right = right and monotone(kv_offsets, ROWS) and longest(kv_offsets) <= max_kv_len
    if index is None:
        right = right and len(q_offsets) == len(kv_offsets)
    else:
        right = right and len(index) == len(q_offsets) - 1 and all(0 <= i < len(kv_offsets) - 1 for i in index)
    q, k, v = rows(), rows(), rows(dim=24)
    call = (q, k, v, torch.tensor(q_offsets, dtype=torch.int64), torch.tensor(kv_offsets, dtype=torch.int64))
    kv_index = None if index is None else torch.tensor(index, dtype=torch.int64)
    if right:
        assert ops.jagged_cross_attn(*call, max_q_len, max_kv_len, kv_index=kv_index).shape == v.shape
    else:
        with pytest.raises(RuntimeError, match=r"q_offsets|kv_offsets|max_q_len|max_kv_len|kv_index"):
            ops.jagged_cross_attn(*call, max_q_len, max_kv_len, kv_index=kv_index)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
# Small, for a refused size must not cost the memory that it names; heads too wide are an example of their own.
SHAPES = st.one_of(st.lists(st.sampled_from([0, 1, 2, 12, 16, 20, 24]), max_size=4), st.just([ROWS, 2, 264]))


def tensor(dtype, shape):
    return torch.ones(shape).to(dtype)


def names(error, *arguments):
    """Whether an error names one of the arguments, the op's own name not counted."""
    text = re.sub(r"vista::\w+", "", str(error))
    return any(re.search(rf"\b{argument}\b", text) for argument in arguments)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["q", "k", "v", "state", "attn_scale"]), DTYPES, SHAPES)
def test_wrong_tensors_are_named(name, dtype, shape):
    good = {"q": rows(), "k": rows(), "v": rows(), "state": torch.zeros(2, 2, 16, 16), "attn_scale": torch.ones(2)}
    bad = tensor(dtype, shape)
    if bad.dtype == good[name].dtype and bad.shape == good[name].shape:
        return
    arguments = {**good, name: bad}
    offsets = torch.tensor([0, 5, 12])
    calls = [
        lambda q, k, v, state, attn_scale: ops.qla(q, k, v, offsets, 8, attn_scale=attn_scale),
        lambda q, k, v, state, attn_scale: ops.qla_apply(q, state, attn_scale, offsets, 8),
        lambda q, k, v, state, attn_scale: ops.qla_state(k, v, offsets, 8),
        lambda q, k, v, state, attn_scale: ops.jagged_cross_attn(q, k, v, offsets, offsets, 8, 8),
    ]
    takes = [{"q", "k", "v", "attn_scale"}, {"q", "state", "attn_scale"}, {"k", "v"}, {"q", "k", "v"}]
    for call, taken in zip(calls, takes, strict=True):
        if name not in taken:
            continue
        try:
            result = call(**arguments)
        except RuntimeError as error:
            # Rows too few for the offsets are a fault of either.
            assert names(error, *taken, "seq_offsets", "q_offsets", "kv_offsets"), error
        else:
            assert result.dtype in (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["x", "up", "gate", "down"]), DTYPES, SHAPES, st.sampled_from([None, 0.0, 1e-6, -1.0]))
def test_sglu(name, dtype, shape, norm_eps):
    good = {"x": torch.ones(ROWS, 16), "up": torch.ones(24, 16), "gate": torch.ones(24, 16), "down": torch.ones(16, 24)}
    arguments = {**good, name: tensor(dtype, shape)}
    try:
        out = ops.sglu(**arguments, norm_eps=norm_eps)
    except RuntimeError as error:
        assert names(error, "norm_eps", *good), error
    else:
        assert out.shape == arguments["x"].shape and norm_eps != -1.0


@settings(max_examples=200, deadline=None)
@given(DTYPES, SHAPES, st.sampled_from(["int8", "int4", "fp8_e4m3", "int2", ""]), st.integers(-70, 300))
def test_quantize_rows(dtype, shape, scheme, group):
    try:
        found = ops.quantize_rows(tensor(dtype, shape), scheme=scheme, group=group)
    except (RuntimeError, ValueError) as error:
        assert names(error, "x", "scheme", "group", "tokens", "dim"), error
    else:
        assert found.dtype == torch.uint8 and found.shape[0] == shape[0] and found.shape[1] % 128 == 0


@settings(max_examples=200, deadline=None)
@given(DTYPES, SHAPES, st.lists(EDGES, max_size=4), st.sampled_from(["raise", "zero", "wrap"]), EDGES, EDGES)
def test_cache_gather(dtype, shape, slots, policy, tokens, dim):
    cache = torch.zeros(3, 128, dtype=torch.uint8) if len(shape) % 2 else tensor(dtype, shape)
    try:
        out, bad = ops.cache_gather(cache, torch.tensor(slots, dtype=torch.int64), tokens, dim, policy=policy)
    except (RuntimeError, ValueError) as error:
        assert names(error, "cache", "slots", "tokens", "dim", "policy"), error
    else:
        assert out.shape == (len(slots), tokens, dim)
        assert int(bad) == sum(not 0 <= slot < len(cache) for slot in slots)


@settings(max_examples=200, deadline=None)
@given(st.lists(EDGES, max_size=4), st.sampled_from(["raise", "zero", "wrap"]), st.integers(0, 4), DTYPES)
def test_cache_scatter(slots, policy, count, dtype):
    cache = torch.zeros(3, 128, dtype=torch.uint8)
    new = torch.ones(count, 128, dtype=torch.uint8) if dtype != torch.bool else torch.ones(count, 128).bool()
    try:
        bad = ops.cache_scatter_(cache, torch.tensor(slots, dtype=torch.int64), new, policy=policy)
    except (RuntimeError, ValueError) as error:
        assert names(error, "slots", "rows", "policy"), error
        assert not cache.any(), "a refused call writes nothing"
    else:
        assert int(bad) == sum(not 0 <= slot < 3 for slot in slots)
        assert cache.any(1).tolist() == [slot in slots for slot in range(3)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["grad_out", "x", "weight", "bias"]), DTYPES, SHAPES)
def test_linear_silu(name, dtype, shape):
    good = {"x": torch.ones(12, 16), "weight": torch.ones(24, 16), "bias": torch.ones(24)}
    grad_out = {"grad_out": torch.ones(12, 24)}
    bad = tensor(dtype, shape)
    calls = [(torch.ops.vista.linear_silu, good), (torch.ops.vista.linear_silu_backward, grad_out | good)]
    for call, arguments in calls:
        if name not in arguments:
            continue
        try:
            result = call(**arguments | {name: bad})
        except RuntimeError as error:
            assert names(error, *arguments), error
        else:
            rows, columns = bad.shape[0] if name == "x" else 12, bad.shape[0] if name == "weight" else 24
            assert result.shape == (rows, columns) and result.dtype == torch.float32
