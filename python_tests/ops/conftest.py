import pytest
import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
collect_ignore = [] if "cuda" in DEVICES else ["test_cuda.py", "test_device_asserts.py"]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu if name == "cuda" else ()) for name in DEVICES])
def device(request):
    """Every device that is there: a test of an op is written once and runs on each."""
    return request.param
