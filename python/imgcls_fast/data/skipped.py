"""Files that a scan met and did not take: how many, which ones first, and why."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.text import some
from .decode import sniff, why_not
from .listing import is_named_as_image

LISTED = 100  # files that are kept with their reason
_SHOWN = 3  # names in a notice


@dataclass(frozen=True)
class SkippedFile:
    """One file that was found beside or among the images.

    Args:
        path: relative to the root of the data.
        reason: "text, not an image".
    """

    path: str
    reason: str


def first_skipped(root: str, strays: Sequence[str], others: Sequence[str]) -> tuple[SkippedFile, ...]:
    """The first LISTED files with their reasons.

    Args:
        root: folder that the paths are relative to.
        strays: files beside the class folders, images among them.
        others: files in class folders that are no images.
    """
    listed = sorted([*strays[:LISTED], *others[:LISTED]])[:LISTED]
    beside = {path for path in strays[:LISTED] if is_named_as_image(path)}
    no_class = "beside the class folders, so no class is known for it"
    return tuple(SkippedFile(path, no_class if path in beside else _reason(os.path.join(root, path))) for path in listed)


def note(paths: Sequence[str], did: str) -> list[str]:
    """One line that counts files that are no images, and names the first; none when there are none.

    Args:
        did: "skipped" or "passed over".
    """
    if not paths:
        return []
    one = len(paths) == 1
    what = "file that is no image was" if one else "files that are not images were"
    return [f"{len(paths):,} {what} {did}: {some(paths, _SHOWN, ' and {:,} more')}"]


def _reason(path: str) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever for somebody to write
            return "no regular file"
        with open(path, "rb") as file:
            return why_not(sniff(file.read(1024)))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
