"""Build variables are read strictly: a misspelt value stops the build instead of being taken for something else."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import backend
import build_config
import cmake_build


@pytest.fixture
def fake_torch(tmp_path, monkeypatch):
    root = tmp_path / "torch"
    root.mkdir()
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setenv("VISTA_TORCH_ROOT", str(root))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("VISTA_CUDA", raising=False)
    monkeypatch.delenv("VISTA_CUDA_ARCHS", raising=False)

    def write(cuda: str) -> None:
        (root / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\n")

    write("None")
    return write


def test_cuda_follows_torch_not_a_visible_gpu(fake_torch):
    assert not build_config.from_environment().cuda
    fake_torch("'13.0'")
    assert build_config.from_environment().cuda


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), ("auto", False)])
def test_cuda_can_be_said(fake_torch, monkeypatch, value, expected):
    monkeypatch.setenv("VISTA_CUDA", value)
    assert build_config.from_environment().cuda is expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VISTA_CUDA", "TRUE", "VISTA_CUDA must be 0, 1 or auto, found 'TRUE'"),
        ("VISTA_CUDA_ARCHS", "sm_80", "VISTA_CUDA_ARCHS must be a list such as '80;90a', found 'sm_80'"),
        ("VISTA_TORCH_ROOT", "/no/such/folder", "VISTA_TORCH_ROOT must name an existing folder"),
        ("VISTA_CUTLASS_ROOT", "/no/such/folder", "VISTA_CUTLASS_ROOT must name an existing folder"),
    ],
)
def test_bad_values_are_named(fake_torch, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(build_config.BuildConfigError, match=message.replace("[", r"\[")):
        build_config.from_environment()


def test_cuda_without_nvcc_is_an_error(fake_torch, monkeypatch):
    monkeypatch.setattr(build_config, "_find_nvcc", lambda: None)
    monkeypatch.setenv("VISTA_CUDA", "1")
    with pytest.raises(build_config.BuildConfigError, match="needs nvcc"):
        build_config.from_environment()


def test_a_folder_without_cutlass_is_named(fake_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("VISTA_CUTLASS_ROOT", str(tmp_path))
    with pytest.raises(build_config.BuildConfigError, match="VISTA_CUTLASS_ROOT must hold cutlass/ and cute/"):
        build_config.from_environment()
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "version.h").touch()
    assert build_config.from_environment().cutlass_root == tmp_path


@pytest.mark.parametrize("cuda", [True, False])
def test_cutlass_is_needed_by_cuda_only(fake_torch, monkeypatch, cuda):
    """Of what is installed only CUTLASS is hidden: the backend asks for it, and CMake is not started without it."""
    found = build_config._package_dir
    monkeypatch.setattr(build_config, "_package_dir", lambda name: None if name == "cutlass_library" else found(name))
    monkeypatch.delenv("VISTA_CUTLASS_ROOT", raising=False)
    fake_torch("'13.0'" if cuda else "None")
    assert any(name.startswith("nvidia-cutlass") for name in backend.get_requires_for_build_wheel()) is cuda
    started = []
    monkeypatch.setattr(cmake_build, "run", lambda *args: started.append(args))
    if cuda:
        with pytest.raises(build_config.BuildConfigError, match="need the headers of CUTLASS, found none"):
            cmake_build.configure(build_config.from_environment())
    else:
        cmake_build.configure(build_config.from_environment())
    assert bool(started) is not cuda


def test_a_torch_yet_to_come_may_be_a_cuda_build(fake_torch, monkeypatch):
    monkeypatch.delenv("VISTA_TORCH_ROOT")
    monkeypatch.delenv("VISTA_CUTLASS_ROOT", raising=False)
    monkeypatch.setattr(build_config, "_package_dir", lambda name: None)
    assert {"torch>=2.10", "nvidia-cutlass>=4.2,<5"} <= set(backend.get_requires_for_build_wheel())
    monkeypatch.setenv("VISTA_CUDA", "0")
    assert "nvidia-cutlass>=4.2,<5" not in backend.get_requires_for_build_wheel()


def test_a_folder_that_is_no_torch_is_named(fake_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("VISTA_TORCH_ROOT", str(tmp_path))
    with pytest.raises(build_config.BuildConfigError, match="VISTA_TORCH_ROOT must name the folder of a torch package"):
        build_config.from_environment()
