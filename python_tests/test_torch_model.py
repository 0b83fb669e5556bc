"""The peer of the whole model: the same function of the same parameters, without an op of this package."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.torch_model import TorchVista
from python_tests.models.conftest import make_candidates, make_histories
from vista_ext.models import FeatureSchema, Vista, VistaConfig
from vista_ext.testing import rms

SCHEMA = FeatureSchema(100, 3, {}, {"tab": 3}, ("click", "like"))
CONFIG = VistaConfig(summary_layers=3, target_layers=3, num_seeds=7, reconstruction_window=6)
BATCHES = {
    "equal": (make_histories([40] * 4), make_candidates([3] * 4), torch.arange(4)),
    "short": (make_histories([5] * 4), make_candidates([3] * 4), torch.arange(4)),
    "jagged": (
        make_histories([5, 0, 1, 300, 40]),
        make_candidates([3, 0, 1, 5, 2, 4]),
        torch.tensor([0, 3, 1, 2, 3, 4]),
    ),
}


class NoOpOfOurs(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not func.name().startswith("vista"), func.name()
        return func(*args, **(kwargs or {}))


def both(config=CONFIG):
    torch.manual_seed(0)
    ours = Vista(SCHEMA, config)
    theirs = TorchVista(SCHEMA, config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(model, batch):
    output = model(*batch)
    loss = output.logits.square().mean() + sum(output.losses.values())
    return loss, output.logits, *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_a_training_step_is_the_same(batch, scale):
    ours, theirs = both(VistaConfig(**{**CONFIG.to_dict(), "embedding": CONFIG.embedding, "scale": scale}))
    found = step(ours, BATCHES[batch])
    with NoOpOfOurs():
        right = step(theirs, BATCHES[batch])
    names = ["loss", "logits", *dict(ours.named_parameters())]
    for name, mine, other in zip(names, found, right, strict=True):
        assert rms(mine - other) <= 1e-4 * rms(other), name  # a few hundred float32 roundings


def test_the_stages_apart_are_the_same():
    ours, theirs = (model.eval() for model in both())
    histories, candidates, users = BATCHES["equal"]
    with torch.no_grad(), NoOpOfOurs():
        summaries = theirs.summarize_whole(histories)
        logits = theirs.score_whole(summaries, candidates)
    assert torch.allclose(ours.summarize(histories), summaries, atol=1e-5)
    assert torch.allclose(ours.score(summaries, candidates, users), logits, atol=1e-5)


def test_it_compiles_whole():
    _, theirs = both()
    batch = BATCHES["equal"]
    compiled = torch.compile(theirs, fullgraph=True, dynamic=False, backend="aot_eager")
    for mine, other in zip(step(compiled, batch), step(theirs, batch), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_what_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="the published model without dropout"):
        TorchVista(SCHEMA, VistaConfig(recent_events=3))
