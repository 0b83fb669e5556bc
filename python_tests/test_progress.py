"""Bars on a terminal, one display however they nest; nothing elsewhere."""

import gzip
import json

import pytest
import torch

from vista_ext.data.dataset import EventDataset
from vista_ext.data.importers import import_amazon
from vista_ext.data.synthetic import make_synthetic
from vista_ext.models import Vista, VistaConfig
from vista_ext.progress import track, working
from vista_ext.serve.compare import all_summaries


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def nested():
    with working("outer"):
        return [item for item in track(range(3), "inner [1/2]", 3, unit="rows")]


def test_nothing_without_a_terminal(no_terminal, capfd):
    assert nested() == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_what_nests_shares_a_display(terminal, capfd):
    assert nested() == [0, 1, 2]
    out, err = capfd.readouterr()
    assert out == "" and "outer" in err and "inner [1/2]" in err and "0/3" in err and "rows/s" in err


def test_a_display_ends_with_an_error_or_an_early_stop(terminal, capfd):
    with pytest.raises(ZeroDivisionError), working("outer"):
        next(track([1], "inner", 1))
        raise ZeroDivisionError
    assert next(track([1, 2], "stopped early", 2)) == 1
    assert nested() == [0, 1, 2]
    assert "stopped early" in capfd.readouterr().err


def test_the_long_jobs_show_one(terminal, capfd, tmp_path):
    make_synthetic(tmp_path / "data", users=20, items=40, events_per_user=60)
    dataset = EventDataset(tmp_path / "data")
    all_summaries(Vista(dataset.schema, VistaConfig()), dataset, torch.zeros(20, dtype=torch.int64))
    with gzip.open(tmp_path / "reviews_x.json.gz", "wt") as file:
        for user, item in (("a", "A"), ("a", "B"), ("b", "C"), ("b", "A")):
            file.write(json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": 5}) + "\n")
    (tmp_path / "meta_x.json").write_text("{'asin': 'A', 'categories': [['c']]}\n")
    import_amazon(tmp_path, tmp_path / "imported")
    shown = capfd.readouterr().err
    expected = ["reading events.parquet", "summarizing", "reading reviews_x.json.gz", "reading meta_x.json"]
    for what in [*expected, "making 20 users", "writing synthetic", "checking amazon", "writing amazon"]:
        assert what in shown
