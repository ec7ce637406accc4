"""Reads the records of a CSV, TSV or JSONL file line by line, within bounds (`core.bounds.TABLE_...`)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..core.bounds import (
    TABLE_BYTES,
    TABLE_COLUMNS,
    TABLE_LINE_CHARACTERS,
    TABLE_ROWS,
)
from ..core.errors import DataError
from ..core.files import parse_json

_PATH_NAMES = (
    "path file filename file_name filepath image image_path img file_path imagepath image_name "
    "imagename image_file img_path img_name paths files filenames images"
)
_LABEL_NAMES = (
    "label class target category class_name classname label_name category_name labels classes targets categories"
)
# names by which a column is found, the likeliest first
COLUMNS: dict[str, tuple[str, ...]] = {
    "path": tuple(_PATH_NAMES.split()),
    "label": tuple(_LABEL_NAMES.split()),
    "split": ("split", "subset", "set", "partition"),
    "group": ("group",),
}
_DELIMITERS = ",;\t|"
_SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n?')  # the first line of a table that Excel is to split at this
_EDGES = " \t\r\n\xa0\u200b\ufeff"  # blanks around the name of a column, seen or not
FAULT = "\0error"  # key of a record that could not be read; no table has a column of this name


def read_table(path: Path) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
    """(0, names of the columns) and then (line, record) for each row; a faulty row is {FAULT: reason}.

    Raises:
        DataError: D004 when the file as a whole is no table, or goes beyond its bounds; with line and column.
        OSError, UnicodeError: it cannot be read.
    """
    size = path.stat().st_size
    if size > TABLE_BYTES:
        raise _refused(path, f"it has {size:,} bytes; at most {TABLE_BYTES:,} are read")
    rows = _json_rows(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(path)
    for count, row in enumerate(rows):
        if count > TABLE_ROWS:
            raise _refused(path, f"it has more than {TABLE_ROWS:,} rows", row[0])
        yield row


def _refused(path: Path, reason: str, line: int = 0, column: int = 0) -> DataError:
    place = (f", line {line}" if line else "") + (f", column {column}" if column else "")
    return DataError("D004", f"{path} is not a readable table: {reason}", where=f"{path}{place}")


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(64)
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    even, odd = head[::2], head[1::2]  # without a mark: the names of columns are ASCII, so every other byte is 0
    if len(odd) > 3 and all(even) and not any(odd):
        return "utf-16-le"
    return "utf-16-be" if len(odd) > 3 and all(odd) and not any(even) else "utf-8-sig"


class _Lines(Iterator[str]):
    """Lines of a text file, numbered from 1, none longer than its bound."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file, self.number, self.ended = path, file, 0, False

    def __next__(self) -> str:
        line = self.file.readline(TABLE_LINE_CHARACTERS + 1)
        self.number += 1
        if not line:
            self.ended = True
            raise StopIteration
        if len(line) > TABLE_LINE_CHARACTERS:
            raise _refused(self.path, f"the line has more than {TABLE_LINE_CHARACTERS:,} characters", self.number)
        if "\0" in line:
            why = "a NUL character (is it UTF-16 without a byte order mark?)"
            raise _refused(self.path, why, self.number, line.index("\0") + 1)
        return line


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
    """The delimiter is the one that the first line names (sep=;), else the one that splits the header into known names."""
    with open(path, encoding=_encoding(path), errors="surrogateescape", newline="") as file:
        lines = _Lines(path, file)
        first = next(lines, "")
        if named := _SEPARATOR.fullmatch(first):
            yield from _delimited(path, lines, named[1])
            return
        file.seek(0)
        yield from _delimited(path, _Lines(path, file), max(_DELIMITERS, key=lambda d: _known(first, d)))


def _delimited(path: Path, lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
    begin = lines.number + 1
    try:
        reader = csv.reader(lines, delimiter=delimiter)
        names = [n.strip(_EDGES) for n in next(reader, [])]
        if not any(names):
            raise DataError("D004", f"{path} is empty", where=str(path))
        _check_columns(path, len(names), lines.number)
        yield 0, names
        begin, width = lines.number + 1, len(names)
        for row in reader:  # a cell is bounded by the module: csv.field_size_limit() is TABLE_CELL_CHARACTERS
            if lines.ended:  # a whole row never needs the line after it
                raise _refused(path, "a quote is opened and never closed", begin)
            if len(row) > width and not "".join(row[width:]).strip():
                del row[width:]  # a comma at the end of each row
            if len(row) == width:
                if "".join(row).strip():  # spreadsheets end in rows of empty cells
                    yield lines.number, dict(zip(names, row, strict=True))
            elif "".join(row).strip():
                yield lines.number, {FAULT: f"{len(row)} fields, expected {width}"}
            begin = lines.number + 1
    except csv.Error as error:
        hint = " (a quote that is never closed?)" if "field larger" in str(error) else ""
        raise _refused(path, f"{error}{hint}", begin) from error


def _check_columns(path: Path, count: int, line: int) -> None:
    if count > TABLE_COLUMNS:
        raise _refused(path, f"it has {count:,} columns; at most {TABLE_COLUMNS:,} are read", line)


def _known(header: str, delimiter: str) -> tuple[int, int]:
    """How many of the header's names are known, and how many there are."""
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:  # with this delimiter it is one cell that is too long
        return 0, 0
    every = {n for known in COLUMNS.values() for n in known}
    return sum(n.strip().lower() in every for n in names), len(names)


def _json_rows(path: Path) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
    """The names are the keys of the first object; numbers become text."""
    with open(path, encoding=_encoding(path), errors="surrogateescape") as file:
        yield from _objects(path, _Lines(path, file))


def _objects(path: Path, lines: _Lines) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
    started = False
    for text in lines:
        line = lines.number
        if not text.strip():
            continue
        record = _json_record(text)
        if FAULT not in record:
            _check_columns(path, len(record), line)
        if not started and FAULT not in record:
            started = True
            yield 0, list(record)
        if not started:
            raise DataError("D004", f"{path.name}, line {line}: {record[FAULT]}", where=str(path))
        yield line, record
    if not started:
        raise DataError("D004", f"{path} is empty", where=str(path))


def _json_record(text: str) -> dict[str, Any]:
    """An object of JSON: numbers become text, lists and objects stay what they are (several labels, or probabilities)."""
    try:
        value = parse_json(text)
    except ValueError as error:
        return {FAULT: f"not JSON: {error}"}
    if not isinstance(value, dict):
        return {FAULT: f"expected an object with the keys path and label, got {type(value).__name__}"}
    nested = [k for k, v in value.items() if isinstance(v, list | dict) and k.lower() in COLUMNS["path"]]
    if nested:
        return {FAULT: f"{nested[0]!r} must be text or a number, got {type(value[nested[0]]).__name__}"}
    return {k: v if isinstance(v, str | list | dict) else "" if v is None else json.dumps(v) for k, v in value.items()}
