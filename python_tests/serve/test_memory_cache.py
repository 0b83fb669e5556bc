"""Scores from quantized memories by slot, against the same memories dequantized, and against exact summaries."""

from dataclasses import replace

import pytest
import torch

from python_tests.models.conftest import make_candidates, make_histories
from vista_ext import ops
from vista_ext.models import FeatureSchema, SummaryRanker, Vista, VistaConfig
from vista_ext.models.target import Memory
from vista_ext.serve.memory_cache import MemoryCache

# Mean change of the logits by quantization, relative to their spread, over the relative error of the rows' values. Seen
# of this untrained model: 0.8 % (int8), 26 % (int4) and 7.9 % (fp8_e4m3) with errors of 0.6 %, 9.0 % and 2.5 %.
MOST_LOSS = 4
CONFIG = VistaConfig(target_layers=3, num_seeds=9)
SLOTS = torch.tensor([3, 0, 5, 1, 4])  # of the five users


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Vista(FeatureSchema(100, 3, {}, {"tab": 3}, ("click", "like")), CONFIG).eval()


@pytest.fixture
def summaries(model):
    return model.summarize(make_histories([5, 0, 1, 300, 40]))


@pytest.fixture
def candidates():
    return make_candidates([3, 0, 1, 5, 2, 400])


USERS = torch.tensor([0, 3, 1, 2, 3, 4])  # of the requests


def dequantized(model, summaries, scheme):
    """The memory of summaries as the bytes of a cache have it."""
    memory = model.encoder.stage2.memory(summaries, torch.float32)

    def through_bytes(rows):
        table = rows.reshape(len(summaries), CONFIG.num_seeds, -1)
        coded = ops.quantize_rows(table, scheme=scheme)
        return ops.dequantize_rows(coded, *table.shape[1:], scheme=scheme).view_as(rows)

    return Memory([(through_bytes(k), through_bytes(v)) for k, v in memory.layers], memory.offsets, memory.max_len)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8_e4m3"])
@torch.no_grad()
def test_scores_are_those_of_the_dequantized_memory(model, summaries, candidates, scheme):
    cache = MemoryCache(model, 6, scheme=scheme)
    cache.refresh_(SLOTS, summaries)
    scores = cache.score(SLOTS[USERS], candidates)
    target, rows = model.encoder.stage2.target, model.items(candidates.items)
    memory = dequantized(model, summaries, scheme)
    attended = target(rows, candidates, memory, USERS)
    assert torch.equal(scores, model.head(attended, rows, candidates, attended[:, :0]))
    exact = model.score(summaries, candidates, USERS)
    loss = ((scores - exact).abs().mean(0) / exact.std(0)).max()
    exact_rows, read = (
        torch.cat([x.flatten() for pair in layers for x in pair])
        for layers in (model.encoder.stage2.memory(summaries, torch.float32).layers, memory.layers)
    )
    assert 0 < loss < MOST_LOSS * (read - exact_rows).norm() / exact_rows.norm()


def test_bytes_of_a_slot(model):
    one = ops.quantize_rows(torch.zeros(1, 9, 64)).shape[1]
    assert MemoryCache(model, 1).slot_bytes == 3 * 2 * one


@torch.no_grad()
def test_refreshing_a_slot_leaves_the_others(model, summaries, candidates):
    cache = MemoryCache(model, 6)
    cache.refresh_(SLOTS, summaries)
    before = cache.score(SLOTS[USERS], candidates)
    cache.refresh_(SLOTS[3:4], summaries[:1])
    after = cache.score(SLOTS[USERS], candidates)
    changed = torch.zeros(len(before), dtype=torch.bool)
    changed[9:11] = True  # of user 3, who asks twice, once without candidates
    assert torch.equal((before != after).any(1), changed)


@torch.no_grad()
def test_a_downstream_model(model, summaries, candidates):
    downstream = SummaryRanker.from_vista(model).eval()
    caches = [MemoryCache(each, 6) for each in (model, downstream)]
    for cache in caches:
        cache.refresh_(SLOTS, summaries.half())
    assert torch.equal(*(cache.score(SLOTS[USERS], candidates) for cache in caches))


@torch.no_grad()
def test_recent_events_are_those_of_the_requests(candidates):
    torch.manual_seed(0)
    model = Vista(FeatureSchema(100, 3, {}, {"tab": 3}, ("click",)), replace(CONFIG, recent_events=4)).eval()
    histories = make_histories([5, 0, 1, 300, 40])
    summaries = model.summarize(histories)
    cache = MemoryCache(model, 6)
    cache.refresh_(SLOTS, summaries)
    recent = make_histories([4, 0, 2, 9, 3, 1], seed=5)
    scores = cache.score(SLOTS[USERS], candidates, recent=recent)
    exact = model.score(summaries[USERS], candidates, torch.arange(6), recent=recent)
    assert torch.allclose(scores, exact, atol=0.02)
    with pytest.raises(ValueError, match="recent must be histories of 6 users, found 5"):
        cache.score(SLOTS[USERS], candidates, recent=histories)


@torch.no_grad()
def test_who_has_no_slot(model, summaries, candidates):
    slots = SLOTS[USERS].clone()
    slots[3] = -1
    strict, lenient = MemoryCache(model, 6), MemoryCache(model, 6, policy="zero")
    with pytest.raises(IndexError, match=r"kv_index must be in \[0, 5\], found -1"):
        strict.score(slots, candidates)
    lenient.refresh_(SLOTS, summaries)
    scores = lenient.score(slots, candidates)
    assert scores.isfinite().all()
    others = torch.ones(len(scores), dtype=torch.bool)
    others[4:9] = False
    assert torch.equal(scores[others], lenient.score(SLOTS[USERS], candidates)[others])


def test_bad_summaries_are_named(model):
    with pytest.raises(ValueError, match=r"summaries must be \[n, 9, 64\], found \[2, 8, 64\]"):
        MemoryCache(model, 6).refresh_(SLOTS[:2], torch.zeros(2, 8, 64))
