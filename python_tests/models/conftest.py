from types import SimpleNamespace

import pytest
import torch

from vista_ext.models import Candidates, FeatureSchema, Histories

NOW = 1_700_000_000


def make_histories(lengths, items=100, actions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    draw = [torch.randint(low, high, (total,), generator=generator) for low, high in ((0, items + 1), (0, actions))]
    times = NOW - torch.arange(total, 0, -1) * 60
    return Histories(offsets, max(lengths, default=0), *draw, times, torch.full((len(lengths),), NOW))


def make_candidates(counts, items=100, seed=1):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    total = int(offsets[-1])
    ids = torch.randint(1, items + 1, (total,), generator=generator)
    context = torch.randint(0, 3, (total, 1), generator=generator)
    return Candidates(offsets, max(counts, default=0), ids, context)


@pytest.fixture
def world():
    """Users with 5, no, one, 300 and 40 events, and six requests, one of them without candidates."""
    return SimpleNamespace(
        schema=FeatureSchema(100, 3, {"author": 7}, {"tab": 3}, ("click", "like")),
        item_features=torch.cat([torch.zeros(1, 1, dtype=torch.int64), torch.arange(100)[:, None] % 7]),
        histories=make_histories([5, 0, 1, 300, 40]),
        candidates=make_candidates([3, 0, 1, 5, 2, 4]),
        kv_index=torch.tensor([0, 3, 1, 2, 3, 4]),
    )
