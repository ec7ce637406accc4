"""What a scan is asked (ScanOptions) and what it answers: a result, or all problems in one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import DataError
from ..core.labels import LabelSpace
from ..core.manifest import Manifest
from ..core.text import command
from . import decode
from .answers import LabelKind
from .listing import Problem
from .quarantine import BadFile
from .skipped import SkippedFile


@dataclass(frozen=True)
class ScanOptions:
    """What a scan checks and how it treats what it finds."""

    exif: decode.ExifPolicy = "apply"
    bad_images: Literal["quarantine", "error"] = "quarantine"
    max_bad: float = 0.2  # below 1: a share of all images; from 1 on: a count
    max_megapixels: float = 50.0
    verify: Literal["suspect", "full"] = "suspect"  # full: decode every image to its last pixel
    group_by: str | None = None  # regular expression on the path
    path_col: str | None = None  # columns of a table: None finds them, "" means that there is none
    label_col: str | None = None  # several with commas: a task each
    label_cols: str | None = None  # columns that are classes, with commas
    label_kind: LabelKind = "auto"
    split_col: str | None = None
    group_col: str | None = None
    duplicates: Literal["drop", "keep", "error"] = "drop"  # what happens to images in several given splits
    near_duplicates: bool = False  # a coarse hash: uniform subjects (cells, X-rays) may look alike to it
    threads: int = 0  # 0: as many as this process may use
    cache: Path | None = None  # where archives are unpacked; None: beside the archive
    classes: tuple[str, ...] | None = None  # only these, in this order
    labels: LabelSpace | None = None  # of a model that answers more than one class per image: its tasks and classes only
    purpose: Literal["train", "judge", "predict"] = "train"  # judge: no rule about training rows; predict: no labels
    advice: bool = True  # notices about what would be better: no gray images as RGB, no uneven classes
    color: str = "auto"  # what training was asked to read
    weighted: bool = False  # class weights were asked for
    pretrained: bool = False  # weights to begin with were asked for
    bits: int | None = None  # bits that 16-bit gray images use, where that was asked for

    @property
    def labelled(self) -> bool:
        """Whether every row needs a label."""
        return self.purpose != "predict"


@dataclass(frozen=True, eq=False)
class ScanResult:
    """What a scan found. With problems, `manifest` holds the rows that are good so far, for looking only."""

    manifest: Manifest
    quarantine: tuple[BadFile, ...] = ()
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()
    skipped: int = 0  # files that are no images
    dropped: int = 0  # duplicates across splits that were removed
    skipped_files: tuple[SkippedFile, ...] = ()  # the first of them, with their reasons
    unknown_classes: Mapping[str, int] = field(default_factory=dict)  # usable images of classes that were not asked for

    def to_dict(self) -> dict[str, Any]:
        """What `api.check_data` returns."""
        counts = zip(self.manifest.labels.classes, self.manifest.counts(), strict=True)
        return {
            **task_facts(self.manifest),
            "ok": not self.problems,
            "line": self.summary(),
            "problems": [vars(problem) for problem in self.problems],
            "quarantine": [{"path": file.path, "reason": file.reason} for file in self.quarantine],
            "notices": list(self.notices),
            "skipped": self.skipped,
            "skipped_files": [vars(file) for file in self.skipped_files],
            "duplicates_removed": self.dropped,
            "counts": {name: int(n) for name, n in counts},
        }

    def summary(self) -> str:
        """The data line: images, classes, smallest class, quarantined, duplicates removed."""
        counts = self.manifest.counts()
        tasks = self.manifest.labels.tasks
        parts = [f"{len(self.manifest):,} images", f"{self.manifest.labels.size} classes"]
        parts[1] += f" of {len(tasks)} tasks" if len(tasks) > 1 else ""
        if len(counts):
            parts.append(f"smallest {counts.min():,}")
        parts.append(f"{len(self.quarantine):,} quarantined")
        if self.dropped:
            parts.append(f"{self.dropped:,} duplicate{'s' * (self.dropped != 1)} across splits removed")
        return ", ".join(parts)


def task_facts(manifest: Manifest) -> dict[str, Any]:
    """{"tasks": ...}: name, kind, images per class and unknown images of each task; nothing for one-label data."""
    if manifest.labels.is_single:
        return {}
    counts, known = manifest.counts(), manifest.known_counts()
    tasks = [
        {
            "name": task.name,
            "kind": task.kind,
            "counts": {name: int(n) for name, n in zip(task.classes, counts[part], strict=True)},
            "unknown": {name: len(manifest) - int(n) for name, n in zip(task.classes, known[part], strict=True) if n < len(manifest)},
        }
        for task, part in manifest.labels.parts
    ]
    return {"tasks": tasks}


class DataProblems(DataError):
    """Everything that a scan found wrong, in one error; `problems` is the full list."""

    def __init__(self, problems: Sequence[Problem], source: str) -> None:
        first = problems[0]
        self.problems = tuple(problems)
        if len(problems) == 1:
            super().__init__(first.code, first.message, where=first.where or source, why=first.why, try_=first.try_)
            return
        counts = Counter(p.kind for p in problems)
        kinds = ", ".join(f"{n:,} x {kind}" for kind, n in counts.items())
        examples = [next(p for p in problems if p.kind == kind) for kind in list(counts)[:5]]
        super().__init__(
            first.code,
            f"{len(problems):,} problems in {source}: {kinds}",
            where=first.where or source,
            details=[f"{p.where + ': ' if p.where else ''}{p.message}" for p in examples],
            try_=first.try_ or command("data", "check", source, "--json"),
        )
