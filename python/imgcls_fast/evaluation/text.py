"""Makes file and class names fit to be shown: they come from strangers' disks and may hold anything."""

from __future__ import annotations

from ..core import text as core_text


def printable(text: str) -> str:
    """`core.text.printable`, where a line break is no harm."""
    return core_text.printable(text, keep="\n")


def shorten(text: str, length: int = 28) -> str:
    """Shorten to `length` characters by leaving out the middle: the ends of file names differ most."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]
