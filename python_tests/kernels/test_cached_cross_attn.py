"""Cross attention on quantized rows in the emulator: the bits of the forward on dequantized rows, with no finding."""

import numpy as np
import pytest
import torch

from python_tests.ptx_emulator import DeviceTrap

from .cached_cross_attn_checks import Cached, CachedCall, check_cached
from .cross_attn_checks import build_library, compare
from .emulated import library_of

library = library_of(build_library)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES = ["int8", "int4", "fp8_e4m3"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("own", [True, False])
def test_schemes(library, scheme, dtype, own):
    """None, one, several rounds of queries; a slot twice, a slot that is none."""
    options = {"q_heads": 4, "kv_heads": 2, "own": own, "padding": 2, "dtype": dtype}
    check_cached(Cached([3, 0, 70, 1, 33], [2, 0, 0, 5, -1], 37, scheme, options=options), library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "e"), [(64, 64), (40, 16), (104, 128), (200, 256), (256, 24)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_head_dimensions(library, scheme, d, e, dtype):
    """More tokens than fit into shared memory at once, for the wide ones."""
    options = {"d": d, "e": e, "q_heads": 1, "kv_heads": 1, "dtype": dtype}
    check_cached(Cached([19], [1], 70 if d > 64 else 20, scheme, options=options, seed=d), library)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("d", "heads", "group"), [(24, 15, 36), (24, 15, 40), (40, 9, 360), (32, 2, 32), (72, 5, 45)])
def test_groups_that_end_anywhere(library, d, heads, group, scheme):
    if scheme == "int4" and group % 2:
        pytest.skip("int4 takes groups of an even size")
    options = {"d": d, "e": d, "q_heads": heads, "kv_heads": heads, "own": False}
    check_cached(Cached([2], [1], 5, scheme, group, options=options), library)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("tokens", [100, 300])
def test_schedules(library, tokens, seed):
    options = {"d": 64, "e": 64, "q_heads": 2, "kv_heads": 1}
    check_cached(Cached([150, 20], [0, 2], tokens, options=options, indices=np.int32), library, seed)


def test_values_that_are_the_keys(library):
    options = {"d": 64, "e": 64, "q_heads": 2, "kv_heads": 2, "dtype": torch.bfloat16}
    call = check_cached(Cached([40], [1], 128, one_cache=True, options=options), library)
    separate = check_cached(Cached([40], [1], 128, options=options), library)
    reads = [_bytes_read(x, "ld.global.v2") for x in (call, separate)]
    assert reads[0] * 2 == reads[1], "one tile serves both"


def test_no_token_is_read_twice(library):
    """Whatever the number of queries: codes come into shared memory once for a run of them."""
    options = {"d": 64, "e": 64, "q_heads": 1, "kv_heads": 1, "dtype": torch.bfloat16, "own": False}
    reads = [
        _bytes_read(check_cached(Cached([n], [1], 128, options=options), library), "ld.global.v2") for n in (16, 500)
    ]
    assert reads == [2 * 128 * 64] * 2


def _bytes_read(call: CachedCall, instruction: str) -> int:
    (metrics,) = (m for name, m in call.device.metrics.items() if "CachedKeys" in name)
    return sum(32 * part.ideal for text, part in metrics.global_.items() if instruction in text)


def test_nan_scale_is_nan_where_it_is_read(library):
    cached = Cached([3, 4], [0, 1], 20, options={"d": 32, "e": 32, "dtype": torch.bfloat16})
    scale_at = 20 * 64 + 2 * 7  # of token 7
    cached.rows["v"][0, scale_at : scale_at + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    call = CachedCall(cached, library)
    assert call.forward() == 0
    assert call.result("out")[:3].isnan().all() and not call.result("out")[3:].isnan().any()
    assert not call.result("lse").isnan().any()


def test_a_cache_without_slots(library):
    """Which has no address, as torch has it."""
    for lengths, slots in (([3, 40], [0, -1]), ([], [])):
        cached = Cached(lengths, slots, 9, num_slots=0, options={"padding": 2})
        call = CachedCall(cached, library)
        for name in ("k_rows", "v_rows"):
            call.arrays.pop(name)
        assert call.forward() == 0
        assert call.arrays["num_bad"].numpy() == len(slots)
        compare(cached.case, call, ["out", "lse"])


def test_bad_slots_trap_if_they_shall(library):
    for slots in ([0, 3], [-1, 0], [0, 2**40]):
        with pytest.raises(DeviceTrap):
            CachedCall(Cached([5, 4], slots, 9), library, trap=True).forward()


def test_what_is_not_built_is_named(library, capfd):
    for overrides, message in [
        ({"num_slots": 2**31}, "at most 2^31 - 1 slots"),
        ({"tokens": 2**27}, "less than 2^31 bytes"),
        ({"dtype": 3}, "float32"),
    ]:
        assert CachedCall(Cached([5], [1], 9), library, **overrides).forward() == -1
        assert message in capfd.readouterr().err
