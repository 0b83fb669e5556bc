"""Training shared among processes: the gradients of one process, resumable, written by the first alone."""

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from python_tests import ranks
from python_tests.train.workers import gradients_of, gradients_of_share, train_share
from vista_ext.config import save_config
from vista_ext.data.dataset import EventDataset
from vista_ext.processes import Processes
from vista_ext.store import LmdbStore
from vista_ext.train.checkpoint import CheckpointError, open_checkpoint
from vista_ext.train.records import read_records
from vista_ext.train.trainer import train

NO_DROPOUT = ["model.options.dropout=0.0"]


def weights(folder, name):
    return open_checkpoint(Path(folder) / "checkpoints" / name).tensors("model")


def newest(folder):
    return (sorted((Path(folder) / "checkpoints").glob("step-*")) or [None])[-1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_gradients_are_those_of_one_process(tiny_config, tmp_path, forkserver):
    """Batches of three histories, so that the processes have unequal parts, and of one: the second has nothing."""
    cases = [
        *product(["vista", "din", "mean"], ["candidate", "history"], [3, 1], ["ddp"]),
        *product(["vista", "mean"], ["request"], [3, 1], ["fsdp"]),
    ]
    configs = [
        tiny_config(
            *NO_DROPOUT, f"model.name={name}", f"train.loss_weighting={weighting}", f"train.requests_per_batch={size}",
            "train.share_window=200000", f"train.parallel={parallel}",
        )
        for name, weighting, size, parallel in cases
    ]  # fmt: skip
    path = tmp_path / "gradients"
    assert ranks.run(forkserver, 2, gradients_of_share, configs, 3, path) == [0, 0]
    dataset = EventDataset(configs[0].data.path)
    for case, config, shared in zip(cases, configs, torch.load(path), strict=True):
        alone = gradients_of(config, dataset, Processes(), 3)
        assert len(alone) == len(shared) == 3
        for (told, right), (found, gradients) in zip(alone, shared, strict=True):
            assert found == pytest.approx(told, rel=1e-5), case
            whole = torch.cat([g.flatten() for g in right.values()]).norm()
            for name, gradient in right.items():
                # Float32 sums in another order: some units of the last place of the terms, which cancel.
                assert (gradients[name] - gradient).norm() <= 1e-5 * whole, (case, name)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_processes_is_a_run_of_one(tiny_config, forkserver, parallel):
    alone, shared = (
        tiny_config(
            *NO_DROPOUT, "train.epochs=1", "train.requests_per_batch=31", f"train.parallel={parallel}", folder=f
        )
        for f in ("alone", "shared")
    )
    train(alone, EventDataset(alone.data.path))
    save_config(shared)
    assert ranks.run(forkserver, 2, train_share, shared.folder) == [0, 0]
    right, found = (read_records(Path(config.folder)) for config in (alone, shared))
    assert [record["step"] for record in found] == [record["step"] for record in right]  # each written once
    for one, other in zip(right, found, strict=True):
        assert other == pytest.approx(one, rel=1e-3, nan_ok=True)  # Adam amplifies rounding where gradients are small


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_it_ends_where_an_undisturbed_run_does(tiny_config, forkserver, parallel):
    """With dropout, so that both processes need their own random numbers back. Another number of them is refused."""
    undisturbed, killed = (
        tiny_config("train.epochs=1", f"train.parallel={parallel}", folder=f) for f in ("undisturbed", "killed")
    )
    for config in (undisturbed, killed):
        save_config(config)
    assert ranks.run(forkserver, 2, train_share, undisturbed.folder) == [0, 0]
    started = ranks.start(forkserver, 2, train_share, killed.folder)
    end = time.monotonic() + 60
    while newest(killed.folder) is None and time.monotonic() < end:
        time.sleep(0.005)
    assert all(process.is_alive() for process in started)
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
    step = newest(killed.folder)
    with pytest.raises(CheckpointError, match=r"expected a run of 1 processes \(WORLD_SIZE\), found one of 2"):
        train(killed, EventDataset(killed.data.path))
    assert step != newest(undisturbed.folder)
    assert ranks.run(forkserver, 2, train_share, killed.folder) == [0, 0]
    for name in ("best", newest(undisturbed.folder).name):
        ours, right = weights(killed.folder, name), weights(undisturbed.folder, name)
        assert all(torch.equal(ours[key], right[key]) for key in right), name
    assert read_records(Path(killed.folder)) == read_records(Path(undisturbed.folder))


def test_a_folder_of_ones_own_is_refused(tiny_config):
    class Elsewhere(Processes):
        def gather(self, values):
            return [values + 5, values]

    config = tiny_config("train.epochs=1")
    with pytest.raises(CheckpointError, match="expected a folder that all processes share, found none as the newest"):
        train(config, EventDataset(config.data.path), processes=Elsewhere(1, 2))
    assert not (Path(config.folder) / "run.yaml").exists()


@pytest.mark.slow
def test_the_commands_under_torchrun(tiny_data, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"folder: run\ndata: {{path: {tiny_data}}}\nthreads: 1\ntrain: {{epochs: 1}}\nstore: {{users_per_shard: 7}}\n"
    )

    def torchrun(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module"]
        done = subprocess.run(
            [*command, "vista_ext.cli", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done

    assert torchrun("train", "run.yaml").stdout == "trained: run\n"
    done = torchrun("summarize", "run")
    assert done.stdout == "60 summaries written, 60 in run/store (int8)\n"
    assert "process 0 of 2: 32 of 32 users" in done.stderr and "process 1 of 2: 28 of 28 users" in done.stderr
    with LmdbStore.open(tmp_path / "run" / "store") as store:
        assert store.find(torch.arange(60)).hits.all()
    refreshed = torchrun("refresh", "run", "--min-events", "0", "--states")
    assert refreshed.stdout == "60 users, 60 due, 60 summaries written\n"
