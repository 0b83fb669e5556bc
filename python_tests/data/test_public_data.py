"""Tests that need public data may not pass for done where it is missing."""

import pytest


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_under_ci_missing_data_is_a_failure(public_data, monkeypatch, tmp_path, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.delenv("VISTA_DATA", raising=False)
    with pytest.raises(outcome, match="VISTA_DATA is not set"):
        public_data("ml_latest_small")
    monkeypatch.setenv("VISTA_DATA", str(tmp_path))
    with pytest.raises(outcome, match="holds no folder ml_latest_small"):
        public_data("ml_latest_small")
