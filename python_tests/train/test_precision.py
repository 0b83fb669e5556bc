"""Training with layers in bfloat16: it learns as in float32, and what is kept stays float32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.torch_model import TorchVista
from python_tests.models.conftest import make_candidates, make_histories
from vista_ext.data.batch import FeatureSchema
from vista_ext.data.dataset import EventDataset
from vista_ext.models import VistaConfig, build_model
from vista_ext.testing import rms
from vista_ext.train.precision import call_in, layers_in
from vista_ext.train.records import read_records
from vista_ext.train.trainer import train

CONFIG = VistaConfig(summary_layers=2, target_layers=2, recent_events=4, dropout=0.0)
ARGUMENTS = make_histories([5, 0, 1, 300, 40]), make_candidates([3, 0, 1, 5, 2, 4]), torch.tensor([0, 3, 1, 2, 3, 4])


SCHEMA = FeatureSchema(100, 3, {}, {"tab": 3})


def build(name, config=CONFIG):
    torch.manual_seed(0)
    return build_model(name, SCHEMA, config)


def step(model, dtype):
    output = call_in(model, dtype, *ARGUMENTS)
    loss = output.logits.float().square().mean() + sum(output.losses.values())
    return output.logits, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("name", ["din", "mean"])
def test_a_step_is_that_of_float32_rounded(name):
    model = build(name)
    logits, grads = step(model, torch.bfloat16)
    right, exact = step(model, torch.float32)
    assert logits.dtype == torch.bfloat16
    assert rms(logits - right) < 0.02 * rms(right)
    for (key, parameter), ours, expected in zip(model.named_parameters(), grads, exact, strict=True):
        assert parameter.dtype == ours.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(ours.flatten(), expected.flatten(), 0) > 0.98, key


def test_a_step_is_rounded_as_in_torch_operators():
    ours = build("vista", replace(CONFIG, recent_events=0))
    theirs = TorchVista(SCHEMA, ours.config)
    theirs.load_state_dict(ours.state_dict())
    logits, grads = step(ours, torch.bfloat16)
    peer_logits, peer_grads = step(theirs, torch.bfloat16)
    right, exact = step(ours, torch.float32)
    assert rms(logits - right) <= 2 * rms(peer_logits - right)
    # The last hundredth: a bias of one value is off by luck.
    for key, mine, peer, expected in zip(dict(ours.named_parameters()), grads, peer_grads, exact, strict=True):
        assert rms(mine - expected) <= 2 * rms(peer - expected) + 0.01 * rms(expected), key


def test_all_layers_and_no_table_are_short():
    model = build("vista")
    found = {}
    for key, module in model.named_modules():

        def remember(module, _inputs, out, key=key):
            found[key] = type(module), getattr(out, "dtype", None)

        module.register_forward_hook(remember)
    call_in(model, torch.bfloat16, *ARGUMENTS)
    for key, (kind, dtype) in found.items():
        if kind is torch.nn.Embedding:
            assert dtype == torch.float32, key
        elif kind in (torch.nn.Linear, torch.nn.RMSNorm, torch.nn.Dropout):
            assert dtype == torch.bfloat16, key
    copies = layers_in(model, torch.bfloat16)
    assert copies.keys() == dict(model.named_parameters()).keys()
    assert copies["items.rows.weight"] is model.items.rows.weight


def test_it_learns_from_the_same_start_to_the_same_end(tiny_config):
    losses, auc = {}, {}
    for precision in ("float32", "bfloat16"):
        config = tiny_config(f"train.precision={precision}", "train.epochs=3", folder=precision)
        model = train(config, EventDataset(config.data.path))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        records = read_records(Path(config.folder))
        losses[precision] = [record["loss"] for record in records if "loss" in record]
        auc[precision] = max(record["valid/auc"] for record in records if "valid/auc" in record)
    assert sum(losses["bfloat16"][-5:]) < sum(losses["bfloat16"][:5])
    assert losses["bfloat16"] != losses["float32"]
    # Steps drift apart; what they are worth does not.
    assert losses["bfloat16"][:10] == pytest.approx(losses["float32"][:10], rel=0.05)
    assert sum(losses["bfloat16"]) == pytest.approx(sum(losses["float32"]), rel=0.03)
    assert auc["bfloat16"] == pytest.approx(auc["float32"], abs=0.03)


def test_autocast_is_fine_too():
    model = build("vista")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*ARGUMENTS)
    loss = output.logits.float().square().mean() + sum(output.losses.values())
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
