"""What a step minimizes, against sums written out: each weighting, with histories that several requests share."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from vista_ext.config import ConfigError
from vista_ext.data.batch import Batch, Candidates
from vista_ext.data.dataset import EventDataset
from vista_ext.models import build_model
from vista_ext.processes import Processes
from vista_ext.train.loss import Objective, candidate_weights

WEIGHTINGS = ["candidate", "request", "history"]


def batches_of(config, **options):
    dataset = EventDataset(config.data.path)
    arguments = {"requests_per_batch": 5, "max_history": 30, "share_window": 200_000, **options}
    return dataset, list(dataset.batches("train", **arguments))


def most_shared(batches):
    return max(batches, key=lambda b: len(set(torch.bincount(b.kv_index).tolist())))


def written_out(batch, losses, weighting):
    """The weighted mean of candidates' losses [m], by loops."""
    requests = [losses[a:b].tolist() for a, b in batch.candidates.offsets.unfold(0, 2, 1).tolist()]
    if weighting == "candidate":
        return sum(map(sum, requests)) / sum(map(len, requests))
    groups = requests
    if weighting == "history":
        groups = [[] for _ in range(len(batch.histories))]
        for request, history in zip(requests, batch.kv_index.tolist(), strict=True):
            groups[history] += request
    means = [sum(group) / len(group) for group in groups if group]
    return sum(means) / len(means)  # what has no candidates has no mean


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_is_the_mean_that_it_says(tiny_config, weighting):
    config = tiny_config(f"train.loss_weighting={weighting}", "model.options.dropout=0.0")
    dataset, batches = batches_of(config)
    batch = most_shared(batches)
    # The data's requests are all of one length: cut them anew, one of them empty.
    cuts = torch.tensor([0, 0, 1, 4, *range(5, len(batch.kv_index) + 1)])[: len(batch.kv_index)]
    offsets = torch.cat([cuts, torch.tensor([len(batch.labels)])])
    candidates = replace(batch.candidates, offsets=offsets, max_len=int(offsets.diff().max()))
    batch = replace(batch, candidates=candidates)
    torch.manual_seed(0)
    model = build_model("vista", dataset.schema, config.vista(), dataset.item_features)
    share, told = Objective(model, config.train, Processes())(batch)
    output = model(batch.histories, batch.candidates, batch.kv_index)
    logits, reconstruction = output.logits.detach(), float(output.losses["reconstruction"].detach())
    losses = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")[:, 0]
    task = written_out(batch, losses, weighting)
    assert told["loss/click"] == pytest.approx(task, rel=1e-5)
    assert told["loss"] == pytest.approx(task + reconstruction, rel=1e-5)
    assert float(share.detach()) == pytest.approx(told["loss"], rel=1e-6)


def test_weightings_differ_where_sizes_do(tiny_config):
    batch = Batch(
        batches_of(tiny_config())[1][0].histories,
        Candidates(torch.tensor([0, 1, 1, 4, 6]), 3, torch.ones(6).long(), torch.zeros(6, 0).long()),
        torch.tensor([0, 1, 1, 0]),
        torch.zeros(6, 1),
        torch.zeros(6).long(),
        torch.zeros(6).long(),
    )
    third, half = 1 / 3, 1 / 2
    expected = {
        "candidate": [1, 1, 1, 1, 1, 1],
        "request": [1, third, third, third, half, half],
        "history": [third] * 6,
    }
    for weighting, weights in expected.items():
        assert candidate_weights(batch, weighting).tolist() == pytest.approx(weights)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_part_without_requests_has_a_loss_of_zero_and_gradients(tiny_config, weighting):
    config = tiny_config(f"train.loss_weighting={weighting}")
    dataset, batches = batches_of(config, part=(5, 6))
    assert len(batches[0].histories) == len(batches[0].labels) == 0
    model = build_model("vista", dataset.schema, config.vista(), dataset.item_features)
    share, told = Objective(model, config.train, Processes())(batches[0])
    share.backward()
    assert told["loss"] == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_sharing_a_history_changes_who_reads_it_and_nothing_else(tiny_config):
    """Requests at one moment give the same logits and gradients whether they share their history or bring a copy."""
    config = tiny_config("model.options.dropout=0.0")
    dataset, batches = batches_of(config)
    batch = most_shared(batches)
    assert len(batch.kv_index) > len(batch.histories)
    users = batch.users[batch.candidates.offsets[:-1]]
    copies = dataset.histories(users, batch.histories.now[batch.kv_index], 30)
    model = build_model("vista", dataset.schema, config.vista(), dataset.item_features)
    shared = model(batch.histories, batch.candidates, batch.kv_index).logits
    copied = model(copies, batch.candidates, torch.arange(len(users))).logits
    assert torch.allclose(shared, copied, atol=1e-5)


def test_an_unknown_weighting_is_named(tiny_config):
    with pytest.raises(ConfigError, match=r"train\.loss_weighting must be candidate, request or history, found 'user'"):
        tiny_config("train.loss_weighting=user")
