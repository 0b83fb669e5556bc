"""Runs the PTX of our CUDA kernels without a GPU and says what is wrong with them; see README.md."""

from . import (  # noqa: F401  they register their instructions
    arithmetic,
    bits,
    comparison,
    control,
    convert,
    data,
    hopper,
    warp,
    wgmma,
)
from .device import Device, DeviceArray
from .findings import DeviceTrap, EmulationError, Problem
from .library import BuildError, EmulatedLibrary, toolkit
from .parser import UnsupportedPtx

__all__ = [
    "BuildError",
    "Device",
    "DeviceArray",
    "DeviceTrap",
    "EmulatedLibrary",
    "EmulationError",
    "Problem",
    "UnsupportedPtx",
    "toolkit",
]
