"""Labels from a table: each record of a CSV, TSV or JSONL file becomes a row of the listing, or a problem."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.bounds import TABLE_PATH_CHARACTERS, TABLE_PROBLEMS
from ..core.errors import DataError, near, shortened
from ..core.manifest import NO_SPLIT
from ..core.places import RUN_NAMES, is_run_folder
from .listing import Listing, Problem
from .records import COLUMNS, FAULT, read_table
from .spelling import SPLIT_NAMES, alike, as_windows, class_name, is_text, split_of

_EDGES = " \t\r\n\xa0\u200b\u200c\u200d\u2060\ufeff"  # blanks around a path, seen or not


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns: None finds them, "" says that there is none."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


def list_table(path: Path, columns: Columns = Columns(), *, labelled: bool = True) -> Listing:
    """Rows of a CSV, TSV or JSONL file; relative paths are relative to its folder.

    Raises:
        DataError: D004 when the file cannot be read as a table at all. Faults of single rows are collected.
    """
    listing = Listing(root=os.path.abspath(path.parent), explicit=True)
    reader = _TableReader(listing, path.name, labelled)
    try:
        for line, record in read_table(path):
            if isinstance(record, list):
                reader.start(record, columns)
            else:
                reader.add(line, record)
    except OSError as error:
        raise DataError("D004", f"{path} cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeError as error:
        raise DataError("D004", f"{path} is not a readable table: {error}", where=str(path)) from error
    listing.classes = reader.class_names()
    if reader.has_groups:
        listing.groups = reader.groups
    return listing.sorted()


class _TableReader:
    """Turns records into rows of a listing and collects what is wrong with them."""

    def __init__(self, listing: Listing, name: str, labelled: bool) -> None:
        self.listing, self.name, self.labelled = listing, name, labelled
        self.classes: dict[str, int] = {}
        self.groups: list[str] = []
        self.seen: dict[str, int] = {}  # path -> row
        self.column: dict[str, str] = {}
        self.labels: dict[str, int] = {}  # cell -> class, so that a name is looked at once and not in each row
        self.in_run: dict[str, bool] = {}  # folder -> whether it is a run's own
        self.bytes_on_disk = (
            False  # a path that is not UTF-8 is there, byte by byte: the table is written as the disk is
        )

    @property
    def has_groups(self) -> bool:
        return "group" in self.column

    def start(self, names: list[str], columns: Columns) -> None:
        """Find the columns, from the header's names."""
        self.listing.columns = names
        for role in ("path", "label", "split", "group"):
            wanted = getattr(columns, role)
            if wanted:
                wanted = next((name for name in names if as_windows(name) == wanted), wanted)
                if wanted not in names:
                    hint = near(wanted, names)
                    raise self._no_column(role, wanted, names, f"--{role}-col {hint}" if hint else "")
                self.column[role] = wanted
            elif wanted is None:
                known = [n for n in names if n.strip().lower() in COLUMNS[role]]
                if known:
                    self.column[role] = min(known, key=lambda n: COLUMNS[role].index(n.strip().lower()))
        needed = ("path", "label") if self.labelled else ("path",)
        for role in needed:
            if role not in self.column:
                raise self._no_column(role, "", names, f"--{role}-col NAME")
        for role, name in self.column.items():
            if names.count(name) > 1:
                where = os.path.join(self.listing.root, self.name)
                raise DataError(
                    "D004",
                    f"{self.name} has {names.count(name)} columns that are called {name!r}",
                    where=f"{where}, line 1",
                    try_=f"rename all but one of them, or name another with --{role}-col",
                )

    def _no_column(self, role: str, wanted: str, names: list[str], hint: str) -> DataError:
        what = f"no column {wanted!r}" if wanted else f"no column for the {role} ({', '.join(COLUMNS[role])})"
        where = os.path.join(self.listing.root, self.name)
        return DataError("D004", f"{self.name} has {what}; its columns are: {shortened(', '.join(names), 400)}", where=where, try_=hint)

    def add(self, line: int, record: dict[str, str]) -> None:
        if FAULT in record:
            return self._problem("D004", "malformed row", line, record[FAULT])
        cell = {role: record.get(name) or "" for role, name in self.column.items()}
        if not all(map(is_text, cell.values())):  # "\\ud800" in a JSON table
            return self._problem("D004", "malformed row", line, "a cell holds half of a character (a lone surrogate)")
        path = self._path(line, cell["path"])
        if path is None:
            return None
        code = self._label(line, path, cell.get("label", ""))
        if code is None:
            return None
        split = self._split(line, path, cell.get("split", "").strip())
        return None if split is None else self._row(line, path, code, split, cell.get("group", "").strip())

    def _label(self, line: int, path: str, cell: str) -> int | None:
        """The class of a cell, -1 where there is none and none is needed; None: a problem."""
        code = self.labels.get(cell)
        if code is not None:
            return code
        label = class_name(cell.strip())
        if len(label) > TABLE_PATH_CHARACTERS:
            self._problem("D004", "label too long", line, f"a label of {len(label):,} characters: {label[:60]}...")
            return None
        if not label and self.labelled:
            self._problem("D004", "empty label", line, f"{path} has no label")
            return None
        code = self.classes.setdefault(label, len(self.classes)) if label else -1
        if label:
            self.listing.spellings.add(label, cell)
        self.labels[cell] = code
        return code

    def _split(self, line: int, path: str, cell: str) -> int | None:
        if not cell:
            return NO_SPLIT
        code = split_of(cell) if len(cell) < TABLE_PATH_CHARACTERS else None
        if code is None:
            hint = near(cell, tuple(SPLIT_NAMES)) if len(cell) < TABLE_PATH_CHARACTERS else ""
            meant = f", did you mean {hint!r}?" if hint else ", expected train, val or test"
            self._problem("D004", "unknown split", line, f"{path} has split {shortened(repr(cell))}{meant}")
        return code

    def _row(self, line: int, path: str, label: int, split: int, group: str) -> None:
        if path in self.seen:
            row = self.seen[path]
            if (self.listing.labels[row], self.listing.splits[row]) != (label, split):
                self._problem("D004", "contradicting rows", line, f"{path} is listed again with another label or split")
            return
        self.seen[path] = len(self.listing.paths)
        self.listing.add(path, label, split)
        if self.has_groups:
            self.groups.append(group)

    def _path(self, line: int, text: str) -> str | None:
        """The path as the manifest keeps it: normal, relative to the table's folder or absolute; None: a problem."""
        if not text.strip() or "\0" in text:
            self._problem("D004", "empty path", line, "the row has no path")
            return None
        if len(text) > TABLE_PATH_CHARACTERS:
            self._problem("D004", "path too long", line, f"a path of {len(text):,} characters: {text[:60]}...")
            return None
        for candidate in _spelled(text):
            path = os.path.normpath(candidate)
            if not os.path.isabs(path) and path.split("/", 1)[0] == "..":
                self._problem(
                    "D004",
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
        self._problem("D001", "missing file", line, f"{text} {what}")
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
            self._problem("D004", "picture of a run", line, f"{path} was drawn by a run, and is no image to learn from")
        return found

    def class_names(self) -> list[str]:
        """The name of each class; where the table is not UTF-8 but the disk is, it came from Windows, and so do the names."""
        named = [name if self.bytes_on_disk else class_name(as_windows(name)) for name in self.classes]
        for name, spelled in zip(named, self.classes, strict=True):
            if name != spelled:
                self.listing.spellings.rename(spelled, name)
        changed = [name for name, spelled in zip(named, self.classes, strict=True) if name != spelled]
        if changed:
            self.listing.notices.append(
                f"{self.name} is not UTF-8: {len(changed):,} class names are read as Windows-1252, the first as {changed[0]!r}; "
                "if that is wrong, save the table as UTF-8"
            )
        self.listing.notices += self.listing.spellings.notices() + alike(dict.fromkeys(named))
        return named

    def _problem(self, code: str, kind: str, line: int, message: str) -> None:
        where = f"{self.name}, line {line}"
        if len(self.listing.problems) >= TABLE_PROBLEMS:
            raise DataError(
                "D004", f"{self.name} has more than {TABLE_PROBLEMS:,} faulty rows; the last that was read: {message}", where=where
            )
        self.listing.problems.append(Problem(code, kind, message, where=where))


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
