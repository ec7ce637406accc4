"""The rules that turn a listing and its examined files into a manifest: what is left out, what is wrong, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..core.manifest import NO_SPLIT, SPLITS, LabelSpace, Manifest, PathList
from ..core.text import command
from . import advice, duplicates, fetch, skipped
from .examine import Files
from .findings import ScanOptions, ScanResult
from .listing import Listing, Problem, is_named_as_image, is_table
from .quarantine import BadFile
from .unknown import about_unknown, no_known_class

_SHOWN = 10  # of a kind in the notices


@dataclass
class Draft:
    """A manifest in the making: each rule reads it, and leaves it with fewer rows, a problem or a notice more."""

    listing: Listing
    files: Files
    options: ScanOptions
    source: str
    classes: list[str]
    label: np.ndarray  # (N,) int32, -1: unknown, or of a class that is left out
    split: np.ndarray  # (N,) uint8
    group: np.ndarray  # (N,) int32, -1: a group of its own
    group_names: tuple[str, ...]
    problems: list[Problem]
    notices: list[str]
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (n,) those that are in
    near: np.ndarray | None = None  # (N,) int64, images that look alike share a number
    bad: tuple[BadFile, ...] = ()
    dropped: int = 0  # duplicates that were left out
    unknown: dict[str, int] = field(default_factory=dict)  # class that was not asked for -> usable images

    @classmethod
    def of(cls, listing: Listing, files: Files, options: ScanOptions, source: str) -> Draft:
        """Begin with everything that was listed; no row is in yet."""
        group, names = _group_codes(listing.groups, len(listing.paths))
        return cls(
            listing=listing,
            files=files,
            options=options,
            source=source,
            classes=list(listing.classes),
            label=np.array(listing.labels, np.int32),
            split=np.array(listing.splits, np.uint8),
            group=group,
            group_names=names,
            problems=list(dict.fromkeys(listing.problems)),
            notices=list(listing.notices),
        )

    def path(self, row: int) -> str:
        return self.listing.paths[row]


def tabulate(listing: Listing, files: Files, options: ScanOptions, source: str) -> ScanResult:
    """Apply RULES to a listing and its files, one after the other, and make the manifest of the rows that remain."""
    draft = Draft.of(listing, files, options, source)
    for rule in RULES:
        rule(draft)
    strays, others = listing.strays, [draft.path(row) for row in np.flatnonzero(files.skip).tolist()]
    draft.notices += skipped.note([path for path in strays if not is_named_as_image(path)] + others, "skipped")
    return ScanResult(
        _manifest(draft),
        draft.bad,
        tuple(draft.problems),
        tuple(draft.notices),
        skipped=len(strays) + len(others),
        dropped=draft.dropped,
        skipped_files=skipped.first_skipped(listing.root, strays, others),
        unknown_classes=draft.unknown,
    )


def choose_classes(draft: Draft) -> None:
    """Keep only the classes that were asked for, in that order; rows of others get label -1 and are left out."""
    wanted = draft.options.classes
    if wanted is None or draft.options.purpose == "predict":
        return
    place = {name: i for i, name in enumerate(wanted)}
    table = np.array([place.get(name, -1) for name in draft.classes] + [-1], np.int32)
    good = draft.files.good()
    counts = np.bincount(draft.label[good][draft.label[good] >= 0], minlength=len(draft.classes))
    draft.unknown = {name: int(n) for name, n in zip(draft.classes, counts, strict=True) if name not in place and n}
    draft.notices += [about_unknown(draft.unknown, wanted)] if draft.unknown else []
    draft.label = table[draft.label]
    for name in wanted:
        if name not in draft.classes and draft.options.purpose == "train":
            draft.problems.append(Problem("D005", "missing class", f"class {name!r} has no images in {draft.source}"))
    draft.classes = list(wanted)


def cluster_near(draft: Draft) -> None:
    """Find images that look alike, where that was asked for; before the count of bad files, which it may add to."""
    if not draft.options.near_duplicates:
        return
    rows = draft.files.good()
    unit = np.arange(len(draft.label)) + len(draft.label)
    if len(rows):
        unit[rows] = duplicates.near_units(draft.files.perceptual(rows))
    draft.near = np.unique(unit, return_inverse=True)[1].astype(np.int64)


def quarantine_bad(draft: Draft) -> None:
    """List the bad files; too many of them are a problem, or any where none may be."""
    out = []
    for row in sorted(draft.files.reasons):
        split, label = int(draft.split[row]), int(draft.label[row])
        if label < 0 and draft.options.classes is not None and draft.options.purpose != "predict":
            continue  # of a class that is left out
        out.append(
            BadFile(
                draft.path(row),
                draft.files.reasons[row],
                SPLITS[split] if split != NO_SPLIT else "",
                draft.classes[label] if label >= 0 else "",
                int(draft.files.head["size_bytes"][row]),
            )
        )
    total = len(out) + len(draft.files.good())
    if out and draft.options.bad_images == "error":
        why = "quarantine is off (--bad-images error)"
        draft.problems.append(_bad_problem(draft, "D012", "undecodable image", out, total, why))
    elif out and len(out) > _allowed(draft.options.max_bad, total):
        share = " of all" if draft.options.max_bad < 1 else ""
        why = f"at most {draft.options.max_bad:g}{share} may be bad (--max-bad)"
        draft.problems.append(_bad_problem(draft, "D013", "too many bad images", out, total, why))
    draft.bad = tuple(out)


def _allowed(limit: float, total: int) -> float:
    return limit * total if limit < 1 else limit


def _bad_problem(draft: Draft, code: str, kind: str, bad: list[BadFile], total: int, why: str) -> Problem:
    first = f"{bad[0].path} ({bad[0].reason})"
    more = f", +{len(bad) - 1:,} more" if len(bad) > 1 else ""
    count = f"{len(bad):,} of {total:,} images cannot be decoded"
    reasons = ", ".join(f"{n:,} x {r}" for r, n in Counter(b.reason.split(":")[0] for b in bad).most_common(4))
    if code == "D012":
        fix = command("train", draft.source, "--bad-images", "quarantine")
        return Problem(code, kind, count, where=first + more, why=why, try_=fix)
    fix = command("train", draft.source, "--max-bad", len(bad))
    return Problem(code, kind, f"{count}: {reasons}", where=first + more, why=why, try_=fix)


def take_good(draft: Draft) -> None:
    """Begin with the rows whose file is good and, unless labels do not matter, whose class is known."""
    rows = draft.files.good()
    draft.rows = rows if draft.options.purpose == "predict" else rows[draft.label[rows] >= 0]


def note_two_labels(draft: Draft) -> None:
    """Point out files with the same bytes and different labels."""
    rows = draft.rows
    same = duplicates.same_bytes(draft.files.digest[rows])
    parts = duplicates.two_labels(same, draft.label[rows])
    for part in parts[:_SHOWN]:
        _, first = np.unique(draft.label[rows[part]], return_index=True)
        shown = sorted({0, 1, *first.tolist()})[:_SHOWN]  # one of each label at least
        names = [f"{draft.path(int(r))} ({draft.classes[draft.label[r]]})" for r in rows[part[shown]]]
        more = f" and {len(part) - len(shown):,} more files" if len(part) > len(shown) else ""
        draft.notices.append(f"the same image has {len(first)} labels: {', '.join(names)}{more}")
    if len(parts) > _SHOWN:
        draft.notices.append(f"{len(parts) - _SHOWN:,} more images have several labels")


def drop_duplicates(draft: Draft) -> None:
    """Leave no image in two splits; where near duplicates were asked for, none that looks like another either."""
    _keep_splits_apart(draft, duplicates.same_bytes(draft.files.digest[draft.rows]), "duplicate")
    if draft.near is not None:
        _keep_splits_apart(draft, draft.near[draft.rows], "near duplicate")
        _join_near(draft, draft.rows, draft.near)


def _keep_splits_apart(draft: Draft, unit: np.ndarray, what: str) -> None:
    """Remove from train (or val) what is also in val or test; the test rows never change."""
    keep = duplicates.keep_highest_split(unit, draft.split[draft.rows])
    lost = draft.rows[~keep]
    if not len(lost):
        return
    if draft.options.duplicates == "drop":
        draft.dropped += len(lost)
        where = Counter(SPLITS[s] if s != NO_SPLIT else "rows without split" for s in draft.split[lost].tolist())
        parts = ", ".join(f"{n:,} from {name}" for name, n in where.items())
        plural = "s" if len(lost) > 1 else ""
        draft.notices.append(
            f"{len(lost):,} {what}{plural} across splits removed ({parts}), e.g. {draft.path(int(lost[0]))}"
        )
        draft.rows = draft.rows[keep]
        return
    text = f"{len(lost):,} images are {what}s of images in another split, e.g. {draft.path(int(lost[0]))}"
    if draft.options.duplicates == "error":
        fix = command("train", draft.source, "--set", "data.duplicates=drop")
        draft.problems.append(Problem("D006", f"{what} across splits", text, try_=fix))
    else:
        draft.notices.append(f"{text}: kept, so the test figures flatter the model")


def _join_near(draft: Draft, rows: np.ndarray, near: np.ndarray) -> None:
    """Images that look alike join one group, so that no split parts them."""
    _, unit, size = np.unique(near[rows], return_inverse=True, return_counts=True)
    alike = int((size[size > 1]).sum())
    if not alike:
        return
    pairs = np.where(size[unit] > 1, unit, -1)
    merged = duplicates.joined(draft.group[rows], pairs)
    draft.notices.append(
        f"{alike:,} images look like another one ({int((size > 1).sum()):,} clusters): kept together in any split"
    )
    _, first, code, count = np.unique(merged, return_index=True, return_inverse=True, return_counts=True)
    grouped = (count[code] > 1) | (draft.group[rows] >= 0)
    names: dict[int, str] = {}
    for unit_code in np.unique(code[grouped]).tolist():
        member = int(rows[first[unit_code]])
        old = int(draft.group[member])
        names[unit_code] = draft.group_names[old] if old >= 0 else f"like {draft.path(member)}"
    numbers = {c: i for i, c in enumerate(names)}
    draft.group[rows] = [
        numbers.get(c, -1) if g else -1 for c, g in zip(code.tolist(), grouped.tolist(), strict=True)
    ]
    draft.group_names = tuple(names.values())


def check_groups(draft: Draft) -> None:
    """Refuse groups that lie in several of the given splits."""
    rows = draft.rows
    mixed = duplicates.crossing(draft.group[rows], draft.split[rows])
    if not mixed:
        return
    total = len(np.unique(draft.group[rows][draft.group[rows] >= 0]))
    images = sum(len(part) for part in mixed)
    part = rows[mixed[0]]
    shown = ", ".join(
        f"{name} {int((draft.split[part] == code).sum())}"
        for code, name in enumerate(SPLITS)
        if (draft.split[part] == code).any()
    )
    example = f"group {draft.group_names[draft.group[part[0]]]!r}: {shown}"
    text = f"{len(mixed):,} of {total:,} groups ({images:,} images) are in several of the given splits, e.g. {example}"
    draft.problems.append(
        Problem(
            "D006",
            "group across splits",
            text,
            why="the model would be judged on groups that it has learnt from",
            try_=command("data", "split", draft.source),
        )
    )


def drop_empty_classes(draft: Draft) -> None:
    """Leave out classes without a usable image, unless these classes were asked for."""
    rows = draft.rows
    if draft.options.classes is not None or not draft.classes:
        return
    counts = np.bincount(draft.label[rows][draft.label[rows] >= 0], minlength=len(draft.classes))
    if (counts > 0).all():
        return
    gone = [name for name, n in zip(draft.classes, counts, strict=True) if n == 0]
    draft.notices.append(f"no usable image in {len(gone)} of the classes, left out: {', '.join(gone[:5])}")
    renumber = np.append(np.cumsum(counts > 0) - 1, -1).astype(np.int32)
    renumber[:-1][counts == 0] = -1
    draft.label = renumber[draft.label]
    draft.classes = [name for name, n in zip(draft.classes, counts, strict=True) if n]


def check_classes(draft: Draft) -> None:
    """Refuse what no classifier can be trained on: no images, one class, a class without training images."""
    rows = draft.rows
    told = {p.code for p in draft.problems}
    if not len(rows):
        if draft.unknown and draft.options.purpose == "judge":
            draft.problems.append(no_known_class(draft.unknown, draft.classes, draft.source))
        elif "D002" not in told:
            draft.problems.append(Problem("D002", "no images", f"no usable images in {draft.source}"))
        return
    if draft.options.purpose != "train":
        return
    if len(draft.classes) < 2 and not draft.listing.problems:  # else the other class may be in the rows at fault
        name = f" ({draft.classes[0]!r})" if draft.classes else ""
        text = f"{draft.source} has {len(draft.classes)} class{name}, and a classifier needs at least 2"
        why = "each class is a folder of its own, or a name in the label column of a table"
        draft.problems.append(Problem("D003", "fewer than two classes", text, why=why, try_=_elsewhere(Path(draft.source))))
    split, label = draft.split[rows], draft.label[rows]
    if (split == NO_SPLIT).any():
        return  # training rows are still to be chosen
    counts = [np.bincount(label[split == code], minlength=len(draft.classes)) for code in range(len(SPLITS))]
    for k in np.flatnonzero((counts[0] == 0) & (counts[1] + counts[2] > 0)).tolist():
        given = f"{counts[1][k]:,} val and {counts[2][k]:,} test images"
        text = f"class {draft.classes[k]!r} has {given} and no training images"
        draft.problems.append(Problem("D005", "class without training images", text))


def advise(draft: Draft) -> None:
    """Add notices about classes and channels, for training only."""
    rows = draft.rows
    if draft.options.purpose != "train":
        return
    counts = np.bincount(draft.label[rows], minlength=len(draft.classes))
    if problem := advice.several_labels(draft.classes, counts, draft.listing.columns, draft.source):
        draft.problems.append(problem)
    if problem or not draft.options.advice:
        return
    learnt = rows[(draft.split[rows] == NO_SPLIT) | (draft.split[rows] == SPLITS.index("train"))]
    draft.notices += advice.about_depth(draft.files, learnt, draft.options.bits)
    if draft.options.color in ("auto", "rgb"):
        draft.notices += advice.about_channels(draft.files.full, draft.files.head, rows, draft.options.max_megapixels)
    asked = {"weighted": draft.options.weighted, "pretrained": draft.options.pretrained}
    draft.notices += advice.about_classes(draft.classes, counts, **asked)


def _manifest(draft: Draft) -> Manifest:
    head, rows = draft.files.head, draft.rows
    present, group = np.unique(draft.group[rows], return_inverse=True)
    names = tuple(draft.group_names[g] for g in present if g >= 0)
    group = group - int((present < 0).any())
    return Manifest(
        root=Path(draft.listing.root),
        paths=PathList.of(draft.listing.paths[r] for r in rows.tolist()),
        labels=LabelSpace.single(draft.classes),
        answers=(draft.label[rows],),
        split=draft.split[rows],
        group=group.astype(np.int32),
        width=head["width"][rows].astype(np.int32),
        height=head["height"][rows].astype(np.int32),
        orientation=head["orientation"][rows].astype(np.uint8),
        digest=draft.files.digest[rows],
        flags=draft.files.flags[rows],
        source=draft.source,
        group_names=names,
    )


def _elsewhere(source: Path) -> str:
    """The command for the table or the one folder inside `source` that was probably meant."""
    if not source.is_dir():
        return ""
    inside = sorted(p for p in source.iterdir() if not fetch.is_ignored(p.name))
    tables = [p for p in inside if is_table(p) and p.suffix.lower() != ".txt"]
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


# in this order: a rule may count on those before it
RULES: tuple[Callable[[Draft], None], ...] = (
    choose_classes,
    cluster_near,
    quarantine_bad,
    take_good,
    note_two_labels,
    drop_duplicates,
    check_groups,
    drop_empty_classes,
    check_classes,
    advise,
)
