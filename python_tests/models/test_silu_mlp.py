"""The MLP of stage 2 is torch's own, layer by layer, in results, gradients and the names of its parameters."""

import pytest
import torch
from torch import nn

from vista_ext.nn import LinearSiLU, silu_mlp


@pytest.mark.parametrize("shape", [(16,), (7, 16), (2, 3, 16), (0, 16), (2, 0, 16)], ids=str)
def test_equals_its_layers(shape):
    torch.manual_seed(0)
    ours, layers = silu_mlp(16, 40), nn.Sequential(nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, 16))
    layers.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    results = []
    for module in (ours, layers):
        rows = x.clone().requires_grad_()
        out = module(rows)
        results.append((out, *torch.autograd.grad(out.square().sum(), [rows, *module.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_starts_from_the_same_parameters():
    torch.manual_seed(0)
    ours = silu_mlp(16, 40).state_dict()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, 16)).state_dict()
    assert list(ours) == list(layers) and all(torch.equal(ours[name], layers[name]) for name in ours)


def test_without_bias():
    layer = LinearSiLU(16, 8, bias=False)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), nn.functional.silu(x @ layer.weight.T))
