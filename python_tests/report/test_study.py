"""A study never shows the numbers of another configuration."""

from pathlib import Path

import pytest

from vista_ext.config import ConfigError
from vista_ext.report.study import study
from vista_ext.runs import Run
from vista_ext.train.checkpoint import CheckpointError


def cells(table):
    return table.rows[-1][1:]


def test_what_was_measured_before_stands_for_its_own_configuration_only(tiny_config, monkeypatch):
    once = study(tiny_config("train.epochs=1"), ["mean"], [0])
    with pytest.raises(CheckpointError, match="found another data"):
        study(tiny_config("train.epochs=1", "data.max_history=5"), ["mean"], [0])
    more = study(tiny_config("train.epochs=2"), ["mean"], [0])
    assert cells(more) != cells(once)

    def refuse(*_):
        raise AssertionError("it was measured before")

    monkeypatch.setattr("vista_ext.report.study.predict", refuse)
    assert study(tiny_config("train.epochs=2"), ["mean"], [0]).rows == more.rows
    with pytest.raises(CheckpointError, match=r"at most train\.epochs = 1 epochs, found one of 2"):
        study(tiny_config("train.epochs=1"), ["mean"], [0])


def test_numbers_of_summary_rows(tiny_config):
    config = tiny_config("train.epochs=1")
    table = study(config, ["vista", "mean"], [0], seed_counts=[2, 4])
    names = [row[0] for row in table.rows if not row[0].startswith("floor")]
    assert names == ["vista, 2 summary rows", "vista, 4 summary rows", "mean"]
    folder = Path(config.folder)
    assert [Run.open(folder / f"vista-{count}-0").model.config.num_seeds for count in (2, 4)] == [2, 4]
    assert (folder / "auc_over_num_seeds.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="num_seeds must be an integer of at least 1, found 0"):
        study(config, ["vista"], [0], seed_counts=[0])
    with pytest.raises(ConfigError, match=r"seed counts are for vista, .* found mean"):
        study(config, ["mean"], [0], seed_counts=[2])
