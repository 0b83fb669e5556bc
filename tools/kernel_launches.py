"""What the launch functions ask of each kernel, found by calling them without a GPU.

python_tests/kernels/every_launch.cpp calls them all; the emulator's runtime takes the launches and computes nothing.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import build_config
import cmake_build

TESTS = cmake_build.ROOT / "python_tests"
FAKE_RUNTIME = TESTS / "ptx_emulator" / "fake_cudart.cpp"
# What launch functions ask of a card, by cudaDeviceAttr: multiprocessors, major and minor compute capability, and the
# most shared memory of a block.
CARDS = {
    "8.0": {16: 108, 75: 8, 76: 0, 97: 163 * 1024},
    "8.6": {16: 84, 75: 8, 76: 6, 97: 99 * 1024},
    "8.9": {16: 142, 75: 8, 76: 9, 97: 99 * 1024},
    "9.0": {16: 132, 75: 9, 76: 0, 97: 227 * 1024},
}
NOT_BUILT = -1  # of every_launch.cpp: the launch function refused, since its callers compose what this card cannot hold


@dataclass(frozen=True)
class Launch:
    threads: int
    dynamic: int  # bytes of shared memory


def build(archive: Path, out: Path, *, runtime: Path | None = None) -> ctypes.CDLL:
    """Every launch as a library, on the CUDA runtime or on `runtime`."""
    sources = [TESTS / "kernels" / "every_launch.cpp", archive, f"-I{cmake_build.ROOT / 'csrc' / 'include'}"]
    options = ["-shared", "-std=c++17", "-Xcompiler=-fPIC", f"-cudart={'none' if runtime else 'static'}"]
    # nvcc knows where the toolkit is; there is no device code in these.
    command = [build_config.from_environment().nvcc, *options, *([runtime] if runtime else []), *sources, "-o", out]
    subprocess.run(list(map(str, command)), check=True)
    library = ctypes.CDLL(str(out))
    library.vista_error_text.restype = ctypes.c_char_p
    return library


class _Request(ctypes.Structure):  # EmulatedLaunch of the fake runtime, as far as it is read here
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("arguments", ctypes.c_void_p),
        ("dynamic_shared", ctypes.c_uint64),
    )


def record(archive: Path, scratch: Path) -> dict[str, dict[str, Launch]]:
    """For each card by mangled name; where launches of a kernel differ, the largest."""
    library = build(archive, scratch / "every_launch.so", runtime=FAKE_RUNTIME)
    seen: dict[str, dict[str, Launch]] = {card: {} for card in CARDS}
    card = ""

    def on_launch(request: ctypes._Pointer[_Request]) -> int:
        asked = request.contents
        name, (x, y, z) = asked.kernel.decode(), asked.block
        before = seen[card].get(name, Launch(0, 0))
        seen[card][name] = Launch(max(x * y * z, before.threads), max(asked.dynamic_shared, before.dynamic))
        return 0

    launch_callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Request))(on_launch)
    memory_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)
    memory_callback = memory_type(lambda *_: 0)
    ctypes.c_void_p.in_dll(library, "emulator_launch").value = ctypes.cast(launch_callback, ctypes.c_void_p).value
    ctypes.c_void_p.in_dll(library, "emulator_memory").value = ctypes.cast(memory_callback, ctypes.c_void_p).value
    attributes = (ctypes.c_int * 256).in_dll(library, "emulator_attributes")
    refused = []
    for device, card in enumerate(CARDS):
        ctypes.c_int.in_dll(library, "emulator_device").value = device
        for attribute, value in CARDS[card].items():
            attributes[attribute] = value
        codes = [library.vista_launch(index) for index in range(library.vista_number_of_launches())]
        failed = [index for index, code in enumerate(codes) if code not in (0, NOT_BUILT)]
        if failed:
            raise RuntimeError(f"launches {failed} of every_launch.cpp failed on a card {card}")
        refused.append({index for index, code in enumerate(codes) if code == NOT_BUILT})
    if set.intersection(*refused):
        raise RuntimeError(f"launches {set.intersection(*refused)} of every_launch.cpp are built for no card")
    return seen
