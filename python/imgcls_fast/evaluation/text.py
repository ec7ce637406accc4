"""File and class names as they can be shown: names come from strangers' disks and may hold anything."""

from __future__ import annotations


def printable(text: str) -> str:
    """The same text with every character that cannot be shown as itself written as an escape.

    Control characters, bytes that are not UTF-8 (surrogates) and marks that turn the direction of writing become
    `\\x00`, `\\udcff`, `\\u202e`; a line break stays.
    """
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(shown)


def shorten(text: str, length: int = 28) -> str:
    """At most `length` characters, the middle left out: ends of file names say more than their middles."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]
