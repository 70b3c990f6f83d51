"""Recorded files as columns: CSV and Parquet in, Arrow tables with numbered rows out.

Knows file formats, spellings of time, and how to count what cannot be used. Does not know any
data set, nor what an event is.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from .errors import UserError

# Epoch numbers below are seconds (up to the year 5138), above milliseconds (from March 1973).
_SECONDS_BELOW: Final = 1e11
_MILLISECONDS_BELOW: Final = 1e14
_NO_TIME: Final = "is neither epoch seconds or milliseconds nor ISO 8601"
_NO_OFFSET: Final = "has no UTC offset: give it with --utc-offset, as in +00:00"
_SHOWN_CHARACTERS: Final = 60


@dataclass
class Skip:
    """Rows left out for one reason."""

    rows: int = 0
    example: str = ""
    """The first such row, in words, where it says more than the reason."""

    def add(self, rows: int, example: str = "") -> None:
        """Count rows; the first example stays."""
        self.rows += rows
        self.example = self.example or example


LeftOut = dict[str, Skip]


def read(
    path: Path, left_out: LeftOut, *, as_csv: bool | None = None, delimiter: str = ","
) -> pa.Table:
    """The file as a table with a `row` column, 1 for the first row after a header.

    as_csv: the format; by default the suffix tells. CSV columns are text, so that `007` stays
    `007`, and lines with too few or too many columns are counted in left_out.
    Raises UserError: no such file, or not of the format.
    """
    as_csv = path.suffix != ".parquet" if as_csv is None else as_csv
    try:
        if as_csv:
            return _read_csv(path, left_out, delimiter)
        table = pa.parquet.read_table(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        form = "CSV in UTF-8" if as_csv else "Parquet"
        raise UserError(f"cannot read {path} as {form}: {one_line(error)}") from error
    return _numbered(table, np.arange(1, table.num_rows + 1))


def _read_csv(path: Path, left_out: LeftOut, delimiter: str) -> pa.Table:
    quoted = delimiter != "\t"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines, delimiter=delimiter), [])
    if len(set(header)) < len(header):
        raise UserError(f"{path.name} has two columns of one name: rename one of them")
    malformed: list[int] = []

    def note(line: Any) -> str:
        row = line.number - 1  # its count begins with the header
        malformed.append(row)
        example = f"row {row:,} has {line.actual_columns} of {line.expected_columns} columns"
        left_out.setdefault("malformed line", Skip()).add(1, example)
        return "skip"

    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(use_threads=False),  # threads do not number lines
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quoted else False,
            newlines_in_values=quoted,
            invalid_row_handler=note,
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.string()),
            strings_can_be_null=True,
            null_values=[""],  # and not NA, which is also a country and a name
        ),
    )
    rows = np.arange(1, table.num_rows + len(malformed) + 1)
    return _numbered(table, np.setdiff1d(rows, malformed))


def _numbered(table: pa.Table, rows: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Table:
    if "row" in table.column_names:  # the file's own column of that name
        table = table.rename_columns({"row": "row (column)"})
    return table.append_column("row", pa.array(rows, pa.int64()))


def column(table: pa.Table, path: Path, *names: str) -> pa.ChunkedArray:
    """The column under the first of its names that is there; UserError if none is."""
    for name in names:
        if name in table.column_names:
            return table[name]
    raise UserError(
        f"{path.name} has no column {names[0]}: is it the right file? It has {columns_of(table)}"
    )


def columns_of(table: pa.Table) -> str:
    """The file's own columns, to be read by a person."""
    return ", ".join(name for name in table.column_names if name != "row")


def keep(table: pa.Table, mask: pa.ChunkedArray, reason: str, left_out: LeftOut) -> pa.Table:
    """The rows where the mask is true; the others are counted under the reason."""
    kept = table.filter(mask)
    left_out.setdefault(reason, Skip()).add(table.num_rows - kept.num_rows)
    return kept


def in_time(table: pa.Table) -> pa.Table:
    """Sorted by `ts`, then by the place in the file."""
    return table.sort_by([("ts", "ascending"), ("row", "ascending")])


def text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids and words as text: 13085.0 is `13085`, and NaN is nothing."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.equal(column, pc.floor(column))).as_py()
        column = pc.cast(column, pa.int64()) if whole else column
    return pc.cast(column, pa.string())


def trimmed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Words without white space at the ends; nothing where nothing is left."""
    words = pc.utf8_trim_whitespace(text(column))
    return pc.if_else(pc.equal(words, ""), None, words)


def positive(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers above zero; nothing where there is no such number."""
    if not pa.types.is_floating(column.type):
        is_number = pc.match_substring_regex(text(column), r"^\d+(\.\d+)?$")
        column = pc.cast(pc.if_else(is_number, text(column), None), pa.float64())
    return pc.if_else(pc.greater(column, 0), column, None)


def with_ts(
    table: pa.Table,
    path: Path,
    name: str,
    offset_ms: int | None,
    left_out: LeftOut,
    called: str | None = None,
) -> pa.Table:
    """Add `ts`, the column's times in epoch ms; rows without a readable time are left out.

    offset_ms: from UTC, for times that carry none. called: the column's name in messages.
    """
    called = called or name
    times = column(table, path, name)
    if pa.types.is_date(times.type):
        times = pc.cast(times, pa.timestamp("ms"))
    if pa.types.is_timestamp(times.type):
        zone = times.type.tz
        if zone is None and offset_ms is None:
            raise UserError(f"the time in column {called!r} {_NO_OFFSET}")
        ms = pc.cast(pc.cast(times, pa.timestamp("ms", zone), safe=False), pa.int64())
        ts = ms if zone else pc.subtract(ms, offset_ms)
    else:
        ts = pa.chunked_array([_parsed(times, table["row"], called, offset_ms, left_out)])
    empty = pc.sum(pc.is_null(times)).as_py() or 0
    if empty:
        left_out.setdefault(f"column {called!r}: no time", Skip()).add(empty)
    table = table.drop_columns(["ts"]) if "ts" in table.column_names else table
    return table.append_column("ts", ts).filter(pc.is_valid(ts))


def _parsed(
    times: pa.ChunkedArray,
    rows: pa.ChunkedArray,
    called: str,
    offset_ms: int | None,
    left_out: LeftOut,
) -> pa.Array:
    parsed: list[int | None] = []
    for row, value in zip(rows.to_pylist(), times.to_pylist(), strict=True):
        try:
            parsed.append(None if value is None else parse_time_ms(value, offset_ms))
        except ValueError as error:
            parsed.append(None)
            reason = f"column {called!r}: the time {error}"
            left_out.setdefault(reason, Skip()).add(1, f"row {row:,}: {shown(value)}")
    return pa.array(parsed, pa.int64())


def parse_time_ms(value: object, offset_ms: int | None = None) -> int:
    """Epoch seconds, epoch milliseconds, ISO 8601 or a datetime -> epoch milliseconds.

    offset_ms: the offset from UTC of a time that carries none. Raises ValueError, saying why.
    """
    if isinstance(value, str):
        value = _from_text(value.strip())
    if isinstance(value, datetime):
        if value.tzinfo is not None:
            return round(value.timestamp() * 1000)
        if offset_ms is None:
            raise ValueError(_NO_OFFSET)
        return round(value.replace(tzinfo=UTC).timestamp() * 1000) - offset_ms
    if isinstance(value, int | float) and math.isfinite(value):
        if abs(value) < _SECONDS_BELOW:
            return round(value * 1000)
        if abs(value) < _MILLISECONDS_BELOW:
            return round(value)
    raise ValueError(_NO_TIME)


def _from_text(text: str) -> float | datetime:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text.replace(" UTC", "+00:00"))  # as REES46 writes it
    except ValueError:
        raise ValueError(_NO_TIME) from None


def parse_offset_ms(text: str) -> int:
    """`+08:00` -> 28,800,000. Raises UserError."""
    match = re.fullmatch(r"([+-])(\d\d):?(\d\d)", "+00:00" if text in ("Z", "UTC") else text)
    if match is None:
        raise UserError(f"cannot read the UTC offset {text!r}: write it as +08:00")
    sign, hours, minutes = match.groups()
    return (-1 if sign == "-" else 1) * (int(hours) * 60 + int(minutes)) * 60_000


def shown(value: object) -> str:
    """A value as a message quotes it: cut where it is long."""
    whole = repr(value)
    return whole if len(whole) <= _SHOWN_CHARACTERS else f"{whole[:_SHOWN_CHARACTERS]}…"


def one_line(error: Exception) -> str:
    """Another library's message without its line breaks."""
    return " ".join(str(error).split())
