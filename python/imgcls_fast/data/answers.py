"""Finds out what the cells of label columns mean (one class, several, probabilities) and what is wrong with a cell."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from .separators import SEPARATORS, joined_labels
from .spelling import class_name

Kind = Literal["one_of", "any_of"]
LabelKind = Literal["auto", "one_of", "any_of"]
_TRUTH = {"true": 1.0, "false": 0.0}
_SHOWN = 4  # faults of one cell
_SUM = 0.02  # most that rounding may take from a sum of probabilities

Fault = tuple[str, str]  # kind of problem, and what is wrong


@dataclass
class Answers:
    """The answers of the distinct cells of one task.

    `table` has a row per distinct cell and a last row for "unknown", which the code -1 finds: (C + 1,) int32 classes of a
    one_of task, (C + 1, K) int8 of an any_of task (1, 0, -1 unknown), (C + 1, K) float32 probabilities (NaN unknown).
    """

    kind: Kind
    classes: list[str]
    table: np.ndarray
    faults: dict[int, Fault] = field(default_factory=dict)  # number of a cell -> what is wrong with it
    how: str = ""  # what the answers were read from, for a notice
    complete: bool = True  # a cell names every class that holds: what it does not name does not hold


class LabelColumn(Protocol):
    """Collects the cells of one task row by row, then finds out what they mean."""

    task: str
    names: tuple[str, ...]  # its columns
    codes: array[int]  # the row's cell as a number, -1 where it is empty

    def code(self, record: Mapping[str, Any]) -> int:
        """Number the cell of a row; -1 where it is empty."""
        ...

    def answers(self, kind: LabelKind) -> Answers:
        """Find out what the cells mean, once all are there."""
        ...

    def shown(self) -> list[str]:
        """The cells as the table has them, for messages; empty where columns are too many to show."""
        ...

    def spellings(self) -> Iterable[tuple[str, str]]:
        """(class, text of the table) of everything that was written."""
        ...


# ---------------------------------------------------------------- one column of names


@dataclass(frozen=True)
class Shares:
    """A cell of JSON that is an object: class -> probability."""

    pairs: tuple[tuple[str, Any], ...]


Cell = str | tuple[str, ...] | Shares


class NameColumn:
    """A column whose cells name classes: "cat", "cat|dog", and in JSON ["cat", "dog"] or {"cat": 0.9, "dog": 0.1}."""

    def __init__(self, task: str, column: str) -> None:
        self.task = task
        self.names: tuple[str, ...] = (column,)
        self.codes: array[int] = array("i")
        self.cells: dict[Cell, int] = {}
        self.spelled: dict[str, int] = {"": -1}  # text -> cell, so that a name is looked at once and not in each row

    def code(self, record: Mapping[str, Any]) -> int:
        value = record.get(self.names[0])
        if isinstance(value, str) or value is None:
            code = self.spelled.get(value or "")
            if code is None:
                name = class_name((value or "").strip())
                code = self.spelled[value or ""] = self.cells.setdefault(name, len(self.cells)) if name else -1
            return code
        cell: Cell = Shares(tuple(value.items())) if isinstance(value, dict) else tuple(map(_text, value))
        return self.cells.setdefault(cell, len(self.cells))

    def shown(self) -> list[str]:
        plain = (list(c) if isinstance(c, tuple) else dict(c.pairs) if isinstance(c, Shares) else c for c in self.cells)
        return [repr(cell) for cell in plain]

    def spellings(self) -> Iterable[tuple[str, str]]:
        names = list(self.cells)
        return [(name, text) for text, k in self.spelled.items() if k >= 0 and isinstance(name := names[k], str)]

    def answers(self, kind: LabelKind) -> Answers:
        cells = list(self.cells)
        if any(isinstance(cell, Shares) for cell in cells):
            return _of_shares(cells, kind)
        lists = any(isinstance(cell, tuple) for cell in cells)
        found = None if kind == "one_of" else joined_labels([cell for cell in cells if isinstance(cell, str)])
        if kind == "any_of" or (lists and kind == "auto") or found:
            separator = found.separator if found else "" if lists else _first_separator(cells)
            return _of_several(cells, separator)
        return _of_names(cells)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _first_separator(cells: Iterable[Cell]) -> str:
    """The sign that occurs in most cells; "" when none does."""
    counts = [sum(isinstance(cell, str) and sign in cell for cell in cells) for sign in SEPARATORS]
    return SEPARATORS[int(np.argmax(counts))] if max(counts) else ""


def _of_names(cells: Sequence[Cell]) -> Answers:
    classes: dict[str, int] = {}
    table = np.full(len(cells) + 1, -1, np.int32)
    faults: dict[int, Fault] = {}
    for k, cell in enumerate(cells):
        if isinstance(cell, str):
            table[k] = classes.setdefault(cell, len(classes))
        else:
            faults[k] = ("several labels", "is a list, and data.label_kind is one_of: one class per image")
    return Answers("one_of", list(classes), table, faults)


def _of_several(cells: Sequence[Cell], separator: str) -> Answers:
    """Answers of cells with any number of classes: the parts between separators, or the items of a list."""
    parts = [_parts(cell, separator) for cell in cells]
    others = [sign for sign in SEPARATORS if sign != separator]
    whole = {part for found in parts for part in found if not any(sign in part for sign in others)}
    classes: dict[str, int] = {}
    faults: dict[int, Fault] = {}
    for k, (cell, found) in enumerate(zip(cells, parts, strict=True)):
        if fault := _fault_of(cell, found, separator, others, whole):
            faults[k] = fault
            continue
        for part in found:
            classes.setdefault(part, len(classes))
    table = np.zeros((len(cells) + 1, len(classes)), np.int8)
    for k, found in enumerate(parts):
        if k in faults:
            table[k] = -1
        else:
            table[k, [classes[part] for part in found]] = 1
    table[-1] = -1
    lists = any(isinstance(cell, tuple) for cell in cells)
    how = f"separator {separator}" if separator else "lists" if lists else "data.label_kind"
    return Answers("any_of", list(classes), table, faults, how)


def _parts(cell: Cell, separator: str) -> list[str]:
    if isinstance(cell, str):
        return [class_name(part.strip()) for part in cell.split(separator)] if separator else [cell]
    return [class_name(part.strip()) for part in cell] if isinstance(cell, tuple) else []


def _fault_of(cell: Cell, parts: list[str], separator: str, others: Sequence[str], whole: set[str]) -> Fault | None:
    if not all(parts):
        sign = f" between two signs {separator!r}, or at an end" if isinstance(cell, str) else ""
        return "empty label", f"has an empty label{sign}: take the sign away, or write the class"
    twice = sorted({part for part in parts if parts.count(part) > 1})
    if twice:
        return "label twice in a cell", f"names {', '.join(map(repr, twice))} twice: once is enough"
    for sign in others if isinstance(cell, str) else ():
        for part in parts:
            if sign in part and whole.issuperset(p.strip() for p in part.split(sign)):
                usual = f"{separator!r} stands in the other rows" if separator else "the other rows are lists"
                return "mixed separators", f"parts its labels with {sign!r}, and {usual}: use one sign"
    return None


def _of_shares(cells: Sequence[Cell], kind: LabelKind) -> Answers:
    """Answers of JSON objects, with a probability per class; a plain name among them is certain."""
    classes: dict[str, int] = {}
    faults: dict[int, Fault] = {}
    values: list[dict[str, float]] = []
    for k, cell in enumerate(cells):
        pairs = cell.pairs if isinstance(cell, Shares) else ((cell, 1.0),) if isinstance(cell, str) else ()
        wrong = [] if pairs else ["is a list among probabilities: write an object" if isinstance(cell, tuple) else "is empty"]
        found: dict[str, float] = {}
        for text, value in pairs:
            name = class_name(text.strip())
            wrong += _wrong_share(text, value)
            wrong += [f"names {name!r} twice"] if name in found else [] if name else ["has a class without a name"]
            found[name] = float(value) if not _wrong_share(text, value) else 0.0
        if not wrong and kind != "any_of":
            wrong += _wrong_sum(sum(found.values()), sum(v > 0 for v in found.values()))
        if wrong:
            faults[k] = ("wrong probability", ", ".join(wrong[:_SHOWN]))
        else:
            for name in found:
                classes.setdefault(name, len(classes))
        values.append(found)
    table = np.zeros((len(cells) + 1, len(classes)), np.float32)
    for k, found in enumerate(values):
        if k not in faults:
            table[k, [classes[name] for name in found]] = list(found.values())
    return _shared(table, list(classes), faults, "any_of" if kind == "any_of" else "one_of", "probabilities")


def _wrong_share(name: str, value: Any) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [f"has {value!r} for {name}, which is no number"]
    if not 0 <= value <= 1:  # also NaN
        return [f"has {value:g} for {name}: a probability lies between 0 and 1"]
    return []


def _wrong_sum(total: float, parts: int) -> list[str]:
    """The fault of probabilities that do not sum to 1; small differences come from rounding and are forgiven."""
    slack = min(_SUM, 0.005 * parts) + 1e-6
    return [] if abs(total - 1) <= slack else [f"has probabilities that sum to {total:.4g}, and not to 1"]


def _shared(table: np.ndarray, classes: list[str], faults: dict[int, Fault], kind: Kind, how: str) -> Answers:
    """Answers of probabilities: rows of one_of are scaled to a sum of exactly 1."""
    if kind == "one_of":
        table = table / np.maximum(table.sum(1, keepdims=True), 1e-12)
    table[[*faults, -1]] = np.nan
    return Answers(kind, classes, table.astype(np.float32), faults, how)


# ---------------------------------------------------------------- a column per class


class MarkColumns:
    """Columns that are classes: 0 and 1 (any number of them may hold), or probabilities."""

    def __init__(self, task: str, columns: Sequence[str], classes: Sequence[str], kind: Kind | None = None) -> None:
        self.task, self.names, self.kind = task, tuple(columns), kind
        self.classes = [class_name(name.strip()) for name in classes]
        self.codes: array[int] = array("i")
        self.cells: dict[tuple[str, ...], int] = {}

    def code(self, record: Mapping[str, Any]) -> int:
        cell = tuple(_text(record.get(name)).strip() for name in self.names)
        return self.cells.setdefault(cell, len(self.cells)) if any(cell) else -1

    def shown(self) -> list[str]:
        return []

    def spellings(self) -> Iterable[tuple[str, str]]:
        return ()

    def answers(self, kind: LabelKind) -> Answers:
        values = np.full((len(self.cells) + 1, len(self.names)), np.nan)
        faults: dict[int, Fault] = {}
        for k, cell in enumerate(self.cells):
            numbers = [_number(text) for text in cell]
            wrong = [f"{text!r} in {name}" for text, name, v in zip(cell, self.names, numbers, strict=True) if v is None]
            if wrong:
                what = "is neither 0 nor 1 nor a probability; where it is unknown, write nothing"
                faults[k] = ("neither 0 nor 1", f"has {', '.join(wrong[:_SHOWN])}, which {what}")
            else:
                values[k] = [np.nan if v is None else v for v in numbers]
        return self._answers(values, faults, self.kind or kind)

    def _answers(self, values: np.ndarray, faults: dict[int, Fault], kind: LabelKind) -> Answers:
        rows = np.array([k for k in range(len(self.cells)) if k not in faults], np.int64)
        marks = np.isnan(values) | (values == 0) | (values == 1)
        wrong = {k: _wrong_row(values[k]) for k in rows.tolist()}
        sound = np.array([not wrong[k] for k in rows.tolist()], bool)
        if kind != "any_of" and marks[rows].all() and (kind == "one_of" or sound.all()):
            return self._one_hot(values, faults, rows[~sound])
        if kind == "one_of" or (kind == "auto" and not marks[rows].all() and 2 * sound.sum() >= len(rows)):
            faults |= {k: ("wrong probability", wrong[k]) for k in rows[~sound].tolist()}
            return _shared(np.nan_to_num(values), self.classes, faults, "one_of", "probabilities")
        if kind == "any_of" and not marks[rows].all():
            values[list(faults)] = np.nan
            return Answers("any_of", self.classes, values.astype(np.float32), faults, "probabilities", complete=False)
        for k in rows[~marks[rows].all(1)].tolist():
            odd = [f"{v:g} in {name}" for v, name in zip(values[k], self.names, strict=True) if 0 < v < 1]
            faults[k] = ("neither 0 nor 1", f"has {', '.join(odd[:_SHOWN])}, which is neither 0 nor 1 as in the other rows")
        values[list(faults)] = np.nan
        table = np.where(np.isnan(values), -1, values).astype(np.int8)
        return Answers("any_of", self.classes, table, faults, "0/1 columns", complete=False)

    def _one_hot(self, values: np.ndarray, faults: dict[int, Fault], others: np.ndarray) -> Answers:
        """Answers where exactly one column holds in each row: an image belongs to one class."""
        for k in others.tolist():
            faults[k] = ("several labels", f"has {np.nansum(values[k]):g} columns with 1, and data.label_kind is one_of")
        table = np.where(np.isnan(values).all(1), -1, np.nan_to_num(values).argmax(1)).astype(np.int32)
        table[list(faults)] = -1
        return Answers("one_of", self.classes, table, faults, "0/1 columns, one per image")


def _wrong_row(values: np.ndarray) -> str:
    """What keeps a row from being probabilities that sum to 1; "" when nothing does."""
    if np.isnan(values).any():
        return "has a probability for some classes only"
    return "".join(_wrong_sum(float(values.sum()), int((values > 0).sum())))


def _number(text: str) -> float | None:
    """NaN where the cell is empty, None where it holds no number from 0 to 1."""
    if not text:
        return np.nan
    known = _TRUTH.get(text.lower())
    if known is not None:
        return known
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None
