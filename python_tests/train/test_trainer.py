"""Training: it learns, it resumes exactly after a real kill, its checkpoints are whole or an error."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from vista_ext.config import load_config, save_config
from vista_ext.data.dataset import EventDataset
from vista_ext.train.checkpoint import CheckpointError, open_checkpoint, save_checkpoint
from vista_ext.train.evaluate import predict, quality
from vista_ext.train.records import read_records
from vista_ext.train.trainer import train


def weights(folder, name="best"):
    return open_checkpoint(Path(folder) / "checkpoints" / name).tensors("model")


def last_step(folder):
    return sorted((Path(folder) / "checkpoints").glob("step-*"))[-1].name


@pytest.mark.parametrize("name", ["vista", "din", "mean"])
def test_it_learns_and_says_so(tiny_config, name):
    config = tiny_config(f"model.name={name}", "train.epochs=4", "train.patience=4")
    dataset = EventDataset(config.data.path)
    model = train(config, dataset)
    records = read_records(Path(config.folder))
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-5:]) < sum(losses[:5])
    best = max(record["valid/auc"] for record in records if "valid/auc" in record)
    assert quality(predict(model, dataset, "valid", config.data)).auc == pytest.approx(best)
    assert list((Path(config.folder) / "tensorboard").glob("events*"))


def test_equal_seeds_equal_weights(tiny_config):
    dataset = EventDataset(tiny_config().data.path)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_config(f"seed={seed}", "train.epochs=1", folder=folder), dataset)
    one, same, other = (weights(tiny_config(folder=folder).folder) for folder in "abc")
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


PROGRAM = textwrap.dedent("""
    import sys
    from vista_ext.config import load_config
    from vista_ext.data.dataset import EventDataset
    from vista_ext.train.trainer import train
    config = load_config(sys.argv[1] + "/run.yaml")
    train(config, EventDataset(config.data.path))
""")


@pytest.mark.slow
def test_a_killed_run_ends_where_an_undisturbed_one_does(tiny_config):
    undisturbed, killed = tiny_config(folder="undisturbed"), tiny_config(folder="killed")
    train(undisturbed, EventDataset(undisturbed.data.path))
    save_config(killed)
    command = [sys.executable, "-c", PROGRAM, killed.folder]
    kills = 0
    while kills < 20:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = newest = sorted((Path(killed.folder) / "checkpoints").glob("step-*"))[-1:]
        while process.poll() is None and newest == before:
            time.sleep(0.01)
            newest = sorted((Path(killed.folder) / "checkpoints").glob("step-*"))[-1:]
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2, "the run must be long enough to be killed"
    for name in ("best", last_step(undisturbed.folder)):
        ours, right = weights(killed.folder, name), weights(undisturbed.folder, name)
        assert all(torch.equal(ours[key], right[key]) for key in right), name
    ours, right = (
        [r for r in read_records(Path(c.folder)) if "loss" in r] for c in (killed, undisturbed)
    )  # fmt: skip
    assert ours == right


def test_more_epochs_go_on_and_another_configuration_does_not(tiny_config):
    dataset = EventDataset(tiny_config().data.path)
    train(tiny_config("train.epochs=1"), dataset)
    train(tiny_config("train.epochs=2"), dataset)
    train(tiny_config("train.epochs=2", folder="whole"), dataset)
    ours, right = (weights(tiny_config(folder=folder).folder) for folder in ("run", "whole"))
    assert all(torch.equal(ours[key], right[key]) for key in right)
    with pytest.raises(CheckpointError, match="found another seed, train: choose another folder"):
        train(tiny_config("seed=3", "train.learning_rate=0.5"), dataset)


def test_a_refused_configuration_leaves_the_runs_own_file_alone(tiny_config):
    dataset = EventDataset(tiny_config().data.path)
    train(tiny_config("train.epochs=1"), dataset)
    with pytest.raises(CheckpointError, match="found another data"):
        train(tiny_config("train.epochs=1", "data.max_history=7"), dataset)
    assert load_config(Path(tiny_config().folder) / "run.yaml") == tiny_config("train.epochs=1")


def test_fewer_epochs_than_were_trained_are_another_run(tiny_config):
    dataset = EventDataset(tiny_config().data.path)
    train(tiny_config("train.epochs=2"), dataset)
    with pytest.raises(CheckpointError, match=r"at most train\.epochs = 1 epochs, found one of 2"):
        train(tiny_config("train.epochs=1"), dataset)


def damage(path, how):
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[-10:])
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing"])
@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.json"])
def test_damaged_checkpoint(tiny_config, file, how):
    config = tiny_config("train.epochs=1")
    dataset = EventDataset(config.data.path)
    train(config, dataset)
    for folder in (Path(config.folder) / "checkpoints").iterdir():
        damage(folder / file, how)
    with pytest.raises(CheckpointError, match=rf"{file}: .*expected .*found"):
        open_checkpoint(Path(config.folder) / "checkpoints" / "best").model()
    with pytest.raises(CheckpointError, match=rf"{file}: .*expected .*found"):
        train(config, dataset)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint's manifest"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_between_its_two_renames_is_found(tiny_config):
    config = tiny_config("train.epochs=1")
    train(config, EventDataset(config.data.path))
    best = Path(config.folder) / "checkpoints" / "best"
    right = weights(config.folder)
    best.rename(best.with_name(".best.old"))
    assert all(torch.equal(value, right[key]) for key, value in open_checkpoint(best).tensors("model").items())


def test_a_second_kill_between_the_renames_loses_no_checkpoint(tiny_config, monkeypatch):
    config = tiny_config("train.epochs=1")
    model = train(config, EventDataset(config.data.path))
    best = Path(config.folder) / "checkpoints" / "best"
    best.rename(best.with_name(".best.old"))

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        save_checkpoint(best, model, None, {})
    assert open_checkpoint(best).model() is not None
    save_checkpoint(best, model, None, {})
    assert best.exists() and not best.with_name(".best.old").exists()


def test_nothing_to_train_on(tiny_config, tiny_data, tmp_path, monkeypatch):
    dataset = EventDataset(tiny_data)
    monkeypatch.setitem(dataset._rows, "train", dataset._rows["train"][:0])
    with pytest.raises(ValueError, match="train split is empty"):
        train(tiny_config(), dataset)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config):
    config = tiny_config("train.learning_rate=1e30", "train.table_learning_rate=1e30")
    with pytest.raises(FloatingPointError, match="the loss is"):
        train(config, EventDataset(config.data.path))
