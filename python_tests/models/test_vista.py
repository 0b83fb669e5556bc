"""Both stages together and apart: leaks, sharing, downstream models, compile and export, bad input."""

from dataclasses import replace

import pytest
import torch

from python_tests.models.conftest import make_candidates, make_histories
from vista_ext.models import (
    PRESETS,
    Candidates,
    EmbeddingConfig,
    FeatureSchema,
    Histories,
    SummaryRanker,
    Vista,
    VistaConfig,
    build_model,
)

OPTIONS = {
    "plain": VistaConfig(),
    "deep": VistaConfig(summary_layers=2, target_layers=3, recent_events=4, num_seeds=7),
    "seeds as targets": VistaConfig(seeds="target", scale="sum"),
    "hash": VistaConfig(embedding=EmbeddingConfig(items="hash", hash_rows=50, time_buckets=0)),
}


@pytest.fixture(params=OPTIONS)
def model(request, world):
    torch.manual_seed(0)
    return Vista(world.schema, OPTIONS[request.param], world.item_features).eval()


def change(candidates, index):
    items = candidates.items.clone()
    items[index] = items[index] % 100 + 1
    return Candidates(candidates.offsets, candidates.max_len, items, candidates.context)


def test_apart_equals_together(world, model):
    together = model(world.histories, world.candidates, world.kv_index).logits
    assert together.shape == (15, 2)
    summaries = model.summarize(world.histories, chunk=64)
    apart = model.score(summaries, world.candidates, world.kv_index, recent=world.histories)
    assert torch.allclose(apart, together, atol=1e-5)
    downstream = SummaryRanker.from_vista(model).eval()
    recent = world.histories.suffix(4)  # all that serving has to keep of the raw events
    assert torch.allclose(downstream(summaries, world.candidates, world.kv_index, recent=recent), apart, atol=1e-6)


@pytest.mark.parametrize("name", ["din", "mean", *OPTIONS])
def test_no_candidate_sees_another(world, name):
    torch.manual_seed(0)
    if name in OPTIONS:
        model = Vista(world.schema, OPTIONS[name], world.item_features).eval()
    else:
        model = build_model(name, world.schema, VistaConfig(), world.item_features).eval()
    before = model(world.histories, world.candidates, world.kv_index).logits
    for index in (0, 6, 14):
        after = model(world.histories, change(world.candidates, index), world.kv_index).logits
        others = torch.arange(15) != index
        assert torch.equal(before[others], after[others]), "changing one candidate changed another, bit for bit"
        assert not torch.equal(before[index], after[index])


def test_users_together_are_users_alone(world, model):
    """Packed with others, or alone in a batch whose bounds leave room for much more: the same summaries and scores."""
    summaries = model.summarize(world.histories)
    together = model(world.histories, world.candidates, world.kv_index).logits
    for user in range(5):
        roomy = replace(world.histories.rows(user, user + 1), max_seq_len=512)
        assert torch.allclose(model.summarize(roomy)[0], summaries[user], atol=1e-5)
        for request in (world.kv_index == user).nonzero().flatten().tolist():
            begin, end = world.candidates.offsets[request : request + 2].tolist()
            items, context = world.candidates.items[begin:end], world.candidates.context[begin:end]
            asked = Candidates(torch.tensor([0, end - begin]), 64, items, context)
            assert torch.allclose(model(roomy, asked, torch.tensor([0])).logits, together[begin:end], atol=1e-5)


@pytest.mark.parametrize("name", ["vista", "din", "mean"])
def test_no_gradient_between_candidates(world, name):
    model = build_model(name, world.schema, VistaConfig(target_layers=2), world.item_features).eval()
    rows = {}

    def keep(_module, _inputs, out):
        rows["events and candidates"] = out

    model.items.register_forward_hook(keep)
    logits = model(world.histories, world.candidates, world.kv_index).logits
    gradient = torch.autograd.grad(logits[7].sum(), rows["events and candidates"])[0][-15:]
    assert gradient[7].any() and not gradient[torch.arange(15) != 7].any()


def test_any_split_of_the_candidates_scores_the_same(world, model):
    summaries = model.summarize(world.histories)
    whole = model.score(summaries, world.candidates, world.kv_index, recent=world.histories)
    counts = world.candidates.offsets.diff()
    owner = torch.repeat_interleave(world.kv_index, counts)
    ones = Candidates(torch.arange(16), 1, world.candidates.items, world.candidates.context)
    assert torch.allclose(model.score(summaries, ones, owner, recent=world.histories), whole, atol=1e-6)
    alone = Candidates(torch.tensor([0, 1]), 1, ones.items[4:5], ones.context[4:5])
    single = model.score(summaries, alone, owner[4:5], recent=world.histories)
    assert torch.allclose(single, whole[4:5], atol=1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
def test_summaries_have_no_dropout_in_a_model_that_trains(world, deterministic):
    config = VistaConfig(dropout=0.5, embedding=EmbeddingConfig(dropout=0.5), summary_layers=2)
    model = Vista(world.schema, config, world.item_features)
    model.items.eval()
    before = [module.training for module in model.modules()]
    found = model.summarize(world.histories, deterministic=deterministic)
    assert [module.training for module in model.modules()] == before and model.training
    assert torch.equal(found, model.eval().summarize(world.histories, deterministic=deterministic))


def test_no_candidates_and_no_requests(world, model):
    summaries = model.summarize(world.histories)
    empty = make_candidates([0, 0])
    none = model.score(summaries, empty, torch.tensor([0, 1]), recent=world.histories)
    assert none.shape == (0, 2)
    nobody = make_candidates([])
    assert model(make_histories([]), nobody, torch.zeros(0, dtype=torch.int64)).logits.shape == (0, 2)


def test_every_parameter_learns(world, model):
    model.train()
    out = model(world.histories, world.candidates, world.kv_index)
    (out.logits.square().sum() + sum(out.losses.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_downstream_training_from_stored_summaries(world):
    torch.manual_seed(0)
    source = Vista(world.schema, VistaConfig(), world.item_features).eval()
    summaries = source.summarize(world.histories)
    downstream = SummaryRanker(world.schema, VistaConfig(), world.item_features)
    optimizer = torch.optim.Adam(downstream.parameters(), 2e-3)  # no spikes, which follow from a last bit
    labels = (torch.arange(30).view(15, 2) % 3 == 0).float()
    losses = []
    for _ in range(40):
        logits = downstream(summaries, world.candidates, world.kv_index)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_baselines_are_their_definitions(world):
    torch.manual_seed(0)
    owner = torch.repeat_interleave(world.kv_index, world.candidates.offsets.diff())
    for name in ("mean", "din"):
        model = build_model(name, world.schema, VistaConfig(), world.item_features).eval()
        events = model.embed(world.histories)
        rows = model.items(world.candidates.items)
        encoded = model.encoder(events, world.candidates, rows, world.kv_index).rows
        for i, user in enumerate(owner.tolist()):
            mine = events.rows[world.histories.seq_offsets[user] : world.histories.seq_offsets[user + 1]]
            expected = torch.zeros(64)
            if name == "mean" and len(mine):
                expected = mine.mean(0)
            elif len(mine):
                query = rows[i].expand_as(mine)
                hidden = model.encoder.first(torch.cat([query, mine, query - mine, query * mine], 1))
                weight = model.encoder.second(torch.nn.functional.silu(hidden))
                expected = (weight * mine).sum(0) / len(mine) ** 0.5
            assert torch.allclose(encoded[i], expected, atol=1e-6), (name, i)


def test_compiles_whole_and_offsets_do_not_recompile(world, model):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 0, 1, 300, 40], [40, 3, 2, 0, 301], [7, 7, 7, 7, 9]):
        histories = make_histories(lengths)
        out = compiled(histories, world.candidates, world.kv_index).logits
        assert torch.allclose(out, model(histories, world.candidates, world.kv_index).logits, atol=1e-6)
    assert counter.frame_count == 1


class Flat(torch.nn.Module):
    """Export takes tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, seq_offsets, items, actions, timestamps, now, offsets, candidates, context, kv_index):
        histories = Histories(seq_offsets, 512, items, actions, timestamps, now)
        return self.model(histories, Candidates(offsets, 8, candidates, context), kv_index).logits


def flat(h, c, kv_index):
    return h.seq_offsets, h.items, h.actions, h.timestamps, h.now, c.offsets, c.items, c.context, kv_index


def test_exports(world, model):
    event, user = torch.export.Dim("events", min=2, max=2**20), torch.export.Dim("users", min=2, max=4096)
    shapes = ({0: user + 1}, *({0: event},) * 3, {0: user}, None, None, None, None)
    arguments = flat(world.histories, world.candidates, world.kv_index)
    program = torch.export.export(Flat(model), arguments, dynamic_shapes=shapes)
    for lengths in ([5, 0, 1, 300, 40], [9, 1, 1, 12, 4, 70]):
        histories = make_histories(lengths)
        out = program.module()(*flat(histories, world.candidates, world.kv_index))
        expected = model(histories, world.candidates, world.kv_index).logits
        assert torch.allclose(out, expected, atol=1e-6)


def test_ids(world, model):
    histories = make_histories([3])
    for item, fine in ((0, True), (100, True), (101, False), (-1, False), (2**62, False)):
        candidates = Candidates(torch.tensor([0, 1]), 1, torch.tensor([item]), torch.zeros(1, 1, dtype=torch.int64))
        if fine:
            assert model(histories, candidates, torch.tensor([0])).logits.isfinite().all()
        else:
            with pytest.raises(IndexError, match=rf"items must be in \[0, 100\], found {item}"):
                model(histories, candidates, torch.tensor([0]))


BAD_CONFIGS = {
    "dim": 0, "num_seeds": -1, "heads": 1.5, "head_dim": 20, "summary_layers": 0, "mlp": (0,), "seeds": "middle",
    "scale": "max", "activation": "gelu", "state_activation": "", "dropout": 1.0, "reconstruction_weight": float("nan"),
    "reconstruction_window": 1, "recent_events": -1, "embedding": {"items": "table"},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config(name):
    with pytest.raises(ValueError, match=rf"{name}.* must be .*found"):
        VistaConfig(**{name: BAD_CONFIGS[name]})


def test_config_round_trip():
    for config in (*PRESETS.values(), *OPTIONS.values()):
        assert VistaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"embedding\.size is not a field"):
        VistaConfig.from_dict({"embedding": {"size": 3}})
    with pytest.raises(ValueError, match="seed is not a field"):
        VistaConfig.from_dict({"seed": 3})


def test_schema_errors():
    with pytest.raises(ValueError, match=r"num_items must be .* found 0"):
        FeatureSchema(0, 1)
    with pytest.raises(ValueError, match=r"author must be .* found -2"):
        FeatureSchema(1, 1, {"author": -2})
    with pytest.raises(ValueError, match="tasks must be different names"):
        FeatureSchema(1, 1, tasks=("a", "a"))
    assert FeatureSchema.from_dict(FeatureSchema(3, 2, {"a": 4}).to_dict()) == FeatureSchema(3, 2, {"a": 4})
