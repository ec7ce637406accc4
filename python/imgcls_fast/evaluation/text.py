"""File and class names as they can be shown: names come from strangers' disks and may hold anything."""

from __future__ import annotations

from ..core import text as core_text


def printable(text: str) -> str:
    """`core.text.printable`, where a line break is no harm."""
    return core_text.printable(text, keep="\n")


def shorten(text: str, length: int = 28) -> str:
    """At most `length` characters, the middle left out: ends of file names say more than their middles."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]
