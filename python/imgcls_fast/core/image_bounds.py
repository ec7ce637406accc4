"""How much work one image may make: bounds on what is read and expanded before or beside its pixels.

The pixels themselves are bounded by `data.max_megapixels`, read from the header. These are the other ways in which a
small file can cost minutes or gigabytes, each found in Pillow 13 or in the probe. What exceeds a bound is a bad image,
at the scan, in both loaders and in `predict` alike, because all of them come through `decode.py`.
"""

from __future__ import annotations

import struct

MAX_EXTRA_BYTES = 256 << 20  # of a file, beyond 8 bytes a permitted pixel
MAX_JPEG_SCANS = 100  # each walks over the whole picture; encoders write one to a dozen
MAX_JPEG_SEGMENTS = 4096  # Pillow copies each; EXIF that goes on over segments is joined anew each time
MAX_JPEG_HEAD_BYTES = 16 << 20  # before the first scan: the largest depth maps of phones have a few MB
MAX_JPEG_JUNK_BYTES = 1 << 20  # between the segments: Pillow steps over it byte by byte
MAX_PNG_CHUNKS = 4096  # and one more for each KB of the file
MAX_PNG_TEXT_BYTES = 1 << 20  # of text and colour profile, expanded; Pillow has its own: 1 MiB each, 64 MiB in all
MAX_GIF_HEAD_BYTES = 1 << 20  # before the first frame: Pillow joins comments anew for each block
MAX_TIFF_TILE = 4  # times the picture (or 4 megapixels): a tile is expanded whole, however little of it is used
MAX_TIFF_TAGS = 4096  # of a directory


def excess(kind: str, content: bytes, max_megapixels: float) -> str | None:
    """Which bound a file exceeds, as the reason to refuse it; None for a file within all of them.

    Args:
        kind: one of `decode.READABLE`, from its first bytes.
        content: the whole file.
        max_megapixels: the bound on the picture.
    """
    check = _CHECKS.get(kind)
    return check(content, max_megapixels) if check else None


def png_chunk_limit(size_bytes: int) -> int:
    """Chunks that a PNG file of this size may have."""
    return MAX_PNG_CHUNKS + size_bytes // 1024


def _jpeg(content: bytes, max_megapixels: float) -> str | None:
    head, several = _jpeg_head(content)
    if head or not several:
        return head
    if content.count(b"\xff\xda") <= MAX_JPEG_SCANS:  # also finds what is none, so this many is the most that it has
        return None
    scans = _jpeg_scans(content)
    return f"{scans:,} scans, the limit is {MAX_JPEG_SCANS}" if scans > MAX_JPEG_SCANS else None


def jpeg_head_excess(content: bytes) -> str | None:
    """Which bound the segments before a JPEG's picture exceed, or None."""
    return _jpeg_head(content)[0]


def _jpeg_head(content: bytes) -> tuple[str | None, bool]:
    """Walk over the segments as Pillow does, up to the first scan; also whether libjpeg will look for another scan."""
    at, segments, junk, components, several = 2, 0, 0, 0, False
    while at + 4 <= len(content):
        marker = content[at + 1]
        if content[at] != 0xFF or marker in (0x00, 0xFF):
            end = content.find(b"\xff", at + 1)
            junk += (end if end >= 0 else len(content)) - at
            at = end if end >= 0 else len(content)
        elif marker == 0xDA or marker < 0xC0:  # the picture, or what Pillow refuses
            return None, several or content[at + 4 : at + 5] != bytes([components])
        elif marker == 0xC8 or 0xD0 <= marker <= 0xD9 or 0xF0 <= marker <= 0xFD:  # without a length
            at, segments = at + 2, segments + 1
        else:
            if marker in (0xC0, 0xC1) and at + 9 < len(content):  # sequential
                components = content[at + 9]
            several = several or (0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xCC))
            at, segments = at + 2 + max(2, int.from_bytes(content[at + 2 : at + 4], "big")), segments + 1
        if segments > MAX_JPEG_SEGMENTS:
            return f"more than {MAX_JPEG_SEGMENTS:,} segments before the picture", several
        if at > MAX_JPEG_HEAD_BYTES or junk > MAX_JPEG_JUNK_BYTES:
            return f"more than {min(at, MAX_JPEG_HEAD_BYTES):,} bytes before the picture", several
    return None, True


def _jpeg_scans(content: bytes) -> int:
    """Scans up to the end of image; segments between them are stepped over."""
    at, scans = 2, 0
    while 0 <= (at := content.find(b"\xff", at)) < len(content) - 3:
        marker = content[at + 1]
        if marker == 0xD9 and scans:
            break
        if marker == 0xFF:
            at += 1
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            at += 2
        else:
            scans += marker == 0xDA
            if scans > MAX_JPEG_SCANS:
                break
            at += 2 + max(2, int.from_bytes(content[at + 2 : at + 4], "big"))
    return scans


def _png(content: bytes, max_megapixels: float) -> str | None:
    at, left = 8, png_chunk_limit(len(content))
    while at + 8 <= len(content):
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        left -= 1
        if left < 0:
            return f"more than {png_chunk_limit(len(content)):,} chunks in {len(content):,} bytes"
    return None


def _webp(content: bytes, max_megapixels: float) -> str | None:
    """The canvas of an extended file is allocated before Pillow reports its size."""
    if content[12:16] != b"VP8X" or len(content) < 30:
        return None
    width, height = (1 + int.from_bytes(content[k : k + 3], "little") for k in (24, 27))
    if width * height <= max_megapixels * 1e6:
        return None
    return (
        f"too large: {width:,} x {height:,} = {width * height / 1e6:,.1f} megapixels, the limit is {max_megapixels:g}"
    )


def _gif(content: bytes, max_megapixels: float) -> str | None:
    """Walk over the extensions before the first frame."""
    at = 13 + (3 << ((content[10] & 7) + 1) if len(content) > 10 and content[10] & 0x80 else 0)
    while at < len(content) and content[at] != 0x2C:  # an image
        if content[at] == 0x21:
            at += 2
            while at < len(content) and content[at] and at <= MAX_GIF_HEAD_BYTES:
                at += 1 + content[at]
        at += 1
        if at > MAX_GIF_HEAD_BYTES:
            return f"more than {MAX_GIF_HEAD_BYTES:,} bytes before the first frame"
    return None


_TILE_WIDTH, _TILE_HEIGHT, _WIDTH, _HEIGHT = 322, 323, 256, 257


def _tiff(content: bytes, max_megapixels: float) -> str | None:
    """The first directory: how many tags, and how large a tile."""
    order = "<" if content[:2] == b"II" else ">"
    try:
        big = struct.unpack_from(order + "H", content, 2)[0] == 43
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, min(at, len(content)))
    except struct.error:
        return None
    if count > MAX_TIFF_TAGS:
        return f"{count:,} tags in a directory, the limit is {MAX_TIFF_TAGS:,}"
    at += 8 if big else 2
    step = 20 if big else 12
    found: dict[int, int] = {}
    for k in range(count):
        entry = content[at + k * step : at + (k + 1) * step]
        if len(entry) < step:
            break
        tag, kind = struct.unpack_from(order + "HH", entry)
        if tag in (_TILE_WIDTH, _TILE_HEIGHT, _WIDTH, _HEIGHT) and kind in (1, 3, 4, 16):
            code = {1: "B", 3: "H", 4: "I", 16: "Q"}[kind]
            found.setdefault(tag, struct.unpack_from(order + code, entry, 12 if big else 8)[0])
    area = found.get(_WIDTH, 0) * found.get(_HEIGHT, 0)
    tile = found.get(_TILE_WIDTH, 0) * found.get(_TILE_HEIGHT, 0)
    if tile > MAX_TIFF_TILE * max(area, 1_000_000):
        return f"tiles of {tile / 1e6:,.1f} megapixels in a picture of {area / 1e6:,.1f}"
    return None


_CHECKS = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "TIFF": _tiff}


# ---------------------------------------------------------------- what is decoded in a child only


def is_odd(kind: str, content: bytes) -> bool:
    """Whether a decoder of others would meet what it may crash on: a malformed WebP, or a TIFF that libtiff expands."""
    return (kind == "WEBP" and not webp_is_sound(content)) or (kind == "TIFF" and not _is_raw_tiff(content))


def webp_is_sound(content: bytes) -> bool:
    """Whether the container of a WebP (RFC 9649) is well-formed: sizes, chunks, and one picture of a stated size."""
    size = int.from_bytes(content[4:8], "little") + 8
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or size % 2 or size > len(content):
        return False
    at, names = 12, []
    while at + 8 <= size:
        name, length = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if at + 8 + length > size or (name == b"VP8 " and content[at + 11 : at + 14] != b"\x9d\x01\x2a"):
            return False
        if name == b"VP8L" and content[at + 8 : at + 9] != b"\x2f":
            return False
        names.append(name)
        at += 8 + length + length % 2
    pictures = sum(name in (b"VP8 ", b"VP8L") for name in names)
    known = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"EXIF", b"XMP "}
    simple = len(names) == 1 or (names[:1] == [b"VP8X"] and b"VP8X" not in names[1:])
    return at == size and pictures == 1 and simple and set(names) <= known  # an animation is not


def _is_raw_tiff(content: bytes) -> bool:
    """Whether the first directory states no compression: then Pillow reads the pixels without libtiff."""
    order = "<" if content[:2] == b"II" else ">"
    try:
        version, at = struct.unpack_from(order + "HI", content, 2)
        (count,) = struct.unpack_from(order + "H", content, at)
        if version != 42:
            return False
        for k in range(count):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", content, at + 2 + 12 * k)
            if tag == 259:
                return bool((kind, number, value) == (3, 1, 1))
    except struct.error:
        return False
    return False


_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II", "TIFF"),
    (b"MM", "TIFF"),
)


def kind_of(content: bytes) -> str:
    """Which of the six formats a file begins as, or ""."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for start, kind in _STARTS if content.startswith(start)), "")
