"""Judges predictions of one-label data: every figure that the project quotes about accuracy comes from `judge`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import NormalDist
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np

from ..core.errors import ConfigError, DataError
from ..core.figures import more_figures
from ..core.predictions import Predictions
from ..core.text import some
from ..core.undecoded import Undecoded
from .calibration import Coverage, Reliability, apply_temperature, coverage, fit_temperature, reliability
from .paired import Difference, against_majority
from .resampling import percentiles

__all__ = [
    "AverageName",
    "Metrics",
    "accuracy_interval",
    "apply_temperature",
    "average",
    "confusion_matrix",
    "fit_temperature",
    "judge",
]

AverageName = Literal["macro", "micro", "weighted"]
AVERAGES: tuple[str, ...] = get_args(AverageName)
CLIP = float(np.finfo(np.float32).eps)  # 1.19e-7: a score of 0 for the true class costs 15.9 nats, not infinity
SUM_TOLERANCE = 1e-3
Judged = TypeVar("Judged", bound=Any)  # Metrics or `tasks.TaskMetrics`


@dataclass(frozen=True)
class Average:
    """Precision, recall and F1 of one way of averaging, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ClassMetrics:
    """One class against the rest. `support`: rows whose truth it is; `predicted`: rows that the model gives to it.

    precision is 0 for a class that is never predicted, recall is 0 for one that never occurs; roc_auc needs rows of
    the class and rows of others, average_precision rows of the class, else they are NaN.
    """

    name: str
    support: int
    predicted: int
    precision: float
    recall: float
    f1: float
    roc_auc: float
    average_precision: float


@dataclass(frozen=True)
class Majority:
    """Result of always answering the most frequent class of the judged rows.

    Args:
        name: the class.
        accuracy: its share of the rows.
        against: comparison of the model with this answer, row by row.
    """

    name: str
    accuracy: float
    against: Difference

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.name, "accuracy": self.accuracy, "against": self.against.to_dict()}


@dataclass(frozen=True, eq=False)
class Metrics:
    """Figures that `judge` computes. Shares are in [0, 1], losses in nats per row; undefined figures are NaN (null in JSON).

    confusion is (K, K) int64, row = truth, column = prediction. `warnings` names every figure that does not mean
    quite what it usually does.
    """

    kind: ClassVar[str] = "one_of"

    n: int
    classes: tuple[str, ...]
    confidence_level: float
    bootstrap: int
    accuracy: float
    accuracy_ci: tuple[float, float]
    macro_f1_ci: tuple[float, float]
    top_k: dict[int, float]
    balanced_accuracy: float
    majority: Majority
    averages: dict[str, Average]
    per_class: tuple[ClassMetrics, ...]
    confusion: np.ndarray
    roc_auc: float
    average_precision: float
    log_loss: float
    brier: float
    ece: float
    reliability: Reliability
    coverage: Coverage
    warnings: tuple[str, ...]
    undecodable_files: tuple[dict[str, str], ...] = ()  # path and reason of each row that could not be judged
    changed_files: tuple[str, ...] = ()  # rows whose file has other bytes than when the run was made; not judged
    unknown_classes: Mapping[str, int] = field(default_factory=dict)  # images of classes that the model does not know; not judged
    # images that the run was trained on, left out or judged, and judged images that chose its epoch
    seen: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        low, high = self.accuracy_ci
        counted = f"{len(self.warnings)} warning{'s' * (len(self.warnings) != 1)}"
        return (
            f"Metrics(accuracy={self.accuracy:.3f} [{low:.3f}, {high:.3f}], macro_f1={self.macro_f1:.3f}, n={self.n:,}, "
            f"{len(self.classes)} classes, {counted})"
        )

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that occur in the truth."""
        return self.averages["macro"].f1

    @property
    def macro_ap(self) -> float:
        """Mean average precision of the classes that occur in the truth."""
        return self.average_precision

    @property
    def imbalanced(self) -> bool:
        """Whether the largest class is so large that accuracy must be held against it: beyond its fair share by a fifth and 5 points."""
        fair = 1 / max(1, sum(c.support > 0 for c in self.per_class))
        return fair < 1 and self.majority.accuracy > fair + max(0.05, 0.2 * fair) + 1e-9

    def to_dict(self) -> dict[str, Any]:
        """The same facts as JSON-safe values: NaN becomes None, arrays become lists."""
        value = {one.name: getattr(self, one.name) for one in fields(self)}
        value["averages"] = {name: asdict(figures) for name, figures in self.averages.items()}
        value["per_class"] = [asdict(figures) for figures in self.per_class]
        value["macro_f1"] = self.macro_f1
        value |= {"majority": self.majority.to_dict(), "imbalanced": self.imbalanced}
        for name in ("reliability", "coverage"):
            value[name] = dict(vars(value[name]))
        value |= {f.field: f.value(self) for f in more_figures(single=True) if self.kind in f.kinds}
        plain: dict[str, Any] = plain_json(value)
        return plain


def without(
    metrics: Judged, undecoded: Undecoded, notices: Sequence[str] = (), facts: Mapping[str, Any] | None = None
) -> Judged:
    """The same figures, with the images that had to be left out of them, and other notices, among the warnings.

    Args:
        facts: the same as figures: changed_files, unknown_classes, seen.
    """
    said = [text for text in (undecoded.sentence(), *notices) if text]
    files = tuple(undecoded.to_list())
    return replace(metrics, warnings=(*metrics.warnings, *said), undecodable_files=files, **(facts or {}))


def average(metrics: Metrics, name: str) -> Average:
    """One of the three averages, by its exact name.

    * macro: mean over the classes that occur in the truth, each counting the same.
    * micro: from the summed counts of all classes; with one answer per row all three figures equal the accuracy.
    * weighted: mean over classes, each counting by its support.

    Raises:
        ConfigError: C003 for any other name; 'Macro' is not quietly something else.
    """
    if name not in AVERAGES:
        legal = ", ".join(repr(known) for known in AVERAGES)
        raise ConfigError("C003", f"average must be one of {legal}, got {name!r}", try_="average(metrics, 'macro')")
    return metrics.averages[name]


def judge(
    predictions: Predictions,
    *,
    top_k: Sequence[int] = (1, 5),
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    group: np.ndarray | None = None,
) -> Metrics:
    """Judge predictions of one `one_of` task; each row counts exactly once, whatever batches it came in.

    Policy for classes without true rows: they cannot have a recall, so macro averages (also balanced accuracy, macro
    ROC-AUC and mean average precision) run over the classes that occur in the truth, and `warnings` lists the others.
    Rows wrongly given to such a class still lower recall of their true class and every micro figure.

    log_loss clips the score of the true class at 1.19e-7. brier is the sum over classes of squared differences, mean
    over rows, in [0, 2] (Brier 1950; for two classes twice the binary score). ece: 15 bins, Guo et al. 2017.

    Args:
        predictions: n > 0 labelled rows; scores are probabilities.
        top_k: values of k for top-k accuracies; values k >= K are left out (they are always 1). Equal scores rank by column.
        bootstrap: number of resamples for the interval of macro-F1; 0 makes it NaN and costs nothing.
        seed: seed for the resamples. Equal input and seed give equal intervals.
        group: (N,) int group of each row of the manifest, for the comparison with the majority class; see `paired.compare`.
        confidence: mass of the intervals, in (0, 1). That of accuracy is Wilson's, see `accuracy_interval`.

    Raises:
        DataError: D004 no labels; D014 no rows, rows without label, NaN or values outside [0, 1] in the scores, or a
            label space that is not a single one_of task.
        ConfigError: C003 for an impossible top_k, bootstrap or confidence.
    """
    check_options(top_k, bootstrap, confidence)
    _check_rows(predictions)
    truth, predicted, scores = predictions.truth, predictions.predicted, predictions.scores
    n, size = scores.shape
    confusion = confusion_matrix(truth, predicted, size)
    per_class = _per_class(confusion, predictions)
    correct = truth == predicted
    bins = reliability(predictions.confidence, correct)
    present = [c for c in per_class if c.support]
    log_loss, brier = _losses(predictions)
    return Metrics(
        n=n,
        classes=predictions.labels.classes,
        confidence_level=confidence,
        bootstrap=bootstrap,
        accuracy=float(correct.mean()),
        accuracy_ci=accuracy_interval(int(correct.sum()), n, confidence),
        macro_f1_ci=percentiles(_macro_f1_draws(confusion, bootstrap, seed), confidence),
        top_k=_top_k(scores, truth, top_k),
        balanced_accuracy=_mean([c.recall for c in present]),
        majority=_majority(predictions, group),
        averages=_averages(confusion, per_class),
        per_class=per_class,
        confusion=confusion,
        roc_auc=_mean([c.roc_auc for c in present]),
        average_precision=_mean([c.average_precision for c in present]),
        log_loss=log_loss,
        brier=brier,
        ece=bins.ece,
        reliability=bins,
        coverage=coverage(predictions.confidence, correct),
        warnings=(*_warnings(per_class, scores), *_soft(predictions)),
    )


def _losses(predictions: Predictions) -> tuple[float, float]:
    """Log-loss and Brier score; labels that are probabilities are what the scores are held against, not their highest class."""
    scores, targets = predictions.scores, np.asarray(predictions.targets)
    if _is_soft(targets):
        log_loss = -(targets * np.log(np.clip(scores.astype(np.float64), CLIP, 1.0))).sum(1).mean()
        return float(log_loss), float(((scores.astype(np.float64) - targets) ** 2).sum(1).mean())
    own = scores[np.arange(len(scores)), predictions.truth].astype(np.float64)
    brier = ((scores.astype(np.float64)) ** 2).sum(1) - 2 * own + 1
    return float(-np.log(np.clip(own, CLIP, 1.0)).mean()), float(brier.mean())


def _is_soft(targets: np.ndarray) -> bool:
    return bool(((targets > 0) & (targets < 1)).any())


def _soft(predictions: Predictions) -> tuple[str, ...]:
    """A notice that labels are probabilities, and how sure they are."""
    targets = np.asarray(predictions.targets)
    if not _is_soft(targets):
        return ()
    sure, least = float(targets.max(1).mean()), float(-(targets * np.log(np.maximum(targets, CLIP))).sum(1).mean())
    return (
        f"labels are probabilities: an image counts as its most probable class ({sure:.0%} on average); log-loss and Brier score "
        f"are against the probabilities, and no model can have a log-loss below {least:.3f}",
    )


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, size: int) -> np.ndarray:
    """(size, size) int64 counts, row = truth, column = prediction."""
    return np.bincount(truth * size + predicted, minlength=size * size).reshape(size, size)


def check_options(top_k: Sequence[int], bootstrap: int, confidence: float) -> None:
    if any(k < 1 for k in top_k):
        raise ConfigError("C003", f"top_k must hold numbers >= 1, got {tuple(top_k)}")
    if bootstrap < 0:
        raise ConfigError("C003", f"bootstrap must be >= 0 resamples, got {bootstrap}")
    if not 0 < confidence < 1:
        raise ConfigError("C003", f"confidence must lie between 0 and 1, got {confidence}")


def _check_rows(predictions: Predictions) -> None:
    tasks, scores = predictions.labels.tasks, predictions.scores
    if len(tasks) != 1 or tasks[0].kind != "one_of":
        names = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
        raise DataError("D014", f"judge needs exactly one task of kind one_of, got {names}")
    if len(predictions) == 0:
        raise DataError("D014", "there are no rows to judge", try_="imgcls-fast data check DATA")
    check_scores(predictions)
    predictions.truth  # noqa: B018  (D004 where there are no labels)
    unknown = ~(np.asarray(predictions.targets) > 0).any(1)
    if unknown.any():
        first = int(unknown.argmax())
        text = f"{unknown.sum()} of {len(scores)} rows have no label, so they cannot be judged"
        raise DataError("D014", text, where=f"row {predictions.rows[first]}, {predictions.paths[first]}")


def check_scores(predictions: Predictions) -> None:
    """Refuse scores that are no probabilities.

    Raises:
        DataError: D014.
    """
    scores = predictions.scores
    bad = ~((scores >= 0) & (scores <= 1 + SUM_TOLERANCE)).all(1)  # also true for NaN
    if bad.any():
        first = int(bad.argmax())
        low, high = scores[first].min(), scores[first].max()
        broken = not np.isfinite(scores[first]).all()
        why = "the model returned NaN or inf" if broken else "logits are not probabilities; apply softmax first"
        text = f"{bad.sum()} of {len(scores)} rows have scores outside [0, 1]; the first holds {low} .. {high}"
        raise DataError("D014", text, where=f"row {predictions.rows[first]}, {predictions.paths[first]}", why=why)


def _per_class(confusion: np.ndarray, predictions: Predictions) -> tuple[ClassMetrics, ...]:
    hits, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = ratio(hits, predicted), ratio(hits, support)
    f1 = ratio(2 * hits, support + predicted)
    out = []
    for k, name in enumerate(predictions.labels.classes):
        auc, ap = ranking(predictions.scores[:, k], predictions.truth == k)
        counts = int(support[k]), int(predicted[k])
        out.append(ClassMetrics(name, *counts, float(precision[k]), float(recall[k]), float(f1[k]), auc, ap))
    return tuple(out)


def _majority(predictions: Predictions, group: np.ndarray | None) -> Majority:
    column, against = against_majority(predictions, group)
    return Majority(predictions.labels.classes[column], float((predictions.truth == column).mean()), against)


def _averages(confusion: np.ndarray, per_class: Sequence[ClassMetrics]) -> dict[str, Average]:
    support = np.array([c.support for c in per_class], np.float64)
    figures = np.array([(c.precision, c.recall, c.f1) for c in per_class])  # (K, 3)
    # each row has one truth and one prediction, so summed false positives = summed false negatives = errors
    micro = np.trace(confusion) / confusion.sum()
    return {
        "macro": Average(*map(float, figures[support > 0].mean(0))),
        "micro": Average(float(micro), float(micro), float(micro)),
        "weighted": Average(*map(float, (figures * support[:, None]).sum(0) / support.sum())),
    }


def ranking(score: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """(ROC-AUC, average precision) of one class from one sort; rows of equal score enter together.

    scikit-learn has both, with a sort and 1 ms of checks each; with 1,000 classes that is most of the time of `judge`.
    """
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # last row of each tie
    hits = np.concatenate([[0], np.cumsum(positive[order])[ends]])
    seen = np.concatenate([[0], ends + 1])
    misses, total = seen - hits, int(hits[-1])
    others = len(score) - total
    if not total:
        return float("nan"), float("nan")
    average_precision = float((np.diff(hits) * hits[1:] / seen[1:]).sum() / total)
    if not others:
        return float("nan"), average_precision
    area = (np.diff(misses) * (hits[1:] + hits[:-1])).sum() / 2
    return float(area / (total * others)), average_precision


def _top_k(scores: np.ndarray, truth: np.ndarray, top_k: Sequence[int]) -> dict[int, float]:
    own = scores[np.arange(len(scores)), truth][:, None]
    ahead = np.arange(scores.shape[1]) < truth[:, None]
    rank = (scores > own).sum(1) + ((scores == own) & ahead).sum(1)  # ties by column, as argmax does
    return {k: float((rank < k).mean()) for k in sorted(set(top_k)) if k < scores.shape[1]}


def accuracy_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of the accuracy of n > 0 independent rows, which keeps its promise with few errors too.

    At a true accuracy of 0.99 and 50 rows it covers 0.91, where resampling the rows covers 0.39 (computed exactly).

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927) 209-212.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (max(0.0, middle - half) if hits else 0.0), (min(1.0, middle + half) if hits < n else 1.0)


def _macro_f1_draws(confusion: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws,) macro-F1 of resampled rows: resampling rows is a multinomial draw over the cells of the confusion.

    In each resample the mean runs over the classes that occur in its truth, the same policy as everywhere.
    """
    truth, predicted = np.nonzero(confusion)  # sorted by truth
    counts, n = confusion[truth, predicted], int(confusion.sum())
    rng = np.random.default_rng([seed, 1])
    by_predicted = np.argsort(predicted, kind="stable")
    rows, row_start = np.unique(truth, return_index=True)
    columns, column_start = np.unique(predicted[by_predicted], return_index=True)
    on_diagonal = np.flatnonzero(truth == predicted)
    chunk = max(1, 2_000_000 // len(counts))  # 16 MB of int64 at a time
    out = []
    for start in range(0, draws, chunk):
        drawn = rng.multinomial(n, counts / n, size=min(chunk, draws - start))  # (m, cells)
        support, claimed, hits = (np.zeros((len(drawn), len(confusion)), np.int64) for _ in range(3))
        support[:, rows] = np.add.reduceat(drawn, row_start, axis=1)
        claimed[:, columns] = np.add.reduceat(drawn[:, by_predicted], column_start, axis=1)
        hits[:, truth[on_diagonal]] = drawn[:, on_diagonal]
        f1 = ratio(2 * hits, support + claimed)
        out.append((f1 * (support > 0)).sum(1) / (support > 0).sum(1))
    return np.concatenate(out) if out else np.zeros(0)


def _warnings(per_class: Sequence[ClassMetrics], scores: np.ndarray) -> tuple[str, ...]:
    out = []
    absent = [c.name for c in per_class if not c.support]
    if absent:
        out.append(f"{named_classes(absent)}: no true rows, so ROC-AUC is undefined and macro averages leave them out")
    never = [c.name for c in per_class if c.support and not c.predicted]
    if never:
        out.append(f"{named_classes(never)}: never predicted, so precision and F1 count as 0")
    if len(per_class) - len(absent) == 1 and len(per_class) > 1:
        out.append("all rows have the same true class: ROC-AUC is undefined, accuracy says little")
    if np.abs(scores.sum(1, dtype=np.float64) - 1).max() > SUM_TOLERANCE:
        out.append("scores do not sum to 1: log-loss, Brier score and ECE suppose probabilities")
    return tuple(out)


def named_classes(names: Sequence[str]) -> str:
    return ("class " if len(names) == 1 else "classes ") + some(names, 10, " and {:,} more")


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    share: np.ndarray = np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
    return share


def _mean(values: Sequence[float]) -> float:
    """Mean of the defined values; NaN where none is."""
    known = [v for v in values if v == v]
    return float(np.mean(known)) if known else float("nan")


def plain_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain_json(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
