"""Finds which columns of a table hold the path, the labels, the split and the group; every fault of the header at once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import near, shortened
from ..core.labels import Task
from .answers import Kind, LabelColumn, LabelKind, MarkColumns, NameColumn
from .listing import Problem
from .records import COLUMNS
from .spelling import as_windows, class_name

ONE_TASK = "label"  # the name of the task where there is one
_JOINT = re.compile(r"(?P<task>.+?)(?: \((?P<kind>one_of|any_of)\))?: (?P<name>.+)", re.DOTALL)


def joint_name(task: Task, name: str) -> str:
    """The name of a column that is one class of a task, so that a scan finds it again with its kind."""
    return f"{task.name} ({task.kind}): {name}"


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns: None finds them, "" means that there is none."""

    path: str | None = None
    label: str | None = None  # several with commas: a task each
    split: str | None = None
    group: str | None = None
    labels: str | None = None  # columns that are classes, with commas
    kind: LabelKind = "auto"
    kinds: dict[str, Kind] = field(default_factory=dict)  # of the tasks of a model
    classes: tuple[str, ...] = ()  # of a model with one task


@dataclass
class Chosen:
    """The columns of a table by role, and what is wrong with its header."""

    roles: dict[str, str] = field(default_factory=dict)  # path, split, group -> column
    labels: list[LabelColumn] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class _Header:
    """The names of a header, and what is asked of them."""

    def __init__(self, names: list[str], place: str) -> None:
        self.names, self.place, self.table = names, place, os.path.basename(place)
        self.chosen = Chosen()

    def problem(self, kind: str, message: str, *, line: str = "", try_: str = "") -> None:
        """Note what is wrong with the header, or with what was asked for."""
        self.chosen.problems.append(Problem("D004", kind, f"{self.table} {message}", where=self.place + line, try_=try_))

    def lacks(self, role: str, wanted: str, try_: str) -> None:
        """Note that a column is not there."""
        what = f"no column {wanted!r}" if wanted else f"no column for the {role} ({', '.join(COLUMNS[role])})"
        self.problem("missing column", f"has {what}; its columns are: {shortened(', '.join(self.names), 400)}", try_=try_)

    def exact(self, wanted: str) -> str | None:
        """The column of this name, as the header writes it."""
        return next((name for name in self.names if wanted in (name, as_windows(name))), None)

    def known(self, role: str) -> str | None:
        """The likeliest column for a role, by the usual names."""
        known = [name for name in self.names if name.strip().lower() in COLUMNS[role]]
        return min(known, key=lambda name: COLUMNS[role].index(name.strip().lower()), default=None)

    def all_of(self, flag: str, wanted: list[str]) -> list[str]:
        """The columns of these names; each that is not there is a problem."""
        found = []
        for k, name in enumerate(wanted):
            column = self.exact(name)
            if column is None:
                hint = near(name, self.names)
                self.lacks("", name, f"--{flag} {','.join([*wanted[:k], hint, *wanted[k + 1 :]])}" if hint else "")
            elif column in found:
                self.problem("column named twice", f"has one column {column!r}, and --{flag} names it twice", try_="name it once")
            else:
                found.append(column)
        return found


def choose_columns(names: list[str], columns: Columns, place: str, *, labelled: bool) -> Chosen:
    """Find the columns in the names of a header.

    Args:
        names: the header.
        columns: names that were asked for.
        place: full name of the table.
        labelled: whether a label column is needed.
    """
    header = _Header(names, place)
    chosen = header.chosen
    _choose_role(header, "path", columns.path)
    if not columns.path and "path" not in chosen.roles:
        header.lacks("path", "", "--path-col NAME")
    _choose_labels(header, columns)
    if labelled and not (chosen.labels or columns.label or columns.labels):
        header.lacks("label", "", "--label-col NAME")
    _choose_role(header, "split", columns.split)
    _choose_role(header, "group", columns.group)
    _refuse_doubles(header)
    return chosen


def _choose_role(header: _Header, role: str, wanted: str | None) -> None:
    found = header.all_of(f"{role}-col", [wanted]) if wanted else [header.known(role)] if wanted is None else []
    if found and found[0]:
        header.chosen.roles[role] = found[0]


def _choose_labels(header: _Header, columns: Columns) -> None:
    labels = header.chosen.labels
    if columns.label and columns.labels:
        what = "is asked for labels in two ways: --label-col names columns that hold classes, --label-cols columns that are classes"
        header.problem("two ways to the labels", what, try_="give one of --label-col and --label-cols")
    asked = _listed(header, columns.labels or columns.label or "")
    several = len(columns.kinds) > 1 and not columns.labels  # other data may have the columns of some tasks only
    there = [bool(header.exact(name)) for name in asked]
    if columns.kinds and (columns.labels or len(asked) > 1) and not (all(there) if several else any(there)):
        labels += _usual_labels(header, columns)  # other data of a model may name the same labels in another form
    if not labels and not any(map(header.exact, asked)):
        labels += _columns_of_classes(header, columns)
    if labels:
        return
    if columns.labels:
        labels += _marks(header.all_of("label-cols", asked))
    elif columns.label:
        labels += [NameColumn(ONE_TASK if len(asked) == 1 else name, name) for name in header.all_of("label-col", asked)]
    elif columns.label is None:
        labels += _usual_labels(header, columns)


def _usual_labels(header: _Header, columns: Columns) -> list[LabelColumn]:
    """The label columns of a table by their names: those of a model's tasks, the usual ones, or a split's."""
    of_model = [name for name in map(header.exact, columns.kinds) if name] if len(columns.kinds) > 1 else []
    if of_model:
        return [NameColumn(class_name(as_windows(name)), name) for name in of_model]
    known = header.known("label")
    return [NameColumn(ONE_TASK, known)] if known else _marks([name for name in header.names if _JOINT.fullmatch(name)])


def _columns_of_classes(header: _Header, columns: Columns) -> list[LabelColumn]:
    """The columns that are called as a model's classes, where no other column holds labels."""
    found = [name for name in map(header.exact, columns.classes) if name and name not in map(header.known, ("path", "split", "group"))]
    enough = "any_of" in columns.kinds.values() or len(found) == len(columns.classes)
    if not found or not enough or columns.label == "" or _usual_labels(header, columns):
        return []
    return [MarkColumns(ONE_TASK, found, [class_name(as_windows(name)) for name in found])]


def _listed(header: _Header, text: str) -> list[str]:
    """Names with commas between them; a column whose name holds a comma is one name."""
    return [text] if header.exact(text) else [name.strip() for name in text.split(",") if name.strip()]


def _marks(columns: Sequence[str]) -> list[LabelColumn]:
    """One task of these columns; one per beginning where all are named "TASK: CLASS", or "TASK (any_of): CLASS"."""
    parts = [_JOINT.fullmatch(name) for name in columns]
    if not all(parts):
        return [MarkColumns(ONE_TASK, columns, columns)]
    tasks: dict[tuple[str, Any], list[tuple[str, str]]] = {}
    for name, found in zip(columns, parts, strict=True):
        if found:
            tasks.setdefault((class_name(found["task"].strip()), found["kind"]), []).append((name, found["name"]))
    return [
        MarkColumns(task, [name for name, _ in found], [own for _, own in found], kind)
        for (task, kind), found in tasks.items()
    ]


def _refuse_doubles(header: _Header) -> None:
    chosen = header.chosen
    named = [*chosen.roles.items(), *(("label", name) for column in chosen.labels for name in column.names)]
    for role, name in named:
        if header.names.count(name) > 1:
            header.problem(
                "two columns of one name",
                f"has {header.names.count(name)} columns that are called {name!r}",
                line=", line 1",
                try_=f"rename all but one of them, or name another with --{role}-col",
            )
