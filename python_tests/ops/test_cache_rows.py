import pytest
import torch

from vista_ext import ops


def test_scatter_keeps_last_of_equal_slots():
    cache = torch.zeros(5, 128, dtype=torch.uint8)
    rows = torch.arange(3, dtype=torch.uint8)[:, None].expand(3, 128) + 1
    bad = ops.cache_scatter_(cache, torch.tensor([4, 0, 4]), rows)
    assert bad.item() == 0
    assert cache[:, 0].tolist() == [2, 0, 0, 0, 3]


def test_scatter_names_the_bad_slot():
    cache = torch.zeros(5, 128, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"slots must be in \[0, 5\), found 5 at index 1"):
        ops.cache_scatter_(cache, torch.tensor([4, 5]), torch.zeros(2, 128, dtype=torch.uint8))


def test_scatter_opcheck():
    cache = torch.zeros(5, 128, dtype=torch.uint8)
    args = (cache, torch.tensor([1, 3]), torch.ones(2, 128, dtype=torch.uint8))
    torch.library.opcheck(torch.ops.vista.cache_scatter_.default, args, {"policy": "zero"})
