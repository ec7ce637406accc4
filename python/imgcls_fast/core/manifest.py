"""The list of images that a run works on: paths, labels, splits, sizes, digests; columnar and immutable."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import bounds
from .errors import DataError
from .files import parse_json, read_bounded, write_whole
from .labels import LabelSpace, demand_answers, hard_answers, task_targets
from .zips import ZipBounds, check_zip

__all__ = ["FLAG_PILLOW", "FLAG_SUSPECT", "FLAG_WIDE", "NO_SPLIT", "SPLITS", "Manifest", "PathList"]

SPLITS = ("train", "val", "test")  # codes 0, 1, 2 in Manifest.split
NO_SPLIT = 255

FLAG_PILLOW = 1  # the loader must decode this row with Pillow (GIF, 16 bit, ...): DALI has no equal decoder
FLAG_SUSPECT = 2  # no end marker, but a full decode succeeded
FLAG_WIDE = 4  # gray of more than 8 bits: how many of them are used is measured


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
    absolute. `split` is an index into SPLITS or NO_SPLIT. `answers` holds one array per task: (N,) int32 classes of a `one_of`
    task (-1: unknown) or (N, K_t) float32 probabilities (NaN: unknown), (N, K_t) int8 of an `any_of` task (0, 1, -1: unknown).
    """

    root: Path
    paths: PathList
    labels: LabelSpace
    answers: tuple[np.ndarray, ...]  # one per task
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
        if len(self.answers) != len(self.labels.tasks) or any(len(answer) != n for answer in self.answers):
            lengths = [len(answer) for answer in self.answers]
            raise ValueError(f"{len(self.labels.tasks)} tasks need as many answers of {n} rows, got {lengths}")

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """The file of one row (absolute, if root is)."""
        return self.root / self.paths[row]

    def rows(self, split: str) -> np.ndarray:
        """(n,) int64 row numbers of one split, in order."""
        return np.flatnonzero(self.split == SPLITS.index(split)).astype(np.int64)

    @cached_property
    def label(self) -> np.ndarray:
        """(N,) int32 class of each row of one-label data (of soft labels the most probable one), -1 where unknown.

        Raises:
            ValueError: the rows have labels of another kind: see `targets`, `stratum` and `labelled`.
        """
        if not self.labels.is_single:
            raise ValueError("only one-label data have one class per row")
        return hard_answers(self.answers[0], "one_of")

    @cached_property
    def labelled(self) -> np.ndarray:
        """(N,) bool: the rows of which any answer is known."""
        seen = [hard_answers(answer, task.kind) >= 0 for task, answer in zip(self.labels.tasks, self.answers, strict=True)]
        return np.logical_or.reduce([part if part.ndim == 1 else part.any(1) for part in seen])

    @cached_property
    def stratum(self) -> np.ndarray:
        """(N,) int64: rows with the same answers to everything share a number, -1 where nothing is known; one-label data: `label`."""
        if self.labels.is_single:
            return self.label.astype(np.int64)
        hard = [hard_answers(answer, task.kind) for task, answer in zip(self.labels.tasks, self.answers, strict=True)]
        together = np.concatenate([part.reshape(len(self), -1).astype(np.int32) for part in hard], axis=1)
        if not len(together):
            return np.zeros(0, np.int64)
        number = np.unique(together, axis=0, return_inverse=True)[1].reshape(-1)
        return np.where(self.labelled, number, -1).astype(np.int64)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """(n, K) float32 targets of `rows`: one-hot, 0 and 1, or probabilities; NaN where unknown."""
        parts = [task_targets(task, answer[rows]) for task, answer in zip(self.labels.tasks, self.answers, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def fair_order(self, rows: np.ndarray, seed: int = 0, *, each_first: bool = True) -> np.ndarray:
        """(n,) int64 `rows` in an order of which every beginning is a sample: one row of each class first, then by share.

        Rows lie sorted by path, so a slice of them is one class and one folder. Unknown labels count as a class, and so does each
        combination of labels, of which there may be as many as rows.

        Args:
            each_first: False: by share from the first row on, so that rare combinations do not crowd a short beginning.
        """
        draw = np.random.default_rng(seed)
        shuffled = draw.permutation(np.asarray(rows, np.int64))
        return shuffled[_fair_order(self.stratum[shuffled], draw, each_first)]

    def spread(self, rows: np.ndarray, n: int) -> np.ndarray:
        """(min(n, len(rows)),) int64, sorted: some of `rows`, each class in its share and none left out if n allows."""
        return np.sort(self.fair_order(rows)[: max(0, n)])

    def counts(self, split: str | None = None) -> np.ndarray:
        """(K,) int64 images of each class, in one split or in all; soft labels count by their most probable class."""
        return self._count(split, lambda part: part == 1, lambda label, k: np.bincount(label[label >= 0], minlength=k))

    def known_counts(self, split: str | None = None) -> np.ndarray:
        """(K,) int64 images of which it is known whether they belong to the class, in one split or in all."""
        return self._count(split, lambda part: part >= 0, lambda label, k: np.full(k, (label >= 0).sum()))

    def _count(
        self,
        split: str | None,
        holds: Callable[[np.ndarray], np.ndarray],
        count: Callable[[np.ndarray, int], np.ndarray],
    ) -> np.ndarray:
        """Counts per column: `holds` of the entries of `any_of` tasks, `count` of the classes of `one_of` tasks."""
        rows = slice(None) if split is None else self.rows(split)
        found = []
        for task, answer in zip(self.labels.tasks, self.answers, strict=True):
            part = hard_answers(answer[rows], task.kind)
            found.append(count(part, len(task.classes)) if part.ndim == 1 else holds(part).sum(0))
        return np.concatenate(found).astype(np.int64)

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
        for part in (self.paths.blob, self.paths.offsets, *self.answers, self.split, self.digest):
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
        answers = tuple(answer[rows] for answer in self.answers)
        return replace(self, paths=PathList.of(self.paths[np.asarray(rows)]), answers=answers, **columns)

    def save(self, path: Path) -> None:
        """Write as .npz, whole, without pickle."""
        usual = self.labels.is_single and self.answers[0].ndim == 1  # as earlier versions wrote and read them
        head = {
            "schema": 1 if usual else 2,
            "root": str(self.root),
            "labels": self.labels.to_dict(),
            "source": self.source,
            "group_names": list(self.group_names),
        }
        columns = {name: getattr(self, name) for name in _COLUMNS}
        columns |= dict(zip(["label"] if usual else _answer_names(self.labels), self.answers, strict=True))
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
            labels = LabelSpace.from_dict(head["labels"])
            if head["schema"] > 2:
                raise ValueError(f"a newer imgcls-fast wrote it (schema {head['schema']}, this one reads 2)")
            names = ["label"] if head["schema"] == 1 else _answer_names(labels)
            answers = tuple(columns.pop(name) for name in names)
            for task, answer in zip(labels.tasks, answers, strict=True):
                demand_answers(task, answer)
            _demand_sound(columns)
            paths = PathList(columns.pop("path_blob"), columns.pop("path_offsets"))
            return cls(
                root=Path(head["root"]),
                paths=paths,
                labels=labels,
                answers=answers,
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


def _answer_names(labels: LabelSpace) -> list[str]:
    """Columns of the file that hold the answers to each task."""
    return [f"answers_{k}" for k in range(len(labels.tasks))]


def _demand_sound(columns: dict[str, np.ndarray]) -> None:
    """Refuse columns that no scan writes: sizes beyond reason would size a table elsewhere.

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
_COLUMNS = ("split", "group", "width", "height", "orientation", "digest", "flags")


def _fair_order(stratum: np.ndarray, draw: np.random.Generator, each_first: bool) -> np.ndarray:
    """(n,) int64 positions in the order of `Manifest.fair_order`."""
    by_class = np.argsort(stratum, kind="stable")
    _, first, size = np.unique(stratum[by_class], return_index=True, return_counts=True)
    place = np.arange(len(stratum)) - np.repeat(first, size)  # within the class
    begin = np.zeros(len(size)) if each_first else draw.random(len(size))
    rank = np.empty(len(stratum))
    rank[by_class] = (place + np.repeat(begin, size)) / np.repeat(size, size)
    return np.argsort(rank, kind="stable")
