"""Images in folders: class folders, pre-split folders of class folders, or any tree of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.manifest import NO_SPLIT
from imgcls_fast.core.places import RUN_NAMES, ours
from imgcls_fast.core.text import command

from .fetch import is_ignored
from .listing import Listing, Problem, is_named_as_image, is_table
from .spelling import alike, class_name, split_of

_SHOWN = 3  # names in a notice


def list_folder(root: Path, *, labelled: bool = True) -> Listing:
    """Class folders, or train/val/test folders that hold class folders. Links are followed, loops are not.

    Runs, bundles, exports and the cache of this project are passed over wherever they lie.

    Args:
        root: the folder.
        labelled: False lists every file of the tree, with unknown labels.

    Raises:
        DataError: D001 when the folder is one of ours, and holds no data.
    """
    listing = Listing(root=os.path.abspath(root))
    folders, files = _entries(listing.root, listing)
    folders = _without_ours(listing, folders, "images to learn from" if labelled else "a folder of images")
    if not labelled:
        for path in _walk(listing, "", only=folders):
            listing.add(path, -1, NO_SPLIT)
        return listing.sorted()
    _note_strays(listing, "", files)
    classes: dict[str, int] = {}
    if splits := _split_folders(listing, folders):
        _list_splits(listing, classes, folders, splits)
    elif inner := _splits_inside(listing, folders):
        for folder, splits in inner.items():
            for name, code in splits.items():
                _add_class(listing, classes, f"{folder}/{name}", folder, code)
    else:
        for folder in folders:
            _add_class(listing, classes, folder, folder, NO_SPLIT)
        _note_equal_folders(listing, folders)
        if not folders:
            listing.problems.append(_no_classes(listing.root, files))
    listing.classes = list(classes)
    listing.notices += _passed_over(listing.ours)
    listing.notices += listing.spellings.notices() + alike(listing.classes)
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


def _folders_in(listing: Listing, folder: str) -> list[str]:
    return _entries(os.path.join(listing.root, folder), listing)[0]


# ---------------------------------------------------------------- ours


def _without_ours(listing: Listing, folders: list[str], wanted: str) -> list[str]:
    """The folders of the root that may be data; a run may have been written into the very folder that it learnt from."""
    what = ours(Path(listing.root))
    if what == "a run":
        folders = [f for f in folders if f not in RUN_NAMES]
    if what and (what != "a run" or not folders):
        raise DataError("D001", f"{listing.root} is {what}, not {wanted}", where=listing.root)
    return [f for f in folders if not _pass_over(listing, f)]


def _pass_over(listing: Listing, folder: str) -> bool:
    """Whether a folder is one of ours; it is then noted."""
    what = ours(Path(listing.root, folder))
    if what:
        listing.ours.append((folder, what))
    return bool(what)


def _passed_over(found: list[tuple[str, str]]) -> list[str]:
    if not found:
        return []
    more = f", {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
    return [f"passed over, because no data: {', '.join(f'{folder} ({what})' for folder, what in found[:_SHOWN])}{more}"]


# ---------------------------------------------------------------- splits


def _split_folders(listing: Listing, folders: list[str]) -> dict[str, int]:
    """{folder: split code} when the folders are splits, else {}: a class may be called "train" (a vehicle)."""
    found = {f: code for f in folders if (code := split_of(f)) is not None}
    codes, others = set(found.values()), [f for f in folders if f not in found]
    if not found:
        return {}
    inner = {f: _folders_in(listing, f) for f in found}
    if others and not (0 in codes and len(codes) > 1):
        full = next((f for f in found if found[f] == 0 and len(inner[f]) > 1), None)
        if full:
            place = os.path.join(listing.root, full)
            listing.notices.append(
                f"the folder {full!r} is taken as a class, beside {_names(others)}; if it holds the class folders "
                f"{_names(inner[full])}, name it as the data: {place}"
            )
        return {}
    if any(inner.values()):
        return found
    if 0 in codes and len(codes) > 1 and not others:
        listing.problems.append(_unsorted_splits(listing, list(found)))
    return {}


def _unsorted_splits(listing: Listing, found: list[str]) -> Problem:
    """Split folders without class folders in them: the classes must be written elsewhere."""
    tables = [f for f in _entries(listing.root, listing)[1] if is_table(Path(f)) and not f.lower().endswith(".txt")]
    return Problem(
        "D002", "no class folders",
        f"the folders {_names(found)} of {listing.root} are splits, and hold no class folders",
        where=listing.root,
        why="each split needs one folder of images per class, or a table that names the class of each image",
        try_=command("data", "check", os.path.join(listing.root, tables[0])) if tables else "",
    )  # fmt: skip


def _list_splits(listing: Listing, classes: dict[str, int], folders: list[str], splits: dict[str, int]) -> None:
    for name in (f for f in folders if f not in splits):
        listing.notices.append(f"folder {name!r} beside the split folders is not a split: skipped")
    for name, code in splits.items():
        place = _inner_split(listing, name, code)
        inner, strays = _entries(os.path.join(listing.root, place), listing)
        _note_strays(listing, place + "/", strays)
        for folder in inner:
            if not _pass_over(listing, f"{place}/{folder}"):
                _add_class(listing, classes, f"{place}/{folder}", folder, code)


def _inner_split(listing: Listing, name: str, code: int) -> str:
    """Where the class folders of a split are: archives often wrap it once more (seg_train/seg_train/forest)."""
    inner, files = _entries(os.path.join(listing.root, name), listing)
    if len(inner) == 1 and not files and (inner[0] == name or split_of(inner[0]) == code):
        below = f"{name}/{inner[0]}"
        return below if _folders_in(listing, below) else name
    return name


def _splits_inside(listing: Listing, folders: list[str]) -> dict[str, dict[str, int]]:
    """{class: {sub-folder: split code}} when each class folder is split on its own (cat/train, cat/test), else {}."""
    found: dict[str, dict[str, int]] = {}
    for folder in folders:
        inner, files = _entries(os.path.join(listing.root, folder), listing)
        codes = [split_of(name) for name in inner]
        if files or None in codes or 0 not in codes or len(set(codes)) < 2:
            return {}
        found[folder] = {name: code for name, code in zip(inner, codes, strict=True) if code is not None}
    if found:
        folder, splits = next(iter(found.items()))
        listing.notices.append(f"the splits are those inside of the class folders ({', '.join(f'{folder}/{s}' for s in splits)})")
    return found


def _note_equal_folders(listing: Listing, folders: list[str]) -> None:
    """Point out "classes" that all hold sub-folders of the same names: those are usually the classes."""
    first = _folders_in(listing, folders[0]) if len(folders) > 1 else []
    if len(first) > 1 and all(_folders_in(listing, f) == first for f in folders[1:]):
        listing.notices.append(
            f"the folders {_names(folders)} are taken as {len(folders)} classes, and each holds the folders {_names(first)}: "
            "if those are the classes, rename the outer ones to train, val and test, or name one of them as the data"
        )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


# ---------------------------------------------------------------- rows


def _note_strays(listing: Listing, prefix: str, files: list[str]) -> None:
    """Files beside class folders have no class: kept for the list of skipped files, and named when they look like images."""
    listing.strays += [prefix + f for f in files]
    images = [f for f in files if is_named_as_image(f)]
    if images:
        more = f" and {len(images) - 1:,} more" if len(images) > 1 else ""
        listing.notices.append(
            f"{prefix}{images[0]}{more} beside the class folders: skipped, no class is known for them"
        )


def _add_class(listing: Listing, classes: dict[str, int], folder: str, name: str, split: int) -> None:
    before, spelled = len(listing.paths), name
    name = class_name(name)
    code = classes.get(name, len(classes))
    for path in _walk(listing, folder):
        listing.add(path, code, split)
    if len(listing.paths) == before:
        if not any(place.startswith(folder + "/") for place, _ in listing.ours):
            listing.notices.append(f"class folder {folder!r} is empty")
        if name not in classes:
            return
    classes[name] = code
    listing.spellings.add(name, spelled)


def _walk(listing: Listing, top: str, only: list[str] | None = None) -> Iterator[str]:
    """Every file below root/top, relative to root. Each real folder once: a second link, or a loop, adds nothing.

    Args:
        only: the sub-folders of `top` that are entered; None: all that are not ours.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        full = os.path.join(listing.root, folder) if folder else listing.root
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
                if (entry.name in only) if folder == top and only is not None else not _pass_over(listing, path):
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
        why="put the images of each class into a folder of its own, or name them in a table with the columns path and label",
        try_=command("data", "check", os.path.join(root, tables[0]) if tables else os.path.dirname(root)),
    )
