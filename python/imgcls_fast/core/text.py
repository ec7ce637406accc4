"""Names of files and classes, as they are shown and as they are written. They come from strangers' disks and hold any bytes.

Python keeps a byte that is not UTF-8 as a lone surrogate (`surrogateescape`): two different names stay different, and can be
turned into the bytes again. So that they stay so, whatever holds a name is written here:

    shown (terminal, log.txt, HTML, labels.txt)   `printable`: control characters, direction marks and such bytes as escapes
    JSON and YAML                                 `to_json`, `to_yaml`: the same characters as escapes of the format; read back exactly
    CSV                                           `to_csv`: as bytes, quoted; read back exactly by `csv.reader` with surrogateescape

Standard library only, but for `to_yaml`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

_QUOTED = re.compile(r'[",\r\n]|^\s|\s$')


def printable(text: str, *, keep: str = "") -> str:
    """The same text with every character that cannot be shown as itself written as an escape.

    Control characters, bytes that are not UTF-8 (surrogates), marks that turn the direction of writing and spaces that look
    like another become `\\x1b`, `\\udcff`, `\\u202e`, `\\u3000`.

    Args:
        keep: characters that stay all the same: "\\n" in a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def command(*words: object) -> str:
    """The command line `imgcls-fast WORDS` so that a shell takes each word as it is meant; empty words and None are left out.

    A word that cannot be shown as itself (a byte that is not UTF-8, a line break) is written in bash's form, $'...'.
    """
    return " ".join(["imgcls-fast", *(quoted(str(word)) for word in words if word not in (None, ""))])


def quoted(word: str) -> str:
    """One word of a command line, quoted where a shell would take it apart."""
    if word.isprintable():
        return shlex.quote(word)
    try:
        content = word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no name of a file: from a JSON file, say
        return shlex.quote(printable(word))
    return "$'" + "".join(f"\\{b:03o}" if b < 32 or b > 126 or b in b"\\'" else chr(b) for b in content) + "'"


def some(names: Iterable[str], most: int = 3, more: str = ", +{:,} more") -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (more.format(len(names) - most) if len(names) > most else "")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that any reader takes and that is safe to look at: what cannot be shown is escaped, other scripts stay readable."""
    # JSON has no bare line break inside of a string, so every line can be looked at alone; few need a look at characters
    lines = json.dumps(value, indent=indent, ensure_ascii=False).split("\n")
    return "\n".join(line if line.isprintable() else "".join(map(_json_safe, line)) for line in lines)


def _json_safe(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Lines of a CSV file, ended by a line feed; what has a quote, a comma, an edge of spaces or a line break is quoted.

    Python's own writer leaves a lone carriage return unquoted (until 3.12), which its reader then refuses.
    """
    return "".join(",".join(map(_csv_cell, row)) + "\n" for row in rows)


def _csv_cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return '"' + text.replace('"', '""') + '"' if _QUOTED.search(text) else text


def to_yaml(value: Any) -> str:
    """YAML that `yaml.safe_load` reads back to an equal value; readable, and ASCII where something in it cannot be shown."""
    import yaml

    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=False)
