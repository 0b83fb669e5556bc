"""Checkpoints and configurations broken on purpose: refused with their own error, or read as what they say.

Short here; `VISTA_FUZZ_SECONDS=600` goes on for ten minutes with each.
"""

import json
import os
import random
import shutil
import time

import pytest

from python_tests.delivery.test_message import spoil
from vista_ext.config import ConfigError, RunConfig, load_config, save_config
from vista_ext.data.dataset import EventDataset
from vista_ext.models import VistaConfig, build_model
from vista_ext.train.checkpoint import CheckpointError, open_checkpoint, save_checkpoint

SECONDS = float(os.environ.get("VISTA_FUZZ_SECONDS", "1"))
VALUES = [-1, 0, 1, 2, 33, 2**31, 2**63, 10**30, 0.5, float("inf"), True, None, "", "x", "vista", [], [1], {}, {"a": 1}]


def rounds():
    chance, end = random.Random(int(os.environ.get("VISTA_FUZZ_SEED", "0"))), time.monotonic() + SECONDS
    while time.monotonic() < end:
        yield chance


def places(value, path=()):
    """The paths of all values in nested dicts and lists."""
    found = [path] if path else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        found += places(child, (*path, key))
    return found


def changed(chance, text):
    """JSON with one value replaced or removed, or with broken bytes."""
    if chance.random() < 0.3:
        return spoil(chance, text)
    values = json.loads(text)
    *way, last = chance.choice(places(values))
    parent = values
    for key in way:
        parent = parent[key]
    if chance.random() < 0.2:
        del parent[last]
    else:
        parent[last] = chance.choice(VALUES)
    return json.dumps(values).encode()


@pytest.fixture(scope="module")
def checkpoint(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    dataset = EventDataset(tiny_data)
    model = build_model("vista", dataset.schema, VistaConfig(dim=32, heads=2), dataset.item_features)
    save_checkpoint(folder / "sound", model, None, {"step": 3})
    return folder / "sound"


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors"])
def test_checkpoints(checkpoint, tmp_path, name):
    shutil.copytree(checkpoint, tmp_path / "broken")
    whole, refused, seen = (checkpoint / name).read_bytes(), 0, 0
    expected = open_checkpoint(checkpoint).tensors("model")
    for chance in rounds():
        data = spoil(chance, whole) if name == "model.safetensors" else changed(chance, whole)
        (tmp_path / "broken" / name).write_bytes(data)
        seen += 1
        try:
            found = open_checkpoint(tmp_path / "broken").model().state_dict()
        except CheckpointError:
            refused += 1
            continue
        # What has no weights may change and fit still, such as the dropout; the weights are those that were saved.
        assert name == "checkpoint.json" or data == whole
        assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in found)
    assert seen > 10 and refused > seen // 2


@pytest.mark.timeout(SECONDS + 600)
def test_configurations(tmp_path):
    save_config(RunConfig(folder=str(tmp_path)))
    file = tmp_path / "run.yaml"
    whole, refused, seen = file.read_bytes(), 0, 0
    words = [
        "-1",
        "null",
        "[]",
        "{}",
        "1e999",
        "9" * 30,
        "${oc.env:NOBODY}",
        "!!python/object/apply:os.getcwd []",
        "&a [*a]",
        "~",
        "'",
    ]
    for chance in rounds():
        parts = whole.decode().split(" ")
        parts[chance.randrange(len(parts))] = chance.choice([*words, chance.choice(parts)])
        file.write_bytes(spoil(chance, whole) if chance.random() < 0.5 else " ".join(parts).encode())
        seen += 1
        try:
            load_config(file)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
    assert seen > 10 and refused > seen // 2
