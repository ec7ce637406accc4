"""Decides which images are learnt from, validated on, and only ever tested on: stratified, groups never parted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..core.errors import DataError, UsageError
from ..core.files import read_start, write_whole
from ..core.manifest import NO_SPLIT, SPLITS, Manifest
from ..core.text import to_csv
from .balance import columns_of, share_out
from .columns import joint_name
from .duplicates import crossing, joined, same_bytes

TRAIN, VAL, TEST = range(3)
_PASSES = 3  # of re-placing each group; later ones hardly change anything


def make_splits(
    manifest: Manifest,
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Manifest:
    """Give every row a split. Given val and test rows never change; the result does not depend on the order of rows.

    No given splits (or only train): train, val and test are made. Train and test given: val is carved from train, with
    the share val / (train + val). Train and val given: nothing is carved, and val is what will be reported. Rows
    without a split go to the splits that are not given, and to train.

    Classes keep their shares: without groups the counts of a class are exact (largest remainder), and a class with at
    least as many images as there are splits is in each of them. Rows of one group, and equal files, never part. Where an
    image has several labels, those of each split are as near to their shares as `balance.share_out` finds.

    Args:
        fractions: shares of train, val, test; scaled to a sum of 1.
        seed: another seed gives another split; images added later do not reshuffle the ones that were there.

    Raises:
        DataError: D006 when a group lies in several given splits, D008 when there are fewer groups than splits.
    """
    shares = _checked(fractions)
    _refuse_crossing(manifest)
    split = manifest.split.copy()
    pool, active = _plan(split, shares)
    unit = _units(manifest)
    if (split == NO_SPLIT).any():
        pool = _join_given(unit, split, pool)
    if not len(pool) or len(active) < 2:
        split[pool] = TRAIN
        return manifest.with_splits(split)
    keys = _keys(manifest, pool, seed)
    weights = np.array([shares[s] for s in active]) / sum(shares[s] for s in active)
    units = np.unique(unit[pool], return_inverse=True)[1]
    _demand_enough(units, len(weights), manifest)
    if manifest.labels.is_single:
        label = np.where(manifest.label < 0, manifest.labels.size, manifest.label)[pool]
        place = _assign(label, units, keys, weights)
    else:
        columns, rarer = columns_of(manifest.targets(pool), manifest.labels.any_of)
        place = share_out(columns, rarer, units, keys, weights)
    split[pool] = np.array(active, np.uint8)[place]
    return manifest.with_splits(split)


def _checked(fractions: Sequence[float]) -> list[float]:
    shares = [float(f) for f in fractions]
    if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0 or not np.isfinite(sum(shares)):
        raise DataError(
            "D008",
            f"a split needs three shares (train, val, test), none negative and train above 0, got {tuple(fractions)}",
        )
    return shares


def _plan(split: np.ndarray, shares: list[float]) -> tuple[np.ndarray, list[int]]:
    """(rows to assign, splits that they may go to)."""
    given = {int(s) for s in np.unique(split) if s != NO_SPLIT}
    free = np.flatnonzero(split == NO_SPLIT)
    makes = [s for s in (TRAIN, VAL, TEST) if s == TRAIN or (s not in given and shares[s] > 0)]
    if len(free):
        return free, makes
    if VAL in given:
        return free, []  # train and val given: a test split would have to be taken from what was chosen for learning
    return np.flatnonzero(split == TRAIN), makes


def _units(manifest: Manifest) -> np.ndarray:
    """(N,) int64: rows with the same number must stay together (same group, or the same bytes)."""
    same = same_bytes(manifest.digest)
    blank = ~manifest.digest.any(1)  # not hashed: nothing is known to be equal
    same[blank] = same.max(initial=0) + 1 + np.arange(int(blank.sum()))
    return joined(manifest.group.astype(np.int64), same) if (manifest.group >= 0).any() else same


def _refuse_crossing(manifest: Manifest) -> None:
    mixed = crossing(manifest.group, manifest.split)
    if mixed:
        paths = ", ".join(manifest.paths[int(r)] for r in mixed[0][:3])
        raise DataError("D006", f"{len(mixed):,} groups lie in several of the given splits, e.g. that of {paths}")


def _join_given(unit: np.ndarray, split: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Rows whose group has rows in a given split follow them; the others are left to assign.

    A unit in several given splits (equal files that were kept on purpose) counts as test before val before train.
    """
    rows = np.flatnonzero(split != NO_SPLIT)
    home = np.full(int(unit.max(initial=-1)) + 1, -1, np.int64)
    np.maximum.at(home, unit[rows], split[rows])
    follows = home[unit[pool]] >= 0
    split[pool[follows]] = home[unit[pool[follows]]]
    return pool[~follows]


def _keys(manifest: Manifest, rows: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64: a random number for each path, the same in any order and any company."""
    key = int(seed).to_bytes(16, "little", signed=True)
    hashes = (
        hashlib.blake2b(manifest.paths[int(r)].encode("utf-8", "surrogateescape"), digest_size=8, key=key) for r in rows
    )
    return np.fromiter((int.from_bytes(h.digest(), "little") for h in hashes), np.uint64, len(rows))


def _demand_enough(unit: np.ndarray, splits: int, manifest: Manifest) -> None:
    """Refuse fewer groups, or different images, than splits.

    Raises:
        DataError: D008.
    """
    units = len(np.bincount(unit))
    if units < splits:
        grouped = (manifest.group >= 0).any()
        names = f"{units} group{'s' if units > 1 else ''}" if grouped else f"{units} different images"
        raise DataError(
            "D008",
            f"{names} cannot be shared out among {splits} splits without parting one",
            try_="give fewer splits: --split-ratio 0.8,0.2,0",
        )


def _assign(label: np.ndarray, unit: np.ndarray, keys: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) index into `weights` of each row: groups first, largest first; single images then fill the classes."""
    size = np.bincount(unit)
    classes = int(label.max()) + 1
    totals = np.bincount(label, minlength=classes)
    target = np.stack([_shares_of(int(n), weights) for n in totals])  # (K, S)
    place = np.full(len(label), -1, np.int64)
    have = np.zeros_like(target)
    if (size > 1).any():
        _assign_groups(label, unit, keys, target, have, place)
    _assign_singles(label, keys, target, have, place)
    _repair(label, unit, keys, have, place)
    return place


def _shares_of(n: int, weights: np.ndarray) -> np.ndarray:
    """(S,) int64 counts that sum to n: largest remainder, and at least one each when n allows."""
    quota = weights * n
    counts = np.floor(quota + 1e-9).astype(np.int64)
    order = np.argsort(-(quota - counts), kind="stable")
    counts[order[: n - int(counts.sum())]] += 1
    if n >= len(weights):
        for empty in np.flatnonzero(counts == 0):
            counts[counts.argmax()] -= 1
            counts[empty] += 1
    return counts


def _assign_groups(
    label: np.ndarray, unit: np.ndarray, keys: np.ndarray, target: np.ndarray, have: np.ndarray, place: np.ndarray
) -> None:
    """Put each unit of several rows where the chi-square distance between counts and targets grows least."""
    order = np.argsort(unit, kind="stable")
    parts = [p for p in np.split(order, np.flatnonzero(np.diff(unit[order])) + 1) if len(p) > 1]
    parts.sort(key=lambda p: (-len(p), int(keys[p].min())))
    mixes = [np.unique(label[p], return_counts=True) for p in parts]
    scale = np.maximum(target, 0.5)
    where = np.full(len(parts), -1)
    for _ in range(_PASSES):
        moved = False
        for i, (kinds, counts) in enumerate(mixes):
            if where[i] >= 0:
                have[kinds, where[i]] -= counts
            now, u = have[kinds], counts[:, None]
            cost = (u * (2.0 * (now - target[kinds]) + u) / scale[kinds]).sum(0)
            best = int(cost.argmin())
            if where[i] >= 0 and cost[where[i]] <= cost[best] + 1e-12:
                best = int(where[i])
            moved |= best != where[i]
            where[i] = best
            have[kinds, best] += counts
        if not moved:
            break
    for part, home in zip(parts, where, strict=True):
        place[part] = home


def _assign_singles(
    label: np.ndarray, keys: np.ndarray, target: np.ndarray, have: np.ndarray, place: np.ndarray
) -> None:
    """Fill each class up to its targets with the rows that stand alone, in the order of their keys."""
    free = np.flatnonzero(place < 0)
    free = free[np.lexsort((keys[free], label[free]))]
    for rows in np.split(free, np.flatnonzero(np.diff(label[free])) + 1) if len(free) else []:
        k = label[rows[0]]
        wanted = np.maximum(target[k] - have[k], 0)
        if wanted.sum() != len(rows):  # a group overfilled one split; the others share what is left
            wanted = _shares_of(len(rows), wanted / wanted.sum())
        place[rows] = np.repeat(np.arange(len(wanted)), wanted)
        have[k] += wanted


def _repair(label: np.ndarray, unit: np.ndarray, keys: np.ndarray, have: np.ndarray, place: np.ndarray) -> None:
    """No class may be without training rows, and no split may stay empty, whatever the groups are like."""
    first = np.full(int(unit.max()) + 1, np.iinfo(np.uint64).max, np.uint64)  # the lowest key of each unit
    np.minimum.at(first, unit, keys)

    def smallest_first(rows: np.ndarray) -> np.ndarray:
        units, counts = np.unique(unit[rows], return_counts=True)
        return units[np.lexsort((first[units], counts))]

    def move(one: int, home: int) -> None:
        rows = np.flatnonzero(unit == one)
        counts = np.bincount(label[rows], minlength=len(have))
        have[:, int(place[rows[0]])] -= counts
        have[:, home] += counts
        place[rows] = home

    def can_spare(one: int, donor: int) -> bool:
        counts = np.bincount(label[unit == one], minlength=len(have))
        left = have[:, donor] - counts
        return bool(left.sum() > 0 and (donor != TRAIN or (left[counts > 0] > 0).all()))

    for k in np.flatnonzero((have[:, TRAIN] == 0) & (have.sum(1) > 0)):
        move(int(smallest_first(np.flatnonzero(label == k))[0]), TRAIN)
    for empty in np.flatnonzero(have.sum(0) == 0):
        donors = np.argsort(-have.sum(0), kind="stable")
        spare = ((u, d) for d in donors for u in smallest_first(np.flatnonzero(place == d)) if can_spare(u, d))
        one, _ = next(spare, (-1, -1))
        if one < 0:
            raise DataError(
                "D008",
                f"too few: {len(first)} images or groups; a split would stay empty, or a class without training images",
                try_="give fewer splits: --split-ratio 0.8,0.2,0",
            )
        move(int(one), int(empty))


def _label_cells(manifest: Manifest) -> tuple[list[str], Callable[[int], list[str]]]:
    """The label columns of the table, and what stands in them in a row."""
    labels = manifest.labels
    if labels.is_single and manifest.answers[0].ndim == 1:
        label, classes = manifest.label, manifest.labels.classes
        return ["label"], lambda row: [classes[label[row]] if label[row] >= 0 else ""]
    head = [joint_name(task, name) for task in labels.tasks for name in task.classes]
    targets = manifest.targets(np.arange(len(manifest)))

    def cells(row: int) -> list[str]:
        return ["" if v != v else f"{v:.7g}" for v in targets[row].tolist()]  # NaN is not equal to itself

    return head, cells


def write_split_csv(path: Path, manifest: Manifest, *, keep: bool = False) -> None:
    """Write path, label, group, split: a table for people, which is also a source that gives the same split again.

    Labels that are not simply one class per image get a column per class (`columns.joint_name`), which a scan finds again.
    Paths are relative to the table's folder where the images lie below it, else absolute.

    Args:
        keep: leave a table that is there already, unless it is empty or the very same.

    Raises:
        UsageError: U002 for a table that is to be kept: another split, or one that a person has corrected.
    """
    folder = os.path.abspath(path.parent)
    root = os.path.abspath(manifest.root)
    below = root == folder or root.startswith(folder.rstrip("/") + "/")
    prefix = os.path.relpath(root, folder) if below else root
    head, labels = _label_cells(manifest)
    lines = [["path", *head, "group", "split"]]
    names = manifest.group_names
    for row, name in enumerate(manifest.paths):
        group = int(manifest.group[row])
        place = os.path.normpath(os.path.join(prefix, name))
        code = int(manifest.split[row])
        text = "" if group < 0 else names[group] if group < len(names) else str(group)
        lines.append([place, *labels(row), text, SPLITS[code] if code != NO_SPLIT else ""])
    blob = to_csv(lines).encode("utf-8", "surrogateescape")
    if keep and os.path.exists(path) and read_start(path, len(blob) + 1) not in (b"", blob):
        raise UsageError(
            "U002",
            f"{path} exists, and holds another split, or one changed by hand",
            try_="choose another place with --out, or add --force",
        )

    def write(file: BinaryIO) -> None:
        file.write(blob)

    write_whole(path, write)
