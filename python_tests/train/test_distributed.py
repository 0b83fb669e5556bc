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

from python_tests import needs, ranks
from python_tests.train.workers import gradients_of, gradients_of_share, score_and_save_share, train_share
from vista_ext._extras import MissingExtraError
from vista_ext.config import ConfigError, save_config
from vista_ext.data.dataset import EventDataset
from vista_ext.processes import Processes
from vista_ext.store import LmdbStore
from vista_ext.train.checkpoint import CheckpointError, open_checkpoint
from vista_ext.train.evaluate import predict
from vista_ext.train.records import read_records
from vista_ext.train.row_wise import RowWiseEmbedding
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


def check_gradients(forkserver, tmp_path, configs, processes=2):
    path = tmp_path / "gradients"
    assert ranks.run(forkserver, processes, gradients_of_share, configs, 3, path) == [0] * processes
    dataset = EventDataset(configs[0].data.path)
    for config, shared in zip(configs, torch.load(path), strict=True):
        parallel, config.train.parallel = config.train.parallel, "ddp"
        alone = gradients_of(config, dataset, Processes(), 3)
        case = config.model, config.train, parallel
        assert len(alone) == len(shared) == 3
        for (told, right), (found, gradients) in zip(alone, shared, strict=True):
            assert found == pytest.approx(told, rel=1e-5), case
            whole = torch.cat([g.flatten() for g in right.values()]).norm()
            for name, gradient in right.items():
                # Float32 sums in another order: some units of the last place of the terms, which cancel.
                assert (gradients[name] - gradient).norm() <= 1e-5 * whole, (case, name)


def test_gradients_are_those_of_one_process(tiny_config, tmp_path, forkserver):
    """Batches of three histories, so that the processes have unequal parts, and of one: the second has nothing."""
    cases = [
        *product(["vista", "din", "mean"], ["candidate", "history"], [3, 1], ["ddp"]),
        *product(["vista", "mean"], ["request"], [3, 1], ["fsdp"]),
    ]
    check_gradients(forkserver, tmp_path, [
        tiny_config(
            *NO_DROPOUT, f"model.name={name}", f"train.loss_weighting={weighting}", f"train.requests_per_batch={size}",
            "train.share_window=200000", f"train.parallel={parallel}",
        )
        for name, weighting, size, parallel in cases
    ])  # fmt: skip


@needs.torchrec
def test_gradients_of_cut_rows_are_those_of_whole_ones(tiny_config, tmp_path, forkserver):
    """Four rows over three processes are two, two and none; two are one, one and none. Items are looked up for
    histories and for candidates, of which two processes have none in batches of one."""
    tables = [["items=table"], ["items=hash", "hash_rows=4"], ["items=hash", "hash_rows=2"]]
    check_gradients(forkserver, tmp_path, [
        tiny_config(
            *NO_DROPOUT, f"model.name={name}", f"train.requests_per_batch={size}", "train.parallel=torchrec",
            *(f"model.options.embedding.{option}" for option in table),
        )
        for name, table, size in product(["vista", "mean"], tables, [3, 1])
    ], 3)  # fmt: skip


@needs.torchrec
def test_a_model_with_cut_rows_scores_and_saves_as_the_whole_one(tiny_config, tmp_path, forkserver):
    """Read from a run of one process; saved it is the same file, which the other jobs read."""
    config = tiny_config("train.epochs=1")
    whole = train(config, EventDataset(config.data.path))
    best = Path(config.folder) / "checkpoints" / "best"
    config.train.parallel = "torchrec"
    assert ranks.run(forkserver, 2, score_and_save_share, config, best, tmp_path) == [0, 0]
    found = torch.load(tmp_path / "found")
    assert found["rows"] == [26, 25] and found["bytes"] == [26 * 32 * 4, 25 * 32 * 4]  # no view of the whole table
    right = predict(whole, EventDataset(config.data.path), "valid", config.data).logits
    assert torch.allclose(found["logits"], right, rtol=1e-5, atol=1e-6)
    saved = open_checkpoint(tmp_path / "saved")
    assert saved.manifest["crc32"] == {"model": open_checkpoint(best).manifest["crc32"]["model"]}


def test_cut_rows_need_company_and_torchrec(tiny_config, tmp_path, forkserver, monkeypatch):
    config = tiny_config("train.parallel=torchrec")
    with pytest.raises(ValueError, match=r"train\.parallel: torchrec .* at least 2 \(WORLD_SIZE\), found 1"):
        train(config, EventDataset(config.data.path))
    assert not (Path(config.folder) / "run.yaml").exists()
    monkeypatch.setitem(sys.modules, "torchrec", None)
    with pytest.raises(MissingExtraError, match=r"'torchrec.*' is needed here .*pip install --no-deps torchrec"):
        RowWiseEmbedding(torch.nn.Embedding(3, 2), None)
    with pytest.raises(ConfigError, match=r"train\.parallel must be ddp, fsdp or torchrec, found 'dmp'"):
        tiny_config("train.parallel=dmp")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", needs.TORCHREC])
def test_a_run_of_two_processes_is_a_run_of_one(tiny_config, forkserver, parallel):
    alone, shared = (
        tiny_config(*NO_DROPOUT, "train.epochs=1", "train.requests_per_batch=31", f"train.parallel={how}", folder=f)
        for f, how in (("alone", "ddp"), ("shared", parallel))
    )
    train(alone, EventDataset(alone.data.path))
    save_config(shared)
    assert ranks.run(forkserver, 2, train_share, shared.folder) == [0, 0]
    right, found = (read_records(Path(config.folder)) for config in (alone, shared))
    assert [record["step"] for record in found] == [record["step"] for record in right]  # each written once
    for one, other in zip(right, found, strict=True):
        assert other == pytest.approx(one, rel=1e-3, nan_ok=True)  # Adam amplifies rounding where gradients are small


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", needs.TORCHREC])
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
