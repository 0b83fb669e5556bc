"""The forward on quantized rows in the emulator: what the tests here run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from python_tests.ptx_emulator import EmulatedLibrary
from vista_ext import ops

from .cache_rows_checks import SCHEME_IDS
from .cross_attn_checks import Call, Case, compare


@dataclass
class Cached:
    """Slots of the groups and what their cache holds; options of the queries as in `Case`."""

    q_lengths: list[int]
    slots: list[int]
    tokens: int
    scheme: str = "int8"
    group: int | None = None
    num_slots: int = 3
    one_cache: bool = False
    indices: type = np.int64
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        lengths = [self.tokens if 0 <= slot < self.num_slots else 0 for slot in self.slots]
        options = {"padding": 0, "grad_lse": False, "seed": self.seed, "indices": self.indices} | self.options
        self.case = Case(self.q_lengths, lengths, **options)
        heads, generator = self.case.kv_heads, torch.Generator().manual_seed(self.seed + 1)
        self.rows: dict[str, Tensor] = {}
        for name, dim in (("k", self.case.d), ("v", self.case.e)):
            shape = self.num_slots, self.tokens, heads * dim
            summaries = torch.randn(shape, generator=generator).to(self.case.dtype)
            rows = ops.quantize_rows(summaries, scheme=self.scheme, group=self.group)
            self.rows[name] = self.rows["k"] if self.one_cache and name == "v" else rows
            values = ops.dequantize_rows(
                self.rows[name], *shape[1:], scheme=self.scheme, group=self.group, dtype=self.case.dtype
            )
            seen = [values[slot].view(self.tokens, heads, dim) for slot in self.slots if 0 <= slot < self.num_slots]
            padding = torch.zeros(self.case.padding, heads, dim, dtype=self.case.dtype)
            self.case.tensors[name] = torch.cat([*seen, padding])


class CachedCall(Call):
    """A cached case on the device."""

    def __init__(self, cached: Cached, library: EmulatedLibrary, seed: int = 0, *, trap: bool = False, **overrides):
        super().__init__(cached.case, library, seed)
        for name in ("k", "v", "kv_offsets"):
            self.arrays.pop(name)
        self.put("slots", np.array(cached.slots, cached.indices))
        self.put("k_rows", cached.rows["k"].numpy())
        if cached.one_cache:
            self.arrays["v_rows"] = self.arrays["k_rows"]
        else:
            self.put("v_rows", cached.rows["v"].numpy())
        self.arrays["num_bad"] = self.device.empty((), np.int64, name="num_bad")
        group = cached.group or 0
        self.overrides = {
            "sequences": 0,
            "max_kv_len": 0,
            "scheme": SCHEME_IDS[cached.scheme],
            "tokens": cached.tokens,
            "k_group": group,
            "v_group": group,
            "num_slots": cached.num_slots,
            "trap": trap,
        } | overrides


def check_cached(cached: Cached, library: EmulatedLibrary, seed: int = 0) -> CachedCall:
    """As exact as torch on the dequantized rows, and the bits of the forward on them."""
    call = CachedCall(cached, library, seed)
    assert call.forward() == 0
    assert call.arrays["num_bad"].numpy() == sum(not 0 <= slot < cached.num_slots for slot in cached.slots)
    compare(cached.case, call, ["out", "lse"])
    packed = Call(cached.case, library)
    assert packed.forward() == 0
    for name in ("out", "lse"):
        assert torch.equal(call.result(name), packed.result(name)), name
    return call
