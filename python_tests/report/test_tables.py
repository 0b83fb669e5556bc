"""Tables as they are printed."""

from vista_ext.report.tables import Table


def test_into_a_file_nothing_is_cut_off(capsys):
    """However narrow the terminal of who started it."""
    columns = ["model", *(f"column {i}" for i in range(40))]
    Table("All of them", columns, [["long " * 20, *(i / 41 for i in range(40))]]).show()
    title, _, head, _, row, *_ = capsys.readouterr().out.splitlines()
    assert title.strip() == "All of them" and "\u2026" not in head + row
    assert all(column in head for column in columns) and all(f"{i / 41:.4f}" in row for i in range(40))
