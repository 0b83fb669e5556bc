"""The compile gate refuses what it should: planted faults, compiled exactly as the kernels are."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import cmake_build
import kernel_manifest

SPILL = """
__global__ void __launch_bounds__(1024) kernel(float* x) {
  float values[256];
#pragma unroll
  for (int i = 0; i < 256; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 256; ++i) x[(255 - i) * 1024 + threadIdx.x] = values[i] * values[(i * 7) % 256];
}
"""
LOCAL_ARRAY = """
__global__ void __launch_bounds__(32) kernel(float* x, int n) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[(i * n) % 64] = x[i];
  x[0] = values[n % 64];
}
"""
DOUBLE = "__global__ void __launch_bounds__(32) kernel(float* x) { x[threadIdx.x] *= 1.1; }"
UNUSED = "__global__ void __launch_bounds__(32) kernel(float* x) { int unused = 3; x[0] = 1.0f; }"
UNINITIALISED = "__global__ void __launch_bounds__(32) kernel(float* x) { float sum; sum += x[1]; x[0] = sum; }"
GOOD = "__global__ void __launch_bounds__(32) kernel(float* x) { x[threadIdx.x] *= 1.1f; }"


def compile_like_a_kernel(source, folder):
    try:
        build = kernel_manifest.library().parent
    except kernel_manifest.Unavailable as reason:
        pytest.skip(str(reason))
    entries = json.loads((build / "compile_commands.json").read_text())
    entry = next(entry for entry in entries if entry["file"].endswith("csrc/kernels/common/launch.cu"))
    if "VISTA_WERROR:BOOL=ON" not in (build / "CMakeCache.txt").read_text():
        pytest.skip("the kernels were not built by the gate: make kernels")
    path = folder / "planted.cu"
    path.write_text(source)
    command = [part.replace(entry["file"], str(path)) for part in shlex.split(entry["command"])]
    command[command.index("-o") + 1] = str(folder / "planted.o")
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(SPILL, "spill", id="spill"),
        pytest.param(LOCAL_ARRAY, "Local memory", id="local array"),
        pytest.param(DOUBLE, "double precision", id="double precision"),
        pytest.param(UNUSED, "never referenced", id="unused variable"),
        pytest.param(UNINITIALISED, "before its value is set", id="uninitialised"),
    ],
)
def test_a_planted_fault_stops_the_build(source, message, tmp_path):
    run = compile_like_a_kernel(source, tmp_path)
    assert run.returncode != 0, run.stdout + run.stderr
    assert message in run.stdout + run.stderr


def test_a_good_kernel_passes(tmp_path):
    run = compile_like_a_kernel(GOOD, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("said", "code"), [("ptxas info : (C7511) wgmma serialised", 1), ("ptxas info : 24 registers", 0)]
)
def test_wgmma_diagnostics_stop_the_build(said, code, tmp_path):
    output = tmp_path / "kernel.o"
    compiler = ["sh", "-c", f"echo '{said}'; touch {output}", "nvcc", "-o", str(output)]
    run = subprocess.run(
        [sys.executable, cmake_build.ROOT / "tools" / "nvcc_gate.py", *compiler], capture_output=True, text=True
    )
    assert (run.returncode, output.exists()) == (code, code == 0)
    assert said in run.stdout
