"""Images in folders: class folders, pre-split folders of class folders, or any tree of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from ..core.errors import DataError
from ..core.manifest import NO_SPLIT
from ..core.places import RUN_NAMES, ours
from ..core.text import command, some
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
    if (wrapper := _wrapper(folders, files)) and _folders_in(listing, wrapper):
        below = list_folder(Path(listing.root, wrapper))
        alone = f"the folder {wrapper!r} is alone, without a training split beside it: entered, and taken as the data"
        below.notices[:0] = [*listing.notices, alone, *_passed_over(listing.ours)]
        return below
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
    beside = what in ("a run", "an evaluation", "a page of benchmarks")
    if what in ("a run", "an evaluation"):
        folders = [f for f in folders if f not in RUN_NAMES]
    if what and not (beside and folders):
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
    if any(inner.values()) and _mostly_below(listing, found, inner):
        return found
    if 0 in codes and len(codes) > 1 and not others:
        listing.problems.append(_unsorted_splits(listing, list(found)))
    return {}


def _mostly_below(listing: Listing, found: Iterable[str], inner: dict[str, list[str]]) -> bool:
    """Whether fewer images lie directly in these folders than below them: then those below are the class folders."""
    direct = sum(map(is_named_as_image, (name for f in found for name in _entries(os.path.join(listing.root, f), Listing(""))[1])))
    below = (
        name
        for f, names in inner.items()
        for place in names
        for _, _, files in os.walk(os.path.join(listing.root, f, place))
        for name in files
        if is_named_as_image(name) and not is_ignored(name)
    )
    return not direct or sum(1 for _ in islice(below, direct + 1)) > direct


def _wrapper(folders: list[str], files: list[str]) -> str:
    """The only folder, beside no image, where its name is that of a split which cannot stand alone ("test-data"), else ""."""
    alone = len(folders) == 1 and not any(map(is_named_as_image, files))
    return folders[0] if alone and split_of(folders[0]) not in (None, 0) else ""


def _unsorted_splits(listing: Listing, found: list[str]) -> Problem:
    """Split folders without class folders in them: the classes must be written elsewhere."""
    tables = [f for f in _entries(listing.root, listing)[1] if is_table(Path(f)) and not f.lower().endswith(".txt")]
    return Problem(
        "D002",
        "no class folders",
        f"the folders {_names(found)} of {listing.root} are splits, and hold no class folders",
        where=listing.root,
        why="each split needs one folder of images per class, or a table that names the class of each image",
        try_=command("data", "check", os.path.join(listing.root, tables[0])) if tables else "",
    )


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
    """{class: {sub-folder: split code}} when class folders are split each on its own (cat/train, cat/test), else {}.

    At least half of them must be, with a training and another split; a class may lack a split, and files that are no images
    are skipped. A class with images that are in no split is a problem, because they could not be told from those of the test.
    """
    found: dict[str, dict[str, int]] = {}
    strays: list[str] = []
    whole, odd = [], []
    looked = Listing(listing.root)  # folders that cannot be read are reported once
    for folder in folders:
        inner, files = _entries(os.path.join(listing.root, folder), looked)
        codes = {name: code for name in inner if (code := split_of(name)) is not None}
        if (not inner and not files) or (inner and len(codes) == len(inner) and not any(map(is_named_as_image, files))):
            found[folder] = codes
            strays += [f"{folder}/{name}" for name in files]
            if 0 in codes.values() and len(set(codes.values())) > 1:
                whole.append(folder)
        else:
            odd.append(folder)
            if 2 * len(odd) > len(folders):
                return {}
    if not whole or 2 * len(whole) < len(folders):
        return {}
    listing.problems += looked.problems
    listing.strays += strays
    if odd:
        listing.problems.append(_odd_classes(listing, whole, odd))
    example = ", ".join(f"{whole[0]}/{split}" for split in found[whole[0]])
    listing.notices.append(f"the splits are those inside of the class folders ({example})")
    if lacking := [folder for folder in found if folder not in whole]:
        listing.notices.append(f"{len(lacking):,} class folders lack a split that others have: {_names(lacking)}")
    return found


def _odd_classes(listing: Listing, whole: list[str], odd: list[str]) -> Problem:
    """Classes that are not split, beside others that are: whether their images are of the test is not known."""
    return Problem(
        "D002",
        "class folder without splits",
        f"{len(whole):,} class folders of {listing.root} are split inside ({_names(whole)}), and {_names(odd)} not",
        where=os.path.join(listing.root, odd[0]),
        why="images outside of the splits could be of any of them",
        try_=f"move the images of {odd[0]!r} into folders of the same names, as in {whole[0]!r}",
    )


def _note_equal_folders(listing: Listing, folders: list[str]) -> None:
    """Point out "classes" that all hold sub-folders of the same names: those are usually the classes, or splits."""
    first = _folders_in(listing, folders[0]) if len(folders) > 1 else []
    if len(first) < 2 or not all(_folders_in(listing, f) == first for f in folders[1:]):
        return
    fact = f"the folders {_names(folders)} are taken as {len(folders)} classes, and each holds the folders {_names(first)}: "
    if any(split_of(name) is not None for name in first):
        advice = "those are not taken as splits, because not all of them are called after one, or none after the training split"
    else:
        advice = "if those are the classes, rename the outer ones to train, val and test, or name one of them as the data"
    listing.notices.append(fact + advice)


def _names(names: list[str]) -> str:
    return some(map(repr, names), _SHOWN, " and {:,} more")


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
    entered = None if only is None else frozenset(only)
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
                if (entry.name in entered) if folder == top and entered is not None else not _pass_over(listing, path):
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
