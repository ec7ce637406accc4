"""Scores of a model for each row: the only thing that metrics, reports and comparisons see."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import DataError
from .files import read_sealed, sha256_file, write_sealed, write_text, write_whole
from .labels import LabelSpace, known
from .text import to_csv


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of a model for rows of one manifest, sorted by row, each row once.

    Args:
        rows: (n,) int64 row numbers, strictly increasing.
        scores: (n, K) float32 probabilities.
        targets: (n, K) float32: one-hot, 0 and 1, or probabilities; NaN where unknown. None where no labels are known at all.
        labels: what column k means.
        paths: n file names, in the order of `rows`.
        fingerprint: fingerprint of the manifest that the rows belong to.
        thresholds: (K,) float32, least scores of the classes of `any_of` tasks; None: 0.5.

    Raises:
        ValueError: lengths disagree, or rows are not strictly increasing.
    """

    rows: np.ndarray
    scores: np.ndarray
    targets: np.ndarray | None
    labels: LabelSpace
    paths: tuple[str, ...]
    fingerprint: str = ""
    thresholds: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.rows)
        if self.scores.shape != (n, self.labels.size) or len(self.paths) != n:
            wanted = f"{n} rows need scores ({n}, {self.labels.size}) and {n} paths"
            raise ValueError(f"{wanted}, got {self.scores.shape} and {len(self.paths)}")
        if self.targets is not None and self.targets.shape != self.scores.shape:
            raise ValueError(f"targets {self.targets.shape} do not fit scores {self.scores.shape}")
        if n and (np.diff(self.rows) <= 0).any():
            raise ValueError("rows must be strictly increasing: each row counts exactly once")
        if self.thresholds is not None and self.thresholds.shape != (self.labels.size,):
            raise ValueError(f"{self.labels.size} columns need as many thresholds, got {self.thresholds.shape}")

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def answers(self) -> np.ndarray:
        """(n, K) bool: what the scores stand for, see `LabelSpace.decide`."""
        return self.labels.decide(self.scores, self.thresholds)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(n,) int64: the column with the highest score."""
        return self.scores.argmax(1).astype(np.int64)

    @cached_property
    def confidence(self) -> np.ndarray:
        """(n,) float32: the highest score."""
        return self.scores.max(1) if len(self) else np.zeros(0, np.float32)

    @cached_property
    def truth(self) -> np.ndarray:
        """(n,) int64: the column of the true class.

        Raises:
            DataError: D004 where the rows have no labels.
        """
        if self.targets is None:
            raise DataError("D004", "these predictions have no labels, so they cannot be judged")
        return self.targets.argmax(1).astype(np.int64)

    @classmethod
    def gather(
        cls,
        rows: Sequence[np.ndarray],
        scores: Sequence[np.ndarray],
        targets: Sequence[np.ndarray] | None,
        labels: LabelSpace,
        path_of: Sequence[str],
        fingerprint: str = "",
        thresholds: np.ndarray | None = None,
    ) -> Predictions:
        """Join the batches of one or several workers: padding (row -1) goes, rows are sorted, each row is kept once.

        Args:
            rows, scores, targets: one array per batch.
            path_of: file name of each row of the manifest (indexed by row number).
        """
        row = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        _, first = np.unique(row, return_index=True)
        first = first[row[first] >= 0]
        score = np.concatenate(scores) if scores else np.zeros((0, labels.size), np.float32)
        target = None if targets is None else (np.concatenate(targets) if targets else np.zeros_like(score))
        return cls(
            rows=row[first].astype(np.int64),
            scores=np.ascontiguousarray(score[first], np.float32),
            targets=None if target is None else target[first].astype(np.float32),
            labels=labels,
            paths=tuple(path_of[i] for i in row[first]),
            fingerprint=fingerprint,
            thresholds=thresholds,
        )

    def take(self, keep: np.ndarray) -> Predictions:
        """Some of the rows, by an (n,) bool mask."""
        targets = None if self.targets is None else self.targets[keep]
        paths = tuple(path for path, stays in zip(self.paths, keep, strict=True) if stays)
        return replace(self, rows=self.rows[keep], scores=self.scores[keep], targets=targets, paths=paths)

    def of_task(self, k: int) -> Predictions:
        """The predictions of one task: its columns, and the rows of which its answer is known (all, without labels)."""
        task, part = self.labels.parts[k]
        one = self if self.targets is None else self.take(known(self.targets, part))
        return replace(
            one,
            scores=np.ascontiguousarray(one.scores[:, part]),
            targets=None if one.targets is None else np.ascontiguousarray(one.targets[:, part]),
            labels=LabelSpace((task,)),
            thresholds=None if one.thresholds is None else one.thresholds[part],
        )

    @property
    def _usual(self) -> bool:
        """Whether one name per row holds all that is known, as in one-label data without probabilities."""
        return self.labels.is_single and (self.targets is None or not ((self.targets > 0) & (self.targets < 1)).any())

    def save(self, directory: Path) -> None:
        """Write scores.npy (row-aligned), predictions.csv for people and predictions.json (labels, fingerprint).

        Labels that one name per row cannot hold are in targets.npy.
        """
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {"scores.npy": self.scores}
        if self.targets is not None and not self._usual:
            arrays["targets.npy"] = self.targets
        for name, array in arrays.items():
            write_whole(directory / name, partial(_write_array, array))
        write_text(directory / "predictions.csv", self.to_csv())
        meta: dict[str, Any] = {"labels": self.labels.to_dict(), "fingerprint": self.fingerprint}
        meta["has_targets"] = self.targets is not None
        if self.thresholds is not None:
            meta["thresholds"] = self.thresholds.tolist()
        meta["digests"] = {name: sha256_file(directory / name) for name in (*arrays, "predictions.csv")}
        write_sealed(directory / "predictions.json", meta)

    def to_csv(self) -> str:
        """One line per row: row, path; label (if known), pred, confidence of each task; then one probability per class.

        Several tasks have their names before these columns ("color: label"). Several classes of one image are joined by "|";
        `any_of` tasks have no confidence.
        """
        tasks = self.labels.parts
        head: list[Any] = ["row", "path"]
        for task, _ in tasks:
            names = ["label", "pred"] if task.kind == "any_of" else ["label", "pred", "confidence"]
            head += names if len(tasks) == 1 else [f"{task.name}: {name}" for name in names]
        lines: list[list[Any]] = [[*head, *[f"p:{name}" for name in self.labels.classes]]]
        for i, row in enumerate(self.rows):
            line = [row, self.paths[i]]
            for task, part in tasks:
                line.append("" if self.targets is None else task.words(self.targets[i, part]))
                line.append(task.words(self.answers[i, part]))
                if task.kind == "one_of":
                    line.append(f"{self.scores[i, part].max():.6g}")
            lines.append([*line, *[f"{s:.6g}" for s in self.scores[i]]])
        return to_csv(lines)

    @classmethod
    def load(cls, directory: Path) -> Predictions:
        """Read what `save` wrote.

        Raises:
            DataError: D001 when a file is missing or damaged.
        """
        try:
            meta = read_sealed(directory / "predictions.json")
            for name, digest in meta.get("digests", {}).items():  # of versions before, none
                if sha256_file(directory / name) != digest:
                    raise ValueError(f"{name} is damaged: its SHA-256 is not the one in predictions.json")
            # mapped: a header that claims more than the file holds is refused before memory is asked for
            scores = np.array(np.load(directory / "scores.npy", mmap_mode="r", allow_pickle=False))
            with open(directory / "predictions.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
                table = list(csv.DictReader(file))
            labels = LabelSpace.from_dict(meta["labels"])
            targets = None
            if "targets.npy" in meta.get("digests", {}):
                targets = np.array(np.load(directory / "targets.npy", mmap_mode="r", allow_pickle=False))
            elif meta["has_targets"]:
                column = {name: k for k, name in enumerate(labels.classes)}
                named = [k for k, line in enumerate(table) if line["label"]]
                targets = np.zeros_like(scores)
                targets[[k for k, line in enumerate(table) if not line["label"]]] = np.nan
                targets[named, [column[table[k]["label"]] for k in named]] = 1
            least = meta.get("thresholds")
            thresholds = None if least is None else np.array(least, np.float32)
            rows = np.array([int(line["row"]) for line in table], np.int64)
            return cls(rows, scores, targets, labels, tuple(line["path"] for line in table), meta["fingerprint"], thresholds)
        except (OSError, ValueError, LookupError, TypeError, EOFError, AttributeError, csv.Error) as error:
            message = f"no readable predictions in {directory}: {error}"
            raise DataError("D001", message, try_="imgcls-fast eval RUN") from error


def _write_array(array: np.ndarray, file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)
