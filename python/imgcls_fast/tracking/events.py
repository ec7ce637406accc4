"""What passes through a sink: a dict that JSON can hold, with its kind under "event"; one type per kind.

Each type is also the constructor of its kind: a key that is misspelt, missing or of the wrong type is an error of the type checker,
where an event is made as well as where it is read. A sink ignores kinds that it does not know.
"""

import warnings  # no `annotations` from __future__: as texts they would hide NotRequired from __required_keys__
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypedDict, TypeVar, cast

from ..core.figures import FIGURES
from ..core.phases import PhaseEvent

_PACKAGE = str(Path(__file__).resolve().parents[1])
Pair = Sequence[float | None]  # the ends of an interval; None where there are too few images for one


class DataRead(TypedDict):
    """The scan is done: what is in the data."""

    event: Literal["data"]
    source: str
    root: str
    images: int
    classes: list[str]
    counts: dict[str, int]
    smallest: int
    splits: dict[str, int]
    quarantined: int
    duplicates_removed: int
    skipped: Any
    skipped_files: list[dict[str, Any]]
    notices: list[str]
    fingerprint: str
    tasks: NotRequired[list[dict[str, Any]]]  # where images have labels of another kind than one class


class Notice(TypedDict):
    """Something worth knowing that is no warning."""

    event: Literal["notice"]
    text: str


class PlanMade(TypedDict):
    """Every `auto` is a number. `rows` are (setting, value, reason)."""

    event: Literal["plan"]
    rows: Sequence[Sequence[Any]]
    parameters: int | None
    device: str
    memory_mb: float | None
    run: str


class BaselineFitted(TypedDict):
    """A linear probe is judged."""

    event: Literal["baseline"]
    features: str
    split: str
    accuracy: float
    ci: Pair
    balanced_accuracy: NotRequired[float]
    macro_f1: float
    exact_match: NotRequired[float]
    exact_match_ci: NotRequired[Pair]
    macro_ap: NotRequired[float]
    imbalanced: NotRequired[bool]
    majority: NotRequired[Mapping[str, Any]]
    n: int
    of: int
    train_rows: int
    train_of: int
    limit: str
    seconds: float


class Started(TypedDict):
    """The loop of training begins, or goes on after `batch` batches of an epoch."""

    event: Literal["start"]
    epoch: int
    epochs: int
    steps_per_epoch: int
    resumed: bool
    step: int
    batch: int
    monitor: str
    patience: int | None


class Stepped(TypedDict):
    """A look at the loss inside an epoch."""

    event: Literal["progress"]
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_s: float
    data_share: float
    eta_s: float


class Validating(TypedDict):
    """How many validation images have been scored."""

    event: Literal["validate"]
    epoch: int
    done: int
    total: int


class EpochDone(TypedDict):
    """An epoch is trained and validated; it may hold the column of any of `core.figures.FIGURES`.

    `delta`: the monitored figure minus that of the best epoch before.
    """

    event: Literal["epoch"]
    epoch: int
    epochs: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    val_macro_f1: float
    val_balanced_accuracy: NotRequired[float]
    val_macro_ap: NotRequired[float]
    lr: float
    images: int
    images_per_s: float
    data_share: float
    memory_mb: float
    seconds: float
    best: bool
    monitor: str
    eta_s: float
    delta: float | None


class Ended(TypedDict):
    """Which epoch was the best by which figure, and whether patience or the caller ended training."""

    epoch: int
    epochs: int
    monitor: str
    best_epoch: int
    best: float
    patience: int | None
    early: bool
    by_caller: NotRequired[bool]


class StoppedEarly(Ended):
    """Patience or the caller ended training."""

    event: Literal["stopped_early"]


class Warned(TypedDict):
    """A warning."""

    event: Literal["warning"]
    text: str


class ImageLeftOut(TypedDict):
    """An image cannot be decoded and is left out from here on."""

    event: Literal["quarantine"]
    path: str
    reason: str
    epoch: int
    row: int


class CheckpointSaved(TypedDict):
    """A checkpoint is on the disk."""

    event: Literal["checkpoint"]
    path: str
    epoch: int
    step: int


class Stopped(TypedDict):
    """A signal ended training; `path`: the checkpoint, if there is one."""

    event: Literal["interrupted"]
    path: str | None
    command: str


class Failed(TypedDict):
    """An error ended training."""

    event: Literal["failed"]
    code: str
    message: str
    where: str
    why: str
    path: str | None
    command: str


class Done(TypedDict):
    """Trained and judged. `against`: the baseline on the same images; `around_s`: time before and after the loop.

    Where images have labels of another kind than one class, figures are means over `tasks` (see `evaluation.tasks.TaskMetrics`).
    """

    event: Literal["done"]
    split: str
    accuracy: float
    ci: Pair
    macro_f1: float
    exact_match: NotRequired[float]
    exact_match_ci: NotRequired[Pair]
    macro_ap: NotRequired[float]
    macro_ap_ci: NotRequired[Pair]
    tasks: NotRequired[list[dict[str, Any]]]
    balanced_accuracy: NotRequired[float]
    imbalanced: NotRequired[bool]
    majority: NotRequired[Mapping[str, Any]]
    ece: NotRequired[float]
    n: int
    baseline: float | None
    baseline_balanced: NotRequired[float | None]
    worst: list[list[Any]]
    seconds: float
    ended: Ended | None
    report: str
    run: str
    commands: list[list[str]]
    notes: list[str]
    against: Mapping[str, Any] | None
    around_s: float
    resumed: bool


Event = (
    DataRead
    | Notice
    | PlanMade
    | BaselineFitted
    | Started
    | Stepped
    | Validating
    | EpochDone
    | StoppedEarly
    | Warned
    | ImageLeftOut
    | CheckpointSaved
    | Stopped
    | Failed
    | Done
    | PhaseEvent
)
Emit = Callable[[Event], Any]
E = TypeVar("E")


def event_of(kind: type[E], facts: Mapping[str, Any]) -> E:
    """An event from facts that are put together elsewhere (rows of metrics.csv, baseline.json, data.json).

    Raises:
        TypeError: a key that the kind does not have, or one that is missing.
    """
    required, optional = kind.__required_keys__, kind.__optional_keys__  # type: ignore[attr-defined]
    if kind is EpochDone:
        optional |= {figure.column for figure in FIGURES}
    if wrong := (facts.keys() - required - optional) | (required - facts.keys()):
        raise TypeError(f"{kind.__name__}: unknown or missing: {', '.join(sorted(wrong))}")
    return cast(E, dict(facts))


@contextmanager
def warnings_as_events(emit: Emit) -> Iterator[None]:
    """While entered, warnings of this package become `warning` events, each text once; those of libraries go on as before."""
    before, seen = warnings.showwarning, set()

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if not filename.startswith(_PACKAGE):
            before(message, category, filename, *rest, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            emit(Warned(event="warning", text=str(message)))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class Sink(Protocol):
    """Anything that can be called with an event and closed at the end."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...
