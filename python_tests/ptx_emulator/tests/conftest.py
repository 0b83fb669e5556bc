import pytest

from python_tests.ptx_emulator import EmulatedLibrary, toolkit

from .toys import FOLDER


def _library(name: str, *others: str) -> EmulatedLibrary:
    if toolkit() is None:
        pytest.skip("no nvcc on this machine")
    return EmulatedLibrary.build([f"{FOLDER}/{name}.cu", *others])


@pytest.fixture(scope="session")
def gemm() -> EmulatedLibrary:
    return _library("tile_gemm")


@pytest.fixture(scope="session")
def hopper() -> EmulatedLibrary:
    common = "csrc/kernels/common"
    return _library("sm90/wgmma_gemm", f"{common}/sm90/tensor_map.cu", f"{common}/launch.cu")


@pytest.fixture(scope="session")
def simple() -> EmulatedLibrary:
    return _library("simple")
