"""Names of classes as folders and tables spell them, in whatever encoding: never two of them one without a word."""

from __future__ import annotations

import unicodedata


def class_name(text: str) -> str:
    """A class name as people see it: NFC, because macOS writes NFD. Bytes that are not UTF-8 stay apart, as lone surrogates."""
    return unicodedata.normalize("NFC", text)


def as_windows(text: str) -> str:
    """Text whose bytes are not UTF-8 as Windows-1252 has it, which Excel writes; unchanged where it is UTF-8, or neither."""
    if text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("cp1252")
    except UnicodeDecodeError:
        return text


class Spellings:
    """Which names became one class, so that no class swallows another without a word."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] = {}

    def add(self, name: str, spelled: str) -> None:
        """Take note that the class `name` was written so."""
        self._found.setdefault(name, set()).add(spelled)

    def rename(self, old: str, new: str) -> None:
        """Two names may become one so."""
        self._found.setdefault(new, set()).update(self._found.pop(old, set()))

    def notices(self) -> list[str]:
        """A sentence for each of the first classes that were written in several ways, and how many more there are."""
        several = [(name, sorted(spelled)) for name, spelled in self._found.items() if len(spelled) > 1]
        told = [f"{' and '.join(map(ascii, ways[:4]))} are taken as one class, {name!r}" for name, ways in several[:5]]
        more = f"{len(several) - 5:,} more classes are written in several ways"
        return told + ([more] if len(several) > 5 else [])


def is_text(text: str) -> bool:
    """Whether it can be written: JSON may hold one half of a character that has two."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
