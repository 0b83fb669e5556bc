"""cached_cross_attn against the definition on dequantized rows, and against cache_gather and jagged_cross_attn."""

import pytest
import torch

from vista_ext import ops
from vista_ext.reference import cached_cross_attn as reference
from vista_ext.testing import assert_as_good_as

Q_LENGTHS = [3, 0, 70, 1, 1100]  # none, one, more than a block, more than a run of blocks
SLOTS = [2, 0, 2, -1, 1]
NUM_SLOTS, TOKENS, PADDING = 4, 37, 2


@pytest.fixture(autouse=True)
def on_the_device(device):
    with torch.device(device):
        yield


def q_offsets():
    return torch.tensor([0, *torch.tensor(Q_LENGTHS).cumsum(0).tolist()])


def make(d=16, e=24, q_heads=2, kv_heads=2, dtype=torch.float32, own=True, scheme="int8", group=None, tokens=TOKENS):
    """Arguments by name."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def cache(dim):
        return ops.quantize_rows(normal(NUM_SLOTS, tokens, kv_heads * dim), scheme=scheme, group=group)

    n = sum(Q_LENGTHS) + PADDING
    named = {
        "q": normal(n, q_heads, d),
        "k_rows": cache(d),
        "v_rows": cache(e),
        "slots": torch.tensor(SLOTS),
        "q_offsets": q_offsets(),
        "max_q_len": max(Q_LENGTHS),
        "tokens": tokens,
        "kv_heads": kv_heads,
        "value_dim": e,
        "scheme": scheme,
        "group": group,
        "policy": "zero",
    }
    return named | ({"self_k": normal(n, kv_heads, d), "self_v": normal(n, kv_heads, e)} if own else {})


def default_group(scheme, dim):
    return 64 if scheme == "int4" and dim % 64 == 0 else dim


def by_definition(named, dtype=None):
    wanted = {name: x for name, x in named.items() if name not in ("max_q_len", "policy", "group")}
    for name in ("q", "self_k", "self_v"):
        if name in wanted:
            wanted[name] = wanted[name].to(dtype or wanted[name].dtype)
    heads, d, e = named["kv_heads"], named["q"].shape[2], named["value_dim"]
    groups = {default_group(named["scheme"], heads * dim) for dim in (d, e)}
    group = named["group"] or groups.pop()
    assert named["group"] or not groups, "the reference takes one group"
    return reference(**wanted, group=group)


def finite(out, lse):
    lse = torch.where(lse.isfinite(), lse, 0)
    return out, lse if out.dtype == torch.float64 else lse.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("d", "e", "q_heads", "kv_heads", "own"),
    [(32, 32, 2, 2, True), (64, 64, 4, 2, False), (16, 16, 3, 1, True), (256, 256, 1, 1, True)],
)
def test_matches_the_definition(d, e, q_heads, kv_heads, own, scheme, dtype):
    named = make(d, e, q_heads, kv_heads, dtype, own, scheme)
    out, lse, num_bad = ops.cached_cross_attn(**named)
    assert num_bad == 1
    exact, peer = by_definition(named, torch.float64), by_definition(named)
    assert torch.equal(lse.isneginf(), exact[1].isneginf())
    assert_as_good_as(finite(out, lse), finite(*exact), finite(*peer))
    assert not out[-PADDING:].any() and not lse[-PADDING:].any(), "padding rows must be zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scheme", "group"), [("int8", None), ("int4", None), ("fp8_e4m3", 40), ("int8", 40)])
@pytest.mark.parametrize("tokens", [1, 37, 200])
def test_bits_of_gather_and_attention(tokens, scheme, group, dtype):
    named = make(40, 80, 4, 2, dtype, scheme=scheme, group=group, tokens=tokens)
    known = [slot for slot in SLOTS if slot >= 0]
    lengths = [tokens if slot >= 0 else 0 for slot in SLOTS]
    options = {"scheme": scheme, "group": group, "dtype": dtype}
    k, v = (
        ops.cache_gather(named[name], torch.tensor(known), tokens, 2 * dim, **options)[0].view(-1, 2, dim)
        for name, dim in (("k_rows", 40), ("v_rows", 80))
    )
    out, lse = ops.jagged_cross_attn(
        named["q"], k, v, named["q_offsets"], torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        named["max_q_len"], tokens, self_k=named["self_k"], self_v=named["self_v"], return_lse=True,
    )  # fmt: skip
    mine = ops.cached_cross_attn(**named)
    assert torch.equal(mine[0], out) and torch.equal(mine[1], lse)


@pytest.mark.parametrize("own", [True, False])
def test_an_unknown_user_has_an_empty_memory(own):
    named = make(own=own)
    named["slots"] = torch.full((5,), NUM_SLOTS)
    out, lse, num_bad = ops.cached_cross_attn(**named)
    rows = slice(0, sum(Q_LENGTHS))
    assert num_bad == 5
    if own:
        assert torch.equal(out[rows], named["self_v"][rows]), "one entry: its value"
    else:
        assert not out.any() and lse[rows].isneginf().all()


def test_one_cache_for_keys_and_values():
    named = make(32, 32)
    copied = ops.cached_cross_attn(**(named | {"v_rows": named["k_rows"].clone()}))
    shared = ops.cached_cross_attn(**(named | {"v_rows": named["k_rows"]}))
    assert all(torch.equal(a, b) for a, b in zip(copied, shared, strict=True))


def test_caches_that_begin_at_the_same_row():
    named = make(32, 32)
    rows = torch.cat([named["k_rows"], named["v_rows"]])
    views = {"k_rows": rows[:NUM_SLOTS], "v_rows": rows[::2]}
    copied = {name: x.clone() for name, x in views.items()}
    pairs = zip(*(ops.cached_cross_attn(**(named | x)) for x in (views, copied)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_view_of_a_larger_cache():
    named = make()
    whole = ops.cached_cross_attn(**named)
    shifted = {name: torch.cat([named[name][:1], named[name]])[1:] for name in ("k_rows", "v_rows")}
    assert all(torch.equal(a, b) for a, b in zip(whole, ops.cached_cross_attn(**(named | shifted)), strict=True))


def test_bits_do_not_depend_on_threads_nor_on_the_batch():
    named = make()
    before = ops.cached_cross_attn(**named)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        after = ops.cached_cross_attn(**named)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    begin = sum(Q_LENGTHS[:4])
    rows = slice(begin + 100, begin + 300)
    part = {name: named[name][rows] for name in ("q", "self_k", "self_v")}
    part |= {"slots": torch.tensor([1]), "q_offsets": torch.tensor([0, 200])}
    out, lse, _ = ops.cached_cross_attn(**(named | part))
    assert torch.equal(out, before[0][rows]) and torch.equal(lse, before[1][rows])


def test_rows_that_cannot_be_represented_stay_with_their_readers():
    named = make()
    named["v_rows"][2] = ops.quantize_rows(torch.full((1, TOKENS, 48), torch.nan))[0]
    out, lse, _ = ops.cached_cross_attn(**named)
    readers = torch.zeros(len(out), dtype=torch.bool)
    readers[0:3] = readers[3:73] = True
    assert torch.equal(out.isnan().any(2).any(1), readers) and not lse.isnan().any()


def test_nothing_to_do():
    named = make(own=False)
    none = {"q": named["q"][:0], "slots": named["slots"][:0], "q_offsets": torch.tensor([0]), "max_q_len": 0}
    out, lse, num_bad = ops.cached_cross_attn(**(named | none))
    assert out.shape == (0, 2, 24) and lse.shape == (0, 2) and num_bad == 0
    empty = {name: named[name][:0] for name in ("k_rows", "v_rows")}
    out, lse, num_bad = ops.cached_cross_attn(**(named | empty))
    assert not out.any() and num_bad == 5


def test_no_gradient():
    named = make()
    named["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="vista::cached_cross_attn: q must not require a gradient"):
        ops.cached_cross_attn(**named)
    with torch.no_grad():
        ops.cached_cross_attn(**named)
    out, *_ = torch.ops.vista.cached_cross_attn(*positional(named), **keywords(named))
    with pytest.raises(RuntimeError, match=r"vista::cached_cross_attn is not differentiable: it is for inference"):
        out.sum().backward()


def positional(named):
    names = ("q", "k_rows", "v_rows", "slots", "q_offsets", "max_q_len", "tokens", "kv_heads", "self_k", "self_v")
    return tuple(named.get(name) for name in names)


def keywords(named):
    return {name: named[name] for name in ("value_dim", "scheme", "group", "policy")}


@pytest.mark.parametrize("own", [True, False])
def test_opcheck(own):
    named = make(own=own)
    torch.library.opcheck(torch.ops.vista.cached_cross_attn.default, positional(named), keywords(named))


def bad_inputs():
    named = make()
    n = len(named["q"])
    yield {"q": named["q"].double()}, "q must be float32, bfloat16 or float16, found float64"
    yield {"kv_heads": 3}, r"kv_heads must divide q's heads \(2\), found 3"
    yield {"kv_heads": 0}, r"kv_heads must divide q's heads \(2\), found 0"
    yield {"value_dim": 20}, "value_dim must be a multiple of 8 from 16 to 256, found 20"
    yield {"value_dim": 64}, "v_rows must have row_bytes"
    yield {"tokens": 30}, "k_rows must have row_bytes"
    yield {"tokens": 0}, "tokens must be from 1"
    yield {"scheme": "int2"}, "scheme must be 'int8', 'int4' or 'fp8_e4m3', found 'int2'"
    yield {"group": 33}, r"group must divide dim \(32\)"
    yield {"k_rows": named["k_rows"].float()}, "k_rows must be uint8, found float32"
    yield {"v_rows": named["v_rows"][:2]}, r"v_rows must have as many slots as k_rows \(4\), found 2"
    yield {"slots": torch.tensor(SLOTS[:2])}, r"q_offsets must have one entry more than slots \(2\), found 6"
    yield {"slots": torch.tensor(SLOTS).float()}, "slots must be int64 or int32, found float32"
    yield {"policy": "raise"}, r"slots must be in \[0, 4\), found -1 at index 3"
    yield {"policy": "skip"}, "policy must be 'raise' or 'zero', found 'skip'"
    yield {"self_v": None}, "self_k and self_v must be given together, found only self_k"
    yield {"self_k": named["self_k"][:3]}, rf"self_k must have shape \[{n}, 2, 16\]"
    yield {"max_q_len": 1099}, "max_q_len must be at least the longest sequence, found 1099"
    yield {"q_offsets": torch.tensor([0, 5, 3, 3, 3, 3])}, "q_offsets must not decrease"


@pytest.mark.parametrize(("change", "message"), list(bad_inputs()), ids=[m[:40] for _, m in bad_inputs()])
def test_bad_input_is_named(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.cached_cross_attn(**(make() | change))
