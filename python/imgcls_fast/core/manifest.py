"""The list of images that a run works on: paths, labels, splits, sizes, digests; columnar and immutable."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from . import bounds
from .errors import DataError
from .files import parse_json, read_bounded, write_whole
from .zips import ZipBounds, check_zip

SPLITS = ("train", "val", "test")  # codes 0, 1, 2 in Manifest.split
NO_SPLIT = 255

FLAG_PILLOW = 1  # the loader must decode this row with Pillow (GIF, 16 bit, ...): DALI has no equal decoder
FLAG_SUSPECT = 2  # no end marker, but a full decode succeeded
FLAG_WIDE = 4  # gray of more than 8 bits: how many of them are used is measured


@dataclass(frozen=True)
class Task:
    """One question about an image: its name, its classes, and whether exactly one or any number of them holds."""

    name: str
    classes: tuple[str, ...]
    kind: Literal["one_of", "any_of"] = "one_of"


@dataclass(frozen=True)
class LabelSpace:
    """What each column of a score matrix means: the classes of all tasks, one task after the other."""

    tasks: tuple[Task, ...]

    @classmethod
    def single(cls, classes: Sequence[str]) -> LabelSpace:
        """The usual case: every image belongs to exactly one class."""
        return cls((Task("label", tuple(classes)),))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The name of every column."""
        return tuple(name for task in self.tasks for name in task.classes)

    @property
    def size(self) -> int:
        """K, the number of columns."""
        return len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        return {"tasks": [{"name": t.name, "classes": list(t.classes), "kind": t.kind} for t in self.tasks]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LabelSpace:
        return cls(tuple(Task(t["name"], tuple(t["classes"]), t["kind"]) for t in value["tasks"]))


class PathList(Sequence[str]):
    """Strings in one UTF-8 blob with offsets: 10 million paths cost their bytes, not 10 million objects."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob, self.offsets = blob, offsets  # uint8 (bytes,), int64 (n + 1,)

    @classmethod
    def of(cls, strings: Iterable[str]) -> PathList:
        # surrogateescape keeps names that are not UTF-8 readable and reversible
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice | np.ndarray | list):
            positions = range(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
            return [self[int(i)] for i in positions]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        i = int(index) % len(self)
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Manifest:
    """N images. A row's number is its identity everywhere: in batches, predictions and checkpoints.

    Sizes are as stored in the file; `orientation` (EXIF 1..8) says how to turn it. Paths are relative to `root`, or
    absolute. `label` is -1 where unknown; `split` is an index into SPLITS or NO_SPLIT.
    """

    root: Path
    paths: PathList
    labels: LabelSpace
    label: np.ndarray  # (N,) int32
    split: np.ndarray  # (N,) uint8
    group: np.ndarray  # (N,) int32, rows of one group never part; -1: a group of its own
    width: np.ndarray  # (N,) int32 pixels
    height: np.ndarray  # (N,) int32 pixels
    orientation: np.ndarray  # (N,) uint8
    digest: np.ndarray  # (N, 16) uint8, first half of the SHA-256 of the file
    flags: np.ndarray  # (N,) uint8, FLAG_*
    source: str = ""  # what the user named
    group_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        n = len(self.paths)
        for name in _COLUMNS:
            if len(getattr(self, name)) != n:
                raise ValueError(f"column {name} has {len(getattr(self, name))} rows, expected {n}")

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """The file of one row (absolute, if root is)."""
        return self.root / self.paths[row]

    def rows(self, split: str) -> np.ndarray:
        """(n,) int64 row numbers of one split, in order."""
        return np.flatnonzero(self.split == SPLITS.index(split)).astype(np.int64)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """(n, K) float32 one-hot targets of `rows`; all zero where the label is unknown."""
        hot = np.zeros((len(rows), self.labels.size), np.float32)
        label = self.label[rows]
        known = np.flatnonzero(label >= 0)
        hot[known, label[known]] = 1
        return hot

    def fair_order(self, rows: np.ndarray, seed: int = 0) -> np.ndarray:
        """(n,) int64 `rows` in an order of which every beginning is a sample: one row of each class first, then by share.

        Rows lie sorted by path, so a slice of them is one class and one folder. Unknown labels count as a class.
        """
        shuffled = np.random.default_rng(seed).permutation(np.asarray(rows, np.int64))
        by_class = np.argsort(self.label[shuffled], kind="stable")
        _, first, size = np.unique(self.label[shuffled][by_class], return_index=True, return_counts=True)
        place = np.arange(len(shuffled)) - np.repeat(first, size)  # within the class
        rank = np.empty(len(shuffled))
        rank[by_class] = place / np.repeat(size, size)
        return shuffled[np.argsort(rank, kind="stable")]

    def spread(self, rows: np.ndarray, n: int) -> np.ndarray:
        """(min(n, len(rows)),) int64, sorted: some of `rows`, each class in its share and none left out if n allows."""
        return np.sort(self.fair_order(rows)[: max(0, n)])

    def counts(self, split: str | None = None) -> np.ndarray:
        """(K,) int64 images of each class, in one split or in all."""
        label = self.label if split is None else self.label[self.rows(split)]
        return np.bincount(label[label >= 0], minlength=self.labels.size)

    def turned_size(self) -> tuple[np.ndarray, np.ndarray]:
        """(width, height), each (N,) int64, after the EXIF rotation has been applied."""
        swap = self.orientation >= 5
        return (
            np.where(swap, self.height, self.width).astype(np.int64),
            np.where(swap, self.width, self.height).astype(np.int64),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of content: classes and every row's path, label, split, group and bytes. The root does not matter."""
        h = hashlib.sha256(json.dumps(self.labels.to_dict(), sort_keys=True).encode("utf-8"))
        for part in (self.paths.blob, self.paths.offsets, self.label, self.split, self.digest):
            h.update(np.ascontiguousarray(part).tobytes())
        if (self.group >= 0).any():  # data without groups keep the digest that earlier versions gave them
            h.update(np.ascontiguousarray(self.group).tobytes())
            h.update(json.dumps(self.group_names).encode("utf-8"))
        return h.hexdigest()

    def with_splits(self, split: np.ndarray) -> Manifest:
        """The same images with other splits ((N,) uint8)."""
        return replace(self, split=split.astype(np.uint8))

    def take(self, rows: np.ndarray) -> Manifest:
        """Some of the rows, renumbered from 0."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return replace(self, paths=PathList.of(self.paths[np.asarray(rows)]), **columns)

    def save(self, path: Path) -> None:
        """Write as .npz, whole, without pickle."""
        head = {
            "schema": 1,
            "root": str(self.root),
            "labels": self.labels.to_dict(),
            "source": self.source,
            "group_names": list(self.group_names),
        }
        columns = {name: getattr(self, name) for name in _COLUMNS}
        columns |= {"path_blob": self.paths.blob, "path_offsets": self.paths.offsets}
        head["sha256"] = _sealed(head, columns)
        columns["head"] = np.frombuffer(json.dumps(head).encode("utf-8"), np.uint8)
        write_whole(path, lambda file: np.savez_compressed(file, allow_pickle=False, **columns))

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote. Manifests from before there were digests in them are read unchecked.

        Raises:
            DataError: D009 when the file is missing, damaged, beyond its bounds, or not a manifest.
        """
        try:
            content = io.BytesIO(read_bounded(path, bounds.MANIFEST_BYTES))
            check_zip(content, _ZIP)
            with np.load(content, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            head = parse_json(columns.pop("head").tobytes())
            digest = head.pop("sha256", None)
            if digest is not None and digest != _sealed(head, columns):
                raise ValueError("its content does not have the SHA-256 that it was written with")
            _demand_sound(columns, LabelSpace.from_dict(head["labels"]).size)
            paths = PathList(columns.pop("path_blob"), columns.pop("path_offsets"))
            return cls(
                root=Path(head["root"]),
                paths=paths,
                labels=LabelSpace.from_dict(head["labels"]),
                source=head["source"],
                group_names=tuple(head["group_names"]),
                **columns,
            )
        except _DAMAGE as error:
            text = f"the manifest {path} is missing or damaged: {error}"
            raise DataError("D009", text, try_="imgcls-fast data check DATA") from error


def _sealed(head: dict[str, Any], columns: dict[str, np.ndarray]) -> str:
    """SHA-256 of everything that is read back."""
    h = hashlib.sha256(json.dumps(head, sort_keys=True).encode("utf-8"))
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        h.update(f"{name} {column.dtype.str} {column.shape} ".encode())
        h.update(column.reshape(-1).view(np.uint8).data)
    return h.hexdigest()


def _demand_sound(columns: dict[str, np.ndarray], classes: int) -> None:
    """Refuse columns that no scan writes: a label beyond the classes would size a table elsewhere.

    Raises:
        ValueError: with the column's name.
    """
    offsets, n = columns["path_offsets"], len(columns["path_offsets"]) - 1
    if (
        offsets.ndim != 1
        or n < 0
        or offsets[0] != 0
        or offsets[-1] != len(columns["path_blob"])
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError("path_offsets do not divide path_blob")
    for name in ("path_blob", "path_offsets", *_COLUMNS):
        column = columns[name]
        if column.dtype.kind not in "iu" or column.ndim != (2 if name == "digest" else 1):
            raise ValueError(f"column {name} is {column.dtype} with {column.ndim} dimensions")
    for name, low, high in (
        ("label", -1, classes - 1),
        ("split", 0, NO_SPLIT),
        ("width", 0, 1 << 20),
        ("height", 0, 1 << 20),
    ):
        column = columns[name]
        if n and len(column) and (int(column.min()) < low or int(column.max()) > high):
            raise ValueError(f"column {name} holds values outside of {low:,} to {high:,}")


_ZIP = ZipBounds(
    entries=64,
    directory_bytes=bounds.MIB,
    unpacked_bytes=bounds.MANIFEST_UNPACKED_BYTES,
    ratio=bounds.MANIFEST_RATIO,
    ratio_from_bytes=bounds.MANIFEST_RATIO_FROM_BYTES,
)
# what zipfile, zlib and numpy raise at damaged bytes (found by damaging each byte)
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
)
_COLUMNS = ("label", "split", "group", "width", "height", "orientation", "digest", "flags")
