"""Judges a task of which any number of classes may hold; unknown entries count nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from ..core.errors import DataError
from ..core.figures import mean_defined, more_figures
from ..core.labels import THRESHOLD
from ..core.predictions import Predictions
from .bounds import share_interval
from .calibration import Reliability, reliability
from .metrics import CLIP, accuracy_interval, check_options, check_scores, named_classes, plain_json, ranking
from .resampling import Answers, resample, resampled_interval

NAN = float("nan")


@dataclass(frozen=True)
class LabelMetrics:
    """One class of an `any_of` task: whether it holds, over the rows in which that is known.

    A figure that is not defined is NaN, never 0: recall, F1 and average precision of a class that holds in no row, ROC-AUC of one
    that holds in none or in all, precision of one that neither holds nor was answered. Precision of a class that holds but was
    never answered counts as 0, as in one-label data.

    Args:
        known: rows in which it is known.
        support: rows in which it holds.
        predicted: known rows in which the model answers that it holds.
        threshold: the least score of such an answer.
    """

    name: str
    known: int
    support: int
    predicted: int
    threshold: float
    accuracy: float
    precision: float
    recall: float
    f1: float
    roc_auc: float
    average_precision: float
    balanced_accuracy: float


@dataclass(frozen=True, eq=False)
class AnyOfMetrics:
    """Figures that `judge_any_of` computes. Shares are in [0, 1], log-loss in nats per known entry; undefined figures are NaN.

    accuracy is the mean over rows of the share of known classes that are answered right; hamming_loss is the share of wrong
    answers among all known entries (1 - accuracy where nothing is unknown). exact_match is the share of rows without a wrong
    answer. Always giving each class its more frequent answer reaches `constant_accuracy` and `constant_exact_match`.

    together[i, j] is the number of rows in which classes i and j both hold, answered[i, j] that of rows in which i holds and j
    was answered; (K, K) int64.
    """

    kind: ClassVar[str] = "any_of"

    n: int
    known: int
    classes: tuple[str, ...]
    confidence_level: float
    bootstrap: int
    accuracy: float
    accuracy_ci: tuple[float, float]
    exact_match: float
    exact_match_ci: tuple[float, float]
    hamming_loss: float
    constant_accuracy: float
    constant_exact_match: float
    macro_f1: float
    macro_f1_ci: tuple[float, float]
    micro_f1: float
    macro_ap: float
    macro_ap_ci: tuple[float, float]
    balanced_accuracy: float
    roc_auc: float
    log_loss: float
    ece: float
    reliability: Reliability
    per_class: tuple[LabelMetrics, ...]
    together: np.ndarray
    answered: np.ndarray
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"AnyOfMetrics(macro_ap={self.macro_ap:.3f}, macro_f1={self.macro_f1:.3f}, exact_match={self.exact_match:.3f}, "
            f"n={self.n:,}, {len(self.classes)} classes)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same facts as JSON-safe values, without the two tables of pairs, which have a file of their own."""
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del value["together"], value["answered"]
        value["per_class"] = [asdict(figures) for figures in self.per_class]
        value["reliability"] = dict(vars(self.reliability))
        value |= {f.field: f.value(self) for f in more_figures(single=False) if self.kind in f.kinds}
        plain: dict[str, Any] = plain_json({"kind": self.kind, **value})
        return plain


def judge_any_of(
    predictions: Predictions,
    thresholds: np.ndarray | Sequence[float] | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> AnyOfMetrics:
    """Judge predictions of one `any_of` task, as scikit-learn does where nothing is unknown.

    Macro figures run over the classes that hold in at least one row (macro ROC-AUC and balanced accuracy: and not in all), and
    `warnings` names the others. log_loss clips scores at 1.19e-7 from both ends; a label that is a probability is what the score
    is held against, and counts as 1 from 0.5 everywhere else.

    Args:
        predictions: rows of which something is known; scores are probabilities.
        thresholds: (K,) least score with which a class holds; None: those of the predictions, 0.5 where they have none.
        bootstrap: number of resamples for the intervals of macro F1 and average precision, which are NaN for 0, and where no
            resample differs.
        seed: seed for the resamples.
        confidence: mass of the intervals, in (0, 1). That of exact_match is Wilson's, that of
            accuracy `bounds.share_interval`.

    Raises:
        DataError: D004 no labels; D014 no rows, a row of which nothing is known, scores that are no probabilities, or another kind
            of task.
        ConfigError: C003 for an impossible bootstrap or confidence.
    """
    check_options((), bootstrap, confidence)
    kinds = [f"{task.name} ({task.kind})" for task in predictions.labels.tasks]
    if len(kinds) != 1 or predictions.labels.tasks[0].kind != "any_of":
        raise DataError("D014", f"judge_any_of needs exactly one task of kind any_of, got {', '.join(kinds)}")
    least = thresholds_of(predictions, thresholds)
    task = answers_of(predictions, least)
    n = len(task.scores)
    per_class = tuple(_label(name, task, k, least[k]) for k, name in enumerate(predictions.labels.classes))
    drawn = resample([task], bootstrap, seed)
    wrong = (task.given != task.true) & task.known
    exact = int((~wrong.any(1)).sum())
    constant = task.known & (task.true != (2 * task.true.sum(0) > task.known.sum(0)))  # where the constant answer is wrong
    bins = reliability(task.scores[task.known], task.true[task.known])
    hits = int((task.given & task.true).sum())
    both = int(task.given.sum() + task.true.sum())
    return AnyOfMetrics(
        n=n,
        known=int(task.known.sum()),
        classes=predictions.labels.classes,
        confidence_level=confidence,
        bootstrap=bootstrap,
        accuracy=float(task.right.mean()),
        accuracy_ci=share_interval(task.right, confidence),
        exact_match=exact / n,
        exact_match_ci=accuracy_interval(exact, n, confidence),
        hamming_loss=float(wrong.sum() / task.known.sum()),
        constant_accuracy=float((1 - constant.sum(1) / task.known.sum(1)).mean()),
        constant_exact_match=float((~constant.any(1)).mean()),
        macro_f1=mean_defined(c.f1 for c in per_class),
        macro_f1_ci=resampled_interval(drawn.macro_f1, confidence),
        micro_f1=2 * hits / both if both else NAN,
        macro_ap=mean_defined(c.average_precision for c in per_class),
        macro_ap_ci=resampled_interval(drawn.macro_ap, confidence),
        balanced_accuracy=mean_defined(c.balanced_accuracy for c in per_class),
        roc_auc=mean_defined(c.roc_auc for c in per_class),
        log_loss=_log_loss(predictions, task.known),
        ece=bins.ece,
        reliability=bins,
        per_class=per_class,
        together=_pairs(task.true, task.true),
        answered=_pairs(task.true, task.given),
        warnings=_warnings(per_class),
    )


def thresholds_of(predictions: Predictions, thresholds: np.ndarray | Sequence[float] | None) -> np.ndarray:
    """(K,) float32: the given thresholds, else those of the predictions, else 0.5."""
    found = predictions.thresholds if thresholds is None else np.asarray(thresholds, np.float32)
    return np.full(predictions.labels.size, THRESHOLD, np.float32) if found is None else found


def answers_of(predictions: Predictions, thresholds: np.ndarray) -> Answers:
    """Scores, answers and truth of one task of either kind, as `resampling` takes them.

    Raises:
        DataError: D004, D014, as in `judge_any_of`.
    """
    labels = predictions.labels
    if len(predictions) == 0:
        raise DataError("D014", "there are no rows to judge", try_="imgcls-fast data check DATA")
    if predictions.targets is None:
        raise DataError("D004", "these predictions have no labels, so they cannot be judged")
    check_scores(predictions)
    known = ~np.isnan(predictions.targets)
    if not known.any(1).all():
        first = int((~known.any(1)).argmax())
        text = f"{(~known.any(1)).sum()} of {len(predictions)} rows have no label, so they cannot be judged"
        raise DataError("D014", text, where=f"row {predictions.rows[first]}, {predictions.paths[first]}")
    given = labels.decide(predictions.scores, thresholds)
    true = labels.decide(predictions.targets)
    if labels.tasks[0].kind == "one_of":
        right = (given & true).any(1).astype(np.float64)
    else:
        given, true = given & known, true & known
        right = 1 - ((given != true) & known).sum(1) / known.sum(1)
    return Answers(predictions.scores, given, true, known, right)


def _label(name: str, task: Answers, k: int, threshold: float) -> LabelMetrics:
    known = task.known[:, k]
    true, given = task.true[known, k], task.given[known, k]
    n, support, predicted, hits = len(true), int(true.sum()), int(given.sum()), int((true & given).sum())
    auc, ap = ranking(task.scores[known, k], true) if n else (NAN, NAN)
    recall = hits / support if support else NAN
    others = n - support
    specificity = 1 - (predicted - hits) / others if others else NAN
    return LabelMetrics(
        name=name,
        known=n,
        support=support,
        predicted=predicted,
        threshold=float(threshold),
        accuracy=float((true == given).mean()) if n else NAN,
        precision=hits / predicted if predicted else 0.0 if support else NAN,
        recall=recall,
        f1=2 * hits / (support + predicted) if support else NAN,
        roc_auc=auc,
        average_precision=ap,
        balanced_accuracy=(recall + specificity) / 2,
    )


def _log_loss(predictions: Predictions, known: np.ndarray) -> float:
    scores = np.clip(predictions.scores[known].astype(np.float64), CLIP, 1 - CLIP)
    targets = np.asarray(predictions.targets)[known]
    return float(-(targets * np.log(scores) + (1 - targets) * np.log1p(-scores)).mean())


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.rint(first.T.astype(np.float32) @ second.astype(np.float32)).astype(np.int64)


def _warnings(per_class: Sequence[LabelMetrics]) -> tuple[str, ...]:
    out = []
    absent = [c.name for c in per_class if not c.support]
    if absent:
        out.append(
            f"{named_classes(absent)}: true of no row, so recall, F1 and average precision are undefined and macro figures leave "
            "them out"
        )
    never = [c.name for c in per_class if c.support and not c.predicted]
    if never:
        out.append(f"{named_classes(never)}: never answered, so precision and F1 count as 0")
    always = [c.name for c in per_class if c.support and c.support == c.known]
    if always:
        out.append(f"{named_classes(always)}: true of all rows, so ROC-AUC is undefined")
    return tuple(out)
