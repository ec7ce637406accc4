"""Tables and lists for people. Each function prints on a rich console; none computes anything."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..core.text import printable

_NAMING = frozenset(("seed", "split_seed", "row", "line", "epoch", "best_epoch", "step", "opset", "port", "pid"))
_SECTIONS = frozenset(("data", "pixels", "augment", "model", "loss", "optim", "train", "evaluate", "export"))
_TIMES = frozenset(("began", "ended", "created"))  # seconds since 1970
MAX_ROWS = 40  # of one table on a terminal; files and --json hold all
_WORD = 30  # characters: a longer text in a list is a sentence


def table(
    console: Any,
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Iterable[int] = (),
    limit: int | None = MAX_ROWS,
) -> None:
    """A table on a terminal, tab-separated lines in a pipe.

    Args:
        numbers: the columns that are aligned to the right.
        limit: rows shown on a terminal; the others are counted.
    """
    heads = [printable(head) for head in heads]
    lines = [[printable(text(cell, heads[k] if k < len(heads) else "")) for k, cell in enumerate(row)] for row in rows]
    if not console.is_terminal:
        for line in [heads, *lines]:
            print("\t".join(line), file=console.file)  # rich would turn tabs into spaces
        return
    from rich import box
    from rich.table import Table

    right = set(numbers)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for k, head in enumerate(heads):
        drawn.add_column(head, justify="right" if k in right else "left", overflow="fold")
    for line in lines[:limit]:
        drawn.add_row(*line)
    console.print(drawn)
    if limit is not None and len(lines) > limit:
        say(console, f"... and {len(lines) - limit:,} more (all with --json)", "dim")


def say(console: Any, line: str, style: str = "") -> None:
    """One line that is never cut. A line break in it, a file's name perhaps, is shown as an escape."""
    console.print(printable(line), style=style or None, soft_wrap=True)


def block(console: Any, lines: str) -> None:
    """Several lines."""
    for line in lines.split("\n"):
        say(console, line)


def facts(console: Any, values: Mapping[str, Any], indent: int = 0, *, names: bool = False) -> None:
    """Names and values; nested mappings are indented, lists of mappings become tables.

    With `names`, the keys are names of the user's (classes), which are shown as they are.
    """
    shown = str if names else words
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping) and not _is_table(value)}
    width = max((len(name) for name in plain), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            if value:
                say(console, " " * indent + shown(name), "bold")
                facts(console, value, indent + 2, names=True)
        elif _is_table(value):
            say(console, " " * indent + words(name), "bold")
            heads = list(dict.fromkeys(key for row in value for key in row))
            table(console, heads, ([row.get(head) for head in heads] for row in value))
        else:
            lines = value if _is_prose(value) else [text(value, name)]
            for k, line in enumerate(lines):
                say(console, f"{' ' * indent}{'' if k else shown(name):<{width}}  {line}")


def _is_prose(value: Any) -> bool:
    """Whether a list holds sentences, which stand better on a line each."""
    return isinstance(value, list | tuple) and any(isinstance(part, str) and len(part) > _WORD for part in value)


def words(name: str) -> str:
    """A key as words."""
    return str(name).replace("_", " ")


def text(value: Any, name: str = "") -> str:
    """One cell: numbers with separators and four digits, nothing as a dash.

    Args:
        name: what the value is of. Settings ("section.name") are shown as one writes them, numbers that only name something
            (seeds, rows, epochs) without separators, and times as dates.
    """
    section, _, key = str(name).rpartition(".")
    setting = section in _SECTIONS
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in _TIMES and isinstance(value, int | float):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if isinstance(value, int):
        return str(value) if setting or key in _NAMING else f"{value:,}"
    if isinstance(value, float) and setting:
        return f"{value:g}"
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".") if 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(text(item, name) for item in value) or "-"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {text(item, key)}" for key, item in value.items()) or "-"
    return str(value)


def share(value: Any) -> str:
    """A figure in 0..1 with three digits."""
    return "-" if value is None or value != value else f"{value:.3f}"


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)
