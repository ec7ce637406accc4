"""Finds the images that a run has learnt from: its own, and those of the runs whose weights it began with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..core.errors import DataError
from ..core.manifest import NO_SPLIT, SPLITS, Manifest
from ..core.places import is_run_folder
from ..core.record import record_of
from ..core.run import Run
from ..core.text import quoted

_GENERATIONS = 16  # a record may be damaged, and lead in a circle


def splits_seen(own: Manifest, other: Manifest) -> np.ndarray:
    """Return (N,) uint8: the split in which a run has an image of the same bytes as each row of `other`; train before val before test."""
    found = np.full(len(other), NO_SPLIT, np.uint8)
    if not len(other):
        return found
    mine, theirs = (np.ascontiguousarray(manifest.digest).view("V16").ravel() for manifest in (own, other))
    known = own.digest.any(1)  # zeros: a row that was never hashed
    for code in reversed(range(len(SPLITS))):
        found[np.isin(theirs, mine[known & (own.split == code)])] = code
    return found


def parents(run: Run) -> Iterator[Run]:
    """Yield the runs whose weights a run began with, the nearest first, as far as they are still where they were."""
    for _ in range(_GENERATIONS):
        folder = _parent(run)
        if folder is None or not is_run_folder(folder):
            return
        run = Run(folder)
        yield run


def _parent(run: Run) -> Path | None:
    """Return where the run was whose weights a run began with."""
    parent = record_of(run.directory).get("parent")
    return Path(str(parent["directory"])) if isinstance(parent, dict) and parent.get("directory") else None


def about_missing(run: Run) -> str:
    """Return a sentence where a run before can no longer be asked what it was trained on; else empty."""
    last, why = run, "is not there any more"
    for last in parents(run):
        try:
            _ = last.manifest
        except DataError:
            lost, why = last.directory, "has a damaged list of images"
            break
    else:
        found = _parent(last)
        if found is None or is_run_folder(found):  # a beginning, or a circle
            return ""
        lost = found
    return f"the weights came from {quoted(str(lost))}, which {why}: images that it was trained on cannot be left out"


def learnt_before(run: Run, manifest: Manifest) -> tuple[np.ndarray, str]:
    """Return the rows of a manifest ((N,) bool) that runs before were trained on, whose weights this one began with; and their names."""
    found, names = np.zeros(len(manifest), bool), []
    for parent in parents(run):
        try:
            rows = splits_seen(parent.manifest, manifest) == SPLITS.index("train")
        except DataError:  # a damaged manifest of another run must not keep this one from being judged
            continue
        names += [parent.name] if (rows & ~found).any() else []
        found |= rows
    return found, " and ".join(names)


def about_parents(run: Run, manifest: Manifest, split: str) -> list[str]:
    """Return sentences where images of a run's split were trained on by a run before it, and where that cannot be known."""
    return list(filter(None, (_trained_on_before(run, manifest, split), about_missing(run))))


def _trained_on_before(run: Run, manifest: Manifest, split: str) -> str:
    rows = manifest.rows(split)
    found, names = learnt_before(run, manifest)
    count = int(found[rows].sum())
    if not count:
        return ""
    return (
        f"{count:,} of {len(rows):,} {split} images are training images of {names}, whose weights {run.name} began with: "
        "the figures flatter the model"
    )
