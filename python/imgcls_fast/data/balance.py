"""Shares out rows with several labels among splits: one algorithm for single images and groups, one task or many.

Units (groups, equal files, single images) become vectors: a column per class with the rows that have it, and one with all rows.
Each unit goes where the chi-square distance between what the splits have and what they should have grows least, the largest
first; moves and swaps of two follow until nothing improves. A column is scaled by its rarer side, so a label that nearly all
images have is shared out by those that lack it. Measured on random labels (tests/data/test_balance.py): 2,000 rows of 20 labels
deviate by less than 0.6 rows a label from the exact share, as iterative stratification does, which cannot keep groups together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..core.errors import DataError

_PASSES = 8  # of moves and swaps; most data need two or three
_LOOKED_AT = 100_000  # units in all passes: of a million different ones each is looked at once
_SWAPPED = 400  # units that may be swapped: the search is quadratic
_TRAIN = 0  # the first split is the one that is learnt from


def columns_of(targets: np.ndarray, any_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((n, C) float64 columns to balance, (C,) what the rarer side of each counts).

    Args:
        targets: (n, K) with NaN where unknown.
        any_of: (K,) bool, the columns whose 0 is an answer too.
    """
    known = ~np.isnan(targets)
    held = np.where(known, targets, 0.0).astype(np.float64)
    lacking = any_of & ~known.all(0)  # where something is unknown, the images that are asked must be shared out, too
    total, asked = held.sum(0), known.sum(0).astype(np.float64)
    rarer = np.minimum(total, asked - total)
    columns = np.concatenate([held, known[:, lacking].astype(np.float64)], axis=1)
    return columns, np.concatenate([rarer, asked[lacking]])


def share_out(columns: np.ndarray, rarer: np.ndarray, unit: np.ndarray, keys: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) index into `weights` for each row.

    Args:
        columns: (n, C) as from `columns_of`.
        rarer: (C,) likewise.
        unit: (n,) rows of the same number stay together; numbers are 0..U-1.
        keys: (n,) uint64, a random number per row, the same whatever the order of rows.
        weights: (S,) shares, of training first; their sum is 1.

    Raises:
        DataError: D008 when a split would stay empty, or a class without training images.
    """
    size = np.bincount(unit).astype(np.float64)
    vectors = np.zeros((len(size), columns.shape[1] + 1))
    np.add.at(vectors[:, :-1], unit, columns)
    vectors[:, -1] = size
    first = np.full(len(size), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(first, unit, keys)
    total = vectors.sum(0)
    target = np.stack([_target(n, weights) for n in total], axis=0)  # (C + 1, S)
    scale = np.maximum(np.append(rarer, total[-1])[:, None] * weights, 0.5)
    work = _Sharing(vectors, target, scale, _order(vectors, rarer, first))
    work.place_equal(weights)
    work.place_rest()
    work.improve()
    _repair(work, first)
    return work.home[unit]


def _target(total: float, weights: np.ndarray) -> np.ndarray:
    """The share of each split; whole rows, and one at least in each split when there are enough."""
    quota = weights * total
    if total != np.floor(total):
        return quota
    counts = np.floor(quota + 1e-9)
    order = np.argsort(-(quota - counts), kind="stable")
    counts[order[: int(total - counts.sum())]] += 1
    if total >= len(weights):
        for empty in np.flatnonzero(counts == 0):
            counts[counts.argmax()] -= 1
            counts[empty] += 1
    return counts


def _order(vectors: np.ndarray, rarer: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(U,) units: the largest first, of the same size those with the rarest label."""
    rarity = np.where(vectors[:, :-1] > 0, rarer, np.inf).min(1, initial=np.inf)
    return np.lexsort((first, rarity, -vectors[:, -1]))


class _Sharing:
    """Which unit is in which split, and how far that is from the target."""

    def __init__(self, vectors: np.ndarray, target: np.ndarray, scale: np.ndarray, order: np.ndarray) -> None:
        self.vectors, self.target, self.scale, self.order = vectors, target, scale, order
        self.home = np.full(len(vectors), -1, np.int64)
        self.have = np.zeros_like(target)
        self.free = order  # units that may still be moved

    def put(self, one: int, home: int) -> None:
        """Place a unit that is nowhere, or move it."""
        if self.home[one] >= 0:
            self.have[:, self.home[one]] -= self.vectors[one]
        self.have[:, home] += self.vectors[one]
        self.home[one] = home

    def place_equal(self, weights: np.ndarray) -> None:
        """Share out units of one row that are alike in all columns; what is left over is for `place_rest`."""
        single = self.order[self.vectors[self.order, -1] == 1]
        if not len(single):
            return
        _, kind = np.unique(self.vectors[single], axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        by_kind = single[np.argsort(kind, kind="stable")]
        left = [units for units in self.order[:, None] if self.vectors[units[0], -1] != 1]
        for units in np.split(by_kind, np.flatnonzero(np.diff(np.sort(kind))) + 1):
            counts = np.floor(weights * len(units)).astype(np.int64)
            ends = np.cumsum(counts)
            for home, end in enumerate(ends):
                part = units[end - counts[home] : end]
                self.home[part] = home
                self.have[:, home] += self.vectors[part].sum(0)
            left.append(units[ends[-1] :])
        free = np.zeros(len(self.home), bool)
        free[np.concatenate(left)] = True
        self.free = self.order[free[self.order]]

    def growth(self, change: np.ndarray) -> np.ndarray:
        """(S,) by how much the distance of each split grows when it gets `change` ((C + 1,))."""
        used = np.flatnonzero(change)
        u = change[used, None]
        return np.asarray((u * (2 * (self.have[used] - self.target[used]) + u) / self.scale[used]).sum(0))

    def place_rest(self) -> None:
        """Put each unit that is left where it helps most."""
        for one in self.free.tolist():
            self.put(one, int(self.growth(self.vectors[one]).argmin()))

    def improve(self) -> None:
        """Move single units and swap pairs until nothing improves."""
        for _ in range(min(_PASSES, 1 + _LOOKED_AT // max(1, len(self.free)))):
            before = self.home.copy()
            for one in self.free.tolist():
                home = self.home[one]
                there, gone = self.growth(self.vectors[one]), self.growth(-self.vectors[one])[home]
                there[home] = -gone
                if there.min() + gone < -1e-9:
                    self.put(one, int(there.argmin()))
            for one in self.free[:_SWAPPED].tolist():
                self._swap(one)
            if (before == self.home).all():
                return

    def _swap(self, one: int) -> None:
        """Swap a unit with the one of another split with which that helps most."""
        home = self.home[one]
        others = self.free[:_SWAPPED]
        others = others[self.home[others] != home]
        if not len(others):
            return
        d = self.vectors[others] - self.vectors[one]  # what `home` gets, and the other split gives away
        e = (self.have - self.target).T  # (S, C + 1)
        s, to = self.scale.T, self.home[others]
        cost = (d * (2 * e[home] + d) / s[home]).sum(1) + (-d * (2 * e[to] - d) / s[to]).sum(1)
        best = int(cost.argmin())
        if cost[best] < -1e-9:
            other, there = int(others[best]), int(to[best])
            self.put(one, there)
            self.put(other, int(home))


def _repair(work: _Sharing, first: np.ndarray) -> None:
    """No class may be without training rows, and no split may stay empty, whatever the groups are like."""

    def smallest(units: np.ndarray) -> np.ndarray:
        return units[np.lexsort((first[units], work.vectors[units, -1]))]

    for k in np.flatnonzero((work.have[:-1, _TRAIN] <= 1e-9) & (work.have[:-1].sum(1) > 1e-9)):
        work.put(int(smallest(np.flatnonzero(work.vectors[:, k] > 0))[0]), _TRAIN)
    for empty in np.flatnonzero(work.have[-1] == 0):
        one = _spare(work, smallest)
        if one < 0:
            raise DataError(
                "D008",
                f"too few: {len(first)} images or groups; a split would stay empty, or a class without training images",
                try_="give fewer splits: --split-ratio 0.8,0.2,0",
            )
        work.put(one, int(empty))


def _spare(work: _Sharing, smallest: Callable[[np.ndarray], np.ndarray]) -> int:
    """A unit that its split can do without: the smallest of the largest split; -1 when there is none."""
    for donor in np.argsort(-work.have[-1], kind="stable"):
        for one in smallest(np.flatnonzero(work.home == donor)):
            left = work.have[:, donor] - work.vectors[one]
            taught = donor != _TRAIN or (left[:-1][work.vectors[one, :-1] > 0] > 1e-9).all()
            if left[-1] > 0 and taught:
                return int(one)
    return -1
