"""Holds what every loader shares: the contract, decoding by Pillow, and what takes the place of a bad image."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from ..core.batch import Batch
from ..core.errors import DataError
from ..core.manifest import Manifest
from ..data import reach
from ..data.decode import Undecodable, decode_pixels, read_file
from .render import render
from .sampler import Request, Sampler

OnBad = Callable[[int, str, int], None]  # row, reason, epoch


class Loader(Protocol):
    """Delivers the batches of a Sampler, in order, as uint8 NHWC of constant size.

    A file that turns out to be undecodable keeps its place with weight 0 and row -1, is remembered in `bad`, and is
    reported once through the `on_bad` callback. It is never replaced by another image.

    A file that cannot be reached is not a bad file: it is tried again for some seconds, then `epoch` raises D015 in
    place of the batch, and nothing is remembered of it.
    """

    sampler: Sampler
    bad: dict[int, str]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from index `start` on."""
        ...

    def hurry(self) -> None:
        """Wait no more for files that are out of reach: D015 follows at once. A signal handler may call this."""
        ...

    def close(self) -> None:
        """Stop workers and free memory; the loader cannot be used afterwards."""
        ...


def make_batch(manifest: Manifest, request: Request, pixels: Any) -> Batch:
    """Return the Batch of a request whose pixels (B, H, W, C) uint8 are ready; CPU torch tensors, pixels on any device."""
    import torch

    targets = manifest.targets(np.where(request.rows >= 0, request.rows, 0))
    targets[request.rows < 0] = 0  # not by multiplication: what is unknown of the row that stands in is NaN
    return Batch(
        pixels=torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels,
        targets=torch.from_numpy(targets),
        weight=torch.from_numpy(request.weight),
        rows=torch.from_numpy(request.rows),
    )


def decode_batch(
    sampler: Sampler, request: Request, threads: int = 1, patience: reach.Patience | None = None
) -> tuple[np.ndarray, Request, dict[int, str]]:
    """Decode a request with Pillow: pixels (B, S, S, C) uint8, the request as delivered, row -> reason of failures.

    Args:
        threads: images decoded at a time.
        patience: shared with other batches; None: the files of this one are waited for together.

    Raises:
        DataError: D015 when a file cannot be reached.
    """
    pixels, size = sampler.pixels, len(request.rows)
    shared = patience or reach.Patience()
    out = np.zeros((size, pixels.size, pixels.size, pixels.channels), np.uint8)

    def reason_against(k: int) -> str | None:
        try:
            out[k] = decode_row(sampler, request, k, read_row(sampler, int(request.rows[k]), shared))
        except Undecodable as error:
            return error.reason
        return None

    positions = np.flatnonzero(request.rows >= 0).tolist()
    if threads > 1 and len(positions) > 1:
        with ThreadPoolExecutor(threads) as pool:  # Pillow lets go of Python's lock while it decodes and resizes
            reasons = list(pool.map(reason_against, positions))
    else:
        reasons = [reason_against(k) for k in positions]
    failed = {int(request.rows[k]): reason for k, reason in zip(positions, reasons, strict=True) if reason is not None}
    wrong = np.zeros(size, bool)
    wrong[[k for k, reason in zip(positions, reasons, strict=True) if reason is not None]] = True
    delivered = request.refilled(wrong)
    return fill(out, delivered), delivered, failed


def read_row(sampler: Sampler, row: int, patience: reach.Patience) -> bytes:
    """Read the file of a row.

    Raises:
        Undecodable: what is there is no image file.
        DataError: D015 when it cannot be reached.
    """
    name, limit = sampler.manifest.paths[row], sampler.pixels.max_megapixels
    return read_file(name, limit, store=sampler.store, patience=patience)


def decode_row(sampler: Sampler, request: Request, position: int, content: bytes) -> np.ndarray:
    """Decode one image with Pillow, as its batch wants it: (size, size, C) uint8.

    Args:
        position: index in the request.
        content: bytes of its file.

    Raises:
        Undecodable: a bad image, or one of another size than at the scan.
    """
    pixels, row = sampler.pixels, int(request.rows[position])
    image = decode_pixels(
        content,
        color=pixels.color,
        exif=pixels.exif,
        max_megapixels=pixels.max_megapixels,
        name=sampler.store.where(sampler.manifest.paths[row]),
        bits=pixels.bits,
    )
    _check_size(sampler, row, image)
    return render(image, request, position, pixels)


def batches_by(sampler: Sampler, view: Callable[[bytes], np.ndarray]) -> Generator[Batch, None, None]:
    """Yield the batches of a sampler, decoded image by image with `view`, which turns the bytes of a file into (S, S, C) uint8.

    An image that cannot be read, or on which `view` raises DataError, is a bad one.
    """
    spec, patience = sampler.pixels, reach.Patience()
    for index in range(sampler.steps):
        request = sampler.request(0, index)
        out = np.zeros((len(request.rows), spec.size, spec.size, spec.channels), np.uint8)
        bad = np.zeros(len(request.rows), bool)
        for k in np.flatnonzero(request.rows >= 0):
            try:
                out[k] = view(read_row(sampler, int(request.rows[k]), patience))
            except (DataError, Undecodable):
                bad[k] = True
        yield make_batch(sampler.manifest, request.refilled(bad), out)


def fill(out: Any, delivered: Request) -> Any:
    """Copy the pixels of good positions into padded ones, in place, by the sampler's filler rule."""
    good = np.flatnonzero(delivered.rows >= 0)
    for k in np.flatnonzero(delivered.rows < 0) if len(good) else ():
        out[k] = out[good[k % len(good)]]
    return out


def _check_size(sampler: Sampler, row: int, image: np.ndarray) -> None:
    expected = (int(sampler.height[row]), int(sampler.width[row]))
    if image.shape[:2] != expected:
        (was_high, was_wide), (high, wide) = expected, image.shape[:2]
        reason = f"changed since the scan: {wide} x {high} pixels, was {was_wide} x {was_high}"
        raise Undecodable(sampler.store.where(sampler.manifest.paths[row]), reason)


def report(failed: Mapping[int, str], epoch: int, bad: dict[int, str], on_bad: OnBad | None) -> None:
    """Remember the rows of `failed` (row -> reason) in `bad`, and report each that is new through `on_bad`."""
    for row, reason in failed.items():
        if row not in bad:
            bad[row] = reason
            if on_bad:
                on_bad(row, reason, epoch)
