"""Every instruction set that this processor has, forced by VISTA_CPU_ISA, keeps the bounds that the ops' tests set."""

import os
import platform
import subprocess
import sys

import pytest

ISAS = ["base", "avx2", "avx512", "amx"]  # each includes those before it
CALL = """
import torch
from vista_ext import ops
q, k, v = (torch.randn(200, 2, 40, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
out = ops.qla(q, k, v, torch.tensor([0, 70, 200]), 130)
print(out.view(torch.int16).long().mul(torch.arange(out.numel()).view_as(out) % 1009).sum().item())
"""

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 has several")


def run(isa, *command):
    environment = {**os.environ, "VISTA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def calls():
    return {isa: run(isa, "-c", CALL) for isa in ISAS}


def test_an_isa_runs_or_says_which_one_would(calls):
    outputs = []
    for isa, call in calls.items():
        if call.returncode == 0:
            outputs.append(call.stdout)
            continue
        widest = ISAS[len(outputs) - 1]
        assert f"an instruction set of this processor, the widest is {widest}, found {isa}" in call.stderr
    assert len(set(outputs)) > 1, "the sums of 4, 8, 16 lanes and of tiles differ in their rounding"


def test_an_unknown_isa_is_refused():
    call = run("sse2", "-c", CALL)
    assert call.returncode != 0
    assert "VISTA_CPU_ISA must be base, avx2, avx512 or amx, found 'sse2'" in call.stderr


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        (
            "test_qla.py",
            "(matches_the_definition and (24-64 or 40-256 or 136-200)) or stays_where_it_matters or wide_rows"
            " or batch_or_threads",
        ),
        ("test_cross_attn.py", "(matches_the_definition and 24-16 and not float16) or long_beside or splitting"),
        ("test_gated_products.py", "rounded_once"),
        ("test_weighted_rms_norm.py", "matches_the_formula and 1e-06 and not 256"),
        ("test_cache_rows.py", "documented_ones or (dtypes and (int4 or fp8)) or reads_back_as_nan or gather_reads"),
    ],
)
def test_ops_in_every_isa(calls, isa, file, chosen):
    if calls[isa].returncode != 0:
        pytest.skip(f"this processor has no {isa}")
    if all(calls[wider].returncode != 0 for wider in ISAS[ISAS.index(isa) + 1 :]):
        pytest.skip(f"{isa} is what {file} itself runs here")
    tests = run(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"python_tests/ops/{file}", "-k", chosen)
    assert tests.returncode == 0, tests.stdout + tests.stderr
