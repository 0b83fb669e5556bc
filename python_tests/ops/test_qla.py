"""qla and its halves against float64 references; a bound is a multiple of what torch in the same precision misses."""

from itertools import pairwise

import pytest
import torch

from vista_ext import ops
from vista_ext.reference import qla_by_rows, qla_by_state
from vista_ext.testing import assert_as_good_as, rms

# Ugly lengths (none, one, primes, more than one chunk), and three rows of padding behind the last sequence.
LENGTHS = [5, 0, 1, 113, 1, 2300, 63]
TARGETS = [2, 0, 1, 7, 0, 3, 63]
PADDING = 3
ACTIVATIONS = ["silu", "shifted_elu", "relu", "identity"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(shape, device, dtype=torch.float32, seed=9):
    """The same values on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def make(device, d, e, dtype=torch.float32, heads=2, lengths=LENGTHS):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) if lengths else torch.zeros(1, dtype=int)
    total = int(offsets[-1]) + PADDING
    shapes = [(total, heads, n) for n in (d, d, e)]
    q, k, v = (normal(shape, device, dtype, seed).requires_grad_() for seed, shape in enumerate(shapes))
    return q, k, v, offsets.to(device)


def outputs_and_grads(function, q, k, v, grad):
    out = function(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "e"), [(16, 16), (24, 64), (64, 64), (40, 256), (256, 16), (136, 200)])
def test_matches_the_definition(device, d, e, dtype):
    q, k, v, offsets = make(device, d, e, dtype)
    targets = torch.tensor(TARGETS, device=device)
    grad = normal(v.shape, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ours = outputs_and_grads(lambda *a: ops.qla(*a, offsets, 2300, num_targets=targets), q, k, v, grad)
    right = outputs_and_grads(lambda *a: qla_by_state(*a, offsets, num_targets=targets), *exact, grad)
    peer = outputs_and_grads(lambda *a: qla_by_state(*a, offsets, num_targets=targets), q, k, v, grad)
    assert_as_good_as(ours, right, peer)
    for result in ours:
        assert not result[-PADDING:].any(), "padding rows must be zero"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("state_activation", ACTIVATIONS)
def test_every_activation(device, activation, state_activation):
    q, k, v, offsets = make(device, 24, 16)
    options = {"activation": activation, "state_activation": state_activation}
    scale = torch.linspace(0.01, 0.1, len(LENGTHS), device=device)
    grad = normal(v.shape, device)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    targets = torch.tensor(TARGETS, dtype=torch.int32, device=device)

    def reference(*a):
        return qla_by_state(*a, offsets, num_targets=targets, attn_scale=scale, **options)

    ours = outputs_and_grads(
        lambda *a: ops.qla(*a, offsets.int(), 2300, num_targets=targets, attn_scale=scale, **options), q, k, v, grad
    )
    assert_as_good_as(ours, outputs_and_grads(reference, *exact, grad), outputs_and_grads(reference, q, k, v, grad))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_jagged_equals_padded(device, activation):
    """Every sequence filled up to the longest by rows whose values are zero: they add nothing to a state. They stand in
    front, since targets are the last rows."""
    q, k, v, offsets = (x.detach() for x in make(device, 24, 40))
    targets = torch.tensor(TARGETS, device=device)
    most = max(LENGTHS)
    ends = torch.arange(1, len(LENGTHS) + 1) * most
    place = torch.cat([torch.arange(int(end) - n, int(end)) for end, n in zip(ends, LENGTHS, strict=True)]).to(device)
    padded = [normal((len(LENGTHS) * most, *x.shape[1:]), device, seed=5) for x in (q, k, v)]
    padded[2].zero_()
    for wide, x in zip(padded, (q, k, v), strict=True):
        wide[place] = x[:-PADDING]
    options = {"num_targets": targets, "attn_scale": ops.mean_scale(offsets, targets), "activation": activation}
    wide_offsets = torch.arange(len(LENGTHS) + 1, device=device) * most
    jagged, state = ops.qla(q, k, v, offsets, most, **options, return_state=True)
    out, wide_state = ops.qla(*padded, wide_offsets, most, **options, return_state=True)
    # One float32 sum in two orders: a few tens of roundings.
    assert rms(out[place] - jagged[:-PADDING]) < 3e-6 * rms(jagged)
    assert rms(wide_state - state) < 3e-6 * rms(state)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_where_it_matters(device, activation, name):
    q, k, v, offsets = (x.detach() for x in make(device, 24, 16))
    targets = torch.tensor(TARGETS, device=device)
    begin, end = int(offsets[3]), int(offsets[4])
    for row in (begin + 4, end - 2):  # a source, a target
        inputs = {"q": q, "k": k, "v": v}
        inputs[name] = inputs[name].clone()
        inputs[name][row, 1] = torch.nan
        options = {"activation": activation, "state_activation": activation}
        out = ops.qla(*inputs.values(), offsets, 2300, num_targets=targets, **options)
        expected = torch.zeros(out.shape[:2], dtype=bool, device=device)
        expected[slice(begin, end) if name != "q" and row == begin + 4 else row, 1] = True
        assert torch.equal(out.isnan().any(2), expected) and torch.equal(out.isnan().all(2), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4e38])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_wide_rows_keep_what_is_not_finite(device, name, value):
    """float32 rows wide enough for products of split values: an infinity may turn into NaN, and nothing spreads. The
    largest finite values stay finite where one product of them does."""
    q, k, v, offsets = (x.detach() for x in make(device, 128, 144))
    inputs = {"q": q, "k": k, "v": v}
    row, begin, end = int(offsets[3]) + 4, int(offsets[3]), int(offsets[4])
    inputs[name][row, 1, 5] = value
    out = ops.qla(*inputs.values(), offsets, 2300)
    lost = ~out.isfinite().all(2)
    touched = torch.zeros_like(lost)
    touched[row if name == "q" else slice(begin, end), 1] = True
    assert not (lost & ~touched).any()
    if value != 3.4e38:
        assert torch.equal(lost, touched)
    else:
        peer = qla_by_state(*inputs.values(), offsets)
        assert not (lost & peer.isfinite().all(2)).any(), "a finite row of torch's is not finite"


@pytest.mark.parametrize("power", [-60, -20, 0, 20, 60])
def test_wide_rows_at_any_scale(device, power):
    """Values of one scale, opposite pairs that cancel all but the last bits, and a long history."""
    q, k, v, offsets = (x.detach() for x in make(device, 128, 128, heads=1, lengths=[1100, 7]))
    k[1:1000:2] = k[:1000:2]
    v[1:1000:2] = -v[:1000:2] * (1 + 1e-4 * normal(v[:1000:2].shape, device, seed=4))
    v *= 2.0**power
    options = {"activation": "silu", "state_activation": "identity"}
    exact = qla_by_state(q.double(), k.double(), v.double(), offsets, **options)
    peer = qla_by_state(q, k, v, offsets, **options)
    assert_as_good_as([ops.qla(q, k, v, offsets, 1100, **options)], [exact], [peer])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_references_agree(device, activation):
    q, k, v, offsets = (x.detach().double() if x.is_floating_point() else x for x in make(device, 16, 24))
    targets = torch.tensor(TARGETS, device=device)
    one = qla_by_state(q, k, v, offsets, num_targets=targets, activation=activation, state_activation="identity")
    other = qla_by_rows(q, k, v, offsets, num_targets=targets, activation=activation)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_reference_gradients_by_finite_differences(device):
    q, k, v, offsets = make(device, 4, 4, lengths=[3, 0, 4])
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    targets = torch.tensor([1, 0, 2], device=device)
    assert torch.autograd.gradcheck(lambda *a: qla_by_state(*a, offsets, num_targets=targets), inputs)


def test_gradients_by_finite_differences(device):
    """Along a random direction, in the kernel itself: float32, so the step is large and the bound its curvature."""
    q, k, v, offsets = make(device, 16, 24, lengths=[40, 7])
    targets = torch.tensor([3, 2], device=device)
    weight = normal(v.shape, device)

    def loss(*inputs):
        return (ops.qla(*inputs, offsets, 40, num_targets=targets).double() * weight).sum()

    grads = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for i, grad in enumerate(grads):
        direction = normal(grad.shape, device, seed=10 + i)
        inputs = [x.detach() for x in (q, k, v)]
        up, down = list(inputs), list(inputs)
        step = 1e-2
        up[i], down[i] = inputs[i] + step * direction, inputs[i] - step * direction
        numeric = (loss(*up) - loss(*down)) / (2 * step)
        torch.testing.assert_close(numeric, (grad.double() * direction).sum(), rtol=2e-3, atol=2e-3)


def test_targets_do_not_leak(device):
    q, k, v, offsets = (x.detach() for x in make(device, 16, 16))
    targets = torch.tensor(TARGETS, device=device)
    changed = int(offsets[6]) - 2  # a target of the longest sequence

    def run(*inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = ops.qla(*inputs, offsets, 2300, num_targets=targets)
        others = torch.arange(len(out), device=device) != changed
        return out[others], *(g[others] for g in torch.autograd.grad(out[others].sum(), inputs))

    before = run(q, k, v)
    for x in (q, k, v):
        x[changed] = 7.0
    for a, b in zip(before, run(q, k, v), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_batch_or_threads(device, dtype):
    q, k, v, offsets = (x.detach() for x in make(device, 24, 40, dtype))
    targets = torch.tensor(TARGETS, device=device)
    whole, state = ops.qla(q, k, v, offsets, 2300, num_targets=targets, return_state=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, ops.qla(q, k, v, offsets, 2300, num_targets=targets))
    finally:
        torch.set_num_threads(threads)
    for b, (begin, end) in enumerate(pairwise(offsets)):
        rows = slice(int(begin), int(end))
        alone = torch.tensor([0, int(end - begin)], device=device)
        out, own = ops.qla(q[rows], k[rows], v[rows], alone, 2300, num_targets=targets[b : b + 1], return_state=True)
        assert torch.equal(out, whole[rows])
        assert torch.equal(own[0], state[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_short_histories(device, dtype):
    """Of one length: the reference is one product for all of them."""
    users, length, targets = 4096, 20, 4
    q, k, v = (normal((users * length, 1, 32), device, dtype, seed) for seed in range(3))
    offsets = torch.arange(users + 1, device=device) * length
    ours = ops.qla(q, k, v, offsets, length, num_targets=torch.full((users,), targets, device=device))

    def reference(*rows):
        q, k, v = (x.view(users, length, 32) for x in rows)
        q, k, sources = torch.nn.functional.silu(q), torch.nn.functional.silu(k), length - targets
        state = k[:, :sources].mT @ v[:, :sources] / sources
        out = q @ torch.nn.functional.silu(state)
        own = (q * k).sum(-1, keepdim=True)[:, sources:] / sources * v[:, sources:]
        return torch.cat([out[:, :sources], out[:, sources:] + own], 1).view(users * length, 1, 32)

    assert_as_good_as([ours], [reference(*(x.double() for x in (q, k, v)))], [reference(q, k, v)])


def test_bfloat16_is_deterministic_beside_torchs_products(device):
    """torch's own products use the same tile registers as ours and set them up otherwise."""
    q, k, v, offsets = (x.detach() for x in make(device, 40, 72, torch.bfloat16))
    x = normal((300, 200), device, torch.bfloat16)
    first, product = ops.qla(q, k, v, offsets, 2300), x @ x.mT
    for _ in range(3):
        assert torch.equal(ops.qla(q, k, v, offsets, 2300), first)
        assert torch.equal(x @ x.mT, product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_have_the_bits_of_small_ones(device, dtype):
    """On a CPU results of 8 MB and more are written past the caches."""
    lengths = [2600] * 7
    q, k, v, offsets = make(device, 64, 64, dtype, heads=4, lengths=lengths)
    grad = normal(v.shape, device, dtype)
    targets = torch.full((7,), 16, device=device)
    assert q.numel() * q.element_size() >= 8 << 20
    whole = outputs_and_grads(lambda *a: ops.qla(*a, offsets, 2600, num_targets=targets), q, k, v, grad)
    for begin in (0, 6 * 2600):
        rows = slice(begin, begin + 2600)
        one = [x.detach()[rows].clone().requires_grad_() for x in (q, k, v)]
        alone = torch.tensor([0, 2600], device=device)
        part = outputs_and_grads(
            lambda *a, alone=alone: ops.qla(*a, alone, 2600, num_targets=targets[:1]), *one, grad[rows]
        )
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[rows])


def test_state_adds_up_over_chunks(device):
    _, k, v, _ = (x.detach() for x in make(device, 16, 24))
    total = len(k)
    whole = ops.qla_state(k, v, torch.tensor([0, total], device=device), total)
    parts = ops.qla_state(k, v, torch.tensor([0, 1000, total], device=device), total).sum(0, keepdim=True)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-3)


def test_halves_compose_to_the_whole(device):
    q, k, v, offsets = make(device, 16, 24)
    targets = torch.tensor(TARGETS, device=device)
    whole = ops.qla(q, k, v, offsets, 2300, num_targets=targets)
    state = ops.qla_state(k, v, offsets, 2300, num_targets=targets)
    scale = ops.mean_scale(offsets, targets)
    halves = ops.qla_apply(q, state, scale, offsets, 2300, num_targets=targets, self_k=k, self_v=v)
    assert torch.equal(whole, halves)
    grad = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad(whole, (q, k, v), grad), torch.autograd.grad(halves, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_targets_alone(device):
    q, k, v, offsets = (x.detach() for x in make(device, 16, 24))
    targets = torch.tensor(TARGETS, device=device)
    whole = ops.qla(q, k, v, offsets, 2300, num_targets=targets)
    state = ops.qla_state(k, v, offsets, 2300, num_targets=targets)
    rows = torch.cat([torch.arange(int(e) - t, int(e)) for e, t in zip(offsets[1:], TARGETS, strict=True)])
    own = torch.tensor([0, *torch.tensor(TARGETS).cumsum(0).tolist()], device=device)
    alone = ops.qla_apply(
        q[rows], state, ops.mean_scale(offsets, targets), own, 63, num_targets=targets, self_k=k[rows], self_v=v[rows]
    )
    assert torch.equal(alone, whole[rows])


def test_state_carries_a_gradient(device):
    q, k, v, offsets = make(device, 16, 24, lengths=[50, 0, 9])
    _, state = ops.qla(q, k, v, offsets, 50, return_state=True)
    weight = torch.randn_like(state)
    through_qla = torch.autograd.grad((state * weight).sum(), (k, v))
    through_state = torch.autograd.grad((ops.qla_state(k, v, offsets, 50) * weight).sum(), (k, v))
    for a, b in zip(through_qla, through_state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1]])
def test_empty_batches_and_histories(device, lengths):
    q, k, v, offsets = make(device, 16, 24, lengths=lengths)
    out, state = ops.qla(q, k, v, offsets, 1, return_state=True)
    assert out.shape == v.shape and state.shape == (len(lengths), 2, 16, 24)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()
    if sum(lengths) == 0:
        assert not state.any()


def test_long_history_keeps_precision(device):
    k, v = (normal((200_000, 1, 16), device, seed=seed) for seed in (0, 1))
    offsets = torch.tensor([0, len(k)], device=device)
    exact = torch.einsum("nd,ne->de", torch.nn.functional.silu(k[:, 0].double()), v[:, 0].double())
    peer = torch.einsum("nd,ne->de", torch.nn.functional.silu(k[:, 0]), v[:, 0])
    assert rms(ops.qla_state(k, v, offsets, len(k))[0, 0] - exact) <= 2 * rms(peer - exact) + 1e-6 * rms(exact)


def opcheck_cases(device):
    q, k, v, offsets = make(device, 16, 24, lengths=[5, 0, 9])
    targets = torch.tensor([2, 0, 3], device=device)
    scale = ops.mean_scale(offsets, targets)
    out, state = (x.detach() for x in ops.qla(q, k, v, offsets, 9, num_targets=targets, return_state=True))
    state.requires_grad_()
    plain = [x.detach() for x in (q, k, v)]
    grad, grad_state = torch.randn_like(out), torch.randn_like(state)
    yield "qla", (q, k, v, offsets, 9, targets)
    yield "qla_backward", (grad, grad_state, *plain, state.detach(), offsets, 9, targets)
    yield "qla_state", (k, v, offsets, 9, targets)
    yield "qla_state_backward", (grad_state, *plain[1:], offsets, 9, targets)
    yield "qla_apply", (q, state, scale, offsets, 9, k, v, targets)
    yield "qla_apply_backward", (grad, plain[0], state.detach(), scale, offsets, 9, *plain[1:], targets)


def test_opcheck(device):
    for name, args in opcheck_cases(device):
        torch.library.opcheck(getattr(torch.ops.vista, name).default, args)


def test_compiles_whole_and_once(device):
    compiles = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def model(q, k, v, offsets):
        return ops.qla(q, k, v, offsets, 4096) * 2

    for lengths in ([5, 0, 9], [1, 7, 3], [300, 2, 2]):
        q, k, v, offsets = make(device, 16, 16, lengths=lengths)
        torch.testing.assert_close(model(q, k, v, offsets), ops.qla(q, k, v, offsets, 4096) * 2)
    assert compiles.frame_count == 1


def test_double_backward_is_refused(device):
    q, k, v, offsets = make(device, 16, 16, lengths=[5])
    (grad,) = torch.autograd.grad(ops.qla(q, k, v, offsets, 5).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        grad.sum().backward()


def good_input():
    q, k, v, offsets = (x.detach() for x in make("cpu", 16, 24, lengths=[5, 9]))
    return {"q": q, "k": k, "v": v, "seq_offsets": offsets, "max_seq_len": 9}


def bad_inputs():
    good = good_input()
    q, k, offsets = good["q"], good["k"], good["seq_offsets"]
    yield {"q": q.double()}, "q must be float32, bfloat16 or float16, found float64"
    yield {"k": k.half()}, r"k must have the dtype of q \(float32\), found float16"
    yield {"k": k[:, :1]}, r"k must have shape \[17, 2, 16\]"
    yield {"q": q[0]}, r"q must have shape \[total, heads, head_dim\], found \[2, 16\]"
    yield {"q": q[..., :10], "k": k[..., :10]}, "q's head dim must be a multiple of 8 from 16 to 256, found 10"
    yield {"seq_offsets": offsets.float()}, "seq_offsets must be int64 or int32, found float32"
    yield {"seq_offsets": torch.tensor([], dtype=torch.int64)}, r"batch \+ 1 entries, found none"
    yield {"max_seq_len": -1}, "max_seq_len must not be negative, found -1"
    yield {"num_targets": torch.tensor([1])}, r"one entry per sequence \(2\), found 1"
    yield {"attn_scale": torch.ones(3)}, r"attn_scale must have one entry per sequence \(2\), found 3"
    yield {"attn_scale": torch.ones(2).double()}, "attn_scale must be float32, found float64"
    yield {"activation": "gelu"}, "activation must be 'silu', .* found 'gelu'"
    yield {"state_activation": ""}, "state_activation must be .* found ''"


@pytest.mark.parametrize(("arguments", "message"), list(bad_inputs()), ids=[m[:40] for _, m in bad_inputs()])
def test_bad_input_is_named(device, arguments, message):
    arguments = {**good_input(), **arguments}
    with pytest.raises(RuntimeError, match=message):
        ops.qla(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})


def bad_contents():
    yield {"seq_offsets": torch.tensor([0, 9, 5])}, "seq_offsets must not decrease, found 9 then 5 at index 2"
    yield {"seq_offsets": torch.tensor([1, 5])}, "seq_offsets must start at 0, found 1"
    yield {"seq_offsets": torch.tensor([0, 5, 99]), "max_seq_len": 99}, r"within the packed rows \(17\), found 99"
    yield {"max_seq_len": 8}, "max_seq_len must be at least the longest sequence, found 8 for sequence 1"
    yield {"num_targets": torch.tensor([0, 10])}, r"sequence's length \(9\), found 10 for sequence 1"
    yield {"num_targets": torch.tensor([-1, 0])}, "found -1 for sequence 0"


@pytest.mark.parametrize(("arguments", "message"), list(bad_contents()), ids=[m[:40] for _, m in bad_contents()])
def test_bad_contents_are_named(arguments, message):
    """On the CPU; on a GPU the contents are checked where they lie (test_device_asserts.py)."""
    with pytest.raises(RuntimeError, match=message):
        ops.qla(**{**good_input(), **arguments})


def test_scale_gradient_is_refused(device):
    q, k, v, offsets = make(device, 16, 16, lengths=[5])
    with pytest.raises(RuntimeError, match="attn_scale must not require a gradient"):
        ops.qla(q, k, v, offsets, 5, attn_scale=torch.ones(1, device=device, requires_grad=True))


def test_own_term_arguments_come_together(device):
    q, k, v, offsets = (x.detach() for x in make(device, 16, 16, lengths=[5]))
    state = ops.qla_state(k, v, offsets, 5)
    with pytest.raises(RuntimeError, match="given together"):
        ops.qla_apply(q, state, ops.mean_scale(offsets), offsets, 5, self_k=k, self_v=v)
