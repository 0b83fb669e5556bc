"""The vectors on a GPU: the CUDA driver compiles and launches the micro-kernels; torch gives the memory."""

from __future__ import annotations

import ctypes

import numpy as np

from .micro import HEADERS, kernel
from .vector import Vector


def _check(result: int) -> None:
    if result != 0:
        raise RuntimeError(f"CUDA driver error {result}")


def run(driver: ctypes.CDLL, vector: Vector) -> np.ndarray:
    import torch

    text = HEADERS[vector.arch] + kernel("vector", vector.body, vector.inputs, vector.outputs)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), text.encode()))
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"vector"))
    operands = torch.from_numpy(vector.operands.view(np.int64)).cuda()
    results = torch.zeros((len(vector.rows), len(vector.outputs)), dtype=torch.int64, device="cuda")
    arguments = [ctypes.c_void_p(operands.data_ptr()), ctypes.c_void_p(results.data_ptr())]
    pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(argument) for argument in arguments))
    torch.cuda.synchronize()
    _check(driver.cuLaunchKernel(function, 1, 1, 1, len(vector.rows), 1, 1, 0, None, pointers, None))
    torch.cuda.synchronize()
    _check(driver.cuModuleUnload(module))
    return results.cpu().numpy().view(np.uint64)


def confirm(vectors: list[Vector]) -> list[str]:
    """Notes the device in each vector that it confirms; what it does not, in words. Of sm_90a on such devices only."""
    import torch

    name = torch.cuda.get_device_name()
    torch.zeros(1, device="cuda")  # makes the context that the driver calls use
    driver = ctypes.CDLL("libcuda.so.1")
    wrong = []
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for vector in vectors:
        if vector.arch == "90a" and not hopper:
            continue
        different = vector.mismatches(run(driver, vector))
        if not different:
            vector.confirmed_on_gpu = name
        wrong += different
    return wrong
