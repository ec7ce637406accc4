"""Measures how many bits 16-bit gray images really use: microscopes and X-ray tools store 12 bits in files of 16."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..core.manifest import FLAG_WIDE, Manifest
from ..core.pixels import FULL_BITS
from .decode import Undecodable, decode_pixels, read_file
from .store import FILES, Store, open_store

LOOKED_AT = 100  # images
_LEAST = 8


def used_bits(manifest: Manifest, max_megapixels: float = 50.0) -> int | None:
    """Bits that the training images use, 8 to 16; None when none of them is gray of more than 8 bits.

    At most LOOKED_AT images are decoded, spread over the classes; one of full range ends the search.
    """
    rows = manifest.rows("train")
    wide = rows[(manifest.flags[rows] & FLAG_WIDE) != 0]
    names = (manifest.paths[row] for row in manifest.spread(wide, LOOKED_AT))
    return bits_of(names, max_megapixels, open_store(manifest.root))


def bits_of(paths: Iterable[str], max_megapixels: float, store: Store = FILES) -> int | None:
    """Bits that these files (or names in `store`) use; None when there are none, or none can be decoded."""
    bits = None
    for path in paths:
        try:
            bits = _at_least(bits or _LEAST, _reader(path, max_megapixels, store))
        except Undecodable:
            continue  # the loader will find it and report it
        if bits == FULL_BITS:
            break
    return bits


def _at_least(bits: int, read: Callable[[int], np.ndarray]) -> int:
    """The smallest number of bits, from `bits` on, that holds every value of an image.

    Read with one bit more, a value that needs this bit is above the middle: 2^b * 255 / (2^(b+1) - 1) > 127.5. So the
    question is asked in the pixels of the policy, and also of files that only a child process may decode.
    """
    while bits < FULL_BITS and read(bits + 1).max(initial=0) > 127:
        bits += 1
    return bits


def _reader(path: str, max_megapixels: float, store: Store) -> Callable[[int], np.ndarray]:
    def read(bits: int) -> np.ndarray:
        content = read_file(path, max_megapixels, store=store)
        return decode_pixels(content, color="gray", exif="ignore", max_megapixels=max_megapixels, name=path, bits=bits)

    return read
