"""What passes between the parser, a verb and the terminal. Standard library only."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from ..core.errors import ImgclsError
from ..core.text import printable


@dataclass(frozen=True)
class Request:
    """A parsed command line: the verb, its positional words, and only those options that were given."""

    verb: str
    things: tuple[str, ...]
    options: Mapping[str, Any]
    words: tuple[str, ...] = ()  # the command line as it was typed

    def get(self, keyword: str, default: Any = None) -> Any:
        return self.options.get(keyword, default)

    def thing(self, place: int = 0) -> str | None:
        """A positional word, or None."""
        return self.things[place] if place < len(self.things) else None


@dataclass(frozen=True)
class Answer:
    """What a verb found.

    Args:
        value: what `--json` prints.
        show: prints the same for people, on a rich console; None where everything has been shown.
        line: the result in one line, for `--quiet`.
        exit_code: 0, or why not.
        result: prints what `--quiet` is to show on a console, where that is more than a line.
        text: printed as it is, instead of `show`, so that no console has to be imported.
    """

    value: dict[str, Any]
    show: Callable[[Any], None] | None = None
    line: str = ""
    exit_code: int = 0
    text: str = ""
    result: Callable[[Any], None] | None = None


@dataclass
class Session:
    """How to talk: as JSON or to people, and the warnings so far."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    warnings: list[str] = field(default_factory=list)
    stdout: IO[str] = field(default_factory=lambda: sys.stdout)

    def note(self, text: str) -> None:
        """Say something once, on stderr."""
        print(f"note: {printable(text)}", file=sys.stderr)

    def warn(self, text: str) -> None:
        """Say something that must not be overlooked; it is repeated at the end."""
        if text not in self.warnings:
            self.warnings.append(text)
            print(f"warning: {printable(text)}", file=sys.stderr)

    def answer(self, found: Answer) -> int:
        """Print what a verb found; the exit code."""
        if self.json:
            self._json({**found.value, "warnings": self.warnings})
        elif self.quiet:
            if found.result is not None:
                from ..tracking.console import make_console

                found.result(make_console(self.stdout))
            elif found.line:
                print(printable(found.line, keep="\n"), file=self.stdout)
        elif found.text:
            print(printable(found.text, keep="\n"), file=self.stdout)
        elif found.show is not None:
            from ..tracking.console import make_console

            found.show(make_console(self.stdout))
        self.stdout.flush()
        self.repeat_warnings()
        return found.exit_code

    def fail(self, error: ImgclsError) -> int:
        """Print an error on one screen; the exit code."""
        if self.json:
            self._json({"error": error.to_dict() | {"exit_code": error.exit_code}, "warnings": self.warnings})
        self.repeat_warnings()
        print(str(error), file=sys.stderr)
        return error.exit_code

    def repeat_warnings(self) -> None:
        """All warnings again, counted: the first ones have scrolled away by now."""
        if self.warnings:
            print(f"{len(self.warnings)} warning{'s' * (len(self.warnings) > 1)}:", file=sys.stderr)
            for text in self.warnings:
                print(f"  {printable(text)}", file=sys.stderr)

    def _json(self, value: dict[str, Any]) -> None:
        print(json.dumps(plain(value), ensure_ascii=True, allow_nan=False), file=self.stdout, flush=True)


def plain(value: Any) -> Any:
    """The same facts as JSON can hold them: NaN and infinity become null, paths text, arrays lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for convert in ("to_dict", "tolist"):  # objects of the API, NumPy arrays and numbers
        if hasattr(value, convert):
            return plain(getattr(value, convert)())
    return str(value)
