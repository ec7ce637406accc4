"""Notices about classes, labels, channels and bit depth: each with its figures and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from ..core.manifest import FLAG_WIDE
from ..core.pixels import FULL_BITS
from ..core.text import some
from . import decode
from .depth import LOOKED_AT, bits_of
from .examine import Files
from .listing import Problem
from .separators import joined_labels

FEW = 20  # images per class, below which its figures mean little
UNEVEN = 5.0  # largest class / smallest class
_LOOKED_AT = 16  # images that are decoded to find a colour in them
_TINT = 8  # levels: chroma of a gray picture that was compressed in colour
_DARK = 32  # levels of 256: 13 bits of 16
_SHOWN = 3  # classes in a notice
_PALETTE = 2  # bit of the probe's `detail`


def about_classes(classes: Sequence[str], counts: np.ndarray, *, weighted: bool, pretrained: bool = False) -> list[str]:
    """Notices for classes of very different sizes, and for small ones.

    Args:
        classes: names.
        counts: (K,) images per class.
        weighted: whether the loss has class weights already.
        pretrained: whether training begins with somebody's weights already.
    """
    if len(classes) < 2 or not counts.all():
        return []
    told = []
    most, least = int(counts.argmax()), int(counts.argmin())
    ratio = counts[most] / counts[least]
    if ratio >= UNEVEN and not weighted:
        told.append(
            f"uneven classes: {classes[most]} has {counts[most]:,} images, {ratio:.0f} times as many as {classes[least]} "
            f"({counts[least]:,}); --class-weights auto lets every class count the same"
        )
    few = np.flatnonzero(counts < FEW)
    if len(few):
        few = few[np.argsort(counts[few], kind="stable")]
        names = ", ".join(f"{classes[k]} {counts[k]}" for k in few[:_SHOWN])
        more = f" and {len(few) - _SHOWN:,} more" if len(few) > _SHOWN else ""
        told.append(
            f"fewer than {FEW} images in {len(few):,} of {len(classes):,} classes ({names}{more}): figures of these classes "
            f"will mean little; collect more{'' if pretrained else ', or begin with --init pretrained'}"
        )
    return told


def about_channels(path_of: Callable[[int], str], head: dict[str, np.ndarray], rows: np.ndarray, limit: float) -> list[str]:
    """A notice when every image is gray; of those that are stored in colour a few are decoded.

    Args:
        path_of: the full name of a row's file.
        head: the probe's columns.
        rows: the rows that are used.
        limit: largest image that is decoded, megapixels.
    """
    stored_gray = (head["channels"] <= 2) & ((head["detail"] & _PALETTE) == 0)
    others = rows[~stored_gray[rows]]
    looked_at = _some(others, _LOOKED_AT)
    if not len(rows) or not all(_is_gray(path_of(row), limit) for row in looked_at):
        return []
    seen = f"the {len(looked_at):,} that were looked at closely among them; " if len(others) else ""
    return [f"all {len(rows):,} images are gray, {seen}--channels 1 reads one channel instead of three equal ones"]


def _is_gray(path: str, limit: float) -> bool:
    """Whether the three channels are equal; an image that cannot be decoded shows no colour."""
    try:
        pixels = decode.decode_pixels(path, max_megapixels=limit)
    except decode.Undecodable:
        return True
    low, high = pixels.min(2), pixels.max(2)
    return int((high - low).max()) <= _TINT


def about_depth(files: Files, rows: np.ndarray, bits: int | None) -> list[str]:
    """Notices when images of 16 bits use fewer: of gray ones how they are read, of colour that they stay dark.

    Args:
        files: the examined files.
        rows: training images.
        bits: the bits that were asked for; None: those that the images use.
    """
    told, limit = [], files.options.max_megapixels
    gray = rows[(files.flags[rows] & FLAG_WIDE) != 0]
    used = bits_of((files.full(row) for row in _some(gray, LOOKED_AT)), limit) if len(gray) else None
    some = len(gray) > LOOKED_AT
    looked = f" in the {LOOKED_AT} that were looked at" if some else ""
    white = "; what is brighter in the rest becomes white   (--set pixels.bits=16: nothing does)" if some else ""
    if used is not None and used < FULL_BITS and bits is None:
        told.append(
            f"the {len(gray):,} images of 16-bit gray use {used} bits (0 to {(1 << used) - 1:,}{looked}), and these are spread over the "
            f"range of the pixels; the model keeps that (pixels.bits={used}; with --init RUN that of the run), also for other images{white}"
        )
    elif used is not None and bits is not None and abs(used - bits) > 1:
        told.append(
            f"the {len(gray):,} images of 16-bit gray use {used} bits, and are read as {bits} (pixels.bits): "
            f"{'too dark' if used < bits else 'what is brighter becomes white'}"
        )
    head = files.head
    wide = rows[(head["bit_depth"][rows] > 8) & (head["channels"][rows] > 2)]
    if len(wide) and (level := _highest([files.full(row) for row in _some(wide, _LOOKED_AT)], limit)) < _DARK:
        told.append(
            f"the {len(wide):,} images of 16-bit colour use the lowest {level * 256 + 255:,} of 65,535 values and are read nearly "
            "black: scale them to 8 bits first"
        )
    return told


def _some(rows: np.ndarray, n: int) -> list[int]:
    """At most n of the rows, spread over them."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), n)).astype(np.int64)].tolist()


def _highest(paths: Sequence[str], limit: float) -> int:
    """The highest level of these images; 255 when none can be decoded."""
    found = []
    for path in paths:
        with contextlib.suppress(decode.Undecodable):
            found.append(int(decode.decode_pixels(path, max_megapixels=limit).max()))
    return max(found, default=255)


def about_labels(classes: Sequence[str], held: np.ndarray, lacked: np.ndarray) -> list[str]:
    """Notices for labels that nearly all or nearly no images have.

    Args:
        classes: names of the labels.
        held: (K,) images that have each.
        lacked: (K,) images that are known not to have it.
    """
    rarer = np.minimum(held, lacked)
    few = np.flatnonzero(rarer < FEW)
    if not len(few):
        return []
    shown = few[np.argsort(rarer[few], kind="stable")].tolist()
    sides = (f"{classes[k]} {'with' if held[k] <= lacked[k] else 'without'} {rarer[k]:,}" for k in shown)
    names = some(sides, _SHOWN, " and {:,} more")
    return [
        f"fewer than {FEW} images with or without {len(few):,} of {len(classes):,} labels ({names}): figures of these labels "
        "will mean little"
    ]


def several_labels(classes: Sequence[str], counts: np.ndarray, source: str) -> Problem | None:
    """The problem that folders seem to name several labels for an image ("RBC,WBC"); None when they do not.

    Args:
        classes: names of the folders.
        counts: (K,) images per class.
        source: what the user named.
    """
    found = joined_labels(classes)
    if found is None:
        return None
    images = sum(int(n) for name, n in zip(classes, counts, strict=True) if name in found.names)
    more = f" and {len(found.names) - _SHOWN:,} more" if len(found.names) > _SHOWN else ""
    return Problem(
        "D017",
        "several labels in one",
        f"{images:,} images of {source} have several labels in one: {', '.join(map(repr, found.names[:_SHOWN]))}{more}; "
        f"the labels are {', '.join(found.labels[: 2 * _SHOWN])}",
        why="a folder is one class; a class of its own for each combination is hardly what is meant",
        try_="write a table path,label with all labels of each image, or rename the folders: each is one class",
    )
