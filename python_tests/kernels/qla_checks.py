"""The QLA kernels in the emulator against torch: what the tests here run."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from python_tests.ptx_emulator import Device, DeviceArray, EmulatedLibrary
from vista_ext.reference.qla import ACTIVATIONS
from vista_ext.testing import rms

FILES = ("plan", "reduce", "state", "apply", "pull", "apply_backward", "state_backward")
ENTRY = "python_tests/kernels/qla_entry.cpp"
DTYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # vista::DType
LAUNCHES = {name: i for i, name in enumerate(("plan", "state", "apply", "apply_backward", "state_backward"))}
POINTERS = [
    *("seq_offsets", "num_targets", "attn_scale"),
    *("q", "k", "v", "grad_out", "state", "grad_state"),
    *("out", "grad_q", "grad_k", "grad_v", "state_out", "grad_state_out", "workspace"),
]


@cache
def build_library() -> EmulatedLibrary:
    return EmulatedLibrary.build([f"csrc/kernels/qla/{name}.cu" for name in FILES], entry=ENTRY)


@dataclass
class Case:
    """Inputs of an op; the lengths and targets of its sequences decide the rest."""

    lengths: list[int]
    targets: list[int] | None = None
    d: int = 32
    e: int = 32
    heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    padding: int = 3
    chunk_rows: int = 64
    activation: str = "silu"
    state_activation: str = "silu"
    indices: type = np.int64
    scale: list[float] | None = None
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rows = {"q": self.d, "k": self.d, "v": self.e, "grad_out": self.e}
        self.tensors = {name: normal(self.total, self.heads, n).to(self.dtype) for name, n in rows.items()}
        self.tensors["grad_state"] = normal(self.batch, self.heads, self.d, self.e)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths) + self.padding

    @property
    def are_targets(self) -> Tensor:
        marks = torch.zeros(self.total, dtype=torch.bool)
        for end, n in zip(self.offsets[1:], self.targets or [], strict=False):
            marks[end - n : end] = True
        return marks

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.lengths)]


def composed(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and state as torch would compose them, in the dtype of its inputs; autograd does the rest."""
    phi1, phi2 = ACTIVATIONS[case.activation], ACTIVATIONS[case.state_activation]
    targets = case.targets or [0] * case.batch
    spans = [(begin, begin + n - m) for begin, n, m in zip(case.offsets, case.lengths, targets, strict=False)]
    states = [torch.einsum("nhd,nhe->hde", phi1(k[begin:end]), v[begin:end]) for begin, end in spans]
    state = torch.stack(states) if states else torch.zeros(0, case.heads, case.d, case.e, dtype=q.dtype) + 0 * k.sum()
    out = []
    for b, (begin, sources_end) in enumerate(spans):
        end = begin + case.lengths[b]
        scale = case.scale[b] if case.scale else 1 / max(1, sources_end - begin)
        rows = torch.einsum("nhd,hde->nhe", phi1(q[begin:end]), phi2(scale * state[b]))
        own = scale * (phi1(q[sources_end:end]) * phi1(k[sources_end:end])).sum(-1, keepdim=True) * v[sources_end:end]
        out.append(torch.cat([rows[: sources_end - begin], rows[sources_end - begin :] + own]))
    return torch.cat([*out, 0 * v[case.offsets[-1] :]]), state


def expected(case: Case, dtype: torch.dtype | None = None, grad_state: bool = True) -> dict[str, Tensor]:
    """Everything that qla and its backward return."""
    q, k, v = (case.tensors[name].to(dtype or case.dtype, copy=True).requires_grad_() for name in "qkv")
    out, state = composed(case, q, k, v)
    loss = (out * case.tensors["grad_out"].to(out.dtype)).sum()
    if grad_state:
        loss = loss + (state * case.tensors["grad_state"].to(state.dtype)).sum()
    grads = torch.autograd.grad(loss, (q, k, v, state), materialize_grads=True)
    names = ("grad_q", "grad_k", "grad_v", "grad_state_out")
    return {"out": out, "state_out": state, **dict(zip(names, grads, strict=True))}


class Call:
    """A case on the device."""

    def __init__(self, case: Case, library: EmulatedLibrary, seed: int = 0, **overrides: int):
        self.case = case
        self.device = Device(library, seed)
        self.arrays: dict[str, DeviceArray] = {}
        self.own_term = case.targets is not None
        self.overrides = overrides
        self.put("seq_offsets", np.array(case.offsets, case.indices))
        if case.targets is not None:
            self.put("num_targets", np.array(case.targets, case.indices))
        if case.scale is not None:
            self.put("attn_scale", np.array(case.scale, np.float32))
        for name, values in case.tensors.items():
            self.put(name, bits(values))

    def put(self, name: str, values: np.ndarray) -> None:
        self.arrays[name] = self.device.array(values, name=name)

    def outputs(self, *names: str) -> None:
        case = self.case
        for name in names:
            if "state" in name:
                self.arrays[name] = self.device.empty((case.batch, case.heads, case.d, case.e), np.float32, name=name)
            else:
                like = {"out": "v", "grad_q": "q", "grad_k": "k", "grad_v": "v"}[name]
                self.arrays[name] = self.device.empty(self.arrays[like].shape, self.arrays[like].dtype, name=name)

    def _arguments(self) -> tuple:
        case = self.case
        kinds = list(ACTIVATIONS)  # in the order of vista::Activation
        named = {
            "dtype": DTYPE_IDS[case.dtype],
            "tf32": case.tf32,
            "activation": kinds.index(case.activation),
            "state_activation": kinds.index(case.state_activation),
            "own_term": self.own_term,
            "total": case.total,
            "batch": case.batch,
            "heads": case.heads,
            "d": case.d,
            "e": case.e,
            "max_seq_len": max(case.lengths, default=0),
            "chunk_rows": case.chunk_rows,
            "int64": case.indices is np.int64,
        } | self.overrides
        sizes = (ctypes.c_int64 * len(named))(*map(int, named.values()))
        pointers = [self.arrays[name].pointer if name in self.arrays else None for name in POINTERS]
        return sizes, (ctypes.c_void_p * len(pointers))(*pointers)

    def launch(self, *names: str) -> int:
        """The plan, then these; the last result."""
        sums = bool({"state", "apply_backward"} & set(names))
        size = self.device.call("test_qla_workspace_bytes", *self._arguments(), sums)
        self.arrays["workspace"] = self.device.empty(size, np.uint8, name="workspace")
        result = 0
        for name in ("plan", *names):
            result = result or self.device.call("test_qla_launch", *self._arguments(), LAUNCHES[name])
        return result

    def result(self, name: str) -> Tensor:
        values = self.arrays[name].numpy()
        return (
            torch.from_numpy(values) if values.dtype == np.float32 else torch.from_numpy(values).view(self.case.dtype)
        )


def bits(x: Tensor) -> np.ndarray:
    x = x.detach()
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.uint16).numpy()


def forward(case: Case, library: EmulatedLibrary, seed: int = 0, **overrides: int) -> Call:
    call = Call(case, library, seed, **overrides)
    call.outputs("state_out", "out")
    assert call.launch("state") == 0
    call.arrays["state"] = call.arrays["state_out"]
    assert call.launch("apply") == 0
    return call


def backward(case: Case, library: EmulatedLibrary, seed: int = 0, grad_state: bool = True) -> Call:
    """qla_backward, from the exact state rounded to float32."""
    call = Call(case, library, seed)
    call.put("state", expected(case, torch.float64)["state_out"].detach().float().numpy())
    if not grad_state:
        del call.arrays["grad_state"]
    call.outputs("grad_q", "grad_k", "grad_v", "grad_state_out")
    assert call.launch("apply_backward") == 0
    call.arrays["grad_state"] = call.arrays["grad_state_out"]
    assert call.launch("state_backward") == 0
    return call


def check(case: Case, call: Call, names: list[str], grad_state: bool = True) -> None:
    """Each at most twice as far from float64 as torch, targets by themselves: their gradients are the smaller ones."""
    exact, peer = expected(case, torch.float64, grad_state), expected(case, None, grad_state)
    for name in names:
        mine = call.result(name)
        assert mine.shape == exact[name].shape
        parts = (
            {"": slice(None)} if "state" in name else {"of sources": ~case.are_targets, "of targets": case.are_targets}
        )
        for part, rows in parts.items():
            _check_part(case, f"{name} {part}", mine[rows], exact[name][rows], peer[name][rows])
        if "state" not in name and case.padding:
            assert not mine[-case.padding :].any(), f"{name}: padding rows must be zero"


def _check_part(case: Case, name: str, mine: Tensor, exact: Tensor, peer: Tensor) -> None:
    if mine.numel() == 0:
        return
    # tf32 keeps 10 bits of every factor, as float16 does.
    eps = torch.finfo(torch.float16 if case.tf32 else mine.dtype).eps
    error, allowed = rms(mine - exact), 2 * rms(peer - exact) + eps * rms(exact)
    assert error <= allowed, f"{name}: error {error:.3e}, peer {rms(peer - exact):.3e}, allowed {allowed:.3e}"


def check_forward(case: Case, library: EmulatedLibrary, seed: int = 0) -> Call:
    call = forward(case, library, seed)
    check(case, call, ["state_out", "out"])
    return call


def check_backward(case: Case, library: EmulatedLibrary, seed: int = 0, grad_state: bool = True) -> Call:
    call = backward(case, library, seed, grad_state)
    check(case, call, ["grad_q", "grad_k", "grad_v", "grad_state_out"], grad_state)
    return call
