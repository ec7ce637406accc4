"""Every error that a user can meet, on one page.

    ImgclsError                    exit code
      UsageError      U...         2   a wrong word on the command line
      ConfigError     C...         2   a wrong value in a setting
      DataError       D...         3   images, labels, splits
      ModelError      M...         2   architectures and weights
      HardwareError   H...         4   driver, memory, missing extra
      ExportError     E...         1   a graph that cannot be made
      GateFailed      E9..         5   made, judged and refused
      Interrupted     X130         130 stopped by a signal after a checkpoint

An error says what happened with full names and numbers, where, why, and the one command to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .text import printable

CODES: dict[str, str] = {
    "U001": "unknown command or option",
    "U002": "missing or malformed argument",
    "U003": "no such run",
    "U004": "benchmark results that cannot be read or compared",
    "C001": "unknown setting",
    "C002": "wrong type for a setting",
    "C003": "value outside its legal range or names",
    "C004": "settings that contradict each other",
    "C005": "configuration file that cannot be read",
    "D001": "no such data",
    "D002": "no images found",
    "D003": "fewer than two classes",
    "D004": "malformed label file",
    "D005": "a class without training images",
    "D006": "groups or images shared by several splits",
    "D007": "unsafe or damaged archive",
    "D008": "split that cannot be made",
    "D009": "damaged manifest",
    "D010": "data changed since the run began",
    "D012": "images that cannot be decoded",
    "D013": "too many bad images",
    "D014": "predictions that cannot be judged",
    "D015": "images that cannot be reached",
    "D016": "damaged or oversized file of a run",
    "D017": "several labels for one image",
    "M001": "unknown model",
    "M002": "weights that do not fit",
    "M003": "unknown or damaged weights file",
    "M004": "damaged bundle",
    "M005": "no usable checkpoint",
    "M006": "resume refused: the run would not be the same run",
    "M007": "pretrained weights are not on this machine",
    "M008": "training diverged",
    "H001": "no usable GPU",
    "H002": "out of memory",
    "H003": "no space or no permission to write",
    "H004": "missing optional library",
    "H005": "the run directory is in use by another process",
    "E001": "export failed",
    "E002": "exported graph breaks a rule of TensorRT",
    "E003": "INT8 quantisation failed",
    "E004": "engine cannot be built",
    "E005": "engine that does not belong to this machine or model",
    "E006": "native code of unknown origin",
    "E901": "exported model disagrees with the original",
    "E902": "exported model lost accuracy",
    "E903": "too few rows to judge the exported model",
    "E904": "pixels or scores differ between runtimes",
    "E905": "slower than before",
    "X001": "internal error",
    "X130": "interrupted",
}

_COMPARED = 3_000  # words with which a misspelt one is compared letter by letter
_EXIT_CODES = {"U": 2, "C": 2, "D": 3, "M": 2, "H": 4, "E": 1, "S": 1, "X": 1}


class ImgclsError(Exception):
    """A mistake or fault that is explained to the user on one screen, without a traceback.

    Args:
        code: a key of `CODES`.
        message: what is wrong, with the full name, what was expected and what came.
        where: file, line or setting.
        why: the reason, when it is not obvious.
        try_: exactly one command (or edit) that helps.
        details: where several things are wrong at once, one line for each.

    Raises:
        KeyError: `code` is not in the table (a programmer's mistake).
    """

    def __init__(
        self, code: str, message: str, *, where: str = "", why: str = "", try_: str = "", details: Sequence[str] = ()
    ) -> None:
        CODES[code]
        super().__init__(message)
        self.details = tuple(details)
        self.code, self.message, self.where, self.why, self.try_ = code, message, where, why, try_

    @property
    def hint(self) -> str:
        """`try_` in the words of whoever reads it: a command on the command line, a call in Python."""
        return _worded(self.try_)

    @property
    def exit_code(self) -> int:
        """The process exit code of this error."""
        return _EXIT_CODES[self.code[0]]

    def __str__(self) -> str:
        # a name with a line break in it must not be able to write a line of its own: "try: curl ..."
        lines = [f"error[{self.code}]: {printable(self.message)}", *(f"    {printable(_worded(line))}" for line in self.details)]
        for name, text in (("where", _worded(self.where)), ("why", self.why), ("try", self.hint)):
            if text:
                lines.append(f"  {name + ':':<6} {printable(text)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same facts for `--json`."""
        return {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "why": self.why,
            "try": self.try_,
            **({"details": list(self.details)} if self.details else {}),
        }


def _worded(text: str) -> str:
    from .hints import worded  # which needs the tables of flags, and these need this file

    return worded(text)


class UsageError(ImgclsError):
    """A wrong word on the command line."""


class ConfigError(ImgclsError):
    """A wrong value in a setting."""


class DataError(ImgclsError):
    """Images, labels or splits that cannot be used as they are."""


class ModelError(ImgclsError):
    """An architecture or weights that cannot be used."""


class HardwareError(ImgclsError):
    """Driver, memory, disk, or an optional library that is not installed."""


class ExportError(ImgclsError):
    """A graph that cannot be made."""


class GateFailed(ImgclsError):
    """Made, judged and refused: the numbers are in the message."""

    @property
    def exit_code(self) -> int:
        return 5


class Interrupted(ImgclsError):
    """Stopped by a signal after the work was saved."""

    @property
    def exit_code(self) -> int:
        return 130


def shortened(text: str, limit: int = 120) -> str:
    """What a message shows of a text that may be as long as a file."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _beginning_alike(word: str, known: Sequence[str]) -> list[str]:
    """At most `_COMPARED` words: the same one in other letters, else those that share the longest useful beginning."""
    found = list(known)
    if same := [other for other in found if other.lower() == word]:
        return same[:1]
    for length in range(1, len(word) + 1):
        fewer = [other for other in found if other[:length].lower() == word[:length]]
        if len(found) <= _COMPARED or not fewer:
            break
        found = fewer
    return found[:_COMPARED]


def near(word: str, known: list[str] | tuple[str, ...], cutoff: float = 0.6) -> str:
    """The known word that `word` most probably meant, or an empty string.

    Of many thousand words only those that begin alike are compared: each comparison takes some 50 microseconds.
    """
    from difflib import get_close_matches

    if len(known) > _COMPARED:
        known = _beginning_alike(word.lower(), known)
    found = get_close_matches(word.lower(), [k.lower() for k in known], n=1, cutoff=cutoff)
    return next((k for k in known if found and k.lower() == found[0]), "")
