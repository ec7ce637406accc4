"""Names of classes and splits as folders and tables spell them: never two classes one without a word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# what people call the three splits, without the words around it; codes of core.manifest.SPLITS
_SPLIT_WORDS = (
    "train training trn trainval",
    "val valid validation validate dev devel development eval evaluation",
    "test testing tst holdout heldout",
)
SPLIT_NAMES = {word: code for code, words in enumerate(_SPLIT_WORDS) for word in words.split()}
_AROUND = re.compile(r"^(?:seg|img|imgs|images?|data)(?=.)|(?<=.)(?:sets?|data|dataset|images?|imgs?|split|folder)$")
_LETTERS = re.compile(r"[^\W\d_]+")
_BLANK = re.compile(r"(?<=\w)[\s_-]+(?=\w)")
_UNSEEN = ("Cf", "Cc")  # categories of Unicode: zero-width characters, marks of direction


@lru_cache(4096)  # a table asks in every row
def split_of(name: str) -> int | None:
    """The split that a folder, or a cell of a split column, is called after: "Training", "seg_test", "val-2017"; else None."""
    text = "".join(_LETTERS.findall(name.lower()))
    while text not in SPLIT_NAMES:
        shorter = _AROUND.sub("", text, count=1)
        if shorter == text:
            return None
        text = shorter
    return SPLIT_NAMES[text]


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
    if text.isascii():
        return True
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def alike(names: Iterable[str]) -> list[str]:
    """A sentence for each of the first groups of classes that people would take for one: 'Cat' and 'cat'."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    several = [sorted(group) for group in groups.values() if len(group) > 1]
    told = []
    for group in several[:5]:
        unseen = len({_visible(name) for name in group}) < len(group)
        how = "in characters that cannot be seen" if unseen else "in capitals, blanks or the like"
        told.append(f"the classes {' and '.join(map(ascii, group[:4]))} differ only {how}: kept apart; if they are one, rename one")
    more = f"{len(several) - 5:,} more groups of classes have names that are nearly the same"
    return told + ([more] if len(several) > 5 else [])


def _visible(name: str) -> str:
    if name.isascii() and name.isprintable():
        return name
    return "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) not in _UNSEEN)


def _folded(name: str) -> str:
    return _BLANK.sub(" ", _visible(name).casefold()).strip()
