"""The reconstruction decoder: packed rows are the padded ones, causal, and as many as the users' windows hold."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from python_tests.models.conftest import make_histories
from vista_ext.models import EmbeddingConfig, Vista, VistaConfig
from vista_ext.models.decoder import Reconstruction
from vista_ext.nn import causal, last_rows, owners, packed_suffix

LENGTHS = [5, 0, 1, 300, 40]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def decode_padded(decoder, summaries, windows):
    """The block on users padded to one length: `[n, m, dim]`."""
    config = decoder.config
    rows = torch.cat([summaries, windows], 1)
    qkv = decoder.qkv(decoder.norm(rows)).view(*rows.shape[:2], 3, config.heads, config.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    rows = rows + decoder.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    rows = rows + decoder.mlp(decoder.mlp_norm(rows))
    return decoder.predict(rows[:, summaries.shape[1] :])


def loss_padded(decoder, summaries, events, offsets, window, whole):
    windows, valid = last_rows(events, offsets, window)
    targets = last_rows(whole, offsets, window)[0][:, 1:].detach()
    error = (decode_padded(decoder, summaries, windows)[:, :-1] - targets).square().mean(-1)
    return torch.where(valid[:, 1:], error, 0.0).sum() / valid[:, 1:].sum().clamp(min=1)


def make(lengths, window, dtype=torch.float64):
    torch.manual_seed(0)
    decoder = Reconstruction(VistaConfig(reconstruction_window=window)).to(dtype)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    summaries, events = draw(len(lengths), 16, 64), draw(sum(lengths), 64)
    return SimpleNamespace(
        decoder=decoder,
        inputs=(summaries, events),
        offsets=offsets_of(lengths),
        longest=max(lengths, default=0),
        whole=draw(sum(lengths), 64),
    )


def values_and_gradients(loss, it):
    leaves = [*it.inputs, *it.decoder.parameters()]
    return loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.fixture(params=[False, True], ids=["rows counted", "rows bounded"])
def bounded(request, monkeypatch):
    """Compiled code, and code for a device, does not know the number of rows and leaves room behind the last user."""
    if request.param:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [0, 0], [2, 2, 2], [400, 0, 3], []], ids=str)
@pytest.mark.parametrize("window", [2, 6, 1000])
def test_packed_is_padded(lengths, window):
    it = make(lengths, window)
    packed = it.decoder(*it.inputs, it.offsets, it.longest, it.whole)
    padded = loss_padded(it.decoder, *it.inputs, it.offsets, min(window, max(it.longest, 2)), it.whole)
    for ours, right in zip(values_and_gradients(packed, it), values_and_gradients(padded, it), strict=True):
        assert torch.allclose(ours, right, rtol=1e-11, atol=1e-13)
    assert (packed == 0) == all(length < 2 for length in lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_bit_for_bit(dtype):
    """v_i depends on its user's summary and on u_1..u_i only."""
    it = make([4, 0, 7, 1], 8, dtype)
    with torch.no_grad():
        decode = lambda summaries, events: it.decoder.decode(summaries, events, it.offsets, 8)  # noqa: E731
        before = decode(*it.inputs)
        for user, begin, end in ((0, 0, 4), (2, 4, 11), (3, 11, 12)):
            for event in range(begin, end):
                events = it.inputs[1].clone()
                events[event] += 1
                changed = (decode(it.inputs[0], events) != before).any(1)
                assert changed.tolist() == [event <= row < end for row in range(12)]
            summaries = it.inputs[0].clone()
            summaries[user, 3] += 1
            changed = (decode(summaries, it.inputs[1]) != before).any(1)
            assert changed.tolist() == [begin <= row < end for row in range(12)]


def test_gradients_flow_from_what_was_seen():
    it = make([4, 0, 7, 1], 8)
    predicted = it.decoder.decode(*it.inputs, it.offsets, 8)
    owner = owners(it.offsets, 12)
    for row in range(12):
        of_summaries, of_events = torch.autograd.grad(predicted[row].sum(), it.inputs, retain_graph=True)
        seen = (owner == owner[row]) & (torch.arange(12) <= row)
        assert torch.equal(of_events.any(1), seen)
        assert torch.equal(of_summaries.any(2).all(1), torch.arange(4) == owner[row])
        assert not of_summaries[torch.arange(4) != owner[row]].any()


def test_the_longest_history_is_not_paid_for_by_all(monkeypatch):
    rows, scores = [], []
    it = make([3000, *[1] * 50, 20], 5000, torch.float32)
    it.decoder.qkv.register_forward_hook(lambda _module, inputs, _out: rows.append(inputs[0].shape[0]))
    attend = causal._attend
    monkeypatch.setattr(
        causal, "_attend", lambda q, k, v: scores.append(q.shape[0] * q.shape[1] ** 2) or attend(q, k, v)
    )
    it.decoder(*it.inputs, it.offsets, it.longest, it.whole)
    assert rows == [3070 + 52 * 16]
    assert sum(scores) == 3016**2 + 50 * 17**2 + 36**2
    # Where nobody knows their number there is room for the events that there are, or for all users' windows if less.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    it.decoder(*it.inputs, it.offsets, it.longest, it.whole)
    it.decoder.config = VistaConfig(reconstruction_window=10)
    it.decoder(*it.inputs, it.offsets, it.longest, it.whole)
    assert rows[1:] == [3070 + 52 * 16, 520 + 52 * 16]


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_packed_suffix(most):
    rows = torch.arange(sum(LENGTHS))
    index, offsets = packed_suffix(offsets_of(LENGTHS), most, len(rows))
    expected = [part[-most:] for part in rows.split(LENGTHS)]
    assert offsets.tolist() == offsets_of([len(part) for part in expected]).tolist()
    assert torch.equal(rows[index[: offsets[-1]]], torch.cat(expected))
    assert offsets[-1] <= len(index) <= min(len(rows), len(LENGTHS) * most)
    assert index.min() >= 0 and index.max() < len(rows)
    none, offsets = packed_suffix(torch.tensor([0]), most, 0)
    assert none.shape == (0,) and offsets.tolist() == [0]


def test_owners():
    assert owners(torch.tensor([0, 0, 2, 2, 3]), 5).tolist() == [1, 1, 3, 3, 3]


def test_no_events_and_no_users():
    decoder = Reconstruction(VistaConfig())
    for users in (0, 2):
        nothing, offsets = torch.zeros(0, 64), torch.zeros(users + 1, dtype=torch.int64)
        assert decoder(torch.randn(users, 16, 64), nothing, offsets, 0, nothing).item() == 0


@pytest.mark.parametrize("constants", [True, False])
def test_targets_are_constants_unless_asked(constants):
    decoder = Reconstruction(VistaConfig(reconstruct_constants=constants))
    rows = torch.randn(2, 64, requires_grad=True)
    decoder(torch.randn(1, 16, 64), rows, torch.tensor([0, 2]), 2, rows).backward()
    assert bool(rows.grad[1].any()) is not constants  # the last event is only ever a target


def test_events_are_predicted_as_they_are(world, monkeypatch):
    model = Vista(world.schema, VistaConfig(embedding=EmbeddingConfig(dropout=0.5)), world.item_features)
    monkeypatch.setattr(model.encoder.reconstruction, "decode", lambda summaries, events, *_: torch.zeros_like(events))
    window = model.config.reconstruction_window
    whole = model.eval().embed(world.histories).rows.split(LENGTHS)
    expected = torch.cat([events[-window:][1:] for events in whole]).square().mean()
    model.train()
    for _ in range(2):
        found = model(world.histories, world.candidates, world.kv_index).losses["reconstruction"]
        assert torch.allclose(found, model.config.reconstruction_weight * expected)


def test_a_training_step_compiles_whole(world):
    """Forward and backward in one graph each, compiled once whatever the lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    model = Vista(world.schema, VistaConfig(summary_layers=2, recent_events=4), world.item_features)

    def step(function, histories):
        output = function(histories, world.candidates, world.kv_index)
        loss = output.logits.square().mean() + output.losses["reconstruction"]
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = 0
    for lengths in (LENGTHS, [40, 3, 2, 0, 301], [7, 7, 7, 7, 9], [0, 0, 1, 2, 0]):
        histories = make_histories(lengths)
        for ours, right in zip(step(compiled, histories), step(model, histories), strict=True):
            assert torch.allclose(ours, right, rtol=1e-4, atol=1e-6)
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations
