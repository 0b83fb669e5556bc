"""The kernels of projected QLA in the emulator against torch: what the tests here run."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from python_tests.ptx_emulator import Device, DeviceArray, EmulatedLibrary
from vista_ext import ops, reference
from vista_ext.reference.qla import ACTIVATIONS
from vista_ext.testing import assert_as_good_as

from .qla_checks import DTYPE_IDS, bits

FILES = ("state", "apply", "state_backward", "apply_backward", "fits")
SOURCES = [f"csrc/kernels/projected_qla/{name}.cu" for name in FILES]
SOURCES += [f"csrc/kernels/projected_qla/sm90/{name}.cu" for name in FILES[:4]]
SOURCES += [f"csrc/kernels/{name}.cu" for name in ("qla/plan", "qla/reduce", "common/launch", "common/sm90/tensor_map")]
ENTRY = "python_tests/kernels/projected_qla_entry.cpp"
RESULTS = {
    "state": ["state_out"],
    "apply": ["out"],
    "state_backward": ["grad_k", "grad_v"],
    "apply_backward": ["grad_q", "grad_state_out"],
}
KERNELS = list(RESULTS)  # in the order of vista::cuda::ProjectedQla
POINTERS = [
    *("seq_offsets", "attn_scale", "x", "weight_q", "weight_k", "weight_v", "grad_out", "state", "grad_state"),
    *("out", "grad_q", "grad_k", "grad_v", "state_out", "grad_state_out", "workspace"),
]
MAX_SHARED_OPTIN = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
SM80, SM86, SM90 = 163 << 10, 99 << 10, 227 << 10  # shared memory of a block


@cache
def build_library() -> EmulatedLibrary:
    return EmulatedLibrary.build(SOURCES, entry=ENTRY)


@dataclass
class Case:
    """Inputs of a layer's attention; the lengths of its sequences decide the rest."""

    lengths: list[int]
    dim: int = 64
    d: int = 32
    heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    padding: int = 3
    chunk_rows: int = 128
    norm_eps: float | None = 1e-6
    activation: str = "silu"
    state_activation: str = "silu"
    indices: type = np.int64
    scale: list[float] | None = None
    shared: int = SM90
    hopper: bool = False  # the kernels of sm90/ where there are some
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        inner = self.heads * self.d
        self.tensors = {name: normal(inner, self.dim) / self.dim**0.5 for name in ("weight_q", "weight_k", "weight_v")}
        self.tensors["x"] = normal(self.total, self.dim) * torch.linspace(0.5, 2, self.total)[:, None]
        self.tensors["grad_out"] = normal(self.total, self.heads, self.d)
        self.tensors = {name: x.to(self.dtype) for name, x in self.tensors.items()}
        self.tensors["grad_state"] = normal(self.batch, self.heads, self.d, self.d)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths) + self.padding

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @property
    def attn_scale(self) -> Tensor:
        return ops.mean_scale(torch.tensor(self.offsets)) if self.scale is None else torch.tensor(self.scale)


def expected(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the launches write. The apply and its backward take the exact state, as they do here."""
    x, *weights = (case.tensors[name].to(dtype) for name in ("x", "weight_q", "weight_k", "weight_v"))
    y = reference.projected_qla.normalised(x, case.norm_eps)
    q, k, v = ((y @ w.t()).unflatten(1, (case.heads, case.d)).requires_grad_() for w in weights)
    phi1, phi2 = ACTIVATIONS[case.activation], ACTIVATIONS[case.state_activation]
    spans = list(zip(case.offsets, case.offsets[1:], strict=False))
    states = [torch.einsum("nhd,nhe->hde", phi1(k[a:b]), v[a:b]) for a, b in spans]
    state = torch.stack(states)
    grad_state = case.tensors["grad_state"].to(dtype)
    grad_k, grad_v = torch.autograd.grad(state, (k, v), grad_state)
    exact = exact_state(case).to(torch.float32).to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()
    maps = phi2(case.attn_scale.to(exact.dtype)[:, None, None, None] * exact).to(dtype)
    parts = [torch.einsum("nhd,hde->nhe", phi1(q[a:b]), maps[i]) for i, (a, b) in enumerate(spans)]
    out = torch.cat([*parts, 0 * q[case.offsets[-1] :]])
    grad_q, grad_of_state = torch.autograd.grad(out, (q, exact), case.tensors["grad_out"].to(dtype))
    factors = reference.projected_qla.normalised(x, case.norm_eps)[:, :1] / x[:, :1]
    if case.norm_eps is None:
        factors = torch.ones_like(factors)
    rows = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    return {
        "state_out": state.detach() if dtype == torch.float64 else state.detach().float(),
        "out": out.detach(),
        "grad_state_out": grad_of_state,
        **{name: grad.flatten(1) * factors for name, grad in rows.items()},
    }


def exact_state(case: Case) -> Tensor:
    x, k, v = (case.tensors[name].double() for name in ("x", "weight_k", "weight_v"))
    options = {"heads": case.heads, "norm_eps": case.norm_eps, "activation": case.activation}
    return reference.projected_qla_state(x, k, v, torch.tensor(case.offsets), **options)


class Call:
    """A case on the device."""

    def __init__(self, case: Case, library: EmulatedLibrary, seed: int = 0, **overrides: int):
        self.case = case
        self.device = Device(library, seed, capability=(9, 0) if case.hopper else (8, 0))
        self.device.attributes[MAX_SHARED_OPTIN] = case.shared
        self.arrays: dict[str, DeviceArray] = {}
        self.overrides = overrides
        self.put("seq_offsets", np.array(case.offsets, case.indices))
        self.put("attn_scale", case.attn_scale.numpy())
        for name, values in case.tensors.items():
            self.put(name, bits(values))
        self.put("state", exact_state(case).float().numpy())

    def put(self, name: str, values: np.ndarray) -> None:
        self.arrays[name] = self.device.array(values, name=name)

    def _arguments(self) -> tuple:
        case = self.case
        kinds = list(ACTIVATIONS)  # in the order of vista::Activation
        named = {
            "dtype": DTYPE_IDS[case.dtype],
            "activation": kinds.index(case.activation),
            "state_activation": kinds.index(case.state_activation),
            "total": case.total,
            "batch": case.batch,
            "heads": case.heads,
            "d": case.d,
            "e": case.d,
            "max_seq_len": max(case.lengths, default=0),
            "chunk_rows": case.chunk_rows,
            "dim": case.dim,
            "int64": case.indices is np.int64,
            "normalise": case.norm_eps is not None,
        } | self.overrides
        sizes = (ctypes.c_int64 * len(named))(*map(int, named.values()))
        pointers = [self.arrays[name].pointer if name in self.arrays else None for name in POINTERS]
        return sizes, (ctypes.c_void_p * len(pointers))(*pointers)

    def fits(self, kernel: str) -> bool:
        return bool(self.device.call("test_fits", *self._arguments(), KERNELS.index(kernel)))

    def launch(self, kernel: str) -> int:
        """The plan, then this."""
        case, rows, inner = self.case, self.arrays["x"].dtype, self.case.heads * self.case.d
        for name in RESULTS[kernel]:
            if "state" in name:
                self.arrays[name] = self.device.empty((case.batch, case.heads, case.d, case.d), np.float32, name=name)
            else:
                shape = (case.total, case.heads, case.d) if name == "out" else (case.total, inner)
                self.arrays[name] = self.device.empty(shape, rows, name=name)
        sums = kernel in ("state", "apply_backward")
        kept = self.arrays.pop("grad_state") if kernel == "apply_backward" else None
        size = self.device.call("test_workspace_bytes", *self._arguments(), sums)
        self.arrays["workspace"] = self.device.empty(size, np.uint8, name="workspace")
        eps = (ctypes.c_double * 1)(case.norm_eps or 0)
        code = 0
        for which in (0, 1 + KERNELS.index(kernel)):
            code = code or self.device.call("test_launch", *self._arguments(), eps, which)
        if kept is not None:
            self.arrays["grad_state"] = kept
        return code

    def result(self, name: str) -> Tensor:
        values = torch.from_numpy(self.arrays[name].numpy())
        return values if values.dtype == torch.float32 else values.view(self.case.dtype)


def check(case: Case, library: EmulatedLibrary, kernel: str, seed: int = 0) -> Call:
    """Each result is at most twice as far from float64 as torch's is."""
    call = Call(case, library, seed)
    assert call.launch(kernel) == 0
    exact, peer = expected(case, torch.float64), expected(case, case.dtype)
    for name in RESULTS[kernel]:
        mine = call.result(name)
        assert_as_good_as([mine], [exact[name]], [peer[name]])
        if "state" not in name and case.padding:
            assert not mine[-case.padding :].any(), f"{name}: padding rows must be zero"
    return call
