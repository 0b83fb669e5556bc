"""The sglu kernels in the emulator against torch: what the tests here run."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from python_tests.ptx_emulator import Device, DeviceArray, EmulatedLibrary
from vista_ext.reference import sglu_by_products
from vista_ext.testing import assert_as_good_as

from .qla_checks import DTYPE_IDS, bits

FILES = (
    "sglu/dispatch",
    "sglu/forward",
    "sglu/backward",
    "sglu/sm90/forward",
    "sglu/sm90/backward",
    "common/launch",
    "common/sm90/tensor_map",
)
ENTRY = "python_tests/kernels/sglu_entry.cpp"
GRADIENTS = ("grad_x", "grad_up_rows", "grad_gate_rows", "hidden_rows")
POINTERS = ("x", "up", "gate", "down", "down_t", "grad_out", "out", *GRADIENTS)


@cache
def build_library() -> EmulatedLibrary:
    return EmulatedLibrary.build([f"csrc/kernels/{name}.cu" for name in FILES], entry=ENTRY)


@dataclass
class Case:
    """Inputs of the op; the sizes decide the rest."""

    rows: int
    dim: int = 64
    hidden: int = 64
    dtype: torch.dtype = torch.bfloat16
    eps: float | None = 1e-6
    residual: bool = True
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        n, dim, hidden = self.rows, self.dim, self.hidden
        scaled = {
            "x": ((n, dim), 2),
            "up": ((hidden, dim), dim**-0.5),
            "gate": ((hidden, dim), dim**-0.5),
            "down": ((dim, hidden), hidden**-0.5),
            "grad_out": ((n, dim), 1),
        }
        self.tensors = {
            name: (torch.randn(shape, generator=generator) * scale).to(self.dtype)
            for name, (shape, scale) in scaled.items()
        }


def expected(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Everything that the op and its backward return, by the definition in this precision."""
    dtype = dtype or case.dtype
    x, up, gate, down, grad = (case.tensors[name].to(dtype) for name in ("x", "up", "gate", "down", "grad_out"))
    x = x.requires_grad_()
    out = sglu_by_products(x, up, gate, down, norm_eps=case.eps, residual=case.residual)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    x = x.detach()
    wide = x.double() if dtype == torch.float64 else x.float()
    r = torch.ones_like(wide[:, :1]) if case.eps is None else (wide.square().mean(1, True) + case.eps).rsqrt()
    y = (r * wide).to(dtype)
    u, v, of_hidden = y @ up.t(), y @ gate.t(), grad @ down
    return {
        "out": out.detach(),
        "grad_x": grad_x,
        "grad_up_rows": (r * (of_hidden * v)).to(dtype),
        "grad_gate_rows": (r * (of_hidden * u)).to(dtype),
        "hidden_rows": u * v,
    }


class Call:
    """A case on the device."""

    def __init__(
        self,
        case: Case,
        library: EmulatedLibrary,
        seed: int = 0,
        capability: tuple[int, int] = (8, 0),
        multiprocessors: int = 8,
        **overrides: int,
    ):
        self.case = case
        self.device = Device(library, seed, capability=capability, multiprocessors=multiprocessors)
        self.overrides = overrides
        self.arrays: dict[str, DeviceArray] = {
            name: self.device.array(bits(values), name=name) for name, values in case.tensors.items()
        }
        self.arrays["down_t"] = self.device.array(bits(case.tensors["down"].t().contiguous()), name="down_t")

    def _run(self, names: tuple[str, ...], backward: bool) -> int:
        case, arrays = self.case, self.arrays
        for name in names:
            columns = case.dim if name in ("out", "grad_x") else case.hidden
            arrays[name] = self.device.empty((case.rows, columns), np.uint16, name=name)
        named = {
            "dtype": DTYPE_IDS[case.dtype],
            "total": case.rows,
            "dim": case.dim,
            "hidden": case.hidden,
            "norm": case.eps is not None,
            "residual": case.residual,
        } | self.overrides
        sizes = (ctypes.c_int64 * len(named))(*map(int, named.values()))
        pointers = [arrays[name].pointer if name in arrays else None for name in POINTERS]
        return self.device.call(
            "test_sglu",
            sizes,
            (ctypes.c_void_p * len(pointers))(*pointers),
            ctypes.c_double(case.eps or 0.0),
            backward,
        )

    def forward(self) -> int:
        return self._run(("out",), False)

    def backward(self) -> int:
        return self._run(GRADIENTS, True)

    def result(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name].numpy().view(np.int16)).view(self.case.dtype)


def _compare(case: Case, call: Call, names: tuple[str, ...]) -> None:
    """Each at most twice as far from float64 as torch in the same precision."""
    exact, peer = expected(case, torch.float64), expected(case)
    for name in names:
        try:
            assert_as_good_as([call.result(name)], [exact[name]], [peer[name]])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def check_forward(case: Case, library: EmulatedLibrary, seed: int = 0, **options) -> Call:
    """`options` are those of Call."""
    call = Call(case, library, seed, **options)
    assert call.forward() == 0
    _compare(case, call, ("out",))
    return call


def check_backward(case: Case, library: EmulatedLibrary, seed: int = 0, **options) -> Call:
    call = Call(case, library, seed, **options)
    assert call.backward() == 0
    _compare(case, call, GRADIENTS)
    return call
