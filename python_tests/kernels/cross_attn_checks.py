"""The cross attention kernels in the emulator against torch: what the tests here run."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from python_tests.ptx_emulator import Device, DeviceArray, EmulatedLibrary
from vista_ext.reference import cross_attn_by_rows
from vista_ext.testing import assert_as_good_as

from .qla_checks import DTYPE_IDS, bits

FILES = ("plan", "forward", "cached", "prepare", "backward_queries", "backward_keys")
ENTRY = "python_tests/kernels/cross_attn_entry.cpp"
POINTERS = [
    *("q_offsets", "kv_offsets", "kv_index", "q", "k", "v", "self_k", "self_v", "grad_out", "grad_lse", "out", "lse"),
    *("grad_q", "grad_k", "grad_v", "grad_self_k", "grad_self_v", "workspace"),
    *("k_rows", "v_rows", "slots", "num_bad"),
]
GRADS_OF = {f"grad_{name}": name for name in ("q", "k", "v", "self_k", "self_v")}


@cache
def build_library() -> EmulatedLibrary:
    return EmulatedLibrary.build([f"csrc/kernels/cross_attn/{name}.cu" for name in FILES], entry=ENTRY)


@dataclass
class Case:
    """Inputs of the op; the lengths decide the rest."""

    q_lengths: list[int]
    kv_lengths: list[int]
    kv_index: list[int] | None = None
    d: int = 32
    e: int = 32
    q_heads: int = 2
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    own: bool = True
    padding: int = 3
    indices: type = np.int64
    scale: float | None = None
    grad_lse: bool = True
    enough_blocks: int = 1  # so that a block takes more than a round of queries
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        n, m = sum(self.q_lengths) + self.padding, sum(self.kv_lengths) + self.padding
        shapes = {
            "q": (n, self.q_heads, self.d),
            "k": (m, self.kv_heads, self.d),
            "v": (m, self.kv_heads, self.e),
            "grad_out": (n, self.q_heads, self.e),
        }
        if self.own:
            shapes |= {"self_k": (n, self.kv_heads, self.d), "self_v": (n, self.kv_heads, self.e)}
        self.tensors = {name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in shapes.items()}
        if self.grad_lse:
            self.tensors["grad_lse"] = torch.randn(n, self.q_heads, generator=generator)

    @property
    def inputs(self) -> list[str]:
        return ["q", "k", "v", *(["self_k", "self_v"] if self.own else [])]

    def offsets(self, lengths: list[int]) -> list[int]:
        return [0, *accumulate(lengths)]


def expected(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Everything that the op and its backward return, by the definition in this precision."""
    tensors = {name: case.tensors[name].to(dtype or case.dtype, copy=True).requires_grad_() for name in case.inputs}
    q_offsets, kv_offsets = (torch.tensor(case.offsets(x)) for x in (case.q_lengths, case.kv_lengths))
    index = None if case.kv_index is None else torch.tensor(case.kv_index, dtype=torch.int64)
    out, lse = cross_attn_by_rows(
        **tensors, q_offsets=q_offsets, kv_offsets=kv_offsets, kv_index=index, attn_scale=case.scale
    )
    loss = (out * case.tensors["grad_out"].to(out.dtype)).sum()
    if case.grad_lse:
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * case.tensors["grad_lse"].to(lse.dtype)).sum()
    grads: tuple[Tensor, ...] = tuple(torch.zeros_like(x) for x in tensors.values())
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True)
    named = {f"grad_{name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


class Call:
    """A case on the device."""

    def __init__(self, case: Case, library: EmulatedLibrary, seed: int = 0, **overrides: int):
        self.case = case
        self.device = Device(library, seed)
        self.arrays: dict[str, DeviceArray] = {}
        self.overrides = overrides
        self.put("q_offsets", np.array(case.offsets(case.q_lengths), case.indices))
        self.put("kv_offsets", np.array(case.offsets(case.kv_lengths), case.indices))
        if case.kv_index is not None:
            self.put("kv_index", np.array(case.kv_index, case.indices))
        for name, values in case.tensors.items():
            self.put(name, bits(values))

    def put(self, name: str, values: np.ndarray) -> None:
        self.arrays[name] = self.device.array(values, name=name)

    def _run(self, backward: bool) -> int:
        case, arrays = self.case, self.arrays
        named = {
            "dtype": DTYPE_IDS[case.dtype],
            "total_q": arrays["q"].shape[0],
            "total_kv": arrays["k"].shape[0] if "k" in arrays else 0,
            "groups": len(case.q_lengths),
            "sequences": len(case.kv_lengths),
            "q_heads": case.q_heads,
            "kv_heads": case.kv_heads,
            "d": case.d,
            "e": case.e,
            "max_q_len": max(case.q_lengths, default=0),
            "max_kv_len": max(case.kv_lengths, default=0),
            "enough_blocks": case.enough_blocks,
            "int64": case.indices is np.int64,
        } | self.overrides

        def arguments() -> tuple:
            sizes = (ctypes.c_int64 * len(named))(*map(int, named.values()))
            pointers = [arrays[name].pointer if name in arrays else None for name in POINTERS]
            return sizes, (ctypes.c_void_p * len(pointers))(*pointers)

        size = self.device.call("test_cross_attn_workspace_bytes", *arguments(), backward)
        arrays["workspace"] = self.device.empty(size, np.uint8, name="workspace")
        scale = case.d**-0.5 if case.scale is None else case.scale
        return self.device.call("test_cross_attn", *arguments(), ctypes.c_double(scale), backward)

    def forward(self) -> int:
        n, heads, _ = self.arrays["q"].shape
        self.arrays["out"] = self.device.empty((n, heads, self.case.e), self.arrays["q"].dtype, name="out")
        self.arrays["lse"] = self.device.empty((n, heads), np.float32, name="lse")
        return self._run(False)

    def backward(self) -> int:
        """After `forward`."""
        for name, like in GRADS_OF.items():
            if like in self.arrays:
                self.arrays[name] = self.device.empty(self.arrays[like].shape, self.arrays[like].dtype, name=name)
        return self._run(True)

    def result(self, name: str) -> Tensor:
        values = self.arrays[name].numpy()
        return torch.from_numpy(values if values.dtype == np.float32 else values.view(np.int16)).view(
            torch.float32 if values.dtype == np.float32 else self.case.dtype
        )


def compare(case: Case, call: Call, names: list[str]) -> None:
    """Each at most twice as far from float64 as torch in the same precision."""
    exact, peer = expected(case, torch.float64), expected(case)
    for name in names:
        mine, right, other = call.result(name), exact[name], peer[name]
        if name == "lse":
            assert torch.equal(mine.isneginf(), right.isneginf())
            mine, right, other = (torch.where(x.isfinite(), x, 0) for x in (mine, right, other.float()))
        try:
            assert_as_good_as([mine], [right], [other])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        if case.padding:
            assert not mine[-case.padding :].any(), f"{name}: padding rows must be zero"


def check_forward(case: Case, library: EmulatedLibrary, seed: int = 0) -> Call:
    call = Call(case, library, seed)
    assert call.forward() == 0
    compare(case, call, ["out", "lse"])
    return call


def check_backward(case: Case, library: EmulatedLibrary, seed: int = 0) -> Call:
    call = Call(case, library, seed)
    assert call.forward() == 0 and call.backward() == 0
    compare(case, call, [f"grad_{name}" for name in case.inputs])
    return call
