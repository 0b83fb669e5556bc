"""The linear_silu kernels in the emulator against torch: what the tests here run."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from python_tests.ptx_emulator import Device, EmulatedLibrary
from python_tests.ptx_emulator.tensor_map import TensorMap
from vista_ext.reference import linear_silu
from vista_ext.testing import assert_as_good_as

from .qla_checks import DTYPE_IDS, bits

ENTRY = "python_tests/kernels/gemm_entry.cpp"
FILES = ("plan", "linear_silu", "sm90/linear_silu")
TENSORS = ("x", "weight", "bias", "grad_out", "out")


@cache
def build_library() -> EmulatedLibrary:
    return EmulatedLibrary.build([f"csrc/kernels/gemm/{name}.cu" for name in FILES], entry=ENTRY)


@dataclass
class Case:
    """Inputs of the op and, if `backward`, of its gradient."""

    rows: int
    in_features: int = 64
    out_features: int = 64
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    backward: bool = False
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        tensors = {
            "x": normal(self.rows, self.in_features),
            "weight": normal(self.out_features, self.in_features) * 2 * self.in_features**-0.5,
        }
        if self.bias:
            tensors["bias"] = normal(self.out_features)
        if self.backward:
            tensors["grad_out"] = normal(self.rows, self.out_features)
        self.tensors = {name: x.to(self.dtype) for name, x in tensors.items()}


def expected(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    """By the definition in float64, or by torch's own layers in the case's precision."""
    given = {name: case.tensors[name].to(dtype or case.dtype) for name in case.tensors}
    x, weight, bias = given["x"], given["weight"], given.get("bias")
    if not case.backward:
        return linear_silu(x, weight, bias) if dtype else functional.silu(functional.linear(x, weight, bias))
    pre = functional.linear(x, weight, bias).requires_grad_()
    return torch.autograd.grad(functional.silu(pre), pre, given["grad_out"])[0]


class Call:
    """A case on the device."""

    def __init__(
        self,
        case: Case,
        library: EmulatedLibrary,
        arch: int = 80,
        seed: int = 0,
        multiprocessors: int = 64,
        device: type[Device] = Device,
        **overrides: int,
    ):
        self.case, self.arch, self.overrides = case, arch, overrides
        self.device = device(library, seed, multiprocessors=multiprocessors, capability=divmod(arch, 10))
        self.arrays = {name: self.device.array(bits(x), name=name) for name, x in case.tensors.items()}
        shape = (case.rows, case.out_features)
        self.arrays["out"] = self.device.empty(shape, self.arrays["x"].dtype, name="out")

    def run(self) -> int:
        case = self.case
        named = {
            "architecture": self.arch,
            "dtype": DTYPE_IDS[case.dtype],
            "rows": case.rows,
            "in_features": case.in_features,
            "out_features": case.out_features,
        } | self.overrides
        pointers = [self.arrays[name].pointer if name in self.arrays else None for name in TENSORS]
        sizes = (ctypes.c_int64 * len(named))(*named.values())
        return self.device.call("test_linear_silu", sizes, (ctypes.c_void_p * len(pointers))(*pointers))

    def result(self) -> Tensor:
        return torch.from_numpy(self.arrays["out"].numpy().view("int16")).view(self.case.dtype)


class Recorder(Device):
    """Runs nothing: keeps the parameters of the launch, for sizes that no memory holds."""

    parameters = b""

    def _launch(self, request: Any) -> int:
        kernel = self.library.program(request.kernel.decode()).kernel
        (parameter,) = kernel.parameters.values()
        self.parameters = ctypes.string_at(request.arguments[0], parameter.size)
        self.launches.append((kernel.name, tuple(request.grid), tuple(request.block), request.dynamic_shared))
        return 0

    def tensor_maps(self) -> dict[int, TensorMap]:
        """By the address that they describe."""
        places = [at.start() for at in re.finditer(b"VMAP", self.parameters)]
        maps = [TensorMap.from_record(self.parameters[at : at + 128]) for at in places]
        return {each.address: each for each in maps}


def best_tile(
    library: EmulatedLibrary,
    case: Case,
    arch: int,
    multiprocessors: int,
    rows: int | None = None,
    out_features: int | None = None,
) -> tuple[int, int]:
    """Rows and columns of the tile that the host chooses for this case, or for these sizes."""
    sizes = (rows or case.rows, out_features or case.out_features, multiprocessors, arch == 90)
    return divmod(library.host.test_linear_silu_tile(*(ctypes.c_int64(size) for size in sizes)), 1000)


def check(case: Case, library: EmulatedLibrary, *args: int, **options: int) -> Call:
    """At most twice as far from float64 as torch in the same precision. The rest are arguments of `Call`."""
    call = Call(case, library, *args, **options)
    assert call.run() == 0
    assert_as_good_as([call.result()], [expected(case, torch.float64)], [expected(case)])
    return call
