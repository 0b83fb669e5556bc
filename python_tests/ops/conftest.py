import sys

import pytest
import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
collect_ignore = [] if "cuda" in DEVICES else ["test_cuda.py", "test_device_asserts.py"]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu if name == "cuda" else ()) for name in DEVICES])
def device(request):
    """Every device that is there: a test of an op is written once and runs on each."""
    return request.param


@pytest.fixture
def products_made_again(monkeypatch):
    """Also on a CPU the ops' own backward passes, which make products again; there torch would keep them."""
    for name in ("linear_silu", "sglu", "projected_qla"):
        monkeypatch.setattr(sys.modules[f"vista_ext.ops.{name}"], "differentiates_on_cpu", lambda *operands: False)


@pytest.fixture(params=["kept", "made again"])
def products(request):
    """Both ways to a gradient of an op with products in it."""
    if request.param == "made again":
        request.getfixturevalue("products_made_again")
