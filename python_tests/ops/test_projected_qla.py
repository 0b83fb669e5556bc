"""projected_qla_* against float64 references; a bound is a multiple of what torch in the same precision misses."""

from itertools import pairwise

import pytest
import torch

from vista_ext import ops, reference
from vista_ext.testing import assert_as_good_as

# Ugly lengths (none, one, primes, more than one piece and chunk), and three rows of padding behind the last sequence.
LENGTHS = [5, 0, 1, 113, 1, 4200, 63]
PADDING = 3
ACTIVATIONS = ["silu", "shifted_elu", "relu", "identity"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def normal(shape, device, dtype=torch.float32, seed=9):
    """The same values on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def make(device, d, e, dim=64, heads=2, dtype=torch.float32, lengths=LENGTHS):
    """x, the three weights and the offsets; rows of very different sizes, which the norm makes equal."""
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) if lengths else torch.zeros(1, dtype=int)
    total = int(offsets[-1]) + PADDING
    x = normal((total, dim), "cpu") * torch.linspace(0.5, 2, total)[:, None]
    weights = [normal((heads * n, dim), "cpu", seed=seed) / dim**0.5 for seed, n in enumerate((d, d, e))]
    q, k, v = (w.to(device=device, dtype=dtype).requires_grad_() for w in weights)
    return x.to(device=device, dtype=dtype).requires_grad_(), q, k, v, offsets.to(device)


def longest(offsets):
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


def both_halves(module, x, q, k, v, offsets, *most, heads=2, **options):
    """A layer's attention: state and out, from the ops or from their references."""
    of_state = {name: value for name, value in options.items() if name != "state_activation"}
    state = module.projected_qla_state(x, k, v, offsets, *most, heads=heads, **of_state)
    return module.projected_qla_apply(x, q, state, ops.mean_scale(offsets), offsets, *most, **options), state


def results(module, inputs, offsets, *most, **options):
    """Outputs and all gradients."""
    out, state = both_halves(module, *inputs, offsets, *most, **options)
    # 1 / 64: the gradient of a state is summed over rows, and must not drown that of the output.
    grads = normal(out.shape, out.device).to(out.dtype), normal(state.shape, out.device).to(state.dtype) / 64
    return out, state, *torch.autograd.grad((out, state), inputs, grads)


def as_good_as_torch(inputs, offsets, **options):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = results(ops, inputs, offsets, longest(offsets), **options)
    right = results(reference, exact, offsets, **options)
    peer = results(reference, inputs, offsets, **options)
    peer = (peer[0], peer[1].float(), *peer[2:])  # a state is float32 whatever the rows are
    assert_as_good_as(ours, right, peer)
    assert not ours[0][-PADDING:].any() and not ours[2][-PADDING:].any(), "padding rows must be zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, EPS])
@pytest.mark.parametrize(("dim", "d", "e"), [(64, 32, 32), (256, 64, 64), (136, 128, 128), (40, 16, 24)])
@pytest.mark.usefixtures("products")
def test_matches_the_definition(device, dim, d, e, norm_eps, dtype):
    *inputs, offsets = make(device, d, e, dim, dtype=dtype)
    as_good_as_torch(inputs, offsets, norm_eps=norm_eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("state_activation", ACTIVATIONS)
@pytest.mark.usefixtures("products")
def test_every_activation(device, activation, state_activation, dtype):
    *inputs, offsets = make(device, 32, 32, heads=3, dtype=dtype, lengths=[70, 0, 200])
    options = {"activation": activation, "state_activation": state_activation}
    as_good_as_torch(inputs, offsets.int(), heads=3, norm_eps=EPS, **options)


def test_references_agree(device):
    """The definition of QLA on keys, values and queries that are there."""
    x, q, k, v, offsets = make(device, 16, 24)
    y = reference.projected_qla.normalised(x.double(), EPS)
    rows = [(y @ w.double().t()).unflatten(1, (2, -1)) for w in (q, k, v)]
    exact = [t.detach().double() for t in (x, q, k, v)]
    out, _ = both_halves(reference, *exact, offsets, norm_eps=EPS)
    right = reference.qla_by_state(*rows, offsets, attn_scale=ops.mean_scale(offsets))
    torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-12)


def test_equals_the_unfused_chain(device):
    """float32: what the model did before, with the norm's weight in the projections."""
    x, q, k, v, offsets = make(device, 16, 24)
    norm = torch.nn.RMSNorm(64, eps=EPS, device=device)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    rows = [(norm(x) @ w.t()).unflatten(1, (2, -1)) for w in (q, k, v)]
    whole, state = ops.qla(*rows, offsets, 4200, return_state=True)
    folded = [w * norm.weight for w in (q, k, v)]
    ours, own = both_halves(ops, x, *folded, offsets, 4200, norm_eps=EPS)
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_batch(device, dtype):
    x, q, k, v, offsets = (t.detach() for t in make(device, 32, 32, dtype=dtype))
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("composed of torch's products of the whole batch")
    whole, states = both_halves(ops, x, q, k, v, offsets, 4200, norm_eps=EPS)
    for b, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = torch.tensor([0, end - begin], device=device)
        out, state = both_halves(ops, x[begin:end], q, k, v, alone, 4200, norm_eps=EPS)
        assert torch.equal(out, whole[begin:end]) and torch.equal(state[0], states[b])


def test_states_of_parts_add_up(device):
    x, _, k, v, _ = (t.detach() for t in make(device, 32, 32))
    ends = torch.tensor([0, len(x)], device=device), torch.tensor([0, 1000, len(x)], device=device)
    whole, parts = (ops.projected_qla_state(x, k, v, offsets, len(x), heads=2) for offsets in ends)
    torch.testing.assert_close(parts.sum(0, keepdim=True), whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1]])
@pytest.mark.usefixtures("products")
def test_empty_batches_and_histories(device, lengths, dtype):
    *inputs, offsets = make(device, 32, 32, dtype=dtype, lengths=lengths)
    out, state = both_halves(ops, *inputs, offsets, 1, norm_eps=EPS)
    assert out.shape == (sum(lengths) + PADDING, 2, 32) and state.shape == (len(lengths), 2, 32, 32)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    if sum(lengths) == 0:
        assert not state.any() and not out.any()


def test_no_rows_at_all(device):
    x, *weights, offsets = make(device, 32, 32, lengths=[0, 0])
    out, state = both_halves(ops, x[:0], *weights, offsets, 0, norm_eps=EPS)
    assert out.shape == (0, 2, 32) and not state.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, EPS])
def test_nothing_depends_on_padding(device, norm_eps, dtype):
    x, *weights, offsets = make(device, 32, 32, dtype=dtype, lengths=[5, 0, 70])
    spoiled = x.detach().clone()
    spoiled[-PADDING:] = torch.nan
    right = results(ops, (x, *weights), offsets, 70, norm_eps=norm_eps)
    ours = results(ops, (spoiled.requires_grad_(), *weights), offsets, 70, norm_eps=norm_eps)
    for a, b in zip(ours, right, strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_sequence(device):
    x, q, k, v, offsets = (t.detach() for t in make(device, 32, 32))
    x[int(offsets[3]) + 4, 7] = torch.nan
    out, state = both_halves(ops, x, q, k, v, offsets, 4200, norm_eps=EPS)
    touched = torch.zeros(len(LENGTHS), dtype=bool, device=device)
    touched[3] = True
    assert torch.equal(state.isnan().flatten(1).all(1), touched) and torch.equal(
        state.isnan().flatten(1).any(1), touched
    )
    rows = torch.zeros(len(x), dtype=bool, device=device)
    rows[offsets[3] : offsets[4]] = True
    assert torch.equal(out.isnan().flatten(1).any(1), rows)


@pytest.mark.usefixtures("products_made_again")
def test_saves_rows_weights_and_states_only(device):
    """No tensor of projections is kept for the backward."""
    x, q, k, v, offsets = make(device, 16, 24)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        both_halves(ops, x, q, k, v, offsets, 4200, norm_eps=EPS)
    known = [t.shape for t in (x, q, k, v, offsets)] + [(len(LENGTHS), 2, 16, 24), (len(LENGTHS),)]
    assert kept and set(kept) <= set(map(torch.Size, known))


@pytest.mark.usefixtures("products")
def test_only_wanted_gradients(device):
    x, _, k, v, offsets = make(device, 16, 24, lengths=[5, 9])
    state = ops.projected_qla_state(x.detach(), k, v.detach(), offsets, 9, heads=2)
    (grad,) = torch.autograd.grad(state.sum(), k)
    everything = torch.autograd.grad(ops.projected_qla_state(x, k, v, offsets, 9, heads=2).sum(), (x, k, v))
    assert torch.equal(grad, everything[1])


def test_autocast_takes_its_dtype(device):
    x, q, k, v, offsets = make(device, 16, 24, lengths=[5, 9])
    with torch.autocast(device, torch.bfloat16):
        out, state = both_halves(ops, x, q, k, v, offsets, 9, norm_eps=EPS)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    grads = torch.autograd.grad(out.float().sum(), (x, q, k, v))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("norm_eps", [None, EPS])
@pytest.mark.usefixtures("products")
def test_a_backward_under_autocast_keeps_the_dtype(norm_eps, device):
    """Where no kernel serves a call its products are torch's, which then come in autocast's dtype."""
    x, q, k, v, offsets = make(device, 16, 24, lengths=[5, 9])
    out, _ = both_halves(ops, x, q, k, v, offsets, 9, norm_eps=norm_eps)
    right = torch.autograd.grad(out.sum(), (x, q, k, v), retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        grads = torch.autograd.grad(out.sum(), (x, q, k, v))
    for grad, expected in zip(grads, right, strict=True):
        assert grad.dtype == x.dtype and (grad - expected).norm() < 0.02 * expected.norm()


def opcheck_cases(device):
    x, q, k, v, offsets = make(device, 16, 24, lengths=[5, 0, 9])
    options = {"norm_eps": EPS, "activation": "shifted_elu"}
    state = ops.projected_qla_state(x, k, v, offsets, 9, heads=2).detach().requires_grad_()
    plain = [t.detach() for t in (x, q, k, v)]
    grad, scale = normal((len(x), 2, 24), device), ops.mean_scale(offsets)
    yield "state", (x, k, v, offsets, 9), {"heads": 2, **options}
    yield "state_backward", (state.detach(), plain[0], *plain[2:], offsets, 9), {"heads": 2, **options}
    yield "apply", (x, q, state, scale, offsets, 9), options
    yield "apply_backward", (grad, *plain[:2], state.detach(), scale, offsets, 9), options


def test_opcheck(device):
    for name, args, options in opcheck_cases(device):
        torch.library.opcheck(getattr(torch.ops.vista, f"projected_qla_{name}").default, args, options)


def test_compiles_whole_and_once(device):
    compiles = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def model(x, q, k, v, offsets):
        return both_halves(ops, x, q, k, v, offsets, 4096, norm_eps=EPS)[0] * 2

    for lengths in ([5, 0, 9], [1, 7, 3], [300, 2, 2]):
        inputs = make(device, 16, 16, lengths=lengths)
        torch.testing.assert_close(model(*inputs), both_halves(ops, *inputs, 4096, norm_eps=EPS)[0] * 2)
    assert compiles.frame_count == 1


def test_double_backward_is_refused(device):
    x, q, k, v, offsets = make(device, 16, 16, lengths=[5])
    out, _ = both_halves(ops, x, q, k, v, offsets, 5)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        grad.sum().backward()


def test_scale_gradient_is_refused(device):
    x, q, k, v, offsets = make(device, 16, 16, lengths=[5])
    state = ops.projected_qla_state(x, k, v, offsets, 5, heads=2)
    with pytest.raises(RuntimeError, match="attn_scale must not require a gradient"):
        ops.projected_qla_apply(x, q, state, torch.ones(1, device=device, requires_grad=True), offsets, 5)


def good_input(name):
    x, q, k, v, offsets = (t.detach() for t in make("cpu", 16, 24, lengths=[5, 9]))
    ends = {"seq_offsets": offsets, "max_seq_len": 9}
    if name == "state":
        return {"x": x, "weight_k": k, "weight_v": v, **ends, "heads": 2}
    return {"x": x, "weight_q": q, "state": torch.ones(2, 2, 16, 24), "attn_scale": torch.ones(2), **ends}


def bad_inputs():
    x, q, k, v, offsets = (t.detach() for t in make("cpu", 16, 24, lengths=[5, 9]))
    yield "state", {"x": x.double()}, "x must be float32, bfloat16 or float16, found float64"
    yield "state", {"x": x[0]}, r"x must have shape \[total, dim\], found \[64\]"
    yield "state", {"weight_k": k.half()}, r"weight_k must have the dtype of x \(float32\), found float16"
    yield "state", {"weight_v": v[:, :60]}, r"weight_v must have the columns of x \(64\), found \[48, 60\]"
    yield "state", {"weight_v": v[None]}, r"weight_v must have shape \[heads \* head_dim, dim\]"
    yield "state", {"weight_k": k[:31]}, r"weight_k must have as many rows for each of the 2 heads, found \[31, 64\]"
    yield "state", {"weight_k": k[:20]}, "weight_k's head dim must be a multiple of 8 from 16 to 256, found 10"
    yield "state", {"heads": 0}, "heads must be at least 1, found 0"
    yield "state", {"norm_eps": -1.0}, "norm_eps must not be negative, found -1"
    yield "state", {"activation": "gelu"}, "activation must be 'silu', .* found 'gelu'"
    yield "state", {"seq_offsets": offsets.float()}, "seq_offsets must be int64 or int32, found float32"
    yield "state", {"seq_offsets": offsets[:0]}, r"batch \+ 1 entries, found none"
    yield "state", {"seq_offsets": offsets[0]}, r"seq_offsets must have shape \[n\], found \[\]"
    yield "apply", {"seq_offsets": offsets[None]}, r"seq_offsets must have shape \[n\], found \[1, 3\]"
    yield "state", {"max_seq_len": -1}, "max_seq_len must not be negative, found -1"
    yield "apply", {"weight_q": q[:31]}, "weight_q must have as many rows for each of the 2 heads"
    yield "apply", {"state": torch.ones(2, 2, 16)}, r"state must have shape \[batch, heads, d, e\], found \[2, 2, 16\]"
    yield (
        "apply",
        {"state": torch.ones(3, 2, 16, 24)},
        r"state must have shape \[2, 2, 16, 24\], found \[3, 2, 16, 24\]",
    )
    yield "apply", {"state": torch.ones(2, 2, 16, 24).double()}, "state must be float32, found float64"
    yield "apply", {"state": torch.tensor(1.0)}, r"state must have shape \[batch, heads, d, e\], found \[\]"
    yield "apply", {"attn_scale": torch.ones(3)}, r"attn_scale must have one entry per sequence \(2\), found 3"
    yield "apply", {"state_activation": ""}, "state_activation must be .* found ''"


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize(("name", "arguments", "message"), list(bad_inputs()), ids=[m[:40] for *_, m in bad_inputs()])
def test_bad_input_is_named(device, name, arguments, message, differentiated):
    arguments = {**good_input(name), **arguments}
    arguments = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    arguments["x"].requires_grad_(differentiated)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, f"projected_qla_{name}")(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_offsets": torch.tensor([0, 9, 5])}, "seq_offsets must not decrease, found 9 then 5 at index 2"),
        ({"seq_offsets": torch.tensor([1, 5, 9])}, "seq_offsets must start at 0, found 1"),
        ({"seq_offsets": torch.tensor([0, 5, 99]), "max_seq_len": 99}, r"within the packed rows \(17\), found 99"),
        ({"max_seq_len": 8}, "max_seq_len must be at least the longest sequence, found 8 for sequence 1"),
    ],
)
@pytest.mark.parametrize("name", ["state", "apply"])
def test_bad_contents_are_named(name, arguments, message):
    """On the CPU; on a GPU the contents are checked where they lie (test_device_asserts.py)."""
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, f"projected_qla_{name}")(**{**good_input(name), **arguments})
