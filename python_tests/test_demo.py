"""The demo from end to end at a size that shows nothing, and what it refuses."""

import json

import pytest

from vista_ext.config import ConfigError
from vista_ext.demo import BASELINES, run_demo


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    folder = tmp_path / "demo"
    run_demo(folder, users=60, epochs=1, seed=0)
    told = capsys.readouterr().out
    assert "60 summaries of 384 bytes" in told and "All of it in" in told
    clicks, precision, latency = json.loads((folder / "demo.json").read_text()).values()
    scores = [row["score"] for row in clicks]
    expected = [*(baseline.label for baseline in BASELINES), "VISTA, from histories", "VISTA, from the store (int8)"]
    assert [score for score in scores if score in expected] == expected
    assert [row["summaries"] for row in precision] == ["float32", "int8", "int4", "fp8_e4m3"]
    assert len(latency) == 4
    assert {file.name for file in (folder / "pictures").iterdir()} >= {"latency.png", "attention.png"}
    # What is refused is refused before the earlier demo is cleared away.
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        run_demo(folder, users=60, epochs=0, seed=0)
    assert (folder / "pictures").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 0}, "--users must be at least 1, found 0"),
        ({"epochs": -1}, r"train\.epochs must be a finite number above 0, found -1"),
        ({"seed": 2**64}, "seed must be below"),
    ],
)
def test_refused_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_demo(tmp_path / "demo", **{"users": 60, "epochs": 1, "seed": 0, **options})
    assert not (tmp_path / "demo").exists()
