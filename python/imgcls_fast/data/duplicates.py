"""Images that are the same, or nearly: found by digest or by a perceptual hash, and kept from crossing a split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from PIL import Image

from ..core.manifest import NO_SPLIT, SPLITS

NEAR_BITS = 4  # of 64; rescaled and recompressed copies differ by 0 to 3, different photos by about 32
_RANK = np.zeros(256, np.uint8)
_RANK[[0, 1, 2]] = 1, 2, 3  # train < val < test; a row without a split gives way to all


def same_bytes(digest: np.ndarray) -> np.ndarray:
    """(N,) int64: rows have the same number when their files are equal. `digest` is (N, 16) uint8."""
    if not len(digest):
        return np.zeros(0, np.int64)
    whole = np.ascontiguousarray(digest).view("V16").ravel()
    return np.unique(whole, return_inverse=True)[1].astype(np.int64)


def keep_highest_split(unit: np.ndarray, split: np.ndarray) -> np.ndarray:
    """(N,) bool, False for a row whose unit also has rows in a split that counts more: test before val before train.

    So an image that is in train and in test leaves train, and test never changes.
    """
    if not len(unit):
        return np.zeros(0, bool)
    rank = _RANK[split]
    highest = np.zeros(int(unit.max()) + 1, np.uint8)
    np.maximum.at(highest, unit, rank)
    return rank == highest[unit]


def two_labels(unit: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """Rows of each unit that has several labels, in row order."""
    known = np.flatnonzero(label >= 0)
    if not len(known):
        return []
    low = np.full(int(unit.max()) + 1, np.iinfo(np.int32).max, np.int64)
    high = np.full(len(low), -1, np.int64)
    np.minimum.at(low, unit[known], label[known])
    np.maximum.at(high, unit[known], label[known])
    return _rows_of(np.flatnonzero((low != high) & (high >= 0)), known, unit)


def _rows_of(units: np.ndarray, rows: np.ndarray, unit: np.ndarray) -> list[np.ndarray]:
    """The members among `rows` of each of `units`, ordered by their first row."""
    if not len(units):
        return []
    rows = rows[np.isin(unit[rows], units)]
    rows = rows[np.argsort(unit[rows], kind="stable")]
    parts = np.split(rows, np.flatnonzero(np.diff(unit[rows])) + 1)
    return sorted(parts, key=lambda part: int(part[0]))


def crossing(unit: np.ndarray, split: np.ndarray) -> list[np.ndarray]:
    """Rows of each unit that lies in several of the given splits; units -1 stand alone."""
    rows = np.flatnonzero((split != NO_SPLIT) & (unit >= 0))
    if not len(rows):
        return []
    present = np.zeros((int(unit.max()) + 1, len(SPLITS)), bool)
    present[unit[rows], split[rows]] = True
    return _rows_of(np.flatnonzero(present.sum(1) > 1), rows, unit)


def dhash(gray: np.ndarray) -> int:
    """64-bit difference hash of (H, W, 1) uint8 pixels: is each of 8 x 8 cells darker than its right neighbour?

    Source: N. Krawetz, "Kind of Like That", 2013.
    """
    small = Image.fromarray(np.ascontiguousarray(gray[:, :, 0])).resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(small)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def near_units(hashes: np.ndarray, bits: int = NEAR_BITS) -> np.ndarray:
    """(N,) int64: rows have the same number when a chain of hashes at most `bits` apart joins them.

    Flat images (hash 0) prove nothing and stay alone. By the pigeonhole principle two such hashes agree in one of
    bits + 1 bands, so only rows within a band's bucket are compared.

    Args:
        hashes: (N,) uint64.
    """
    values, inverse = np.unique(hashes, return_inverse=True)
    edges_a, edges_b = [], []
    for band in _bands(values, bits + 1):
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=-1))
        for bucket in np.split(order, starts[1:]):
            for i in range(len(bucket) - 1):
                rest = bucket[i + 1 :]
                close = rest[np.bitwise_count(values[rest] ^ values[bucket[i]]) <= bits]
                edges_a.append(np.full(len(close), bucket[i]))
                edges_b.append(close)
    a = np.concatenate(edges_a) if edges_a else np.zeros(0, np.int64)
    b = np.concatenate(edges_b) if edges_b else np.zeros(0, np.int64)
    told = (values[a] != 0) & (values[b] != 0)
    a, b = a[told], b[told]
    unit = components(len(values), a, b)[inverse]
    flat = np.flatnonzero(hashes == 0)
    unit[flat] = len(hashes) + np.arange(len(flat))
    return np.unique(unit, return_inverse=True)[1].astype(np.int64)


def _bands(values: np.ndarray, count: int) -> list[np.ndarray]:
    edges = np.linspace(0, 64, count + 1).astype(int)
    masks = [((np.uint64(1) << np.uint64(high - low)) - np.uint64(1), np.uint64(low)) for low, high in pairwise(edges)]
    return [((values >> low) & mask).astype(np.int64) for mask, low in masks]


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) int64: the connected components of rows that share a number in `first` or in `second`; -1 joins nothing."""
    n = len(first)
    rows = np.arange(n)
    a, b = rows[first >= 0], rows[second >= 0]
    offset = n + int(first.max(initial=-1)) + 1
    size = offset + int(second.max(initial=-1)) + 1
    numbers = np.concatenate([n + first[a].astype(np.int64), offset + second[b].astype(np.int64)])
    lowest = components(size, np.concatenate([a, b]), numbers)[:n]
    return np.unique(lowest, return_inverse=True)[1].astype(np.int64)


def components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) int64: the lowest node of each node's connected component, in the graph with edges a[i] - b[i].

    Minimum-label hooking with pointer jumping (Shiloach and Vishkin 1982): a few array passes, no loop over nodes.
    """
    low = np.arange(n, dtype=np.int64)
    while True:
        before = low.copy()
        least = np.minimum(low[a], low[b])
        for ends in (low[a], low[b], a, b):
            np.minimum.at(low, ends, least)
        while (low[low] != low).any():
            low = low[low]
        if (low == before).all():
            return low
