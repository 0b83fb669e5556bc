"""A study never shows the numbers of another configuration."""

import pytest

from vista_ext.report.study import study
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
