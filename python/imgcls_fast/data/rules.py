"""The rules that turn a listing and its examined files into a manifest: what is left out, what is wrong, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from imgcls_fast.core.errors import DataError, near
from imgcls_fast.core.manifest import NO_SPLIT, SPLITS, LabelSpace, Manifest, PathList
from imgcls_fast.core.text import command, some

from . import advice, decode, duplicates, fetch, skipped, sources
from .listing import is_named_as_image
from .quarantine import BadFile
from .skipped import SkippedFile
from .sources import Listing, Problem

if TYPE_CHECKING:
    from .scan import Files


_SHOWN = 10  # of a kind in the notices


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
    label_col: str | None = None
    split_col: str | None = None
    group_col: str | None = None
    duplicates: Literal["drop", "keep", "error"] = "drop"  # of images in several given splits
    near_duplicates: bool = False  # a coarse hash: uniform subjects (cells, X-rays) may look alike to it
    threads: int = 0  # 0: as many as this process may use
    cache: Path | None = None  # where archives are unpacked; None: beside the archive
    classes: tuple[str, ...] | None = None  # only these, in this order
    purpose: Literal["train", "judge", "predict"] = "train"  # judge: no rule about training rows; predict: no labels
    advice: bool = True  # notices about what would be better: no gray images as RGB, no uneven classes
    color: str = "auto"  # what training was asked to read
    weighted: bool = False  # class weights were asked for
    pretrained: bool = False  # weights to begin with were asked for
    bits: int | None = None  # that 16-bit gray uses, where training was told


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
        parts = [f"{len(self.manifest):,} images", f"{self.manifest.labels.size} classes"]
        if len(counts):
            parts.append(f"smallest {counts.min():,}")
        parts.append(f"{len(self.quarantine):,} quarantined")
        if self.dropped:
            parts.append(f"{self.dropped:,} duplicate{'s' * (self.dropped != 1)} across splits removed")
        return ", ".join(parts)


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


class Tabulation:
    """Turns listing and files into a manifest, dropping what must not be in it and noting why."""

    def __init__(self, listing: Listing, files: Files, options: ScanOptions, source: str) -> None:
        self.listing, self.files, self.options, self.source = listing, files, options, source
        self.problems, self.notices = list(dict.fromkeys(listing.problems)), list(listing.notices)
        self.dropped = 0
        self.unknown: dict[str, int] = {}
        self.classes = list(listing.classes)
        self.label = np.array(listing.labels, np.int32)
        self.split = np.array(listing.splits, np.uint8)
        self.group, self.group_names = _group_codes(listing.groups, len(listing.paths))

    def finish(self) -> ScanResult:
        """Apply the rules, one after the other."""
        self._choose_classes()
        near = self._near_units()
        bad = self._quarantine()
        rows = self.files.good()
        rows = rows[self.label[rows] >= 0] if self.options.purpose != "predict" else rows
        self._note_two_labels(rows)
        rows = self._keep_splits_apart(rows, duplicates.same_bytes(self.files.digest[rows]), "duplicate")
        if near is not None:
            rows = self._keep_splits_apart(rows, near[rows], "near duplicate")
            self._join_near(rows, near)
        self._check_groups(rows)
        self._remove_empty_classes(rows)
        self._check_classes(rows)
        self._advise(rows)
        strays, others = self.listing.strays, [self._path(row) for row in np.flatnonzero(self.files.skip).tolist()]
        self.notices += skipped.note([path for path in strays if not is_named_as_image(path)] + others, "skipped")
        manifest = self._manifest(rows)
        return ScanResult(
            manifest, bad, tuple(self.problems), tuple(self.notices), len(strays) + len(others), self.dropped,
            skipped_files=skipped.first_skipped(self.listing.root, strays, others), unknown_classes=self.unknown,
        )  # fmt: skip

    def _advise(self, rows: np.ndarray) -> None:
        """Notices about classes and channels, for training only."""
        if self.options.purpose != "train":
            return
        counts = np.bincount(self.label[rows], minlength=len(self.classes))
        if problem := advice.several_labels(self.classes, counts, self.listing.columns, self.source):
            self.problems.append(problem)
        if problem or not self.options.advice:
            return
        learnt = rows[(self.split[rows] == NO_SPLIT) | (self.split[rows] == SPLITS.index("train"))]
        self.notices += advice.about_depth(self.files, learnt, self.options.bits)
        if self.options.color in ("auto", "rgb"):
            self.notices += advice.about_channels(self.files.full, self.files.head, rows, self.options.max_megapixels)
        asked = {"weighted": self.options.weighted, "pretrained": self.options.pretrained}
        self.notices += advice.about_classes(self.classes, counts, **asked)

    def _path(self, row: int) -> str:
        return self.listing.paths[row]

    def _choose_classes(self) -> None:
        """Keep only the classes that were asked for, in that order; rows of others get label -1 and are left out."""
        wanted = self.options.classes
        if wanted is None or self.options.purpose == "predict":
            return
        place = {name: i for i, name in enumerate(wanted)}
        table = np.array([place.get(name, -1) for name in self.classes] + [-1], np.int32)
        good = self.files.good()
        counts = np.bincount(self.label[good][self.label[good] >= 0], minlength=len(self.classes))
        self.unknown = {name: int(n) for name, n in zip(self.classes, counts, strict=True) if name not in place and n}
        self.notices += [about_unknown(self.unknown, wanted)] if self.unknown else []
        self.label = table[self.label]
        for name in wanted:
            if name not in self.classes and self.options.purpose == "train":
                self.problems.append(Problem("D005", "missing class", f"class {name!r} has no images in {self.source}"))
        self.classes = list(wanted)

    def _quarantine(self) -> tuple[BadFile, ...]:
        """The bad files, and the problem that there are too many or that there may be none."""
        out = []
        for row in sorted(self.files.reasons):
            split, label = int(self.split[row]), int(self.label[row])
            if label < 0 and self.options.classes is not None and self.options.purpose != "predict":
                continue  # of a class that is left out
            out.append(
                BadFile(
                    self._path(row),
                    self.files.reasons[row],
                    SPLITS[split] if split != NO_SPLIT else "",
                    self.classes[label] if label >= 0 else "",
                    int(self.files.head["size_bytes"][row]),
                )
            )
        total = len(out) + len(self.files.good())
        if out and self.options.bad_images == "error":
            self.problems.append(
                self._bad_problem("D012", "undecodable image", out, total, "quarantine is off (--bad-images error)")
            )
        elif out and len(out) > self._allowed(total):
            share = " of all" if self.options.max_bad < 1 else ""
            why = f"at most {self.options.max_bad:g}{share} may be bad (--max-bad)"
            self.problems.append(self._bad_problem("D013", "too many bad images", out, total, why))
        return tuple(out)

    def _allowed(self, total: int) -> float:
        limit = self.options.max_bad
        return limit * total if limit < 1 else limit

    def _bad_problem(self, code: str, kind: str, bad: list[BadFile], total: int, why: str) -> Problem:
        first = f"{bad[0].path} ({bad[0].reason})"
        more = f", +{len(bad) - 1:,} more" if len(bad) > 1 else ""
        count = f"{len(bad):,} of {total:,} images cannot be decoded"
        reasons = ", ".join(f"{n:,} x {r}" for r, n in Counter(b.reason.split(":")[0] for b in bad).most_common(4))
        if code == "D012":
            fix = command("train", self.source, "--bad-images", "quarantine")
            return Problem(code, kind, count, where=first + more, why=why, try_=fix)
        fix = command("train", self.source, "--max-bad", len(bad))
        return Problem(code, kind, f"{count}: {reasons}", where=first + more, why=why, try_=fix)

    def _note_two_labels(self, rows: np.ndarray) -> None:
        same = duplicates.same_bytes(self.files.digest[rows])
        parts = duplicates.two_labels(same, self.label[rows])
        for part in parts[:_SHOWN]:
            _, first = np.unique(self.label[rows[part]], return_index=True)
            shown = sorted({0, 1, *first.tolist()})[:_SHOWN]  # one of each label at least
            names = [f"{self._path(int(r))} ({self.classes[self.label[r]]})" for r in rows[part[shown]]]
            more = f" and {len(part) - len(shown):,} more files" if len(part) > len(shown) else ""
            self.notices.append(f"the same image has {len(first)} labels: {', '.join(names)}{more}")
        if len(parts) > _SHOWN:
            self.notices.append(f"{len(parts) - _SHOWN:,} more images have several labels")

    def _keep_splits_apart(self, rows: np.ndarray, unit: np.ndarray, what: str) -> np.ndarray:
        """Remove from train (or val) what is also in val or test; the test rows never change."""
        keep = duplicates.keep_highest_split(unit, self.split[rows])
        lost = rows[~keep]
        if not len(lost):
            return rows
        if self.options.duplicates == "drop":
            self.dropped += len(lost)
            where = Counter(SPLITS[s] if s != NO_SPLIT else "rows without split" for s in self.split[lost].tolist())
            parts = ", ".join(f"{n:,} from {name}" for name, n in where.items())
            plural = "s" if len(lost) > 1 else ""
            self.notices.append(
                f"{len(lost):,} {what}{plural} across splits removed ({parts}), e.g. {self._path(int(lost[0]))}"
            )
            return rows[keep]
        text = f"{len(lost):,} images are {what}s of images in another split, e.g. {self._path(int(lost[0]))}"
        if self.options.duplicates == "error":
            fix = command("train", self.source, "--set", "data.duplicates=drop")
            self.problems.append(Problem("D006", f"{what} across splits", text, try_=fix))
        else:
            self.notices.append(f"{text}: kept, so the test figures flatter the model")
        return rows

    def _near_units(self) -> np.ndarray | None:
        """(N,) int64 clusters of images that look alike, or None when not asked for."""
        if not self.options.near_duplicates:
            return None
        rows = self.files.good()
        unit = np.arange(len(self.label)) + len(self.label)
        if len(rows):
            unit[rows] = duplicates.near_units(self.files.perceptual(rows))
        return np.unique(unit, return_inverse=True)[1].astype(np.int64)

    def _join_near(self, rows: np.ndarray, near: np.ndarray) -> None:
        """Images that look alike join one group, so that no split parts them."""
        _, unit, size = np.unique(near[rows], return_inverse=True, return_counts=True)
        alike = int((size[size > 1]).sum())
        if not alike:
            return
        pairs = np.where(size[unit] > 1, unit, -1)
        merged = duplicates.joined(self.group[rows], pairs)
        self.notices.append(
            f"{alike:,} images look like another one ({int((size > 1).sum()):,} clusters): kept together in any split"
        )
        _, first, code, count = np.unique(merged, return_index=True, return_inverse=True, return_counts=True)
        grouped = (count[code] > 1) | (self.group[rows] >= 0)
        names: dict[int, str] = {}
        for unit_code in np.unique(code[grouped]).tolist():
            member = int(rows[first[unit_code]])
            old = int(self.group[member])
            names[unit_code] = self.group_names[old] if old >= 0 else f"like {self._path(member)}"
        numbers = {c: i for i, c in enumerate(names)}
        self.group[rows] = [
            numbers.get(c, -1) if g else -1 for c, g in zip(code.tolist(), grouped.tolist(), strict=True)
        ]
        self.group_names = tuple(names.values())

    def _check_groups(self, rows: np.ndarray) -> None:
        mixed = duplicates.crossing(self.group[rows], self.split[rows])
        if not mixed:
            return
        total = len(np.unique(self.group[rows][self.group[rows] >= 0]))
        images = sum(len(part) for part in mixed)
        part = rows[mixed[0]]
        shown = ", ".join(
            f"{name} {int((self.split[part] == code).sum())}"
            for code, name in enumerate(SPLITS)
            if (self.split[part] == code).any()
        )
        example = f"group {self.group_names[self.group[part[0]]]!r}: {shown}"
        text = (
            f"{len(mixed):,} of {total:,} groups ({images:,} images) are in several of the given splits, e.g. {example}"
        )
        self.problems.append(
            Problem(
                "D006",
                "group across splits",
                text,
                why="the model would be judged on groups that it has learnt from",
                try_=command("data", "split", self.source),
            )
        )

    def _remove_empty_classes(self, rows: np.ndarray) -> None:
        if self.options.classes is not None or not self.classes:
            return
        counts = np.bincount(self.label[rows][self.label[rows] >= 0], minlength=len(self.classes))
        if (counts > 0).all():
            return
        gone = [name for name, n in zip(self.classes, counts, strict=True) if n == 0]
        self.notices.append(f"no usable image in {len(gone)} of the classes, left out: {', '.join(gone[:5])}")
        renumber = np.append(np.cumsum(counts > 0) - 1, -1).astype(np.int32)
        renumber[:-1][counts == 0] = -1
        self.label = renumber[self.label]
        self.classes = [name for name, n in zip(self.classes, counts, strict=True) if n]

    def _check_classes(self, rows: np.ndarray) -> None:
        told = {p.code for p in self.problems}
        if not len(rows):
            if self.unknown and self.options.purpose == "judge":
                self.problems.append(_no_known_class(self.unknown, self.classes, self.source))
            elif "D002" not in told:
                self.problems.append(Problem("D002", "no images", f"no usable images in {self.source}"))
            return
        if self.options.purpose != "train":
            return
        if len(self.classes) < 2 and not self.listing.problems:  # else the other class may be in the rows at fault
            name = f" ({self.classes[0]!r})" if self.classes else ""
            text = f"{self.source} has {len(self.classes)} class{name}, and a classifier needs at least 2"
            why = "each class is a folder of its own, or a name in the label column of a table"
            self.problems.append(Problem("D003", "fewer than two classes", text, why=why, try_=_elsewhere(Path(self.source))))
        split, label = self.split[rows], self.label[rows]
        if (split == NO_SPLIT).any():
            return  # training rows are still to be chosen
        counts = [np.bincount(label[split == code], minlength=len(self.classes)) for code in range(len(SPLITS))]
        for k in np.flatnonzero((counts[0] == 0) & (counts[1] + counts[2] > 0)).tolist():
            given = f"{counts[1][k]:,} val and {counts[2][k]:,} test images"
            text = f"class {self.classes[k]!r} has {given} and no training images"
            self.problems.append(Problem("D005", "class without training images", text))

    def _manifest(self, rows: np.ndarray) -> Manifest:
        head = self.files.head
        present, group = np.unique(self.group[rows], return_inverse=True)
        names = tuple(self.group_names[g] for g in present if g >= 0)
        group = group - int((present < 0).any())
        return Manifest(
            root=Path(self.listing.root),
            paths=PathList.of(self.listing.paths[r] for r in rows.tolist()),
            labels=LabelSpace.single(self.classes),
            label=self.label[rows],
            split=self.split[rows],
            group=group.astype(np.int32),
            width=head["width"][rows].astype(np.int32),
            height=head["height"][rows].astype(np.int32),
            orientation=head["orientation"][rows].astype(np.uint8),
            digest=self.files.digest[rows],
            flags=self.files.flags[rows],
            source=self.source,
            group_names=names,
        )


def about_unknown(unknown: Mapping[str, int], known: Sequence[str]) -> str:
    """How many images have classes that a model does not know, and which; empty where there are none."""
    if not unknown:
        return ""
    images, kinds = sum(unknown.values()), len(unknown)
    what = f"{images:,} image{'s' * (images != 1)} of {kinds:,} class{'es' * (kinds != 1)} that the model does not know"
    return f"{what} {'were' if images != 1 else 'was'} left out: {_listed(unknown, known)}"


def _listed(unknown: Mapping[str, int], known: Sequence[str]) -> str:
    """Classes with their number of images, and the class of the model that may be meant."""
    names = sorted(unknown, key=lambda name: -unknown[name])
    parts = []
    meant = _meant(names, known)
    for name in names[:_SHOWN]:
        parts.append(f"{name} {unknown[name]:,}" + (f" (perhaps the model's {meant[name]})" if name in meant else ""))
    return ", ".join(parts) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _meant(names: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The classes of the model that the first few names may mean; comparing all with all would take minutes."""
    same = {other.casefold(): other for other in reversed(known)}
    found = {name: same.get(name.casefold()) or near(name, list(known)) for name in names[:_SHOWN]}
    return {name: other for name, other in found.items() if other}


def _no_known_class(unknown: Mapping[str, int], known: Sequence[str], source: str) -> Problem:
    """None of the images has a class of the model: both sides are named, and what is spelled almost alike."""
    several = len(unknown) != 1
    theirs = f"none of the {len(unknown):,} classes" if several else "the only class"
    ours = some(known, _SHOWN, " and {:,} more")
    pairs = _meant(sorted(unknown, key=lambda name: -unknown[name]), known)
    renamed = ", ".join(f"{name} to {meant}" for name, meant in pairs.items())
    return Problem(
        "D014",
        "classes of another model",
        f"{theirs} of {source} is {'a class of the model' if several else 'no class of the model'}: {_listed(unknown, known)}",
        why=f"the model knows {ours}",
        try_=f"rename {renamed}" if renamed else "name the folders, or the labels of the table, as the model's classes",
    )


def _elsewhere(source: Path) -> str:
    """The command for the table or the one folder inside `source` that was probably meant."""
    if not source.is_dir():
        return ""
    inside = sorted(p for p in source.iterdir() if not fetch.is_ignored(p.name))
    tables = [p for p in inside if sources.is_table(p) and p.suffix.lower() != ".txt"]
    folders = [p for p in inside if p.is_dir() and any(q.is_dir() and not fetch.is_ignored(q.name) for q in p.iterdir())]
    meant = tables[0] if len(tables) == 1 else folders[0] if len(folders) == 1 else None
    return command("data", "check", meant) if meant else ""


def _group_codes(groups: list[str] | None, n: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """((N,) int32 codes, names in sorted order); "" becomes -1."""
    if groups is None:
        return np.full(n, -1, np.int32), ()
    names = sorted(set(groups) - {""})
    code = {name: i for i, name in enumerate(names)} | {"": -1}
    return np.fromiter((code[g] for g in groups), np.int32, n), tuple(names)
