"""What a loader hands to a model: images, targets, and which rows they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Batch:
    """One batch of constant size N; NumPy arrays or torch tensors, on any device.

    Padding (the tail of an evaluation, or a quarantined image) keeps its place with weight 0 and row -1; its pixels
    repeat a good row and must not count anywhere.
    """

    pixels: Any  # (N, H, W, C) uint8, channels in RGB order
    targets: Any  # (N, K) float32: one-hot, 0 and 1, or probabilities; NaN where unknown, 0 in padding
    weight: Any  # (N,) float32, 0 for padding
    rows: Any  # (N,) int64 row numbers of the manifest, -1 for padding

    def __len__(self) -> int:
        return len(self.rows)

    def pin_memory(self) -> Batch:
        """The same batch of torch tensors in page-locked memory; torch's DataLoader asks for it by this name."""
        return Batch(*(value.pin_memory() for value in (self.pixels, self.targets, self.weight, self.rows)))
