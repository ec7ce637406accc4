"""The gate: may this engine replace the model it was made from? Judged row by row, against FP32, on labelled images.

Rows are divided once, by seed: a search may look at its part as often as it likes, and the engine that comes out of it sees the
other part, once. Verdicts, with the one-sided 95 % score bounds of the drop of accuracy (`evaluation/paired.py`):

    pass            the upper bound is within the budget
    fail            the lower bound is above the budget: the rows show that the engine loses more
    underpowered    too few rows to decide; the report says how many would be enough

Where images have several labels there are two drops, of exact match and of per-label accuracy, and both must be within the
budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from ..core.batch import Batch
from ..core.errors import DataError, GateFailed
from ..core.files import sha256_json
from ..core.labels import task_targets
from ..core.manifest import Manifest, PathList
from ..core.phases import phase
from ..core.predictions import Predictions
from ..core.targets import Way
from ..core.text import command
from ..engines.base import Engine
from ..engines.scoring import predict
from ..evaluation.paired import Judgement, judge

Batches = Callable[[np.ndarray], Iterable[Batch]]  # row numbers of the gate's manifest -> batches of them

METHOD = "one-sided score bound on paired counts (Tango 1998)"
MEAN_METHOD = "one-sided bound of a mean by betting (Waudby-Smith, Ramdas 2024)"  # of per-label accuracy
SCHEMA = 1


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, eq=False)
class GateRows:
    """The two parts of the gate rows: (s,) and (v,) int64 positions, ascending, disjoint, together all of them."""

    search: np.ndarray
    verdict: np.ndarray


@dataclass(frozen=True, eq=False)
class GateData:
    """Labelled images that may judge an engine.

    Args:
        manifest: exactly these images, renumbered from 0.
        left_out: how many were not allowed to: "calibration" (they set the INT8 ranges), "training" (the model has learnt
            them), "repeated" (the same file twice), "unlabelled".
    """

    manifest: Manifest
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.manifest)

    def digest(self, rows: np.ndarray | None = None) -> str:
        """SHA-256 over the files' digests, whatever their order."""
        digests = self.manifest.digest if rows is None else self.manifest.digest[rows]
        return rows_digest(digests)


def gate_data(
    manifest: Manifest, which: str = "val", *, calibration: np.ndarray | None = None, extra: Manifest | None = None
) -> GateData:
    """The rows of a run that may judge its engines, and those of `--gate-data`.

    Args:
        manifest: the images of the run.
        which: "val", "test" or "val+test".
        calibration: (m, 16) uint8 digests of the files that set INT8 ranges. They never serve, wherever they come from.
        extra: more labelled images, scanned with the classes of the model; all of their rows, whatever their split.

    Raises:
        ValueError: `which` is none of the three, or `extra` has other classes.
    """
    if which not in ("val", "test", "val+test"):
        raise ValueError(f"gate rows are 'val', 'test' or 'val+test', got {which!r}")
    own = np.concatenate([manifest.rows(split) for split in ("val", "test") if split in which.split("+")])
    whole = manifest.take(own)
    if extra is not None:
        if extra.labels != manifest.labels:
            raise ValueError(f"the classes are {extra.labels.classes}, expected {manifest.labels.classes}")
        whole = _joined(whole, extra)
    forbidden = {
        "calibration": _keys(calibration if calibration is not None else np.zeros((0, 16), np.uint8)),
        "training": _keys(manifest.digest[manifest.rows("train")]),
    }
    keep, counts, keys = np.ones(len(whole), bool), {}, _keys(whole.digest)
    for reason, digests in forbidden.items():
        refused = np.isin(keys, digests) & keep
        counts[reason] = int(refused.sum())
        keep &= ~refused
    unlabelled = ~whole.labelled & keep
    keep &= ~unlabelled
    repeated = keep.copy()
    kept = np.flatnonzero(keep)
    repeated[kept[np.unique(keys[kept], return_index=True)[1]]] = False
    counts |= {"repeated": int(repeated.sum()), "unlabelled": int(unlabelled.sum())}
    return GateData(whole.take(np.flatnonzero(keep & ~repeated)), {k: n for k, n in counts.items() if n})


def split_rows(strata: np.ndarray | int, seed: int, fraction: float = 0.5) -> GateRows:
    """Divide gate rows into search rows and verdict rows, every stratum alike (to within one row).

    Args:
        strata: (n,) numbers of rows that are alike (`Manifest.stratum`), or n where nothing is known of them.
        seed: the same seed and strata give the same parts.
        fraction: part of the rows that a search may look at; 0 leaves all of them for the verdict.

    Raises:
        ValueError: `fraction` outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the search fraction must be in [0, 1), got {fraction}")
    label = np.zeros(strata, np.int64) if isinstance(strata, int) else np.asarray(strata)
    mixed = np.random.Generator(np.random.Philox(seed)).permutation(len(label))
    order = mixed[np.argsort(label[mixed], kind="stable")]  # stratum after stratum, each in random order
    place = np.arange(len(order))
    search = np.floor((place + 1) * fraction) > np.floor(place * fraction)
    return GateRows(np.sort(order[search]).astype(np.int64), np.sort(order[~search]).astype(np.int64))


def rows_digest(digests: np.ndarray) -> str:
    """SHA-256 of a set of files, from their (n, 16) uint8 digests."""
    return sha256_json(sorted(row.tobytes().hex() for row in np.asarray(digests, np.uint8)))


def _joined(first: Manifest, second: Manifest) -> Manifest:
    """Two manifests as one: the rows of the second come last, with absolute paths."""
    names = ("split", "group", "width", "height", "orientation", "digest", "flags")
    columns: dict[str, Any] = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
    columns["group"] = np.full(len(columns["group"]), -1, np.int32)  # numbers of two scans mean different groups
    answers = tuple(
        np.concatenate([mine, its] if mine.dtype == its.dtype else [task_targets(task, mine), task_targets(task, its)])
        for task, mine, its in zip(first.labels.tasks, first.answers, second.answers, strict=True)
    )
    paths = [*first.paths, *(str(second.path(row).absolute()) for row in range(len(second)))]
    return replace(first, paths=PathList.of(paths), group_names=(), answers=answers, **columns)


def _keys(digests: np.ndarray) -> np.ndarray:
    """(n,) of 16 opaque bytes, which NumPy compares as one value."""
    return np.ascontiguousarray(np.asarray(digests, np.uint8).reshape(-1, 16)).view("V16").ravel()


# ---------------------------------------------------------------- refusal


def demand(judgement: Judgement, way: Way, *, run: str = "RUN", verdict_share: float = 1.0) -> None:
    """Raise unless the engine passed.

    Args:
        way: the target that the engine is meant for, and its precision.
        run: name of the run in the command to try.
        verdict_share: part of added rows that will judge; the rest goes to the search.

    Raises:
        GateFailed: E902 when it lost too much, E903 when too few rows judged; with the numbers.
    """
    if judgement.passed:
        return
    name, again = f"{way.target}-{way.precision}", command("export", run, f"--{way.target}")
    milder = f"{again} --precision {way.milder}" if way.milder else command("verify", run)
    more = f"{again} --precision {way.precision} --gate-data DATA"
    allowed, sure = f"{100 * judgement.max_drop:.4g}", f"{100 * judgement.confidence:.4g}"
    where = "judged in another runtime than the one that is exported" if judgement.simulated else ""
    if judgement.verdict == "fail":
        figure = next(figure for figure in figures_of(judgement) if figure.verdict == "fail")
        share = f"{figure.reference:.2%} -> {figure.value:.2%}"
        raise GateFailed(
            "E902",
            f"{name} lost {_points(figure.drop)} points of {figure.name} ({share}; {figure.counts}), "
            f"at least {_points(figure.lower_bound)} with {sure} % confidence; allowed: {allowed}",
            where=where,
            why=_worst_class(judgement),
            try_=milder,
        )
    first, *rest = [figure for figure in figures_of(judgement) if figure.verdict == "underpowered"]
    said = (
        f"{judgement.rows:,} rows cannot show that {name} loses at most {allowed} points of {first.name}: {first.counts}, "
        f"a drop of {_points(first.drop)} that may be {_points(first.bound)} with {sure} % confidence"
    )
    said += "".join(f"; of {f.name} a drop of {_points(f.drop)} that may be {_points(f.bound)}" for f in rest)
    if judgement.rows_needed is None:
        drop = max(figure.drop for figure in (first, *rest))
        why = f"a drop of {_points(drop)} is not below {allowed}, so more rows like these would not let it pass"
        if drop < judgement.max_drop:
            why = "no number of rows like these is known that would show it"
        raise GateFailed("E903", said, where=where, why=why, try_=milder)
    images = math.ceil(max(1, judgement.rows_needed - judgement.rows) / verdict_share)
    why = f"add about {images:,} labelled images that are neither training nor calibration images"
    said += f"; {judgement.rows_needed:,} rows like these would show it"
    raise GateFailed("E903", said, where=where, why=why, try_=more)


class Figure(NamedTuple):
    """One figure that an engine has to hold: fractions, as in `Judgement`."""

    name: str
    counts: str
    value: float
    reference: float
    drop: float
    bound: float
    lower_bound: float
    verdict: str


def figures_of(judgement: Judgement) -> list[Figure]:
    """Accuracy, for one-label data; else exact match and per-label accuracy, each with its own verdict."""
    j, mean = judgement, judgement.per_label
    counts = f"{j.lost:,} lost and {j.gained:,} gained of {j.rows:,} rows"
    own = "pass" if j.bound <= j.max_drop else "fail" if j.lower_bound > j.max_drop else "underpowered"
    name = "accuracy" if mean is None else "exact match"
    first = Figure(name, counts, j.accuracy, j.reference_accuracy, j.drop, j.bound, j.lower_bound, own)
    if mean is None:
        return [first]
    values = (mean.accuracy, mean.reference_accuracy, mean.drop, mean.bound, mean.lower_bound)
    return [first, Figure("per-label accuracy", f"the mean of {j.rows:,} rows", *values, mean.verdict)]


def _points(fraction: float) -> str:
    return f"{100 * fraction:.4g}"


def _worst_class(judgement: Judgement) -> str:
    if len(judgement.per_class) < 2:
        return ""
    name, rows, lost, gained = max(judgement.per_class, key=lambda entry: (entry[2] - entry[3]) / entry[1])
    return f"the class that lost most is {name!r}: {lost:,} lost and {gained:,} gained of {rows:,}"


def plain_int8_loses(judgement: Judgement) -> str:
    """A sentence that comes before the search for layers that INT8 harms."""
    figures = figures_of(judgement)
    drops = f"{100 * judgement.drop:.2f} points"
    if len(figures) > 1:
        drops = " and ".join(f"{100 * figure.drop:.2f} points of {figure.name}" for figure in figures)
    return (
        f"plain INT8 loses {drops} on {judgement.rows:,} search rows "
        f"({100 * judgement.max_drop:g} are allowed): looking for the layers that it harms"
    )


# ---------------------------------------------------------------- the procedure


def answers_of(engine: Engine, manifest: Manifest, batches: Iterable[Batch]) -> Predictions:
    """The predictions of an engine for batches of labelled rows, without padding."""
    return predict(engine, batches, paths=manifest.paths, fingerprint=manifest.fingerprint)


class Gate:
    """The gate of one export: search rows that may be looked at again and again, verdict rows that are looked at once.

    Args:
        data: labelled images.
        reference: the model in FP32.
        batches: gives the batches of some rows of `data.manifest`; each candidate is shown the same.
        max_drop_pp: the budget, percentage points.
        seed, fraction: as in `split_rows`.
    """

    def __init__(
        self,
        data: GateData,
        reference: Engine,
        batches: Batches,
        *,
        max_drop_pp: float,
        seed: int = 0,
        fraction: float = 0.5,
    ) -> None:
        self.data, self.max_drop_pp, self.seed, self.fraction = data, max_drop_pp, seed, fraction
        self.rows = split_rows(data.manifest.stratum, seed, fraction)
        self.history: list[dict[str, Any]] = []
        self._reference, self._batches = reference, batches
        self._said: dict[str, Predictions] = {}
        self._judged = ""

    @phase("judging a candidate")
    def look(self, name: str, engine: Engine, *, simulated: bool, **facts: Any) -> Judgement:
        """Judge a candidate on the search rows, and write it into the history with `facts`.

        Raises:
            DataError: D010 when a file can no longer be read as it was.
        """
        judgement = self._judge("search", engine, simulated)
        self.history.append({"name": name, "precision": engine.precision, **facts, **judgement.to_dict()})
        return judgement

    @phase("judging the file on the gate rows")
    def verdict(self, name: str, engine: Engine, *, simulated: bool) -> Judgement:
        """Judge the chosen candidate on the verdict rows. Whoever comes back with another one has searched on them.

        Raises:
            RuntimeError: the verdict rows have been looked at.
            DataError: D010 when a file can no longer be read as it was.
        """
        if self._judged:
            raise RuntimeError(f"the verdict rows have judged {self._judged}; they cannot judge {name} as well")
        self._judged = name
        return self._judge("verdict", engine, simulated)

    def _judge(self, part: Literal["search", "verdict"], engine: Engine, simulated: bool) -> Judgement:
        rows, manifest = getattr(self.rows, part), self.data.manifest
        if part not in self._said:
            self._said[part] = answers_of(self._reference, manifest, self._batches(rows) if len(rows) else ())
        said = answers_of(engine, manifest, self._batches(rows) if len(rows) else ())
        if not np.array_equal(said.rows, self._said[part].rows):
            changed = np.setxor1d(said.rows, self._said[part].rows)
            raise DataError(
                "D010",
                f"{len(changed):,} of {len(rows):,} gate images can no longer be read as before, first {manifest.path(int(changed[0]))}",
                try_="imgcls-fast data check DATA",
            )
        return judge(self._said[part], said, self.max_drop_pp, simulated=simulated)


# ---------------------------------------------------------------- gate.json


def gate_report(
    judgement: Judgement,
    gate: Gate,
    *,
    judge_runtime: str,
    judge_precision: str,
    exported_runtime: str,
    versions: Mapping[str, str],
    bundle: str,
    engine: str,
    calibration: np.ndarray | None = None,
) -> dict[str, Any]:
    """Content of gate.json: who judged what, on which rows, with which result.

    Args:
        judge_runtime, judge_precision: what computed the scores, and in which precision it really computed.
        exported_runtime: what the exported file is for.
        versions: those of the libraries involved.
        bundle, engine: SHA-256 of the weights and of the exported file.
        calibration: (m, 16) uint8 digests of the calibration rows.
    """
    verdict_rows = gate.rows.verdict
    return {
        "schema": SCHEMA,
        "verdict": judgement.verdict,
        "simulated": judgement.simulated,
        "statement": _statement(judgement, judge_runtime, judge_precision, exported_runtime),
        "judge": {"runtime": judge_runtime, "precision": judge_precision, "exported_for": exported_runtime},
        "method": METHOD if judgement.per_label is None else f"{METHOD}; per label: {MEAN_METHOD}",
        **{name: value for name, value in judgement.to_dict().items() if name not in ("verdict", "simulated")},
        "split": {
            "seed": gate.seed,
            "search_fraction": gate.fraction,
            "search_rows": len(gate.rows.search),
            "verdict_rows": len(verdict_rows),
            "left_out": dict(gate.data.left_out),
        },
        "digests": {
            "bundle": bundle,
            "engine": engine,
            "gate_rows": gate.data.digest(),
            "verdict_rows": gate.data.digest(verdict_rows),
            "calibration_rows": None if calibration is None else rows_digest(calibration),
        },
        "versions": dict(versions),
        "search": list(gate.history),
    }


def counts_as_passed(report: Mapping[str, Any] | None, engine: str) -> bool:
    """Whether a gate.json lets exactly this file pass: judged itself, in its own runtime, within the budget.

    Args:
        engine: SHA-256 of the file that is about to be used.
    """
    if not report or report.get("verdict") != "pass" or report.get("simulated") is not False:
        return False
    return bool(report.get("digests", {}).get("engine") == engine)


def _statement(judgement: Judgement, runtime: str, precision: str, exported_for: str) -> str:
    judged = f"{judgement.verdict}: judged in {runtime}, which computed in {precision}"
    if not judgement.simulated:
        return f"{judged}; this holds for the file whose digest stands here, and for no other"
    return (
        f"{judged}, not in {exported_for}: a simulation. An engine for {exported_for} counts as passed only when that engine "
        "was judged"
    )
