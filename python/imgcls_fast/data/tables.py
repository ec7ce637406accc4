"""Labels from a table: each record of a CSV, TSV or JSONL file becomes a row of the listing, or a problem."""

from __future__ import annotations

import json
import os
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.bounds import TABLE_PATH_CHARACTERS, TABLE_PROBLEMS
from ..core.errors import DataError, near, shortened
from ..core.manifest import NO_SPLIT
from ..core.places import RUN_NAMES, is_run_folder
from .answers import Answers, LabelColumn
from .columns import ONE_TASK, Columns, choose_columns
from .findings import DataProblems
from .listing import Listed, Listing, Problem
from .records import FAULT, read_table
from .spelling import SPLIT_NAMES, Spellings, alike, as_windows, class_name, is_text, split_of

_NONE = "where no class holds, write 0 in the column of each class (--label-cols), or [] in JSONL; else take the row out"
_EDGES = " \t\r\n\xa0\u200b\u200c\u200d\u2060\ufeff"  # blanks around a path, seen or not


def list_table(path: Path, columns: Columns | None = None, *, labelled: bool = True) -> Listing:
    """Rows of a CSV, TSV or JSONL file; relative paths are relative to its folder.

    Raises:
        DataError: D004 when the file cannot be read as a table at all. Faults of single rows are collected.
    """
    listing = Listing(root=os.path.abspath(path.parent), explicit=True)
    reader = _TableReader(listing, path.name, columns or Columns(), labelled)
    try:
        for line, record in read_table(path):
            if isinstance(record, list):
                reader.start(record)
            else:
                reader.add(line, record)
    except OSError as error:
        raise DataError("D004", f"{path} cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeError as error:
        raise DataError("D004", f"{path} is not a readable table: {error}", where=str(path)) from error
    reader.finish()
    return listing.sorted()


class _TableReader:
    """Turns records into rows of a listing and collects what is wrong with them."""

    def __init__(self, listing: Listing, name: str, columns: Columns, labelled: bool) -> None:
        self.listing, self.name, self.columns, self.labelled = listing, name, columns, labelled
        self.lines: array[int] = array("I")  # of each row
        self.groups: list[str] = []
        self.seen: dict[str, int] = {}  # path -> row
        self.again: list[tuple[int, int, list[int]]] = []  # (line, row, cells): a path with other cells than before
        self.unanswered: list[tuple[int, str]] = []  # (line, path) of rows without a label in any of several tasks
        self.role: dict[str, str] = {}  # path, split, group -> column
        self.labels: list[LabelColumn] = []
        self.in_run: dict[str, bool] = {}  # folder -> whether it is a run's own
        self.bytes_on_disk = False  # a path that is not UTF-8 is there, byte by byte: the table is written as the disk is

    def start(self, names: list[str]) -> None:
        """Find the columns, from the header's names.

        Raises:
            DataProblems: everything that is wrong with the header.
        """
        self.listing.columns = names
        place = os.path.join(self.listing.root, self.name)
        chosen = choose_columns(names, self.columns, place, labelled=self.labelled)
        if chosen.problems:
            raise DataProblems(chosen.problems, place)
        self.role, self.labels = chosen.roles, chosen.labels

    def add(self, line: int, record: dict[str, Any]) -> None:
        """Take a record as a row, or note what is wrong with it."""
        if FAULT in record:
            return self._problem("malformed row", line, record[FAULT])
        cell = {role: _as_text(record.get(name)) for role, name in self.role.items()}
        texts = [record.get(name) for column in self.labels for name in column.names]
        if not all(is_text(_as_text(value)) for value in (*cell.values(), *texts)):  # "\\ud800" in a JSON table
            return self._problem("malformed row", line, "a cell holds half of a character (a lone surrogate)")
        path = self._path(line, cell["path"])
        codes = None if path is None else self._codes(line, path, record, texts)
        if path is None or codes is None:
            return None
        split = self._split(line, path, cell.get("split", "").strip())
        return None if split is None else self._row(line, path, codes, split, cell.get("group", "").strip())

    def _codes(self, line: int, path: str, record: dict[str, Any], texts: list[Any]) -> list[int] | None:
        """The cell of each label column, -1 where it is empty and may be; None: a problem, or no row."""
        for text in texts:
            if isinstance(text, str) and len(text.strip()) > TABLE_PATH_CHARACTERS:
                self._problem("label too long", line, f"a label of {len(text):,} characters: {text[:60]}...")
                return None
        codes = [column.code(record) for column in self.labels]
        if not self.labelled or max(codes) >= 0:
            return codes
        if max(len(codes), len(self.columns.kinds)) > 1:  # of several tasks some are unknown here and there, so now and then all
            self.unanswered.append((line, path))
        else:
            self._problem("empty label", line, f"{path} has no label")
        return None

    def _split(self, line: int, path: str, cell: str) -> int | None:
        if not cell:
            return NO_SPLIT
        code = split_of(cell) if len(cell) < TABLE_PATH_CHARACTERS else None
        if code is None:
            hint = near(cell, tuple(SPLIT_NAMES)) if len(cell) < TABLE_PATH_CHARACTERS else ""
            meant = f", did you mean {hint!r}?" if hint else ", expected train, val or test"
            self._problem("unknown split", line, f"{path} has split {shortened(repr(cell))}{meant}")
        return code

    def _row(self, line: int, path: str, codes: list[int], split: int, group: str) -> None:
        row = self.seen.get(path)
        if row is None:
            self.seen[path] = len(self.listing.paths)
            self.listing.add(path, -1, split)
            self.lines.append(line)
            for column, code in zip(self.labels, codes, strict=True):
                column.codes.append(code)
            self.groups += [group] if "group" in self.role else []
        elif self.listing.splits[row] != split:
            self._contradiction(line, path)
        elif [column.codes[row] for column in self.labels] != codes:
            self.again.append((line, row, codes))  # "a|b" and "b|a" may be the same: known once all rows are there

    def _contradiction(self, line: int, path: str) -> None:
        self._problem("contradicting rows", line, f"{path} is listed again with another label or split")

    def _path(self, line: int, text: str) -> str | None:
        """The path as the manifest keeps it: normal, relative to the table's folder or absolute; None: a problem."""
        if not text.strip() or "\0" in text:
            self._problem("empty path", line, "the row has no path")
            return None
        if len(text) > TABLE_PATH_CHARACTERS:
            self._problem("path too long", line, f"a path of {len(text):,} characters: {text[:60]}...")
            return None
        for candidate in _spelled(text):
            path = os.path.normpath(candidate)
            if not os.path.isabs(path) and path.split("/", 1)[0] == "..":
                self._problem(
                    "path leaves the folder",
                    line,
                    f"{text} climbs out of {self.listing.root}; absolute paths are allowed",
                )
                return None
            full = os.path.join(self.listing.root, path)
            if os.path.isfile(full):
                self.bytes_on_disk |= as_windows(path) != path
                return path if not self._of_run(line, path) else None
        what = "is a folder, not a file" if os.path.isdir(full) else "does not exist"
        self._problem("missing file", line, f"{text} {what}", code="D001")
        return None

    def _of_run(self, line: int, path: str) -> bool:
        """Whether a picture is one that a run has drawn; it is then a problem."""
        folder = os.path.dirname(path)
        found = self.in_run.get(folder)
        if found is None:
            parts = Path(self.listing.root, folder).parts
            found = self.in_run[folder] = any(
                name in RUN_NAMES and is_run_folder(Path(*parts[:k])) for k, name in enumerate(parts) if k
            )
        if found:
            self._problem("picture of a run", line, f"{path} was drawn by a run, and is no image to learn from")
        return found

    def finish(self) -> None:
        """Find out what the label columns mean, once all rows are there."""
        listing = self.listing
        before = len(listing.problems)
        if self.unanswered and (listing.paths or listing.problems):
            listing.notices.append(_left_out(self.unanswered, self.name, self.labels))
        elif self.unanswered:
            self._problem("no labels", self.unanswered[0][0], f"no row has {_any_label(self.labels)}")
        for column in self.labels:
            wanted = self.columns.kinds.get(column.task, self.columns.kind)
            found = column.answers(wanted if self.labelled else "one_of")  # without labels, nothing is made of several
            found.classes = _class_names(listing, self.name, column, found, self.bytes_on_disk)
            usual = len(self.labels) == 1 and column.task == ONE_TASK and found.table.ndim == 1
            if self.labelled:
                self._refuse(column, found)
            codes = np.array(column.codes, np.int64)
            if usual and len(column.names) > 1 and self.labelled:
                said = f"labels: {len(found.classes)} classes, exactly one per image in the columns (one_of)"
                listing.notices.append(f"{said}; --label-kind any_of: any number of them")
            if usual:
                listing.labels, listing.classes = array("i", found.table[codes].tolist()), found.classes
            elif self.labelled:
                task = Listed(column.task, found.kind, found.classes, found.table[codes], found.how, found.complete)
                listing.tasks.append(task)
        if any(task.kind == "any_of" for task in listing.tasks):
            listing.problems = [replace(p, try_=_NONE) if p.kind == "empty label" and not p.try_ else p for p in listing.problems]
        if len(listing.problems) > before:
            listing.problems.sort(key=lambda problem: int(problem.where.rpartition(" ")[2]))
        if "group" in self.role:
            listing.groups = self.groups

    def _refuse(self, column: LabelColumn, found: Answers) -> None:
        """Note the faults of cells in each of their rows, and rows that say something else of the same image."""
        where = f"{column.names[0]} of " if len(self.labels) > 1 else ""
        if found.faults:
            shown = column.shown()
            for row, code in enumerate(column.codes):
                if code in found.faults:
                    kind, what = found.faults[code]
                    said = f" ({shortened(shown[code], 60)})" if shown else ""
                    self._problem(kind, self.lines[row], f"{where}{self.listing.paths[row]}{said} {what}")
        k = self.labels.index(column)
        for line, row, codes in self.again:
            first, second = column.codes[row], codes[k]
            if first != second and not np.array_equal(found.table[first], found.table[second], equal_nan=True):
                self._contradiction(line, where + self.listing.paths[row])

    def _problem(self, kind: str, line: int, message: str, code: str = "D004") -> None:
        where = f"{self.name}, line {line}"
        if len(self.listing.problems) >= TABLE_PROBLEMS:
            raise DataError(
                "D004", f"{self.name} has more than {TABLE_PROBLEMS:,} faulty rows; the last that was read: {message}", where=where
            )
        self.listing.problems.append(Problem(code, kind, message, where=where))


def _any_label(columns: list[LabelColumn]) -> str:
    return f"a label in {'any of ' * (len(columns) > 1)}{', '.join(column.task for column in columns)}"


def _left_out(rows: list[tuple[int, str]], table: str, columns: list[LabelColumn]) -> str:
    """What is noted of rows without a label: how many, and the first."""
    n, (line, path) = len(rows), rows[0]
    said = f"{n:,} row{'s' * (n > 1)} of {table} without {_any_label(columns)} {'were' if n > 1 else 'was'} left out"
    return f"{said}: {'the first is ' * (n > 1)}{path}, line {line}"


def _class_names(listing: Listing, table: str, column: LabelColumn, found: Answers, bytes_on_disk: bool) -> list[str]:
    """The name of each class; where the table is not UTF-8 but the disk is, it came from Windows, and so do the names."""
    named = [name if bytes_on_disk else class_name(as_windows(name)) for name in found.classes]
    spelled = Spellings()
    for name, text in column.spellings() if found.table.ndim == 1 else ():
        spelled.add(name, text)
    for name, text in zip(named, found.classes, strict=True):
        if name != text:
            spelled.rename(text, name)
    changed = [name for name, text in zip(named, found.classes, strict=True) if name != text]
    if changed:
        listing.notices.append(
            f"{table} is not UTF-8: {len(changed):,} class names are read as Windows-1252, the first as {changed[0]!r}; "
            "if that is wrong, save the table as UTF-8"
        )
    listing.notices += spelled.notices() + alike(dict.fromkeys(named))
    return named


def _as_text(value: Any) -> str:
    """A cell as text; what a JSON table nests is written as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _spelled(text: str) -> Iterator[str]:
    """A path as it stands, and where there is no such file as Windows, macOS and people at a spreadsheet write it."""
    yield text
    seen = {text}
    for form in (text, as_windows(text)):
        slashed = form.replace("\\", "/")
        bare = slashed.strip(_EDGES)
        for other in (slashed, bare, unicodedata.normalize("NFC", bare), unicodedata.normalize("NFD", bare)):
            if other not in seen:
                seen.add(other)
                yield other
