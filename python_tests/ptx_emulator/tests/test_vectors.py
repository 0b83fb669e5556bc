"""Every instruction against its vectors."""

import os
import subprocess

import pytest

from python_tests.ptx_emulator import toolkit, vectors
from python_tests.ptx_emulator.vectors.micro import HEADERS, emulate, kernel

VECTORS = vectors.load()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name.replace(" ", "-"))
def test_vector(vector):
    text = kernel("vector", vector.body, vector.inputs, vector.outputs)
    assert vector.mismatches(emulate(text, "vector", vector.operands, len(vector.outputs))) == []


def test_the_file_is_what_is_computed():
    assert [vector.as_json() for vector in vectors.compute()] == [vector.as_json() for vector in VECTORS]


@pytest.mark.parametrize("arch", HEADERS)
def test_the_assembler_takes_them(tmp_path, arch):
    nvcc = toolkit()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    texts = [kernel(f"vector_{n}", v.body, v.inputs, v.outputs) for n, v in enumerate(VECTORS) if v.arch == arch]
    source = tmp_path / "vectors.ptx"
    source.write_text(HEADERS[arch] + "".join(texts))
    command = [str(nvcc), "-cubin", f"-arch=sm_{arch}", str(source), "-o", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
