"""Makes small pictures for the report, from files that may be broken, huge or not images at all."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from ..core.image_bounds import excess, is_odd, kind_of

ReadImage = Callable[[str], bytes]  # the bytes of an image by its name in the manifest; none where it cannot be read
SIDE = 160  # pixels, the longer side
MAX_PIXELS = 64_000_000  # a larger image is not opened for a picture of 160 pixels
MAX_BYTES = 64_000_000  # a larger file is not read
MOSTLY_FILLED = 0.98  # share of gray filling above which a broken JPEG has nothing to show
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # not PostScript, which is a program
# What Pillow raises on damaged files. The first line was met in 288 odd files; the second is what arithmetic on hostile
# headers can raise. A test holds that sound files of every format do get a picture, so that no bug hides in here.
_BROKEN = (
    *(OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError),
    *(EOFError, LookupError, ArithmeticError, TypeError, MemoryError, zlib.error),
)


def thumbnail(content: bytes, *, partial: bool = False) -> str | None:
    """A JPEG of at most 160 x 160 pixels as a `data:` address, turned upright; None where nothing can be decoded.

    Args:
        content: bytes of any file, at most MAX_BYTES.
        partial: the file was refused: of a truncated JPEG show the part that can be decoded, and open nothing on which
            decoders crash.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scan has reported what is odd about this file
        try:
            kind = kind_of(content)
            # what makes endless work or crashes decoders is not opened here; what was judged has been decoded before
            if not kind or (partial and is_odd(kind, content)) or excess(kind, content, MAX_PIXELS / 1e6):
                return None
            return _encode(_open(io.BytesIO(content)))
        except _BROKEN:
            pass
        try:
            return _encode(_open_part(content)) if partial else None
        except _BROKEN:
            return None


def _open(source: io.BytesIO) -> Image.Image:
    with Image.open(source, formats=FORMATS) as image:
        _check_size(image)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # lets a JPEG decode at 1/8 of its size
        image.load()
        return image.copy()


def _open_part(content: bytes) -> Image.Image:
    """What a JPEG holds up to its break: with an end marker behind it the decoder fills the rest with gray.

    Pillow's LOAD_TRUNCATED_IMAGES does the same, but for the whole process.
    """
    if not content.startswith(JPEG_START):
        raise ValueError("only of a JPEG can a part be shown")
    image = _open(io.BytesIO(content + JPEG_END))
    values = np.asarray(image)
    filled = values == values[-1, -1]  # what follows the break; the block in which it breaks may hold rubbish
    if filled.mean() > MOSTLY_FILLED:
        raise ValueError("the file breaks at its first pixels")
    return image


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many for a thumbnail")


def _encode(image: Image.Image) -> str:
    image = _to_rgb(_upright(image))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=78, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN:  # damaged EXIF in front of sound pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit: stretch what is there to 8 bits
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        scaled = (values - low) * (255 / (high - low) if high > low else 0)
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
