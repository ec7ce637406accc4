"""Proves that an image is well-formed, on the very bytes that a decoder gets which nothing could restart.

DALI decodes in this process, and one malformed file can make its whole pipeline invalid or end the process. So it sees
JPEG and PNG only, and of these what a parser of our own has walked through to the end. Everything else goes to Pillow.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

from ..core.env import reinstall_hint
from ..core.errors import HardwareError
from ..core.image_bounds import MAX_JPEG_SCANS, MAX_PNG_TEXT_BYTES, jpeg_head_excess, png_chunk_limit

JPEG, PNG, TIFF, GIF = 1, 2, 5, 6  # the probe's `format`
PNG_START = b"\x89PNG\r\n\x1a\n"
_INFLATED_PIECE = 1 << 20  # bytes: what a bomb may cost of memory
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


@dataclass(frozen=True)
class Proof:
    """What the walk through one image in memory found."""

    kind: int  # the probe's `format`
    sound: bool  # JPEG and PNG: well-formed to the end
    whole: bool  # JPEG: and nothing follows the end
    width: int = 0  # pixels, as stored
    height: int = 0
    orientation: int = 1
    scans: int = 0  # of a JPEG


def prove(content: bytes) -> Proof:
    """Walk through one image, decoding nothing; a PNG's pixels are inflated and thrown away.

    Raises:
        HardwareError: H004 when the package was installed without its compiled half.
    """
    kind, status, width, height, orientation, sound, whole, scans = compiled().prove(content)
    if kind == JPEG:
        sound = sound and scans <= MAX_JPEG_SCANS and jpeg_head_excess(content) is None
    elif kind == PNG:
        sound = whole = status == 0 and png_is_sound(content)
    return Proof(kind, sound, whole, width, height, orientation, scans)


def compiled():  # type: ignore[no-untyped-def]  # a module
    """The compiled half.

    Raises:
        HardwareError: H004 when there is none.
    """
    try:
        from .. import _C
    except ImportError as error:
        raise HardwareError(
            "H004",
            f"imgcls_fast._C, the compiled half that reads image headers, is missing: {error}",
            try_=reinstall_hint(),
        ) from error
    return _C


@dataclass
class _Chunks:
    """What the chunks of a PNG have shown so far."""

    width: int = 0
    height: int = 0
    depth: int = 0
    color: int = -1
    palette: int = 0  # entries
    pixels: list[memoryview] = field(default_factory=list)
    text: int = 0  # bytes, expanded
    closed: bool = False  # something followed the pixels

    def take(self, kind: bytes, body: memoryview) -> bool:
        """Whether the chunk may stand here; only chunks that every decoder knows, or may pass over, may."""
        if (kind == b"IHDR") == (self.color >= 0):
            return False  # first, and once
        if kind == b"IHDR":
            return self._header(body)
        if kind == b"IDAT":
            if self.closed or (self.color == 3 and not self.palette):
                return False
            self.pixels.append(body)
            return True
        self.closed = bool(self.pixels)
        if kind == b"PLTE":
            if self.palette or self.closed or self.color in (0, 4) or len(body) % 3 or not 3 <= len(body) <= 768:
                return False
            self.palette = len(body) // 3
            return self.color != 3 or self.palette <= 1 << self.depth
        if kind == b"tRNS":
            if self.closed or self.color not in (0, 2, 3):
                return False
            return 0 < len(body) <= self.palette if self.color == 3 else len(body) == (2 if self.color == 0 else 6)
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            return self._text(kind, bytes(body))
        # animations and critical chunks that we do not know are for Pillow
        return kind not in (b"acTL", b"fcTL", b"fdAT") and kind[0] & 0x20 != 0

    def _text(self, kind: bytes, body: bytes) -> bool:
        """Whether a text or a profile is small when it is expanded, and all of them together."""
        start = body.find(b"\0") + 2  # behind the keyword and the method
        if kind == b"iTXt":
            language = body.find(b"\0", start + 1)
            start = body.find(b"\0", language + 1) + 1 if language >= 0 and body[start - 1 : start] == b"\1" else 0
        if kind == b"tEXt" or start == 0:
            self.text += len(body)
        elif start < 2:
            return False
        else:
            try:
                size = len(zlib.decompressobj().decompress(body[start:], MAX_PNG_TEXT_BYTES + 1))
            except zlib.error:
                return False
            self.text += size
        return self.text <= MAX_PNG_TEXT_BYTES

    def _header(self, body: memoryview) -> bool:
        if len(body) != 13:
            return False
        self.width, self.height, self.depth, self.color, method, prediction, interlaced = struct.unpack(
            ">IIBBBBB", body
        )
        legal = self.depth in _DEPTHS.get(self.color, ()) and self.width > 0 and self.height > 0
        return legal and (method, prediction, interlaced) == (0, 0, 0)

    def row_bytes(self) -> int:
        return 1 + (self.width * _CHANNELS[self.color] * self.depth + 7) // 8


def png_is_sound(content: bytes) -> bool:
    """Whether a PNG is well-formed: chunks whole, in order and with the right CRC, and pixels that inflate exactly.

    Much text, interlacing and animation are legal and not "sound": Pillow's business.
    """
    found = _Chunks()
    at, view, left = 8, memoryview(content), png_chunk_limit(len(content))
    while at + 12 <= len(content) and left > 0:
        (length,) = struct.unpack_from(">I", content, at)
        if at + 12 + length > len(content):
            return False
        if zlib.crc32(view[at + 4 : at + 8 + length]) != struct.unpack_from(">I", content, at + 8 + length)[0]:
            return False
        kind = content[at + 4 : at + 8]
        if kind == b"IEND":
            return bool(found.pixels) and length == 0 and _inflates(found)
        if not found.take(kind, view[at + 8 : at + 8 + length]):
            return False
        at += 12 + length
        left -= 1
    return False


def _inflates(found: _Chunks) -> bool:
    """Whether the pixels of a PNG inflate to exactly their rows, each with a known filter."""
    row, expected = found.row_bytes(), found.row_bytes() * found.height
    stream, done = zlib.decompressobj(), 0
    try:
        for piece in found.pixels:
            waiting: bytes | memoryview = piece
            while waiting:
                out = stream.decompress(waiting, _INFLATED_PIECE)
                filters = np.frombuffer(out, np.uint8)[-done % row :: row]
                done += len(out)
                if done > expected or (filters > 4).any():
                    return False
                if stream.eof:
                    break
                waiting = stream.unconsumed_tail
    except zlib.error:
        return False
    return done == expected and stream.eof
