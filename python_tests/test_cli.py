"""The commands as a user types them, in processes of their own."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vista_ext import info

ROOT = Path(__file__).parents[1]


def vista(*arguments, cwd=None, check=True):
    command = [sys.executable, "-m", "vista_ext.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "200"})
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_from_a_log_to_scores(tmp_path):
    rows = [["who", "what", "when", "liked", "kind"]]
    pairs = [(u, t) for u in range(40) for t in range(30)]
    rows += [[f"u{u}", f"i{(u * 7 + t * t) % 23}", 1000 + 10 * t, (u + t) % 2, t % 3] for u, t in pairs]
    with (tmp_path / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    columns = ["--user", "who", "--item", "what", "--timestamp", "when", "--label", "like=liked", "--action", "kind"]
    vista("import", "generic", tmp_path / "log.csv", tmp_path / "data", *columns)
    (tmp_path / "run.yaml").write_text("folder: run\ndata: {path: data}\ntrain: {epochs: 1, log_steps: 1}\n")
    vista("train", "run.yaml", "model.options.num_seeds=4", cwd=tmp_path)
    early = vista("score", "run", "--user", "u3", "--items", "i1", cwd=tmp_path, check=False)
    assert early.returncode == 1 and early.stderr.startswith("vista: ") and "run/store" in early.stderr
    assert "40 summaries written, 40 in run/store (int8)" in vista("summarize", "run", cwd=tmp_path).stdout
    assert vista("refresh", "run", cwd=tmp_path).stdout == "40 users, 0 due, 0 summaries written\n"
    vista("summarize", "run", "--split", "test", cwd=tmp_path)
    evaluated = vista("evaluate", "run", "--pictures", cwd=tmp_path).stdout
    assert "from the store" in evaluated and "fp8_e4m3" in evaluated and "20 events old" in evaluated
    tables = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert any(row["score"] == "vista, from the store (int8)" for row in tables["like on test"])
    pictures = {file.name for file in (tmp_path / "run" / "pictures").iterdir()}
    assert {"latency.png", "attention.png", "summaries_pca.png", "reconstruction_loss.png"} <= pictures
    scored = vista("score", "run", "--user", "u3", "--items", "i1,i2", cwd=tmp_path).stdout.splitlines()
    assert scored[0] == "user,item,like" and [line.split(",")[:2] for line in scored[1:]] == [
        ["u3", "i1"],
        ["u3", "i2"],
    ]


def test_baselines_evaluate_too(tiny_data, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"folder: run\ndata: {{path: {tiny_data}}}\nmodel: {{name: mean}}\ntrain: {{epochs: 1}}\n"
    )
    vista("train", "run.yaml", cwd=tmp_path)
    assert "mean, from histories" in vista("evaluate", "run", cwd=tmp_path).stdout
    done = vista("summarize", "run", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "model.name must be vista for this command, found 'mean'" in done.stderr


@pytest.mark.slow
def test_study(tiny_data, tmp_path):
    (tmp_path / "run.yaml").write_text(f"folder: runs\ndata: {{path: {tiny_data}}}\ntrain: {{epochs: 1}}\n")
    done = vista("study", "run.yaml", "--models", "vista,mean", "--seeds", "0,1", cwd=tmp_path)
    assert "| floor: item mean | 0." in done.stdout and "| vista | 0." in done.stdout and "±" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "absent.yaml: expected a YAML file"),
        (["train", "run.yaml"], "meta.json"),
        (["train", "run.yaml", "--device", "xpu:99"], "--device must be a torch device that can be used here"),
        (["evaluate", ".", "--device", "meta"], "--device must be a torch device that can be used here, found 'meta'"),
        (["summarize", "."], "expected the folder of a run, with a run.yaml"),
        (
            ["evaluate", ".", "--staleness", "x"],
            "--staleness: an age must be a number of events, or of s, m, h or d such as 2h, found 'x'",
        ),
        (["import", "movielens", "nowhere", "data"], "nowhere"),
        (["demo", "--folder", "d", "--epochs", "0"], "train.epochs must be a finite number above 0, found 0"),
        (["demo", "--folder", "d", "--users", "-5"], "--users must be at least 1, found -5"),
        (["demo", "--folder", "d", "--seed", "-1"], "seed must be a finite number at least 0, found -1"),
        (["demo", "--folder", "."], "--folder must be new, empty, or made by an earlier demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    (tmp_path / "run.yaml").write_text("data: {path: nowhere}\n" if arguments[0] == "train" else "")
    if arguments[0] in ("summarize", "evaluate"):
        (tmp_path / "run.yaml").unlink()
    done = vista(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_info_names_what_was_built():
    told = json.loads(vista("info").stdout)
    assert "qla" in told["ops"] and told["built against torch"]


def test_info_names_what_each_extra_lacks(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    expected = {extra: len(packages) for extra, packages in extras.items() if extra != "bench"}
    assert {extra: len(names) for extra, names in info.EXTRAS.items()} == expected
    assert all(importlib.util.find_spec(name) for name in info.EXTRAS["run"])  # no name is misspelt
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("nats", "rich") else there(name))
    lacks = info.collect()["extras that lack packages"]
    assert lacks["nats"] == ["nats"] and "rich" in lacks["run"]


def test_the_package_is_light_to_import():
    program = """
import time, torch, sys
begun = time.perf_counter()
import vista_ext, vista_ext.models
took = time.perf_counter() - begun
assert not torch.cuda.is_initialized()
heavy = {"pyarrow", "lmdb", "rich", "typer", "omegaconf", "matplotlib", "sklearn", "tensorboard", "safetensors"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print(took)
"""
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    assert min(times) < 0.5
