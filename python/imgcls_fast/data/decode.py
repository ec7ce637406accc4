"""Decodes files of every supported kind to uint8 pixels, by one policy.

Everything that decodes with Pillow comes here.

formats      JPEG (MPO too), PNG, WebP, BMP, TIFF, GIF: by content, whatever the file is called
too large    refused from the header, before any pixel is decoded
cut files    refused, not completed with grey (but a cut JPEG that was given an end marker passes libjpeg)
orientation  EXIF applied (or ignored, when asked)
CMYK, YCCK   to RGB by Pillow's convert
palette      expanded; 1 bit, 2 bit and 4 bit to 0..255
alpha        dropped for rgb and gray, without blending; kept for rgba, opaque where a file has none
gray         luma of the RGB pixels (ITU-R 601, Pillow's integers)
16 bit gray  scaled: round(v * 255 / (2^bits - 1)), with the bits of the pixel specification: 16, so v / 257, or fewer where
             the training images use fewer (12 bits of a microscope); not clipped at 255 as Pillow's convert would
16 bit RGB   Pillow hands out the high byte, v >> 8, which is at most 1 level from round(v / 257)
float, LAB   refused
animated     the first frame
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

# The plugins are named so that Pillow does not import all forty when a TIFF or WebP comes along.
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from ..core.image_bounds import MAX_EXTRA_BYTES, excess
from ..core.pixels import FULL_BITS
from . import reach, shelter
from .store import FILES, Store

Color = Literal["gray", "rgb", "rgba"]
ExifPolicy = Literal["apply", "ignore"]

_PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
READABLE = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
ORIENTATION = 0x0112

# What Pillow's decoders raise on damaged files, found by feeding them damaged files; OSError includes "truncated" and
# "cannot identify". Anything else is caught in quarantine.py, the only place where a decoder may raise what it likes.
DECODER_FAULTS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    SyntaxError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class Undecodable(Exception):
    """An image that cannot become pixels.

    Args:
        path: the file, or what stands for it ("1,024 bytes").
        reason: a short plain sentence: "empty file", "truncated: 8,192 of 48,331 bytes decoded".
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that it survives a process border
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_pixels(
    source: Path | str | bytes | Image.Image | np.ndarray,
    *,
    color: Color = "rgb",
    exif: ExifPolicy = "apply",
    max_megapixels: float = 50.0,
    name: str = "",
    bits: int = FULL_BITS,
) -> np.ndarray:
    """Decode one image by the policy at the top of this file.

    Args:
        source: a file, its bytes, an opened image, or pixels (H, W), (H, W, 1|3|4) of uint8 or uint16.
        color: 1, 3 or 4 channels.
        exif: whether the orientation tag turns the pixels.
        max_megapixels: larger images are refused before they are decoded.
        name: name of the file that `source` was read from.
        bits: number of bits that 16-bit gray uses, 8 to 16.

    Returns:
        (H, W, C) uint8, writable and contiguous.

    Raises:
        Undecodable: for any reason that is in the image.
        DataError: D015 for a file that cannot be reached.
    """
    if isinstance(source, np.ndarray):
        source = _image_of(source, bits)
    if isinstance(source, Image.Image):
        name, size_bytes = name or f"{source.mode} image {source.width} x {source.height}", 0
        try:
            return _decode(source, name, color, exif, max_megapixels, bits)[0]
        except DECODER_FAULTS as error:
            raise Undecodable(name, _reason(error, size_bytes, max_megapixels)) from error
    content = source if isinstance(source, bytes) else read_file(source, max_megapixels)
    name = name or (f"{len(source):,} bytes" if isinstance(source, bytes) else str(source))
    return decode_bytes(content, color=color, exif=exif, max_megapixels=max_megapixels, name=name, bits=bits)[0]


def decode_bytes(
    content: bytes, *, color: Color, exif: ExifPolicy, max_megapixels: float, name: str = "", bits: int = FULL_BITS
) -> tuple[np.ndarray, int]:
    """Decode a file in memory: pixels as `decode_pixels` gives them, and the orientation as tagged.

    Raises:
        Undecodable: as `decode_pixels`.
    """
    kind = sniff(content[:1024])
    if kind not in READABLE:
        raise Undecodable(name, why_not(kind))
    if reason := excess(kind, content, max_megapixels):
        raise Undecodable(name, reason)
    if shelter.is_needed(kind, content):
        try:
            return shelter.decode(content, color, exif, max_megapixels, bits)
        except shelter.Fate as fate:
            raise Undecodable(name, fate.reason) from fate
    with _Opened(content, kind, max_megapixels, name) as image:
        return _decode(image, name, color, exif, max_megapixels, bits)


def full_decode(path: Path | str, *, max_megapixels: float = 50.0, store: Store = FILES) -> tuple[int, int, int]:
    """Decode everything and keep nothing.

    Args:
        path: a file, or a name in `store`.
        max_megapixels: larger images are refused before they are decoded.

    Returns:
        (width, height, orientation): the size as stored, before the orientation is applied.

    Raises:
        Undecodable, DataError: as `decode_pixels`.
    """
    content = read_file(path, max_megapixels, store=store)
    pixels, orientation = decode_bytes(
        content, color="rgb", exif="ignore", max_megapixels=max_megapixels, name=str(path)
    )
    return pixels.shape[1], pixels.shape[0], orientation


def read_file(
    path: Path | str,
    max_megapixels: float = 50.0,
    *,
    store: Store = FILES,
    seen: bool = True,
    patience: reach.Patience | None = None,
) -> bytes:
    """Read an image file, whatever its bytes are; wait for a file that was there and is out of reach.

    Args:
        path: a file, or a name in `store`.
        seen, patience: as in `reach.with_file`.

    Raises:
        Undecodable: what is there is no file, or is too large to be an image of so many pixels.
        DataError: D015 when it cannot be reached.
        FileNotFoundError: as `reach.with_file`.
    """
    try:
        return store.read(os.fspath(path), seen=seen, most=largest_file(max_megapixels), patience=patience)
    except reach.NotAFile as error:
        raise Undecodable(store.where(os.fspath(path)), error.reason) from error


def largest_file(max_megapixels: float) -> int:
    """Return the bytes of the largest file that is read: RGBA of 16 bits, uncompressed, and room for further pages."""
    return MAX_EXTRA_BYTES + int(8e6 * max_megapixels)


class _Opened:
    """A file in memory opened strictly as one kind; every fault inside the block becomes Undecodable.

    Decoders only ever see bytes, so a fault of the disk cannot pass for one of the image.
    """

    def __init__(self, content: bytes, kind: str, max_megapixels: float, name: str) -> None:
        self.kind, self.max_megapixels, self.name = kind, max_megapixels, name
        self.size_bytes, self.file = len(content), io.BytesIO(content)

    def __enter__(self) -> Image.Image:
        try:
            return Image.open(self.file, formats=[self.kind])
        except DECODER_FAULTS as error:
            raise Undecodable(self.name, _reason(error, self.size_bytes, self.max_megapixels)) from error

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: Any) -> None:
        if isinstance(fault, DECODER_FAULTS):
            raise Undecodable(self.name, _reason(fault, self.size_bytes, self.max_megapixels)) from fault


def _decode(
    image: Image.Image, name: str, color: Color, exif: ExifPolicy, max_megapixels: float, bits: int
) -> tuple[np.ndarray, int]:
    """Return (pixels, orientation as tagged) of an image that may not have been loaded yet."""
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise Undecodable(name, too_large(width, height, max_megapixels))
    if image.format == "TIFF":  # Pillow turns a TIFF while it loads it, and forgets the tag
        orientation = _orientation(image)
        image.load()
        turned = _orientation(image) == 1
    else:  # reading a PNG's tag loads its pixels: a fault there must not pass for broken metadata
        image.load()
        orientation = _orientation(image)
        turned = False
    pixels = _convert(image, name, color, bits)
    if exif == "apply" and not turned:
        pixels = turn(pixels, orientation)
    elif exif == "ignore" and turned:
        pixels = turn(pixels, {6: 8, 8: 6}.get(orientation, orientation))
    whole = pixels.flags.c_contiguous and pixels.flags.writeable
    return pixels if whole else np.array(pixels, order="C"), orientation


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Bring (H, W, C) pixels upright by their EXIF `orientation` (1..8); a view where possible."""
    if orientation in (2, 3, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation in (5, 7):
        return pixels.swapaxes(0, 1)
    if orientation in (6, 8):
        return np.rot90(pixels, -1 if orientation == 6 else 1)
    return pixels


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; 1 when there is none or when the tag is nonsense."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DECODER_FAULTS:  # broken metadata does not make a picture bad
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _convert(image: Image.Image, name: str, color: Color, bits: int) -> np.ndarray:
    """Convert a loaded image to (H, W, C) uint8, not turned."""
    mode = image.mode
    if mode.startswith("I"):
        return _from_wide(image, name, color, bits)
    if mode in ("F", "LAB", "HSV"):
        word = "32-bit float pixels" if mode == "F" else f"{mode} colour"
        raise Undecodable(name, f"{word} are not supported: convert to 8-bit PNG or JPEG")
    if color == "gray":
        image = image if mode in ("1", "L", "LA") else image.convert("RGB")
        image = image.convert("L")
    elif color == "rgb":
        if mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # the same colours, without Pillow's warning
        image = image.convert("RGB")
    else:
        image = (image.convert("RGB") if mode in ("CMYK", "YCbCr", "RGBX") else image).convert("RGBA")
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _from_wide(image: Image.Image, name: str, color: Color, bits: int) -> np.ndarray:
    values = np.asarray(image)
    if values.dtype.itemsize > 2 and values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
        raise Undecodable(
            name, f"32-bit pixels from {values.min()} to {values.max()} are not supported: convert to 8 or 16 bit"
        )
    gray = scale_to_8(values, bits)[:, :, None]
    if color == "gray":
        return gray
    pixels = np.repeat(gray, 3, axis=2)
    if color == "rgb":
        return pixels
    alpha = np.full_like(gray, 255)
    if isinstance(clear := image.info.get("transparency"), int):
        alpha[values == clear] = 0
    return np.concatenate([pixels, alpha], axis=2)


def scale_to_8(values: np.ndarray, bits: int = FULL_BITS) -> np.ndarray:
    """Return round(v * 255 / (2^bits - 1)) for v in 0..65535, in integers, at most 255: uint8 of the same shape."""
    white = (1 << bits) - 1  # odd, so that no v is in the middle of two levels
    return ((np.minimum(values, white).astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _image_of(pixels: np.ndarray, bits: int) -> Image.Image:
    name = f"array {pixels.dtype} {pixels.shape}"
    if pixels.dtype == np.uint16:
        gray = pixels.ndim == 2 or pixels.shape[2:] == (1,)
        pixels = scale_to_8(pixels, bits if gray else FULL_BITS)  # colour of 16 bits is read by its high byte in files too
    if pixels.dtype != np.uint8:
        raise Undecodable(name, "an array of pixels must be uint8 (0..255) or uint16 (0..65535)")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] in (3, 4)):
        raise Undecodable(name, "an array of pixels must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if not pixels.size:
        raise Undecodable(name, "an array without pixels")
    return Image.fromarray(np.ascontiguousarray(pixels))


def too_large(width: int, height: int, max_megapixels: float) -> str:
    """Write the reason for an image over the limit."""
    return (
        f"too large: {width:,} x {height:,} = {width * height / 1e6:,.1f} megapixels, the limit is {max_megapixels:g}"
    )


def _reason(fault: BaseException, size_bytes: int, max_megapixels: float) -> str:
    """Write one plain sentence for what a decoder raised."""
    text = " ".join(str(fault).split())
    if isinstance(fault, Undecodable):
        return fault.reason
    if isinstance(fault, Image.DecompressionBombError | Image.DecompressionBombWarning):
        pixels = re.search(r"\d+", text)
        count = f"{int(pixels.group()) / 1e6:,.0f} megapixels" if pixels else text
        return f"too large: {count}, the limit is {max_megapixels:g}"
    if isinstance(fault, MemoryError):
        return "needs more memory than there is"
    if left := re.search(r"truncated \((\d+) bytes not processed\)", text):
        return f"truncated: {max(0, size_bytes - int(left.group(1))):,} of {size_bytes:,} bytes decoded"
    if "truncated" in text.lower():
        return f"truncated: the file ends after {size_bytes:,} bytes, in the middle of the picture"
    if isinstance(fault, Image.UnidentifiedImageError):
        return "damaged header"
    if isinstance(fault, OSError) and fault.errno and fault.strerror:
        return f"cannot be read: {fault.strerror}"
    return f"damaged: {text or type(fault).__name__}"


_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"BM", "BMP"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"ftyp", "MP4 video"),
    (0, b"8BPS", "Photoshop (PSD)"),
    (0, b"\0\0\x01\0", "ICO"),
    (0, b"icns", "ICNS"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x01\xda", "SGI"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (128, b"DICM", "DICOM"),
    (0, b"\x0a\x05\x01", "PCX"),
)
_NOT_IMAGES = ("HTML", "XML", "JSON", "text", "a ZIP archive", "a gzip archive", "an AppleDouble side file")


def sniff(head: bytes) -> str:
    """Recognise a file by its first 1,024 bytes: one of READABLE, another format's name, "HTML", "empty", or ""."""
    if not head:
        return "empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    for offset, magic, kind in _MAGIC:
        if kind != "WEBP" and head.startswith(magic, offset):
            return kind
    if head[:1] == b"P" and head[1:2] in b"1234567Ff" and head[2:3].isspace():
        return "PNM (PBM, PGM, PPM)"
    if head[:4] in (b"\0\x05\x16\x07", b"\0\x05\x16\0"):
        return "an AppleDouble side file"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "a ZIP archive"
    if head[:2] == b"\x1f\x8b":
        return "a gzip archive"
    return _sniff_text(head)


def _sniff_text(head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text:
        return "SVG"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return "HTML"
    if text.startswith(b"<?xml"):
        return "HTML" if b"<html" in text else "XML"
    if text[:1] in (b"{", b"["):
        return "JSON"
    if not any(head):
        return "zeros"
    return "text" if not any(c < 9 or 13 < c < 32 for c in head) else ""


def why_not(kind: str) -> str:
    """Write the reason to refuse a file of a `kind` that `sniff` found and that is not readable."""
    if kind == "empty":
        return "empty file"
    if kind == "zeros":
        return "only zero bytes, not an image (an unfinished download?)"
    if kind in _NOT_IMAGES:
        return f"{kind}, not an image"
    if kind:
        return f"format {kind} is not supported: convert to PNG or JPEG"
    return "not an image of a known format"
