"""Tables that ask for more than they are worth: refused in bounded time and memory, with the line; odd ones are read."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.errors import DataError
from imgcls_fast.data.tables import Columns, list_table

MANY = 120_000
HOSTILE = {
    "a cell of 10 MB": ("t.csv", "path,label\na.jpg,cat\nb.jpg," + "x" * 10_000_000 + "\n", "line 3", "characters"),
    "a quoted cell of 10 MB": ("t.csv", "path,label\na.jpg,cat\nb.jpg,\"" + "x\n" * 5_000_000 + "\"\n", "line 3", "never"),
    "100 MB without a newline": ("t.csv", "path,label," * 9_000_000, "line 1", "characters"),
    "100,000 columns": ("t.csv", "path,label," + "x," * 100_000 + "\n", "line 1", "100,003 columns"),
    "100,000 keys": ("t.jsonl", "{" + ",".join(f'"k{i}":1' for i in range(60_000)) + "}\n", "line 1", "60,000 columns"),
    "a NUL": ("t.csv", "path,label\na.jpg,c\0at\n", "line 2, column 8", "NUL"),
    "NULs only": ("t.csv", "\0" * 1_000_000, "line 1, column 1", "NUL"),
    "a quote that is never closed": ("t.csv", 'path,label\na.jpg,cat\n"b.jpg,cat\nc.jpg,cat\n', "line 3", "never closed"),
    "a label column twice": ("t.csv", "path,label,label\na.jpg,cat,dog\n", "line 1", "2 columns that are called 'label'"),
    "a million faulty rows": ("t.csv", "path,label\n" + "x\n" * 1_000_000, "line 10002", "10,000 faulty rows"),
    "a million faulty objects": ("t.jsonl", '{"path":"a","label":"b"}\n' + "[\n" * 1_000_000, "line", "10,000 faulty rows"),
    "100,000 brackets": ("t.jsonl", "[" * MANY + "\n", "line 1", "levels deep"),
    "100,000 objects inside each other": ("t.jsonl", '{"path":' * MANY + "\n", "line 1", "levels deep"),
    "a line of 100 MB": ("t.jsonl", '{"path": "' + "x" * 100_000_000, "line 1", "characters"),
}  # fmt: skip


def read(path: Path) -> str:
    listing = list_table(path)
    return f"{listing.problems}"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_refused_within_bounds(name: str, tmp_path: Path, in_bounds: Callable[..., Any]) -> None:
    file, text, where, words = HOSTILE[name]
    (tmp_path / file).write_text(text, "utf-8", newline="")
    (tmp_path / "a.jpg").write_bytes(b"")
    found = in_bounds(read, tmp_path / file, memory_mib=128)
    assert found.code == "D004", found
    assert file in found.text and where in found.text and words in found.text, found.text
    assert len(found.text) < 1200


ROWS = {
    "deep nesting": ("t.jsonl", '{"path":"a.jpg","label":"cat"}\n' + '{"x":' + "[" * MANY + "\n", "line 2", "levels deep"),
    "a key twice": ("t.jsonl", '{"path":"a.jpg","label":"cat"}\n{"path":"b.jpg","label":"a","label":"b"}\n', "line 2", "twice"),
    "a path of 100,000 letters": ("t.csv", "path,label\na.jpg,cat\n" + "x" * 100_000 + ",cat\n", "line 3", "100,000 characters"),
    "a label of 100,000 letters": ("t.csv", "path,label\na.jpg," + "x" * 100_000 + "\n", "line 2", "100,000 characters"),
    "a split of 100,000 letters": ("t.csv", "path,label,split\na.jpg,cat," + "x" * 100_000 + "\n", "line 2", "xxx..."),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_row_is_a_problem_with_its_line(name: str, tmp_path: Path, in_bounds: Callable[..., Any]) -> None:
    file, text, where, words = ROWS[name]
    (tmp_path / file).write_text(text, "utf-8", newline="")
    (tmp_path / "a.jpg").write_bytes(b"")
    found = in_bounds(read, tmp_path / file, memory_mib=128)
    assert found.code == "ok", found
    assert where in found.text and words in found.text, found.text
    assert len(found.text) < 1200


@pytest.mark.parametrize("label", ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "01", "1e5", "NaN", "nul"])
def test_formulas_and_numbers_are_labels_as_they_stand(label: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], ["a.jpg", label]])
    assert list_table(tmp_path / "t.csv").classes == [label]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("file", ["t.csv", "t.jsonl"])
def test_byte_order_marks_are_no_part_of_a_name(encoding: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    text = "path,label\na.jpg,é\n" if file == "t.csv" else '{"path": "a.jpg", "label": "é"}\n'
    (tmp_path / file).write_bytes(("\ufeff" * (encoding == "utf-8") + text).encode(encoding))
    listing = list_table(tmp_path / file)
    assert (listing.classes, listing.paths, listing.problems) == (["é"], ["a.jpg"], [])


def test_a_column_that_nobody_asks_for_may_stand_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "t.csv").write_text("path,label,,note,note\na.jpg,cat,,x,y\n")
    assert list_table(tmp_path / "t.csv").classes == ["cat"]
    with pytest.raises(DataError, match="2 columns"):
        list_table(tmp_path / "t.csv", Columns(label="note"))


def test_a_quoted_cell_of_two_lines_is_read_and_later_rows_keep_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "t.csv").write_text('path,label,note\na.jpg,cat,"two\nlines"\ngone.jpg,cat,x')
    listing = list_table(tmp_path / "t.csv")
    assert listing.paths == ["a.jpg"]
    assert [problem.where for problem in listing.problems] == ["t.csv, line 4"]
