"""What a source names before any file has been opened: rows, classes, and what is wrong with them."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from .spelling import Spellings

TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson")
# Names of images, supported or not: what is called so and is not one is reported; other files are passed over.
_READABLE = "jpg jpeg jpe jfif mpo png apng webp bmp dib tif tiff gif"
_FOREIGN = "jp2 j2k jpf jpx jxl avif heic heif svg psd pcx ppm pgm pbm pnm tga ico icns dds qoi exr hdr sgi rgb fits"
_RAW = "dcm raw cr2 nef arw dng"
IMAGE_ENDINGS = frozenset("." + name for name in f"{_READABLE} {_FOREIGN} {_RAW}".split())


@dataclass(frozen=True)
class Problem:
    """One thing that must be mended before work can start; the fields are those of an error."""

    code: str
    kind: str  # for counting: "missing file"
    message: str
    where: str = ""
    why: str = ""
    try_: str = ""


@dataclass
class Listed:
    """One task of a table whose labels are not simply one class per image; the answers are as in a manifest."""

    name: str
    kind: Literal["one_of", "any_of"]
    classes: list[str]
    answers: np.ndarray  # (N,) int32, (N, K) int8 or (N, K) float32
    how: str = ""  # what they were read from
    complete: bool = True  # an image has none of the classes that are not named

    def in_order(self, rows: np.ndarray) -> Listed:
        """Other rows, classes by name; names that have become equal are one class."""
        names = sorted(set(self.classes))
        number = {name: k for k, name in enumerate(names)}
        place = [number[name] for name in self.classes]
        old = self.answers[rows]
        if old.ndim == 1:
            return replace(self, classes=names, answers=np.array([*place, -1], np.int32)[old])
        new = np.zeros((len(old), len(names)), old.dtype)
        for k, to in enumerate(place):
            new[:, to] = np.maximum(new[:, to], old[:, k]) if to in place[:k] else old[:, k]
        return replace(self, classes=names, answers=new)


@dataclass
class Listing:
    """What the source names, before any file has been opened. All columns have one entry per row."""

    root: str  # absolute; relative paths are relative to it
    paths: list[str] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("i"))  # index into classes, -1: unknown
    splits: array[int] = field(default_factory=lambda: array("B"))
    groups: list[str] | None = None  # "": a group of its own
    classes: list[str] = field(default_factory=list)
    tasks: list[Listed] = field(default_factory=list)  # instead of labels and classes, where these are not enough
    columns: list[str] = field(default_factory=list)  # of a table
    explicit: bool = False  # every row was named by the user: none may be skipped as "not an image"
    strays: list[str] = field(default_factory=list)  # files beside the class folders
    ours: list[tuple[str, str]] = field(default_factory=list)  # folders passed over, and what they are: "a run"
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    spellings: Spellings = field(default_factory=Spellings)

    def add(self, path: str, label: int, split: int) -> None:
        """Append a row."""
        self.paths.append(path)
        self.labels.append(label)
        self.splits.append(split)

    def sorted(self) -> Listing:
        """Rows by path, classes by name (plain order, as torchvision's ImageFolder), so that a source has one order."""
        names = sorted(set(self.classes))
        renumber = {name: i for i, name in enumerate(names)}
        new = [renumber[name] for name in self.classes]
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        self.labels = array("i", (new[k] if (k := self.labels[i]) >= 0 else -1 for i in order))
        self.splits = array("B", (self.splits[i] for i in order))
        self.groups = None if self.groups is None else [self.groups[i] for i in order]
        self.paths = [self.paths[i] for i in order]
        self.tasks = [task.in_order(np.array(order, np.int64)) for task in self.tasks]
        self.classes = names
        return self


def is_named_as_image(path: str) -> bool:
    """Whether the ending is one of an image, supported or not: what is called so is never passed over."""
    return os.path.splitext(path)[1].lower() in IMAGE_ENDINGS


def is_table(path: Path) -> bool:
    """Whether the name is that of a list of images."""
    return path.suffix.lower() in TABLES
