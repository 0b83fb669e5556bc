"""Columns of files as numpy arrays; whatever is wrong with a file is one error that names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vista_ext._extras import require
from vista_ext.progress import working

Array = np.ndarray[Any, np.dtype[Any]]
Table = dict[str, Array]
Kind = Literal["int", "float", "string", "id"]
"""What a column holds: int64, float32, str; "id" is a string that a file may also store as an integer."""


class DataError(ValueError):
    """A file or a column is not what it should be; the message names it, what was expected and what was found."""

    def __init__(self, file: Path | str, column: str | None, expected: str, found: str) -> None:
        where = str(file) if column is None else f"{file}: {column}"
        super().__init__(f"{where}: expected {expected}, found {found}")


def read_parquet(path: Path, columns: Mapping[str, Kind]) -> Table:
    """Read columns of a Parquet file.

    Args:
        columns: the columns to read and what each holds. Integers of any width are read as int64.

    Raises:
        DataError: the file is missing or damaged; a column is missing, has another type or missing values.
    """
    parquet = require("pyarrow.parquet", extra="run")

    def read() -> Table:
        # Not `read_table`: it takes folders named like "day=1" in the path for columns.
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_names(path, file.schema_arrow.names, columns)
            return _to_numpy(path, file.read(columns=list(columns)), columns)

    return _read(path, "a Parquet file", read)


def read_lists(path: Path, column: str) -> tuple[Array, Array]:
    """Read a column of lists of integers: the row of each element and the element, both int64.

    Raises:
        DataError: as for `read_parquet`.
    """
    pa, parquet = require("pyarrow", extra="run"), require("pyarrow.parquet", extra="run")

    def read() -> Table:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_names(path, file.schema_arrow.names, [column])
            lists = file.read(columns=[column]).column(column).combine_chunks()
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
            raise DataError(path, column, "lists of integers", f"type {lists.type}")
        length = lists.value_lengths()
        if length.null_count:
            raise DataError(path, column, "no missing lists", f"{length.null_count} of {len(lists)} missing")
        values = _to_numpy(path, pa.table({column: lists.flatten()}), {column: "int"})
        return {"row": np.repeat(np.arange(len(lists)), length.to_numpy()), **values}

    table = _read(path, "a Parquet file", read)
    return table["row"], table[column]


def read_csv(
    path: Path,
    columns: Mapping[str, Kind],
    *,
    names: list[str] | None = None,
    separator: str = ",",
    quoted: bool = True,
) -> Table:
    """Read columns of a CSV file, plain or gzipped.

    Args:
        columns: the columns to read and what each holds. Names are compared without regard to case.
        names: the names of the columns of a file without a header.
        separator: of fields, one or more characters.
        quoted: fields may stand in double quotes; without quotes the text is taken as Latin-1.

    Raises:
        DataError: the file is missing or damaged; a column is missing, or a value is missing or not of its type.
    """
    pa, csv = require("pyarrow", extra="run"), require("pyarrow.csv", extra="run")
    found: list[str] = []

    def read() -> Table:
        parse = csv.ParseOptions(delimiter=separator if len(separator) == 1 else "\t", quote_char=quoted and '"')
        encoding = "utf8" if quoted else "latin1"

        def source() -> Any:
            if len(separator) == 1:
                return str(path)
            # The parser separates by one character only; a file with "::" is small enough to rewrite in memory.
            with pa.input_stream(str(path)) as stream:
                text = pa.BufferOutputStream()  # Arrow's memory: its threads may free it after the interpreter ended
                text.write(stream.read().replace(separator.encode(), b"\t"))
                return pa.BufferReader(text.getvalue())

        with csv.open_csv(source(), csv.ReadOptions(column_names=names, encoding=encoding), parse) as head:
            found.extend(head.schema.names)
        wanted: dict[str, Kind] = {}
        for name, kind in columns.items():
            spelt = [other for other in found if other == name]
            spelt = spelt or [other for other in found if other.lower() == name.lower()]
            if len(spelt) != 1:
                raise DataError(path, name, "one column of that name", f"{len(spelt)} among {sorted(found)}")
            wanted[spelt[0]] = kind
        arrow = {"int": pa.int64(), "float": pa.float32(), "string": pa.string(), "id": pa.string()}
        types = {name: arrow[kind] for name, kind in wanted.items()}
        convert = csv.ConvertOptions(include_columns=list(wanted), column_types=types)
        table = csv.read_csv(source(), csv.ReadOptions(column_names=names, encoding=encoding), parse, convert)
        return _to_numpy(path, table.rename_columns(list(columns)), columns)

    return _read(path, "a CSV file", read, found)


def read_json_lines(path: Path, columns: Mapping[str, Kind]) -> Table:
    """Read fields of a file with one JSON object per line, plain or gzipped; other fields are left out.

    Raises:
        DataError: the file is missing or damaged; a field is missing in a line, or not of its type.
    """
    pa, json = require("pyarrow", extra="run"), require("pyarrow.json", extra="run")

    def read() -> Table:
        arrow = {"int": pa.int64(), "float": pa.float64()}
        schema = pa.schema([(name, arrow.get(kind, pa.string())) for name, kind in columns.items()])
        parse = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        # A line must fit into a block.
        table = json.read_json(str(path), json.ReadOptions(block_size=2**24), parse)
        return _to_numpy(path, table, columns)

    return _read(path, "a file of JSON objects, one per line", read)


def as_table(path: Path, values: Mapping[str, Any], columns: Mapping[str, Kind]) -> Table:
    """The columns of `values` with the dtypes of a file, all of one length.

    Raises:
        DataError: a column is missing, not of its kind, not one-dimensional, or of another length than the first.
    """
    _check_names(path, list(values), columns)
    table: Table = {}
    for name, kind in columns.items():
        column = np.asarray(values[name])
        allowed, dtype = {"int": ("iub", np.int64), "float": ("fiub", np.float32)}.get(kind, ("UTO", object))
        if column.size and column.dtype.kind not in allowed:  # an empty list is of no kind
            raise DataError(path, name, f"a column of kind {kind}", f"dtype {column.dtype}")
        if column.ndim != 1 or column.size != next(iter(table.values()), column).size:
            raise DataError(path, name, "one value per row", f"shape {column.shape}")
        if kind in ("string", "id") and not all(isinstance(value, str) for value in column):
            raise DataError(path, name, "strings", "values of another type")
        table[name] = column.astype(dtype)
    return table


def check_range(path: Path, column: str, values: Array, low: float, high: float) -> None:
    """Raise DataError unless every value lies in `[low, high]` (a NaN does not)."""
    wrong = ~((values >= low) & (values <= high))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(path, column, f"values from {low} to {high}", f"{values[row]} in row {row}")


def _read(path: Path, expected: str, read: Callable[[], Table], names: list[str] | None = None) -> Table:
    pa = require("pyarrow", extra="run")
    if not path.is_file():
        raise DataError(path, None, expected, "no such file")
    try:
        with working(f"reading {path.name}"):
            return read()
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        text = str(error).splitlines()[0]
        # The CSV parser knows columns by number only.
        match = re.search(r"CSV column #(\d+)", text)
        column = names[int(match[1])] if match and names and int(match[1]) < len(names) else None
        raise DataError(path, column, expected if column is None else "values of its type", text) from error


def _check_names(path: Path, found: list[str], wanted: Mapping[str, Kind] | list[str]) -> None:
    for name in wanted:
        if found.count(name) != 1:
            raise DataError(path, name, "one column of that name", f"{found.count(name)} among {sorted(found)}")


def _to_numpy(path: Path, table: Any, columns: Mapping[str, Kind]) -> Table:
    pa = require("pyarrow", extra="run")
    is_type = pa.types

    def fits(kind: Kind, arrow: Any) -> bool:
        integer = is_type.is_integer(arrow) or is_type.is_boolean(arrow)
        text = is_type.is_string(arrow) or is_type.is_large_string(arrow)
        return {
            "int": integer,
            "float": integer or is_type.is_floating(arrow),
            "string": text,
            "id": text or is_type.is_integer(arrow),
        }[kind]

    result: Table = {}
    for name, kind in columns.items():
        column = table.column(name)
        arrow = column.type.value_type if is_type.is_dictionary(column.type) else column.type
        if not fits(kind, arrow):
            raise DataError(path, name, f"a column of kind {kind}", f"type {column.type}")
        if column.null_count:
            raise DataError(path, name, "no missing values", f"{column.null_count} of {len(column)} missing")
        target = {"int": pa.int64(), "float": pa.float32()}.get(kind, pa.string())
        try:
            # A copy: what arrow hands out without one may not be written to, which torch warns of.
            result[name] = np.array(column.cast(arrow).cast(target).to_numpy())
        except (pa.ArrowException, ValueError) as error:
            raise DataError(path, name, f"values of kind {kind}", str(error)) from error
    return result
