import pytest

from vista_ext.config import load_config
from vista_ext.data.dataset import EventDataset
from vista_ext.runs import Run
from vista_ext.serve.export import export_run
from vista_ext.serve.summarize import open_for_writing, refresh
from vista_ext.train.trainer import train


@pytest.fixture(scope="session")
def trained(tiny_data, tmp_path_factory):
    """The folder of a small trained run; read-only to tests."""
    folder = tmp_path_factory.mktemp("runs") / "vista"
    overrides = [f"data.path={tiny_data}", f"folder={folder}", "train.epochs=1", "train.requests_per_batch=32"]
    config = load_config(None, [*overrides, "data.max_history=80", "threads=1"])
    train(config, EventDataset(tiny_data))
    return folder


@pytest.fixture
def run(trained):
    return Run.open(trained)


@pytest.fixture(scope="session")
def stored(trained, tmp_path_factory):
    """The folder of a store with everybody's summaries; read-only to tests."""
    path, run = tmp_path_factory.mktemp("stores") / "store", Run.open(trained)
    with open_for_writing(path, run.store_spec()) as store:
        refresh(run.vista, run.dataset, store)
    return path


@pytest.fixture(scope="session")
def package(trained, tmp_path_factory):
    """The folder of the run's exported stage 2; read-only to tests."""
    folder = tmp_path_factory.mktemp("exports") / "package"
    export_run(Run.open(trained), folder)
    return folder
