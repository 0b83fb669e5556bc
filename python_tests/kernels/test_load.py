"""Without a driver the CUDA half loads, the CPU half works, and a launch comes back with an error: no crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vista_ext
from vista_ext import _C

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import build_config
import kernel_launches
import kernel_manifest

NO_DRIVER = (35, 100)  # cudaErrorInsufficientDriver, cudaErrorNoDevice

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def test_a_cuda_build_loads_without_a_driver():
    if not _C.build_info()["cuda_archs"]:
        pytest.skip("this is a CPU build: VISTA_CUDA=1 make test")
    assert _C.build_info()["cuda_archs"].split() == build_config.from_environment().cuda_archs.split(";")
    loaded = Path("/proc/self/maps").read_text()
    assert "_ops.so" in loaded and "libcuda.so" not in loaded
    x = torch.full((2, 4, 64), 127.0)
    assert torch.equal(vista_ext.ops.dequantize_rows(vista_ext.ops.quantize_rows(x, scheme="int8"), 4, 64), x)


def test_information_names_what_was_built():
    out = subprocess.run([sys.executable, "-m", "vista_ext.info"], capture_output=True, text=True, check=True).stdout
    information = json.loads(out)
    archs = _C.build_info()["cuda_archs"]
    assert information["cuda architectures"] == (archs or "none: no CUDA kernels in this build")
    assert information["cuda compiler"] == (kernel_manifest.nvcc_version() if archs else "none")


def test_every_launch_without_a_driver_returns_an_error(tmp_path):
    try:
        archive = kernel_manifest.library()
    except kernel_manifest.Unavailable as reason:
        pytest.skip(str(reason))
    library = kernel_launches.build(archive, tmp_path / "every_launch.so")
    codes = {library.vista_launch(index) for index in range(library.vista_number_of_launches())}
    assert codes and codes <= set(NO_DRIVER)
    for code in codes:
        assert any(word in library.vista_error_text(code) for word in (b"driver", b"device"))
