"""Makes a manifest of a folder, table or archive: every file is looked at once, and every problem is reported at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..core import env
from .examine import Files, is_no_image, probe
from .findings import DataProblems, ScanOptions, ScanResult
from .folders import list_folder
from .listing import is_named_as_image
from .rules import tabulate
from .sources import group_by_pattern, list_source

__all__ = ["Unlabelled", "inspect", "scan", "unlabelled"]


def scan(source: Path | str, options: ScanOptions = ScanOptions()) -> ScanResult:  # noqa: B008 (frozen)
    """Make the manifest of a source, or report everything that is wrong with it.

    Args:
        source: a folder of class folders, of train/val/test folders with class folders, a CSV, TSV or JSONL table, or
            a zip or tar archive of one of these.
        options: rules.

    Returns:
        The manifest (rows by path, classes by name in plain order, sizes as stored), bad files, and notices.

    Raises:
        DataProblems: (a DataError) all problems at once.
        DataError: when there is nothing to look at: D001, D004, D007, D008.
        HardwareError: H003 for a cache that cannot be written, H004 without the compiled probe.
    """
    result = inspect(source, options)
    if result.problems:
        raise DataProblems(result.problems, str(source))
    return result


def inspect(source: Path | str, options: ScanOptions = ScanOptions()) -> ScanResult:  # noqa: B008 (frozen)
    """As `scan`, but with the problems in the result instead of an error."""
    threads = options.threads or env.usable_cpus()
    listing = list_source(Path(source), options)
    if options.group_by:
        notice = group_by_pattern(listing, options.group_by)
        listing.notices += [notice] if notice else []
    files = Files(listing, options, threads)
    files.look()
    return tabulate(listing, files, options, str(source))


@dataclass(frozen=True)
class Unlabelled:
    """The files of a tree: images, and what was passed over because it is none."""

    images: tuple[str, ...]  # relative to the folder, by name
    passed_over: tuple[str, ...]
    notices: tuple[str, ...] = ()  # folders that cannot be read, and links that are not followed


def unlabelled(folder: Path) -> Unlabelled:
    """The images of a folder and its sub-folders, by the rule of the scan: the content decides, and not the name.

    Only files without the ending of an image are opened here; hidden files and what systems leave behind are not listed.

    Raises:
        DataError: D001 when the folder is a run or another of our own.
        HardwareError: H004 when there are such files and no compiled probe.
    """
    listing = list_folder(folder, labelled=False)
    odd = [path for path in listing.paths if not is_named_as_image(path)]
    status = probe([os.fsencode(os.path.join(listing.root, path)) for path in odd], 1)["status"] if odd else ()
    none = {path for path, found in zip(odd, status, strict=True) if is_no_image(path, int(found))}
    images = tuple(path for path in listing.paths if path not in none)
    notices = (*(problem.message for problem in listing.problems), *listing.notices)
    return Unlabelled(images, tuple(p for p in odd if p in none), notices)
