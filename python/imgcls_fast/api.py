"""Everything that `imgcls_fast.*` offers in Python; the command line calls the same functions.

Data may be a folder, a CSV or JSONL table, a zip or tar; a run may be its path, its name in the folder of runs, a Run,
or None for the last one. Heavy libraries are imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core import env
from .core import run as _runs
from .core.run import Run, find_run

if TYPE_CHECKING:
    from .core.config import RunConfig
    from .core.exports import Export
    from .engines.predictor import Predictor as _Predictor
    from .evaluation.metrics import Metrics

RunLike = Run | str | Path | None


def train(
    data: str | Path | None = None,
    *,
    resume: RunLike = None,
    config: Path | None = None,
    preset: str | None = None,
    sets: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    sinks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    command: Sequence[str] | None = None,
    **settings: Any,
) -> Run:
    """Train a classifier from images to a judged bundle and a report; or continue a run.

    Args:
        data: the images; None: the embedded handwritten digits.
        resume: a run to continue instead ("last" for the last one).
        config: YAML file with the sections of RunConfig.
        preset: name of a shipped preset.
        sets: "section.field=value" strings.
        overrides: dotted setting names to values.
        sinks: callables that receive the events of training.
        command: the command line, stored in env.json.
        settings: flags by their Python names: `model="resnet50", epochs=10, batch_size=64, img_size=224`.

    Returns:
        The finished run.

    Raises:
        ImgclsError: with a code, the cause and what to do; Interrupted after a signal, with the work saved.
    """
    from .core.settings import from_sets
    from .training import session

    changes = _overrides(overrides, settings)
    if resume is not None:
        changes |= from_sets(sets)
        return session.resume(_run(resume), changes, sinks)
    return session.start(_config(data, config, preset, sets, changes), sinks, command)


def plan(
    data: str | Path | None = None,
    *,
    config: Path | None = None,
    preset: str | None = None,
    sets: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What `train` would do, with measured estimates of memory (MB) and time (s); trains nothing.

    Returns:
        rows of (setting, value, reason), parameters, memory_mb, seconds_per_epoch, epochs, device, data, config.

    Raises:
        ImgclsError: as `train`.
    """
    from .training import session

    return session.dry_run(_config(data, config, preset, sets, _overrides(overrides, settings)))


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
) -> Metrics:
    """Judge a run on one of its own splits, or on other labelled images; each row counts exactly once.

    Args:
        data: other images, in any form that `train` takes; their classes must be classes of the model.
        split: train, val or test; with `data`, all of its images are judged.
        runtime: torch, compile, aoti, onnx, openvino, trt or auto.
        precision: of the export that the runtime opens; None: the chosen one.
        out: folder for metrics.json, per_class.csv, confusion.csv and predictions.csv.
        trust: open native code (aoti, trt) that this user has not exported; here and below.

    Raises:
        DataError: D001..D014; ModelError M004, M005; ExportError E001.
    """
    from .data.loader import usual_loader
    from .evaluation.metrics import judge, without
    from .evaluation.report import claim_folder, write_evaluation
    from .training.judging import engine_and_rows, score_rows

    claim_folder(out)
    found = _run(run)
    device = _device()
    images = None if data is None else Path(data)
    engine, note, manifest, rows, left, said = engine_and_rows(found, images, split, runtime, device, precision, trust)
    settings = found.config.evaluate
    predictions = score_rows(
        engine, manifest, rows, batch_size=batch_size or int(settings.batch_size), on_bad=left.of(manifest),
        loader=usual_loader(engine.pixels, device), workers=min(4, env.usable_cpus()),
    )  # fmt: skip
    engine.close()
    metrics = judge(predictions, top_k=settings.top_k, bootstrap=settings.bootstrap, seed=found.config.train.seed)
    metrics = without(metrics, left, said)
    if out is not None:
        write_evaluation(Path(out), predictions, metrics, Path(out) / "plots")
    _say(note)
    return metrics


def predict(
    run: RunLike = None,
    images: Sequence[Any] | str | Path = (),
    *,
    runtime: str = "torch",
    precision: str | None = None,
    top_k: int = 1,
    batch_size: int | None = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Name the class of images.

    Args:
        images: files and folders (and bytes, Pillow images, arrays).

    Returns:
        One dict an image, in order: path, label, confidence and top (class, probability); or path and error.

    Raises:
        DataError: D001 for a path that does not exist, D002 when a folder holds no image.
    """
    from .engines.predictor import files_of

    listed: list[Any] = []
    for image in [images] if isinstance(images, str | Path) else images:
        listed += files_of(Path(image)) if isinstance(image, str | Path) else [image]
    predictor = Predictor(run, runtime=runtime, precision=precision, batch=batch_size or 32, top_k=top_k, trust=trust)
    try:
        return [answer.to_dict() for answer in predictor.stream(listed)]
    finally:
        predictor.close()


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
        precision: of the export that the runtime opens; None: the chosen one.
        batch: images per forward pass.
        top_k: classes in each answer.
        device: of the torch runtime; None: a GPU if there is one.

    Raises:
        ModelError: M004, M005 without a usable model; ExportError E001 without an export for `runtime`.
    """
    from .engines.predictor import Predictor as Loaded
    from .training.judging import open_model

    engine, note = open_model(run, runtime, device or _device(), precision, trust)
    _say(note)
    return Loaded(engine, batch=batch, top_k=top_k, threads=min(8, env.usable_cpus()))


def load_model(run: RunLike = None, *, runtime: str = "torch", trust: bool = False) -> _Predictor:
    """The model of a run: `.predict(images)`, `.embed(images)`, `.classes`, `.preprocess(image)`. See `Predictor`."""
    return Predictor(run, runtime=runtime, trust=trust)


def export(
    run: RunLike = None,
    target: str = "onnx",
    *,
    precision: str | None = None,
    out: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
    **settings: Any,
) -> Export:
    """Write the model for another runtime; compare it with the original and judge it before it is called done.

    Args:
        target: onnx, trt, pt2, aoti, torchscript or triton.
        precision: fp32, fp16, bf16 or int8; None: fp16 for trt, else fp32.
        out: also copy the file there.
        overrides: dotted setting names to values, for this export.
        say: told what happens, in sentences; None: as Python warnings.
        progress: told (phase, fraction) while an engine is built.
        settings: flags by their Python names: `max_drop=0.5, gate_data="more/", batch=8`.

    Returns:
        `.path`, `.folder`, `.meta` (comparison, latency, quantisation, ...), `.gate` (the judgement), `.to_dict()`.

    Raises:
        ConfigError: C001 to C004 for a wrong target, precision or setting.
        ExportError: E001 to E004.
        GateFailed: E901 when the file disagrees with the original, E902 when it lost accuracy, E903 when the rows cannot tell.
        HardwareError: H004, H001 where a library or a GPU is missing; what could be made stays.
    """
    from .core.files import copy_whole
    from .exporting.session import export_run

    made = export_run(_run(run), target, precision, _overrides(overrides, settings), say=say or _say, progress=progress)
    if out is not None:
        copy_whole(made.path, Path(out))
    return made


def verify(
    run: RunLike = None, *, images: int | None = None, out: str | Path | None = None, trust: bool = False
) -> dict[str, Any]:
    """Compare the pixels of every loader and the scores of every runtime that is here, on real images of the run.

    Args:
        images: how many; None: the run's setting.
        out: also write the result there, as JSON.

    Returns:
        images, undecodable, pixels and scores (reference, allowed, compared, absent with reasons), and table: the same as rows.

    Raises:
        GateFailed: E904 when pixels differ by more than 2 levels (0.25 on average), or FP32 scores by more than 1e-4.
    """
    from .core.bundle import read_bundle
    from .core.files import write_json
    from .exporting.verify import engines_of, verify_run, verify_table

    found = _run(run)
    bundle = read_bundle(found.bundle_path)
    reference, engines = engines_of(bundle, found.exports, _device(), trust=trust)
    result = verify_run(
        bundle, found.manifest, reference, engines,
        images=images or found.config.export.verify_images, run=str(found.directory),
    )  # fmt: skip
    if out is not None:
        write_json(Path(out), result)
    return result | {"table": verify_table(result)}


def deploy(run: RunLike = None, kind: str = "kserve", **options: Any) -> str:
    """A manifest that serves the Triton export of a run: for KServe, or for plain Kubernetes.

    Args:
        kind: kserve or k8s.
        options: of `exporting.deploy.render`.

    Returns:
        YAML.

    Raises:
        ConfigError: C003 for an unknown kind; ExportError: E001 without a Triton export.
    """
    from .core.bundle import read_bundle
    from .core.exports import find_export
    from .exporting.deploy import render

    found = _run(run)
    made = find_export(found.exports, read_bundle(found.bundle_path), "triton")
    return render(kind, name=options.pop("name", None) or "classifier", export=made, **options)


def benchmark(
    run: RunLike = None,
    *,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (),
    duration_s: float = 3.0,
    device: str | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Time the engines of a run on this machine: latency, rate, what they compute in and what they are worth.

    Args:
        run: a run, or the folder (or file) of one of its exports, which is then timed alone beside torch.
        runtimes: torch, compile, aoti, onnx, openvino, trt; empty: all that are here.
        batches: sizes; empty: 1, 2, 4, ... until the rate falls.
        duration_s: of each timing.
        device: cpu or cuda; None: a GPU if there is one.
        out: also write the result there, as JSON; bench/efficiency.json of the run is always written.
        say: told what happens, in sentences.

    Returns:
        model, engines (latency in ms, images per second, ratio to torch with its interval, precision, accuracy), data
        (images per second from files), absent (with reasons), machine. See `exporting.efficiency`.

    Raises:
        ConfigError: C003 for an unknown runtime or batch size; ModelError M004, M005; ExportError E001, E005.
    """
    from .exporting.efficiency import examine

    return examine(
        *_run_or_export(run), runtimes=tuple(runtimes), batches=tuple(batches), duration_s=duration_s,
        device=device or _device(), out=None if out is None else Path(out), say=say or _say, trust=trust,
    )  # fmt: skip


def bench_report(results: Sequence[str | Path] | str | Path, out: str | Path = "bench") -> dict[str, Any]:
    """Draw results of `pytest benchmarks`: one picture an area, the engines' accuracy against latency, one HTML page.

    Args:
        results: folders `results/<machine>`.
        out: folder for the page and the pictures.

    Returns:
        page, pictures (paths), tables (text of each area).

    Raises:
        UsageError: U004 when there are no results, or they cannot be read.
    """
    from .evaluation.benchcharts import write_bench_report

    given = [results] if isinstance(results, str | Path) else results
    return write_bench_report([Path(folder) for folder in given], Path(out))


def bench_compare(before: str | Path, after: str | Path) -> dict[str, Any]:
    """Which ratios to a rival became worse by more than 5 %, between two results of one machine and one set of versions.

    Returns:
        rows (area, case, contender, rival, before, after, change, low, p, adjusted, flagged), flagged (their number),
        only_before and only_after (rows without a partner), and table: the same as text.

    Raises:
        UsageError: U004 when they cannot be read or must not be compared.
    """
    from .evaluation.benchreport import compare, read_results

    return compare(*(read_results(Path(folder)) for folder in (before, after))).to_dict()


def report(run: RunLike = None) -> Path:
    """Write report.html of a run again, from its directory alone.

    Raises:
        UsageError: U003 when the run was not judged yet.
    """
    from .training.reporting import report_run

    return report_run(_run(run))


def demo(*, out: str | Path | None = None, sinks: Sequence[Callable[[dict[str, Any]], Any]] = ()) -> Run:
    """Train on the embedded handwritten digits: no network, no GPU, under 90 s on two cores."""
    return train(None, sinks=sinks, overrides={"out": str(out)} if out else None, command=["imgcls-fast", "demo"])


def check_data(data: str | Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Scan images as `train` would, and tell everything that is wrong with them; changes nothing.

    Returns:
        ok, line (the summary), problems, quarantine (path and reason of each), notices, classes and counts.
    """
    from .data.digits import write_digits
    from .data.prepare import scan_options
    from .data.scan import inspect

    config = _config_of(data, arguments)
    source = Path(config.data.source) if config.data.source else write_digits(env.cache_dir())
    found = inspect(source, scan_options(config.data, config.pixels.exif, env.cache_dir()))
    return found.to_dict()


def split_data(data: str | Path | None = None, *, out: str | Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Divide images into train, val and test, and write split.csv, which `train` takes as data.

    Returns:
        path of the file, images of each split, notices.
    """
    from .data.prepare import prepare
    from .data.split import write_split_csv

    config = _config_of(data, arguments)
    prepared = prepare(config.data, config.pixels.exif, env.cache_dir())
    path = Path(out) if out else Path("split.csv")
    write_split_csv(path, prepared.manifest, replace=out is not None)
    names = ("images", "splits", "quarantined", "duplicates_removed", "notices")
    return {"path": str(path), **{name: prepared.facts()[name] for name in names}}


def data_stats(data: str | Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Counts of classes and splits, image sizes, aspect ratios, channel means."""
    from .data.prepare import prepare, statistics

    config = _config_of(data, arguments)
    return statistics(prepare(config.data, config.pixels.exif, env.cache_dir()))


def list_runs() -> list[dict[str, Any]]:
    """The runs in the folder of runs, the oldest first: name, data, model, epochs, accuracy, split, created, finished."""
    return [run.brief() for run in _runs.list_runs()]


def show_run(run: RunLike = None) -> dict[str, Any]:
    """One run: its brief, configuration, data, metrics of each split, efficiency, epochs and paths."""
    return _run(run).details()


def doctor() -> dict[str, Any]:
    """What this machine has: versions, compiled extension, GPU, loaders, disk.

    Returns:
        {"sections": [(name, [(item, value, ok, hint), ...]), ...]}
    """
    from .training.doctor import examine_machine

    return {"sections": examine_machine()}


def _run(run: RunLike) -> Run:
    return run if isinstance(run, Run) else find_run(run)


def _run_or_export(run: RunLike) -> tuple[Run, Path | None]:
    """A run; or the run to which an export belongs, and the export's folder."""
    from .core.exports import export_folder

    folder = export_folder(Path(run)) if isinstance(run, str | Path) and str(run) != "last" else None
    return (_run(run), None) if folder is None else (_run(folder.parent.parent), folder)


def _config(
    data: str | Path | None, file: Path | None, preset: str | None, sets: Sequence[str], overrides: dict[str, Any]
) -> RunConfig:
    from .core.settings import build_config

    return build_config(
        {**({} if data is None else {"data.source": str(data)}), **overrides},
        preset=preset,
        file=file,
        sets=tuple(sets),
    )


def _config_of(data: str | Path | None, arguments: dict[str, Any]) -> RunConfig:
    """The configuration of the data functions: the same arguments as `train`, or flags by their Python names."""
    known = {name: arguments.pop(name) for name in ("config", "preset", "sets", "overrides") if name in arguments}
    changes = _overrides(known.get("overrides"), arguments)
    return _config(data, known.get("config"), known.get("preset"), known.get("sets", ()), changes)


def _overrides(overrides: dict[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any]:
    from .core.flags import python_overrides

    return {**(overrides or {}), **python_overrides(settings)}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _say(note: str) -> None:
    if note:
        import warnings

        warnings.warn(note, stacklevel=3)
