"""Quality under delivery as records, tables, a page and a picture."""

import json
import math

import pytest
import torch

from vista_ext.config import ConfigError
from vista_ext.report.delivery import (
    ALL,
    Measured,
    buckets,
    change_of,
    delivery_tables,
    records_of,
    spread,
)
from vista_ext.report.pictures import draw_delivery
from vista_ext.report.tables import replace_section
from vista_ext.serve.compare import AGES, PRECISIONS, Delivery

SOME = (*AGES[:3], *AGES[5:6])


def delivery(seed=0, rows=500):
    """Logits that get noisier with the age, and a little with int4."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows,), generator=draw).float()
    direct = 2 * labels - 1 + torch.randn(rows, generator=draw)
    ways = {
        (precision, age): direct
        + (0.1 * SOME.index(age) + 0.01 * (precision == "int4")) * torch.randn(rows, generator=draw)
        for age in SOME
        for precision in PRECISIONS
    }
    lengths = torch.randint(0, 400, (rows,), generator=draw)
    return Delivery(labels, torch.arange(rows) % 50, lengths, direct, ways)


def test_every_row_is_in_one_bucket():
    lengths = torch.tensor([0, 9, 10, 29, 30, 299, 300, 10**9])
    found = buckets(lengths, (10, 30, 300))
    assert {name: rows.sum().item() for name, rows in found.items()} == {
        ALL: 8, "0-9": 2, "10-29": 2, "30-299": 2, "300+": 2,
    }  # fmt: skip
    assert torch.equal(sum(rows.int() for name, rows in found.items() if name != ALL), torch.ones(8, dtype=torch.int32))


def test_buckets_sum_to_the_whole():
    one = delivery()
    measured = Measured(0, 0, records_of(one))
    for age in map(str, SOME):
        parts = [measured.record("int8", age, b) for b in measured.values("events before") if b != ALL]
        whole = measured.record("int8", age)
        assert sum(part["rows"] for part in parts) == whole["rows"] == 500
        mean = sum(part["rows"] * part["mean change"] for part in parts) / 500
        assert mean == pytest.approx(whole["mean change"], rel=1e-5)
        assert max(part["largest change"] for part in parts) == whole["largest change"]
    fresh = measured.record("float32", "fresh")
    assert fresh["mean change"] == 0 and fresh["auc"] == fresh["direct auc"] and fresh["ne"] == fresh["direct ne"]


def test_tables_have_means_and_spreads_of_each_variant():
    runs = [Measured(seed, recent, records_of(delivery(seed + recent))) for recent in (20, 0) for seed in (0, 1)]
    by_age, by_precision, by_length = delivery_tables(runs, "test")
    assert by_age.title == "by age, float32, on test, seeds 0, 1"
    assert [column for column in by_age.columns if column.endswith(": NE")] == [
        "summary alone: NE", "summary + 20 newest events: NE",
    ]  # fmt: skip
    assert [row[0] for row in by_age.rows][:3] == ["from the history", "summary, fresh", "summary, 1 event old"]
    alone = [m.record("float32", "1 h")["ne"] for m in runs if not m.recent]
    row = next(row for row in by_age.rows if row[0] == "summary, 1 h old")
    assert row[2] == spread(alone) == f"{sum(alone) / 2:.4f} ± {abs(alone[0] - alone[1]) / math.sqrt(2):.4f}"
    assert len(by_precision.columns) == 1 + 2 * 4 and len(by_precision.rows) == 2 * 4
    assert [row[0] for row in by_length.rows[::2]] == [ALL, "0-9", "10-29", "30-99", "100-299", "300+"]
    assert by_length.rows[1][2:4] == ["summary + 20 newest events", by_age.rows[0][5]]
    assert change_of(runs[:1], "ne", "float32", "fresh") == "0.0"
    assert all(len(row) == len(table.columns) for table in (by_age, by_precision, by_length) for row in table.rows)
    assert delivery_tables([Measured(0, 0, records_of(delivery(rows=0)))], "test") == []
    other = Measured(2, 0, records_of(delivery(rows=400)))
    with pytest.raises(ConfigError, match="--beside must be runs on the same data"):
        delivery_tables([*runs, other], "test")


def test_a_picture_of_it_is_the_same_twice(tmp_path):
    runs = [Measured(seed, recent, records_of(delivery(seed))) for recent in (0, 5) for seed in (0, 1)]
    files = [draw_delivery(tmp_path / f"{i}.svg", "data", runs).read_bytes() for i in range(2)]
    assert files[0] == files[1] and b"summary + 5 newest events" in files[0] and len(files[0]) < 100_000


def test_a_section_is_put_and_replaced(tmp_path):
    page = tmp_path / "docs" / "page.md"
    replace_section(page, "a", "one")
    replace_section(page, "b", "two")
    page.write_text("# Mine\n\n" + page.read_text() + "\nand mine\n")
    replace_section(page, "a", "three")
    assert page.read_text() == (
        "# Mine\n\n<!-- begin a: generated -->\n\nthree\n\n<!-- end a -->\n\n"
        "<!-- begin b: generated -->\n\ntwo\n\n<!-- end b -->\n\nand mine\n"
    )
    page.write_text("<!-- begin a: generated -->\n")
    with pytest.raises(ValueError, match="expected '<!-- end a -->'"):
        replace_section(page, "a", "four")


def test_the_command_measures_once_and_writes_a_page(tiny_config, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from vista_ext.cli import app
    from vista_ext.data.dataset import EventDataset
    from vista_ext.report import delivery as module
    from vista_ext.train.trainer import train

    folders = []
    for name, recent in (("alone", 0), ("recent", 3)):
        config = tiny_config("train.epochs=1", f"model.options.recent_events={recent}", folder=name)
        train(config, EventDataset(config.data.path))
        folders.append(config.folder)
    page = tmp_path / "docs" / "quality.md"
    command = ["evaluate", folders[0], "--beside", folders[1], "--page", str(page), "--staleness", "0,7,1h"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    text = page.read_text()
    assert "| summary, 7 events old |" in text and "summary + 3 newest events: int4" in text
    assert "(pictures/delivery_synthetic.svg)" in text and (page.parent / "pictures/delivery_synthetic.svg").exists()
    tables = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert len(tables) == 4  # floors and scores, and three of delivery
    records = json.loads((tmp_path / "recent" / "delivery-test.json").read_text())["records"]
    assert {r["age"] for r in records} == {"fresh", "7 events", "1 h"}
    monkeypatch.setattr(module, "deliveries", None)
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert page.read_text() == text
