import multiprocessing
import os
import sys

import hypothesis
import pytest

from vista_ext.config import load_config
from vista_ext.data.synthetic import make_synthetic

# CI throws the same inputs each time, so that a change is judged by what it changed; elsewhere they differ by run.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_synthetic(folder, users=60, items=50, events_per_user=80, recent=20, clusters=5, liked=1)
    return folder


@pytest.fixture(scope="session")
def forkserver():
    """Starts clean processes without the cost of importing torch in each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vista_ext.delivery", "vista_ext.runs", "vista_ext.train.trainer"])
    return context


@pytest.fixture
def tiny_config(tiny_data, tmp_path):
    def config(*overrides, folder="run"):
        basics = [
            f"data.path={tiny_data}", f"folder={tmp_path / folder}", "data.max_history=80", "threads=1",
            "train.requests_per_batch=32", "train.epochs=2", "train.log_steps=1", "train.checkpoint_steps=5",
            "model.options.dropout=0.1", "train.learning_rate=3e-3",
        ]  # fmt: skip
        return load_config(None, [*basics, *overrides])

    return config


@pytest.fixture
def here(monkeypatch, capfd, tmp_path):
    """Run a command in this process, as main() would: its output, or the message it ends with."""
    from vista_ext.cli import main

    def here(*arguments):
        monkeypatch.setattr(sys, "argv", ["vista", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as info:
            main()
        return info.value.code or capfd.readouterr().out

    return here
