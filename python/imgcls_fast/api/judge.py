"""Judge a run, ask its model about images, write its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import env
from ..core.errors import UsageError
from ..core.phases import counted_off, phase
from ..core.run import Run
from ..core.runs import find_run
from ..core.text import command
from .common import RunLike, run_of, say_warning, usual_device

if TYPE_CHECKING:
    from ..engines.predictor import Gathered
    from ..engines.predictor import Predictor as _Predictor
    from ..evaluation.metrics import Metrics
    from ..evaluation.tasks import TaskMetrics


def evaluate(
    run: RunLike = None,
    data: str | Path | None = None,
    *,
    split: str = "test",
    runtime: str = "torch",
    precision: str | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    trust: bool = False,
    include_train: bool = False,
    force: bool = False,
) -> Metrics | TaskMetrics:
    """Judge a run on one of its own splits, or on other labelled images; each row counts exactly once.

    Images that would flatter the model or cannot be judged are left out and counted, in warnings and in the metrics: files
    that the run was trained on (`seen`), of classes that the model does not know (`unknown_classes`), that cannot be decoded
    (`undecodable_files`), and of the run itself that have other bytes now (`changed_files`).

    Args:
        data: other images, in any form that `train` takes; at least one of their classes must be a class of the model.
        split: train, val or test; with `data`, all of its images are judged but those that the run was trained on.
        runtime: torch, compile, aoti, onnx, openvino, trt or auto.
        precision: precision of the export that the runtime opens; None: the chosen one.
        out: folder for metrics.json, per_class.csv, confusion.csv and predictions.csv.
        trust: open native code (aoti, trt) that this user has not exported; here and below.
        include_train: with `data`, judge images that the run was trained on as well; they are counted in any case.
        force: replace files in `out` that no evaluation has written; never the table that `data` names.

    Returns:
        Metrics of one class per image; of other kinds of labels TaskMetrics: figures of each task, and means over them.

    Raises:
        UsageError: U002 when files in `out` may not be replaced.
        DataError: D001..D015; ModelError M004, M005; ExportError E001.
    """
    from ..core.outputs import JUDGED, JUDGED_NAMES, claim_folder, demand_outside

    images = None if data is None else Path(data)
    if out is not None:
        claim_folder(Path(out), JUDGED_NAMES, JUDGED, force=force, inputs=[] if images is None else [images])
    from ..engines.scoring import score_rows
    from ..evaluation.metrics import without
    from ..evaluation.report import write_evaluation
    from ..evaluation.tasks import judge_all
    from ..loading.loader import usual_loader
    from ..training.judged_rows import demand_split, rows_to_judge
    from ..training.judging import run_engine

    demand_split(split)
    found, device = run_of(run), usual_device()
    if out is not None and images is None and found.config.data.source:
        demand_outside(Path(out), [Path(str(found.config.data.source))])
    engine, note = run_engine(found, runtime, device, precision, trust)
    asked = rows_to_judge(found, images, split, engine, include_train=include_train)
    settings = found.config.evaluate
    predictions = score_rows(
        engine,
        asked.manifest,
        asked.rows,
        batch_size=batch_size or int(settings.batch_size),
        on_bad=asked.undecoded.of(asked.manifest),
        loader=usual_loader(engine.pixels, device),
        workers=min(4, env.usable_cpus()),
    )
    engine.close()
    predictions = asked.kept(predictions)
    metrics = judge_all(
        predictions,
        top_k=settings.top_k,
        bootstrap=settings.bootstrap,
        seed=found.config.train.seed,
        group=asked.manifest.group,
    )
    metrics = without(metrics, asked.undecoded, (*asked.warnings, *asked.notices), asked.facts)
    if out is not None:
        write_evaluation(Path(out), predictions, metrics, Path(out) / "plots")
    for text in (note, *asked.warnings):
        say_warning(text)
    return metrics


def predict(
    run: Any = None,
    images: Any = None,
    *,
    runtime: str = "torch",
    precision: str | None = None,
    top_k: int = 1,
    batch_size: int | None = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Name the class of images: `predict("a.jpg")` asks the last run, `predict(run, ["a.jpg", "photos/"])` that one.

    Args:
        run: a run, a path, or None for the last one; without `images`, the images.
        images: one image or several: files, folders, bytes, open files, Pillow images, arrays,
            tensors. Of a folder every file is taken that is an image by its
            content or its name; a warning counts and names the others.

    Returns:
        One dict per image, in order: path, label, confidence and top (class, probability); or path and error. Where any number of
            classes may hold: path, labels (class, probability of those that do) and top. Of a model with several tasks: path and tasks,
            by their names.

    Raises:
        DataError: D001 for a path that does not exist, D002 when a folder holds no image.
    """
    run, images = _run_and_images(run, images)
    asked = gather_images(images)
    say_warning(asked.note())
    predictor = Predictor(run, runtime=runtime, precision=precision, batch=batch_size or 32, top_k=top_k, trust=trust)
    try:
        with phase("predicting") as current:
            return [answer.to_dict() for answer in counted_off(predictor.stream(asked.images), current)]
    finally:
        predictor.close()


def _run_and_images(run: Any, images: Any) -> tuple[RunLike, Any]:
    """What is meant by one positional argument: the images, unless it is a run."""
    if images is not None:
        return run, images
    if run is not None and not isinstance(run, Run):
        try:
            found = find_run(run) if isinstance(run, str | Path) else None
        except UsageError:  # no run, so images
            found = None
        if found is None:
            return None, run
    named = run.directory if isinstance(run, Run) else run
    said = "predict needs images, got None" if run is None else f"{named} is a run; predict needs images as well"
    raise UsageError("U002", said, try_=command("predict", "RUN", "IMAGES..."))


def gather_images(images: Any) -> Gathered:
    """The images that `predict` would answer about, of folders those inside, and the files that it would pass over.

    Raises:
        DataError: D001 for a path that does not exist, D002 when a folder holds no image.
    """
    from ..engines.predictor import gather

    return gather(images)


def Predictor(
    run: RunLike = None,
    *,
    runtime: str = "torch",
    precision: str | None = None,
    batch: int = 32,
    top_k: int = 1,
    device: str | None = None,
    trust: bool = False,
) -> _Predictor:
    """A loaded model that answers about paths, bytes, Pillow images, arrays, lists and folders.

    Args:
        run: a run, or the folder of a bundle.
        runtime: torch, compile, aoti, onnx, openvino, trt or auto.
        precision: precision of the export that the runtime opens; None: the chosen one.
        batch: images per forward pass.
        top_k: classes in each answer.
        device: device of the torch runtime; None: a GPU if there is one.

    Raises:
        ModelError: M004, M005 without a usable model; ExportError E001 without an export for `runtime`.
    """
    from ..engines.predictor import Predictor as Loaded
    from ..training.judging import open_model

    meant = run_of(run) if run in (None, "last") else run
    engine, note = open_model(meant, runtime, device or usual_device(), precision, trust)
    say_warning(note)
    return Loaded(engine, batch=batch, top_k=top_k, threads=min(8, env.usable_cpus()))


def load_model(run: RunLike = None, *, runtime: str = "torch", trust: bool = False) -> _Predictor:
    """The model of a run: `.predict(images)`, `.embed(images)`, `.classes`, `.preprocess(image)`. See `Predictor`."""
    return Predictor(run, runtime=runtime, trust=trust)


def report(run: RunLike = None, *, force: bool = False) -> Path:
    """Write report.html of a run again, from its directory alone.

    Args:
        force: replace a report.html that we have not written.

    Raises:
        UsageError: U003 when the run was not judged yet; U002 when its report.html is somebody else's.
    """
    from ..core.outputs import REPORT, demand_ours
    from ..training.reporting import report_run

    found = run_of(run)
    demand_ours(found.report_path, REPORT, force=force)
    return report_run(found)
