"""What a source may be, and who lists it; groups of images by a pattern in their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from ..core.choices import FORMATS
from ..core.errors import DataError
from ..core.labels import LabelSpace
from . import fetch
from .columns import Columns
from .findings import ScanOptions
from .folders import list_folder
from .listing import Listing, is_table
from .tables import list_table


@dataclass(frozen=True)
class Format:
    """One kind of source: how it is recognised, and who lists it."""

    name: str  # for people, after "neither" and "nor"
    matches: Callable[[Path], bool]
    list_rows: Callable[[Path, ScanOptions], Listing]


def list_source(source: Path, options: ScanOptions) -> Listing:
    """List what a source names, by the first format of `core.choices.FORMATS` that matches it.

    Raises:
        DataError: D001 when there is no such source, D004 for a table or D007 for an archive that cannot be read.
    """
    formats: list[Format] = [resolve_name(place) for place in dict.fromkeys(FORMATS.values())]
    found = next((one for one in formats if one.matches(source)), None)
    if found is None:
        source = Path(os.path.abspath(source))
        fetch.demand_there(source)
        raise DataError("D001", f"{source} is neither {', nor '.join(one.name for one in formats)}")
    return found.list_rows(source, options)


def _list_table(source: Path, options: ScanOptions) -> Listing:
    labels = options.labels or (LabelSpace.single(options.classes) if options.classes else None)
    columns = Columns(
        path=options.path_col,
        label=options.label_col,
        split=options.split_col,
        group=options.group_col,
        labels=options.label_cols,
        kind=options.label_kind,
        kinds={task.name: task.kind for task in labels.tasks} if labels else {},
        classes=labels.tasks[0].classes if labels and len(labels.tasks) == 1 else (),
    )
    return list_table(source, columns, labelled=options.labelled)


def _list_archive(source: Path, options: ScanOptions) -> Listing:
    root = _opened(source, options)
    listing = list_folder(root, labelled=options.labelled)
    if options.labelled and len(listing.classes) < 2:  # a table inside an archive has no other way in
        tables = [path for path in sorted(root.iterdir()) if is_table(path) and path.suffix.lower() != ".txt"]
        if len(tables) == 1:
            listing = _list_table(tables[0], options)
            listing.notices.append(f"labels come from {tables[0].name} inside the archive")
    return listing


def _list_tree(source: Path, options: ScanOptions) -> Listing:
    return list_folder(_opened(source, options), labelled=options.labelled)


def _opened(source: Path, options: ScanOptions) -> Path:
    return fetch.open_source(source, options.cache or Path(os.path.abspath(source)).parent / ".imgcls-cache")


FOLDER = Format("a folder", os.path.isdir, _list_tree)
TABLE = Format("a table (.csv, .tsv, .jsonl)", lambda source: is_table(source) and os.path.isfile(source), _list_table)
ARCHIVE = Format(
    f"an archive ({', '.join(fetch.ARCHIVES)})",
    lambda source: fetch.is_archive(source) and os.path.isfile(source),
    _list_archive,
)


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
