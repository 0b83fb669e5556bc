"""jagged_cross_attn against float64 references, at ugly sizes, with every argument."""

import pytest
import torch

from vista_ext import ops
from vista_ext.reference import cross_attn_by_mask, cross_attn_by_rows
from vista_ext.testing import assert_as_good_as

Q_LENGTHS = [3, 0, 70, 1, 113]  # groups; more than one block
KV_LENGTHS = [1, 0, 130, 65]  # sequences; the last is read by nobody
KV_INDEX = [2, 0, 2, 1, 0]
PADDING = 2


@pytest.fixture(autouse=True)
def on_the_device(device):
    with torch.device(device):
        yield


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def offsets(lengths):
    return (
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) if lengths else torch.zeros(1, dtype=torch.int64)
    )


def make(d=16, e=24, q_heads=2, kv_heads=2, dtype=torch.float32, own=True, seed=0):
    generator = seeded(seed)
    n, m = sum(Q_LENGTHS) + PADDING, sum(KV_LENGTHS) + PADDING

    def rows(count, heads, dim):
        return torch.randn(count, heads, dim, generator=generator).to(dtype).requires_grad_()

    q, k, v = rows(n, q_heads, d), rows(m, kv_heads, d), rows(m, kv_heads, e)
    return (q, k, v, rows(n, kv_heads, d), rows(n, kv_heads, e)) if own else (q, k, v)


def run(q, k, v, self_k=None, self_v=None, **options):
    return ops.jagged_cross_attn(
        q,
        k,
        v,
        offsets(Q_LENGTHS),
        offsets(KV_LENGTHS),
        113,
        130,
        kv_index=torch.tensor(KV_INDEX),
        self_k=self_k,
        self_v=self_v,
        return_lse=True,
        **options,
    )


def reference(q, k, v, self_k=None, self_v=None, **options):
    index = torch.tensor(KV_INDEX)
    return cross_attn_by_rows(
        q, k, v, offsets(Q_LENGTHS), offsets(KV_LENGTHS), kv_index=index, self_k=self_k, self_v=self_v, **options
    )


def with_grads(function, inputs, weight, lse_weight, **options):
    out, lse = function(*inputs, **options)
    finite = torch.where(lse.isfinite(), lse, 0)
    loss = (out * weight.to(out.dtype)).sum() + (finite * lse_weight.to(lse.dtype)).sum()
    return out, finite.float() if out.dtype != torch.float64 else finite, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("d", "e", "q_heads", "kv_heads", "own"),
    [(16, 24, 2, 2, True), (64, 64, 4, 2, False), (40, 16, 3, 1, False), (256, 256, 1, 1, True), (24, 16, 4, 2, True)],
)
def test_matches_the_definition(d, e, q_heads, kv_heads, own, dtype):
    inputs = make(d, e, q_heads, kv_heads, dtype, own)
    generator = seeded(1)
    weight = torch.randn(len(inputs[0]), q_heads, e, generator=generator)
    lse_weight = torch.randn(len(inputs[0]), q_heads, generator=generator)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    ours = with_grads(run, inputs, weight, lse_weight)
    assert_as_good_as(
        ours, with_grads(reference, exact, weight, lse_weight), with_grads(reference, inputs, weight, lse_weight)
    )
    for result in (ours[0], ours[2], ours[3], ours[4]):
        assert not result[-PADDING:].any(), "padding rows must be zero"
    assert not ours[3][sum(KV_LENGTHS[:3]) :].any(), "a sequence that nobody reads has no gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_beside_short_sequences(dtype):
    """A long sequence's backward is cut by its keys; a short one's bits do not depend on the long one beside it."""
    generator = seeded(0)
    q, k, v, self_k, self_v, weight = (
        torch.randn(count, 2, dim, generator=generator).to(dtype)
        for count, dim in ((150, 16), (523, 16), (523, 24), (150, 16), (150, 24), (150, 24))
    )
    lengths = {"q_offsets": [70, 3, 77], "kv_offsets": [300, 23, 200]}
    index = torch.tensor([0, 2, 1])

    def grads(function, x, rows=slice(150), keys=slice(523), kv_index=index, maxima=(77, 300), **given):
        leaves = [t.detach().clone().requires_grad_() for t in (x[0][rows], *(t[keys] for t in x[1:3]))]
        leaves += [t[rows].detach().clone().requires_grad_() for t in x[3:5]]
        ends = {name: offsets(given.get(name, lengths[name])) for name in lengths}
        own = {"self_k": leaves[3], "self_v": leaves[4], "kv_index": kv_index}
        out = function(*leaves[:3], *ends.values(), *maxima, **own)
        out = out if isinstance(out, torch.Tensor) else out[0]
        return out, *torch.autograd.grad((out * x[5][rows]).sum(), leaves)

    inputs = (q, k, v, self_k, self_v, weight)
    ours, exact, peer = (
        grads(ops.jagged_cross_attn, inputs),
        grads(cross_attn_by_rows, [x.double() for x in inputs], maxima=()),
        grads(cross_attn_by_rows, inputs, maxima=()),
    )
    assert_as_good_as(ours, exact, peer)
    rows, keys, alone = slice(73, 150), slice(300, 323), {"q_offsets": [77], "kv_offsets": [23]}
    short = grads(ops.jagged_cross_attn, inputs, rows, keys, torch.tensor([0]), (77, 23), **alone)
    parts = (rows, rows, keys, keys, rows, rows)
    assert all(torch.equal(a, b[part]) for a, b, part in zip(short, ours, parts, strict=True))


@pytest.mark.parametrize("own", [True, False])
def test_references_agree(own):
    inputs = [x.detach().double() for x in make(own=own)]
    index = torch.tensor(KV_INDEX)
    names = dict(zip(("self_k", "self_v"), inputs[3:], strict=False))
    by_rows, _ = reference(*inputs, attn_scale=0.3)
    by_mask = cross_attn_by_mask(
        *inputs[:3], offsets(Q_LENGTHS), offsets(KV_LENGTHS), kv_index=index, attn_scale=0.3, **names
    )
    torch.testing.assert_close(by_rows, by_mask, rtol=1e-10, atol=1e-12)


def test_scale_is_an_argument():
    inputs = [x.detach() for x in make()]
    exact = [x.double() for x in inputs]
    assert_as_good_as(run(*inputs, attn_scale=0.7)[:1], reference(*exact, attn_scale=0.7)[:1],
                      reference(*inputs, attn_scale=0.7)[:1])  # fmt: skip


def test_gradients_by_finite_differences():
    inputs = make()
    generator = seeded(2)
    weight = torch.randn(len(inputs[0]), 2, 24, generator=generator)

    def loss(*x):
        return (run(*x)[0].double() * weight).sum()

    grads = torch.autograd.grad(loss(*inputs), inputs)
    for i, grad in enumerate(grads):
        direction = torch.randn(grad.shape, generator=generator)
        up, down = [x.detach() for x in inputs], [x.detach() for x in inputs]
        up[i], down[i] = up[i] + 1e-2 * direction, down[i] - 1e-2 * direction
        numeric = (loss(*up) - loss(*down)) / 2e-2
        torch.testing.assert_close(numeric, (grad.double() * direction).sum(), rtol=2e-3, atol=2e-3)


def test_splitting_and_sharing_queries_changes_no_bit():
    inputs = [x.detach() for x in make()]
    q, k, v, self_k, self_v = inputs
    whole, lse = run(*inputs)
    q_offsets = offsets(Q_LENGTHS)
    for g, sequence in enumerate(KV_INDEX):
        for begin in range(int(q_offsets[g]), int(q_offsets[g + 1]), 37):
            rows = slice(begin, min(begin + 37, int(q_offsets[g + 1])))
            keys = slice(sum(KV_LENGTHS[:sequence]), sum(KV_LENGTHS[: sequence + 1]))
            count = rows.stop - rows.start
            out, own_lse = ops.jagged_cross_attn(
                q[rows],
                k[keys],
                v[keys],
                torch.tensor([0, count]),
                torch.tensor([0, KV_LENGTHS[sequence]]),
                count,
                130,
                self_k=self_k[rows],
                self_v=self_v[rows],
                return_lse=True,
            )
            assert torch.equal(out, whole[rows])
            assert torch.equal(own_lse, lse[rows])


def test_bits_do_not_depend_on_threads():
    inputs = make()
    weight, lse_weight = torch.ones(len(inputs[0]), 2, 24), torch.ones(len(inputs[0]), 2)
    threads = torch.get_num_threads()
    before = with_grads(run, inputs, weight, lse_weight)
    try:
        torch.set_num_threads(1)
        after = with_grads(run, inputs, weight, lse_weight)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_candidates_do_not_leak():
    changed = 20

    def results(q, k, v, self_k, self_v):
        q, k, v, self_k, self_v = (x.clone().requires_grad_() for x in (q, k, v, self_k, self_v))
        out, _ = run(q, k, v, self_k, self_v)
        others = torch.arange(len(out)) != changed
        grads = torch.autograd.grad(out[others].sum(), (q, k, v, self_k, self_v))
        return out[others], grads[0][others], grads[3][others], grads[4][others], grads[1], grads[2]

    inputs = [x.detach() for x in make()]
    before = results(*inputs)
    for i in (0, 3, 4):
        inputs[i][changed] = 3.0
    for a, b in zip(before, results(*inputs), strict=True):
        assert torch.equal(a, b)


def test_own_item_is_one_more_key():
    q, k, v, self_k, self_v = make()
    one, kv_len = 4, sum(KV_LENGTHS[:3]) - 1
    row = slice(one, one + 1)
    begin = 1  # sequence 2 begins there
    keys = torch.cat([k[begin : begin + 130], self_k[row]])
    values = torch.cat([v[begin : begin + 130], self_v[row]])
    assert kv_len == 130
    joined = ops.jagged_cross_attn(q[row], keys, values, torch.tensor([0, 1]), torch.tensor([0, 131]), 1, 131)
    torch.testing.assert_close(run(q, k, v, self_k, self_v)[0][row], joined, rtol=1e-5, atol=1e-6)


def test_parts_merge_by_lse_with_gradients():
    q, k, v = (x.detach().double().float().requires_grad_() for x in make(own=False))
    rows, keys = q[:50], k[:130]
    values = v[:130]

    def attend(part):
        n = part.stop - part.start
        return ops.jagged_cross_attn(
            rows, keys[part], values[part], torch.tensor([0, 50]), torch.tensor([0, n]), 50, 130, return_lse=True
        )

    whole, _ = attend(slice(0, 130))
    parts = [attend(slice(0, 47)), attend(slice(47, 130))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    grad = torch.randn(whole.shape, generator=seeded(3))
    for a, b in zip(
        torch.autograd.grad(merged, (q, k, v), grad), torch.autograd.grad(whole, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["q", "k", "v", "self_k", "self_v"])
def test_nan_stays_where_it_matters(name):
    names = ["q", "k", "v", "self_k", "self_v"]
    inputs = dict(zip(names, (x.detach() for x in make()), strict=True))
    row = 70  # of the third group (rows 3 to 72), and of the third sequence (rows 1 to 130), which groups 0 and 2 read
    inputs[name][row, 1] = torch.nan
    out, lse = run(*inputs.values())
    expected = torch.zeros(out.shape[:2], dtype=bool)
    if name in ("k", "v"):
        expected[0:3, 1] = expected[3:73, 1] = True
    else:
        expected[row, 1] = True
    assert torch.equal(out.isnan().any(2), expected) and torch.equal(out.isnan().all(2), expected)
    assert torch.equal(lse.isnan(), expected if name not in ("v", "self_v") else torch.zeros_like(expected))


def test_nothing_to_see():
    q = torch.randn(3, 1, 16, requires_grad=True)
    empty = torch.zeros(0, 1, 16, requires_grad=True)
    out, lse = ops.jagged_cross_attn(q, empty, empty, torch.tensor([0, 3]), torch.tensor([0, 0]), 3, 0, return_lse=True)
    assert not out.any() and torch.isneginf(lse).all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()
    none = ops.jagged_cross_attn(q[:0], empty, empty, torch.tensor([0]), torch.tensor([0]), 0, 0)
    assert none.shape == (0, 1, 16)


def test_large_scores_do_not_overflow():
    q, k, v = (x.detach() for x in make(own=False))
    out, lse = run(q * 1000, k * 10, v)
    assert torch.isfinite(out).all()
    exact, exact_lse = reference(*(x.double() for x in (q * 1000, k * 10, v)))
    finite = exact_lse.isfinite()
    torch.testing.assert_close(lse[finite].double(), exact_lse[finite], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("own", [True, False])
def test_opcheck(own):
    inputs = make(own=own)
    args = (*inputs[:3], offsets(Q_LENGTHS), offsets(KV_LENGTHS), 113, 130)
    extra = (*(inputs[3:] or (None, None)), torch.tensor(KV_INDEX))
    torch.library.opcheck(torch.ops.vista.jagged_cross_attn.default, (*args, *extra))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*args, *extra)]
    out, lse = torch.ops.vista.jagged_cross_attn(*plain)
    grads = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(
        torch.ops.vista.jagged_cross_attn_backward.default, (*grads, *plain[:3], out, lse, *plain[3:])
    )


def test_compiles_whole_and_once():
    compiles = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def model(q, k, v, q_offsets, kv_offsets, kv_index):
        return ops.jagged_cross_attn(q, k, v, q_offsets, kv_offsets, 256, 256, kv_index=kv_index) + 1

    for q_lengths, kv_lengths in (([3, 4], [9, 2, 4]), ([7, 2], [3, 3, 3]), ([40, 6], [100, 2, 50])):
        q, k = torch.randn(sum(q_lengths), 2, 16), torch.randn(sum(kv_lengths), 2, 16)
        args = (q, k, k.clone(), offsets(q_lengths), offsets(kv_lengths), torch.tensor([2, 0]))
        expected = ops.jagged_cross_attn(*args[:5], 256, 256, kv_index=args[5]) + 1
        torch.testing.assert_close(model(*args), expected)
    assert compiles.frame_count == 1


def bad_inputs():
    q, k, v, self_k, self_v = (x.detach() for x in make())
    good = {
        "q": q, "k": k, "v": v, "q_offsets": offsets(Q_LENGTHS), "kv_offsets": offsets(KV_LENGTHS),
        "max_q_len": 113, "max_kv_len": 130, "kv_index": torch.tensor(KV_INDEX),
    }  # fmt: skip
    yield {**good, "k": k.half()}, r"k must have the dtype of q \(float32\), found float16"
    yield {**good, "k": torch.randn(len(k), 2, 24)}, r"k must have q's head dim \(16\), found 24"
    yield {**good, "q": torch.randn(len(q), 3, 16)}, r"k's heads must divide q's heads \(3\), found 2"
    yield {**good, "v": v[:5]}, r"v must have shape \[198, 2, 24\]"
    yield {**good, "self_k": self_k}, "self_k and self_v must be given together, found only self_k"
    yield {**good, "self_k": self_k[:3], "self_v": self_v}, r"self_k must have shape \[189, 2, 16\]"
    yield {**good, "kv_index": None}, r"kv_index is needed where q_offsets \(5 groups\) and kv_offsets \(4 sequences\)"
    yield {**good, "kv_index": torch.tensor([0, 1, 2, 4, 0])}, r"kv_index must be in \[0, 4\), found 4 at index 3"
    yield {**good, "kv_index": torch.tensor([0, -1, 2, 3, 0])}, r"kv_index must be in \[0, 4\), found -1 at index 1"
    yield {**good, "kv_index": torch.tensor([0])}, r"kv_index must have one entry per query group \(5\), found 1"
    yield {**good, "max_kv_len": 129}, "max_kv_len must be at least the longest sequence, found 129"
    yield {**good, "q_offsets": torch.tensor([0, 5, 3])}, "q_offsets must not decrease"
    yield {**good, "q": q.double()}, "q must be float32, bfloat16 or float16, found float64"


@pytest.mark.parametrize(("arguments", "message"), list(bad_inputs()), ids=[m[:40] for _, m in bad_inputs()])
def test_bad_input_is_named(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.jagged_cross_attn(**arguments)
