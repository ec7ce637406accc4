"""Turns a listing and its examined files into a manifest, by rules: what is left out, what is wrong, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from ..core.manifest import NO_SPLIT, SPLITS
from ..core.text import command
from . import duplicates, skipped
from .class_rules import advise, check_classes, choose_classes, describe_labels, drop_empty_classes
from .draft import Draft
from .examine import Files
from .findings import ScanOptions, ScanResult
from .listing import Listing, Problem, is_named_as_image
from .quarantine import BadFile

_SHOWN = 10  # examples of one kind in the notices


def tabulate(listing: Listing, files: Files, options: ScanOptions, source: str) -> ScanResult:
    """Apply RULES to a listing and its files, one after the other, and make the manifest of the rows that remain."""
    draft = Draft.of(listing, files, options, source)
    for rule in RULES:
        rule(draft)
    strays, others = listing.strays, [draft.path(row) for row in np.flatnonzero(files.skip).tolist()]
    draft.notices += skipped.note([path for path in strays if not is_named_as_image(path)] + others, "skipped")
    return ScanResult(
        draft.manifest(),
        draft.bad,
        tuple(draft.problems),
        tuple(draft.notices),
        skipped=len(strays) + len(others),
        dropped=draft.dropped,
        skipped_files=skipped.first_skipped(listing.root, strays, others),
        unknown_classes=draft.unknown,
    )


def cluster_near(draft: Draft) -> None:
    """Find images that look alike, where that was asked for; before the count of bad files, which it may add to."""
    if not draft.options.near_duplicates:
        return
    rows = draft.files.good()
    unit = np.arange(len(draft.split)) + len(draft.split)
    if len(rows):
        unit[rows] = duplicates.near_units(draft.files.perceptual(rows))
    draft.near = np.unique(unit, return_inverse=True)[1].astype(np.int64)


def quarantine_bad(draft: Draft) -> None:
    """List the bad files; too many of them are a problem, or any where none may be."""
    out = []
    chosen = draft.options.classes is not None or draft.options.labels is not None
    for row in sorted(draft.files.reasons):
        split, label = int(draft.split[row]), draft.words(row)
        if not label and chosen and draft.options.purpose != "predict":
            continue  # its class is left out
        out.append(
            BadFile(
                draft.path(row),
                draft.files.reasons[row],
                SPLITS[split] if split != NO_SPLIT else "",
                label,
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
    draft.rows = rows if draft.options.purpose == "predict" else rows[draft.known(rows)]


def note_two_labels(draft: Draft) -> None:
    """Point out files with the same bytes and different labels."""
    rows = draft.rows
    same = duplicates.same_bytes(draft.files.digest[rows])
    label = draft.alike(rows)
    parts = duplicates.two_labels(same, label)
    for part in parts[:_SHOWN]:
        _, first = np.unique(label[part], return_index=True)
        shown = sorted({0, 1, *first.tolist()})[:_SHOWN]  # one of each label at least
        names = [f"{draft.path(int(r))} ({draft.words(int(r))})" for r in rows[part[shown]]]
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
    describe_labels,
    advise,
)
