"""Decides which image is where in which epoch, and how it is cropped: a pure function of (seed, epoch, index).

No state, no generator that has to be saved: every loader backend, any number of workers and every resumed run ask the
same function and get the same answer. Randomness is counter-based (Philox: Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.manifest import FLAG_PILLOW, Manifest
from ..core.pixels import EXTREME_ASPECT, Pixels, evaluation_geometry
from ..data.store import open_store
from .augment import Augment, color_factors, random_resized_crops
from .draws import COLUMNS, DRAW

LAYOUT = 1  # another number when the same seed gives the rows in another order
_ORDER, _DRAWS = 0, 1  # streams of random numbers


def random_stream(seed: int, epoch: int, stream: int, skip: int = 0) -> np.random.Generator:
    """Return the random numbers of one epoch, after `skip` blocks of four 64-bit words."""
    mask = (1 << 64) - 1
    key = np.array([seed & mask, (epoch * 2 + stream) & mask], np.uint64)  # a list would pass through float64
    return np.random.Generator(np.random.Philox(counter=[skip, 0, 0, 0], key=key))


def forward_passes(batch: int, most: int, least: int = 1) -> list[slice]:
    """Cut a batch into nearly equal parts, each for one forward pass.

    Args:
        batch: images in all.
        most: images of a part, unless that would leave another part with fewer than `least`.
        least: images of a part; a batch norm takes its statistics over at least two.
    """
    parts = max(1, min(-(-batch // most), batch // least))
    return [slice(batch * k // parts, batch * (k + 1) // parts) for k in range(parts)]


@dataclass(frozen=True)
class Request:
    """What a backend must produce for one batch; B images of constant size.

    A quarantined or padded position asks for the row and the crop of a good position (its filler).
    """

    epoch: int
    index: int
    rows: np.ndarray  # (B,) int64 rows as delivered, -1 for padding
    sources: np.ndarray  # (B,) int64 rows to decode; -1 where the whole batch has no good row
    crop: np.ndarray | None  # (B, 4) int64 top, left, height, width after EXIF rotation; training
    resize: np.ndarray | None  # (B, 4) int64 resized height, width, then top, left of the crop; evaluation
    flip: np.ndarray  # (B,) bool
    color: np.ndarray | None  # (B, 4) float32 brightness, contrast, saturation factors and hue in degrees

    @property
    def weight(self) -> np.ndarray:
        """(B,) float32: 0 for padding."""
        return (self.rows >= 0).astype(np.float32)

    def refilled(self, bad: np.ndarray) -> Request:
        """The same batch with the positions `bad`, (B,) bool, turned into padding: weight 0, row -1 and a filler."""
        if not bad.any():
            return self
        rows = np.where(bad, -1, self.rows)
        good = np.flatnonzero(rows >= 0)
        if not len(good):
            return replace(self, rows=rows, sources=np.full_like(self.sources, -1))
        position = np.arange(len(rows))
        filler = np.where(bad | (self.rows < 0), good[position % len(good)], position)
        picked: dict[str, Any] = {"rows": rows, "sources": self.sources[filler], "flip": self.flip[filler]}
        for name in ("crop", "resize", "color"):
            column = getattr(self, name)
            picked[name] = None if column is None else column[filler]
        return replace(self, **picked)


class Sampler:
    """Orders the rows of one split into batches.

    Training permutes the whole split anew each epoch and drops the tail; evaluation keeps the order and pads the tail
    with weight 0, so that each row counts exactly once.

    Args:
        manifest: sizes and orientations of the images.
        rows: (n,) int64 the rows of the split.
        pixels: output size and evaluation geometry.
        batch_size: B; for training at most n.
        seed: seed of order and augmentation.
        augment: random changes; None: evaluation.

    Raises:
        ValueError: no rows, or a training batch larger than the split.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        pixels: Pixels,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Augment | None = None,
    ) -> None:
        if len(rows) == 0 or batch_size < 1 or (augment is not None and batch_size > len(rows)):
            raise ValueError(f"cannot make batches of {batch_size} from {len(rows)} rows")
        self.manifest, self.rows, self.pixels = manifest, np.asarray(rows, np.int64), pixels
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.store = open_store(manifest.root)
        width, height = manifest.turned_size() if pixels.exif == "apply" else (manifest.width, manifest.height)
        self.width, self.height = width.astype(np.int64), height.astype(np.int64)
        self._order: tuple[int, np.ndarray] = (-1, self.rows)

    @property
    def training(self) -> bool:
        """Whether images are augmented, shuffled, and the tail is dropped."""
        return self.augment is not None

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        n = len(self.rows)
        return n // self.batch_size if self.training else -(-n // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) int64 rows in the order of this epoch."""
        if not self.training:
            return self.rows
        if self._order[0] != epoch:  # a memo, not state: the value depends on (seed, epoch) alone
            self._order = (epoch, self.rows[random_stream(self.seed, epoch, _ORDER).permutation(len(self.rows))])
        return self._order[1]

    def rows_of(self, epoch: int, index: int) -> np.ndarray:
        """(at most B,) int64 rows of one batch, bad ones and all, without padding."""
        return self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def draws(self, epoch: int, index: int) -> np.ndarray:
        """(B, COLUMNS) float64 in [0, 1): the random numbers of each position of a batch."""
        first = index * self.batch_size
        return random_stream(self.seed, epoch, _DRAWS, skip=first * (COLUMNS // 4)).random((self.batch_size, COLUMNS))

    def request(self, epoch: int, index: int, bad: Collection[int] = frozenset()) -> Request:
        """What batch `index` of `epoch` is made of, when the rows in `bad` are quarantined."""
        size = self.batch_size
        rows = self.rows_of(epoch, index)
        padded = np.concatenate([rows, np.full(size - len(rows), -1, np.int64)])
        sources = np.where(padded >= 0, padded, rows[0])
        blank = np.zeros(size, bool)
        width, height = self.width[sources], self.height[sources]
        if self.augment is not None:
            u = self.draws(epoch, index)
            crop = random_resized_crops(u, width, height, self.augment.scale, self.augment.ratio)
            flip = u[:, DRAW.flip] < self.augment.flip
            request = Request(epoch, index, padded, sources, crop, None, flip, color_factors(u, self.augment))
        else:
            resize = evaluation_geometry(width, height, self.pixels.resize_to, self.pixels.size)
            request = Request(epoch, index, padded, sources, None, resize, blank, None)
        is_bad = np.fromiter((int(row) in bad for row in padded), bool, size) if bad else blank
        return request.refilled(is_bad | (padded < 0))

    def needs_pillow(self, rows: np.ndarray) -> np.ndarray:
        """(n,) bool: rows whose pixels only Pillow gets right (format, or an extreme shape)."""
        flagged = (self.manifest.flags[rows] & FLAG_PILLOW) != 0
        width, height = self.width[rows], self.height[rows]
        return flagged | (np.maximum(width, height) > EXTREME_ASPECT * np.minimum(width, height))
