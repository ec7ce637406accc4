"""Which images are there and what are they called: class folders, pre-split folders, CSV, TSV and JSONL tables."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imgcls_fast.core.bounds import TABLE_PATH_CHARACTERS, TABLE_PROBLEMS
from imgcls_fast.core.errors import DataError, near, shortened
from imgcls_fast.core.manifest import NO_SPLIT
from imgcls_fast.core.text import command

from .fetch import SPLIT_FOLDERS, is_ignored
from .spelling import Spellings, as_windows, class_name, is_text
from .tables import COLUMNS, FAULT, read_table

TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson")
# Names of images, supported or not: what is called so and is not one is reported; other files are passed over.
_READABLE = "jpg jpeg jpe jfif mpo png apng webp bmp dib tif tiff gif"
_FOREIGN = "jp2 j2k jpf jpx jxl avif heic heif svg psd pcx ppm pgm pbm pnm tga ico icns dds qoi exr hdr sgi rgb fits"
_RAW = "dcm raw cr2 nef arw dng"
IMAGE_ENDINGS = frozenset("." + name for name in f"{_READABLE} {_FOREIGN} {_RAW}".split())


@dataclass(frozen=True)
class Problem:
    """One thing that must be mended before work can start; the fields are those of an error."""

    code: str
    kind: str  # for counting: "missing file"
    message: str
    where: str = ""
    why: str = ""
    try_: str = ""


@dataclass
class Listing:
    """What the source names, before any file has been opened. All columns have one entry a row."""

    root: str  # absolute; relative paths are relative to it
    paths: list[str] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("i"))  # index into classes, -1: unknown
    splits: array[int] = field(default_factory=lambda: array("B"))
    groups: list[str] | None = None  # "": a group of its own
    classes: list[str] = field(default_factory=list)
    explicit: bool = False  # every row was named by the user: none may be skipped as "not an image"
    skipped: int = 0  # files beside the class folders
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    spellings: Spellings = field(default_factory=Spellings)

    def sorted(self) -> Listing:
        """Rows by path, classes by name (plain order, as torchvision's ImageFolder), so that a source has one order."""
        names = sorted(set(self.classes))
        renumber = {name: i for i, name in enumerate(names)}
        new = [renumber[name] for name in self.classes]
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        self.labels = array("i", (new[k] if (k := self.labels[i]) >= 0 else -1 for i in order))
        self.splits = array("B", (self.splits[i] for i in order))
        self.groups = None if self.groups is None else [self.groups[i] for i in order]
        self.paths = [self.paths[i] for i in order]
        self.classes = names
        return self


def is_table(path: Path) -> bool:
    """Whether the name says that this is a list of images."""
    return path.suffix.lower() in TABLES


# ---------------------------------------------------------------- folders


def list_folder(root: Path, *, labelled: bool = True) -> Listing:
    """Class folders, or train/val/test folders that hold class folders. Links are followed, loops are not.

    Args:
        root: the folder.
        labelled: False lists every file of the tree, with unknown labels.
    """
    listing = Listing(root=os.path.abspath(root))
    folders, files = _entries(listing.root, listing)
    if not labelled:
        for path in _walk(listing.root, "", listing):
            _add(listing, path, -1, NO_SPLIT)
        return listing.sorted()
    _notice_strays(listing, "", files)
    splits = _split_folders(listing, folders)
    classes: dict[str, int] = {}
    if splits:
        for name in (f for f in folders if f not in splits):
            listing.notices.append(f"folder {name!r} beside the split folders is not a split: skipped")
        for name, code in splits.items():
            inner, strays = _entries(os.path.join(listing.root, name), listing)
            _notice_strays(listing, name + "/", strays)
            for folder in inner:
                _add_class(listing, classes, f"{name}/{folder}", folder, code)
    else:
        for folder in folders:
            _add_class(listing, classes, folder, folder, NO_SPLIT)
        if not folders:
            listing.problems.append(_no_classes(listing.root, files))
    listing.classes = list(classes)
    listing.notices += listing.spellings.notices()
    return listing.sorted()


def _entries(folder: str, listing: Listing) -> tuple[list[str], list[str]]:
    """Sorted names of the sub-folders and of the files of one folder, without what systems leave behind."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_ignored(entry.name):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        message = f"the folder {folder} cannot be read: {error.strerror}"
        listing.problems.append(Problem("D001", "unreadable folder", message, where=folder))
    return sorted(folders), sorted(files)


def _split_folders(listing: Listing, folders: list[str]) -> dict[str, int]:
    """{folder: split code} when the folders are splits, else {}: a class may be called "train" (a vehicle)."""
    found = {f: SPLIT_FOLDERS[f.lower()] for f in folders if f.lower() in SPLIT_FOLDERS}
    codes = set(found.values())
    if not found or not ((0 in codes and len(codes) > 1) or len(found) == len(folders)):
        return {}
    inner = {f: _entries(os.path.join(listing.root, f), listing)[0] for f in found}
    return found if any(inner.values()) else {}


def _notice_strays(listing: Listing, prefix: str, files: list[str]) -> None:
    """Files beside class folders have no class: counted, and named when they look like images."""
    listing.skipped += len(files)
    images = [f for f in files if os.path.splitext(f)[1].lower() in IMAGE_ENDINGS]
    if images:
        more = f" and {len(images) - 1:,} more" if len(images) > 1 else ""
        listing.notices.append(
            f"{prefix}{images[0]}{more} beside the class folders: skipped, no class is known for them"
        )


def _add_class(listing: Listing, classes: dict[str, int], folder: str, name: str, split: int) -> None:
    before, spelled = len(listing.paths), name
    name = class_name(name)
    code = classes.get(name, len(classes))
    for path in _walk(listing.root, folder, listing):
        _add(listing, path, code, split)
    if len(listing.paths) == before:
        listing.notices.append(f"class folder {folder!r} is empty")
        if name not in classes:
            return
    classes[name] = code
    listing.spellings.add(name, spelled)


def _add(listing: Listing, path: str, label: int, split: int) -> None:
    listing.paths.append(path)
    listing.labels.append(label)
    listing.splits.append(split)


def _walk(root: str, top: str, listing: Listing) -> Iterator[str]:
    """Every file below root/top, relative to root. Each real folder once: a second link, or a loop, adds nothing."""
    seen: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        full = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(full)
            if (status.st_dev, status.st_ino) in seen:
                listing.notices.append(f"folder {folder!r} is a link to a folder seen before: not followed again")
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(full) as entries:
                found = sorted(entries, key=lambda e: e.name)
        except OSError as error:
            message = f"the folder {full} cannot be read: {error.strerror}"
            listing.problems.append(Problem("D001", "unreadable folder", message, where=full))
            continue
        for entry in found:
            if is_ignored(entry.name):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                waiting.append(path)
            elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                yield path  # a broken link is reported as a bad image, not passed over; pipes and devices are


def _no_classes(root: str, files: list[str]) -> Problem:
    tables = [f for f in files if is_table(Path(f)) and not f.lower().endswith(".txt")]
    return Problem(
        "D002",
        "no class folders",
        f"{root} has no class folders (one folder of images for each class)",
        where=root,
        try_=command("data", "check", os.path.join(root, tables[0]) if tables else os.path.dirname(root)),
    )


# ---------------------------------------------------------------- tables


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
        self.bytes_on_disk = (
            False  # a path that is not UTF-8 is there, byte by byte: the table is written as the disk is
        )

    @property
    def has_groups(self) -> bool:
        return "group" in self.column

    def start(self, names: list[str], columns: Columns) -> None:
        """Find the columns, from the header's names."""
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
                    "D004", f"{self.name} has {names.count(name)} columns that are called {name!r}", where=f"{where}, line 1",
                    try_=f"rename all but one of them, or name another with --{role}-col",
                )  # fmt: skip

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
        label = class_name(cell.get("label", "").strip())
        split = cell.get("split", "").strip().lower()
        if path is None:
            return None
        if len(label) > TABLE_PATH_CHARACTERS:
            return self._problem("D004", "label too long", line, f"a label of {len(label):,} characters: {label[:60]}...")
        if not label and self.labelled:
            return self._problem("D004", "empty label", line, f"{path} has no label")
        if split and split not in SPLIT_FOLDERS:
            hint = near(split, tuple(SPLIT_FOLDERS))
            meant = f", did you mean {hint!r}?" if hint else f", expected one of {', '.join(SPLIT_FOLDERS)}"
            return self._problem("D004", "unknown split", line, f"{path} has split {shortened(repr(split))}{meant}")
        code = self.classes.setdefault(label, len(self.classes)) if label else -1
        if label:
            self.listing.spellings.add(label, cell["label"])
        return self._row(line, path, code, SPLIT_FOLDERS.get(split, NO_SPLIT), cell.get("group", "").strip())

    def _row(self, line: int, path: str, label: int, split: int, group: str) -> None:
        if path in self.seen:
            row = self.seen[path]
            if (self.listing.labels[row], self.listing.splits[row]) != (label, split):
                self._problem("D004", "contradicting rows", line, f"{path} is listed again with another label or split")
            return
        self.seen[path] = len(self.listing.paths)
        _add(self.listing, path, label, split)
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
        for candidate in dict.fromkeys(
            (text, *(form.replace("\\", "/") for form in (text, as_windows(text))))
        ):  # of Windows
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
                return path
        what = "is a folder, not a file" if os.path.isdir(full) else "does not exist"
        self._problem("D001", "missing file", line, f"{text} {what}")
        return None

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
        self.listing.notices += self.listing.spellings.notices()
        return named

    def _problem(self, code: str, kind: str, line: int, message: str) -> None:
        where = f"{self.name}, line {line}"
        if len(self.listing.problems) >= TABLE_PROBLEMS:
            raise DataError(
                "D004", f"{self.name} has more than {TABLE_PROBLEMS:,} faulty rows; the last that was read: {message}", where=where
            )
        self.listing.problems.append(Problem(code, kind, message, where=where))


# ---------------------------------------------------------------- groups


def group_by_pattern(listing: Listing, pattern: str) -> str:
    """Fill `listing.groups` from the paths: the first capture group, or the whole match.

    Returns:
        A notice when some rows do not match (each is then a group of its own), else "".

    Raises:
        DataError: D008 when the pattern is not a regular expression or matches no row.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise DataError("D008", f"--group-by {pattern!r} is not a regular expression: {error}") from error
    matches = [regex.search(path) for path in listing.paths]
    listing.groups = ["" if m is None else (m.group(1 if regex.groups else 0) or "") for m in matches]
    without = sum(not g for g in listing.groups)
    if listing.paths and without == len(listing.paths):
        raise DataError(
            "D008",
            f"--group-by {pattern!r} matches none of the {without:,} paths",
            where=f"the first path is {listing.paths[0]}",
        )
    return (
        f"{without:,} of {len(listing.paths):,} paths do not match --group-by {pattern!r}: each is a group of its own"
        if without
        else ""
    )
