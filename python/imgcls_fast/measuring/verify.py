"""Checks whether all loaders give the same pixels and all runtimes the same scores, on real images of a run: `verify`.

Pixels are compared with those of the torch loader (Pillow decodes and resizes), scores with those of torch in FP32 from the
same pixels, so that a difference belongs to the loader or to the runtime and not to both.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import env
from ..core.batch import Batch
from ..core.bundle import Bundle
from ..core.errors import DataError, GateFailed, ImgclsError
from ..core.exports import list_exports
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.pixels import Pixels
from ..core.targets import READS
from ..core.text import command
from ..core.undecoded import Undecoded
from ..engines.agreement import MAX_SCORE
from ..engines.as_found import as_found
from ..engines.base import Engine
from ..engines.predictor import Predictor
from ..engines.runtimes import open_engine
from ..loading.backend import batches_by
from ..loading.loader import comparison_rows, dali_missing, read_rows
from ..loading.sampler import Sampler

Opened = Engine | Callable[[], Engine] | str  # str: why it is absent
Batches = Generator[Batch, None, None]
Source = Callable[[Sampler], Batches]  # delivers the sampler's batches, and frees what it holds when it is closed

MAX_LEVELS = 2  # of 255, anywhere
MEAN_LEVELS = 0.25  # of 255, over all images
REFERENCE = "torch"
REDUCED = (" fp16", " bf16", " int8")  # ends of names
_BATCH = 32


@dataclass
class Distance:
    """Distances between values, over all images."""

    images: int = 0
    largest: float = -1.0
    total: float = 0.0  # sum of the images' means
    beyond: float = 0.0  # sum of the images' shares above the limit
    worst: int = -1  # row

    def add(self, rows: np.ndarray, difference: np.ndarray, limit: float) -> None:
        """Take absolute differences (n, ...) of some rows into account; what is not finite is infinitely far."""
        apart = np.where(np.isfinite(difference), difference, np.inf).reshape(len(rows), -1)
        self.images += len(rows)
        self.total += float(apart.mean(1).sum())
        self.beyond += float((apart > limit).mean(1).sum())
        each = apart.max(1) if len(rows) else np.zeros(0)
        if len(rows) and each.max() > self.largest:
            self.largest, self.worst = float(each.max()), int(rows[each.argmax()])

    @property
    def mean(self) -> float:
        return self.total / max(self.images, 1)


@dataclass
class Compared:
    """One loader or runtime against the reference."""

    name: str
    precision: str = ""  # of a runtime
    values: Distance = field(default_factory=Distance)  # pixels of a loader, scores of a runtime
    scores: Distance = field(default_factory=Distance)  # of the reference, from the loader's pixels
    same: int = 0  # images with the same answer
    unlike: list[int] = field(default_factory=list)  # rows that only one of the two could read


@phase("comparing loaders and runtimes")
def verify_run(
    bundle: Bundle,
    manifest: Manifest,
    reference: Engine,
    engines: Mapping[str, Opened],
    *,
    images: int = 200,
    sources: Mapping[str, Source | str] | None = None,
    run: str = "RUN",
) -> dict[str, Any]:
    """`compare_run`, and an error where something differs.

    Raises:
        GateFailed: E904 above 2 levels anywhere or 0.25 on average, or above 1e-4 in an FP32 score; names the worst file.
    """
    result = compare_run(bundle, manifest, reference, engines, images=images, sources=sources)
    demand_same(result, run=run)
    return result


def compare_run(
    bundle: Bundle,
    manifest: Manifest,
    reference: Engine,
    engines: Mapping[str, Opened],
    *,
    images: int = 200,
    sources: Mapping[str, Source | str] | None = None,
) -> dict[str, Any]:
    """Compare loaders and runtimes on up to `images` images: test rows first, then val, then train, spread over each.

    Args:
        reference: torch in FP32.
        engines: name (which may end with the precision of a file) -> an engine, a function that opens one (it is closed
            again), or why there is none. An engine that
            cannot be opened is listed as absent with the reason.
        sources: name -> who else delivers pixels, or why not; None: `usual_sources`.

    Returns:
        images, undecodable, undecodable_files (path and reason), notices, pixels and scores (reference, allowed, compared,
        absent) and failures (sentences).

    Raises:
        DataError: D002 when the run has no images, D012 when none of them can be decoded.
    """
    rows, left = comparison_rows(manifest, images), Undecoded()
    if not len(rows):
        raise DataError("D002", "the run has no images to compare on", try_="imgcls-fast data check DATA")
    found = usual_sources(reference) if sources is None else sources
    with ExitStack() as stack:
        opened, absent = _open(engines, stack)
        size = min([_BATCH, len(rows), reference.max_batch, *(engine.max_batch for engine in opened.values())])
        sampler = Sampler(manifest, rows, bundle.pixels, size)
        present = {name: source for name, source in found.items() if not isinstance(source, str)}
        pixels = {name: Compared(name) for name in present}
        scores = {name: Compared(name, engine.precision) for name, engine in opened.items()}
        streams = {name: stack.enter_context(closing(source(sampler))) for name, source in present.items()}
        base = stack.enter_context(closing(loader_source(REFERENCE, left)(sampler)))
        undecodable = _compare(base, streams, reference, opened, pixels, scores, sampler)
    if undecodable == len(rows):
        raise DataError("D012", f"none of the {len(rows):,} images can be decoded", try_="imgcls-fast data check DATA")
    missing = {name: source for name, source in found.items() if isinstance(source, str)}
    judged = [_judge_pixels(one, manifest) for one in pixels.values()]
    scored = [_judge_scores(one, manifest) for one in scores.values()]
    return {
        "images": len(rows) - undecodable,
        "undecodable": undecodable,
        "undecodable_files": left.to_list(),
        "notices": [left.sentence()] if left else [],
        "pixels": {
            "reference": REFERENCE,
            "allowed_max": MAX_LEVELS,
            "allowed_mean": MEAN_LEVELS,
            "compared": judged,
            "absent": missing,
            "known": _known(bundle.pixels),
        },
        "scores": {"reference": REFERENCE, "allowed_max": MAX_SCORE, "compared": scored, "absent": absent},
        "failures": [entry["failure"] for entry in judged + scored if entry["failure"]],
    }


def demand_same(result: Mapping[str, Any], *, run: str = "RUN") -> None:
    """Raise the first failure of `compare_run`, with the names of the others.

    Raises:
        GateFailed: E904.
    """
    failed = [(kind, entry) for kind in ("pixels", "scores") for entry in result[kind]["compared"] if entry["failure"]]
    if not failed:
        return
    kind, first = failed[0]
    if kind == "pixels":
        again = "imgcls-fast train DATA --loader torch"
    else:
        target = READS.get(first["name"].partition("-")[0])
        again = command("export", run, f"--{target}") if target else "imgcls-fast doctor"
    others = ", ".join(entry["name"] for _, entry in failed[1:])
    known = result["pixels"]["known"] if first["name"].startswith("dali") else ""
    raise GateFailed(
        "E904",
        first["failure"],
        where=first["worst"] or "",
        why="; ".join(part for part in (known, f"also different: {others}" if others else "") if part),
        try_=again,
    )


def verify_table(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows for people: what, of whom, difference, same answers, verdict (or why it is absent)."""
    table = []
    for entry in result["pixels"]["compared"]:
        apart = f"max {_number(entry['max'])}, mean {_number(entry['mean'])} levels"
        table.append(("pixels", entry["name"], apart, _same(entry), entry["verdict"]))
    for entry in result["scores"]["compared"]:
        name = f"{entry['name']} ({entry['precision']})"
        table.append(("scores", name, f"max {_number(entry['max'])}", _same(entry), entry["verdict"]))
    for kind in ("pixels", "scores"):
        table += [(kind, name, "", "", f"absent: {why}") for name, why in result[kind]["absent"].items()]
    return table


@as_found()
def engines_of(bundle: Bundle, exports: Path, device: str, *, trust: bool = False) -> tuple[Engine, dict[str, Opened]]:
    """The model in torch, and how to open each runtime on each of its exports; what is usual is asked for even if it is not there."""

    def opener(runtime: str, precision: str) -> Callable[[], Engine]:
        return lambda: open_engine(bundle, runtime, device=device, exports=exports, precision=precision, trust=trust)

    there = [(export.meta.get("target"), export.meta.get("precision")) for export in list_exports(exports)]
    wanted = [("onnx", "fp32"), ("openvino", "fp32"), ("aoti", "fp32"), ("trt", "fp16")]
    for runtime in ("onnx", "openvino", "aoti", "trt"):
        wanted += [(runtime, str(precision)) for target, precision in there if target == READS[runtime]]
    engines: dict[str, Opened] = {
        f"{runtime} {precision}": opener(runtime, precision)
        for runtime, precision in dict.fromkeys(wanted)
        if precision != "bf16" or runtime == "trt"  # no ONNX runtime on a CPU takes it
    }
    return open_engine(bundle, "torch"), engines


# ---------------------------------------------------------------- who delivers pixels


def usual_sources(reference: Engine) -> dict[str, Source | str]:
    """Everything besides the torch loader that makes pixels of files, or why it cannot here."""
    dali = dali_missing() or (
        "it delivers 1 or 3 channels, and these are rgba" if reference.pixels.color == "rgba" else ""
    )
    gpu = "" if torch.cuda.is_available() else "there is no usable GPU"
    return {
        "predictor": predictor_source(reference),
        "dali-cpu": dali or loader_source("dali-cpu"),
        "dali-gpu": dali or gpu or loader_source("dali-gpu"),
    }


def loader_source(backend: str, left: Undecoded | None = None) -> Source:
    """The batches of one of the loaders; what it cannot decode goes into `left`."""

    def batches(sampler: Sampler) -> Batches:
        device = "cuda" if backend == "dali-gpu" else "cpu"
        workers = 0 if backend == "torch" else min(2, env.usable_cpus())
        on_bad = None if left is None else left.of(sampler.manifest)
        how: dict[str, Any] = {"batch_size": sampler.batch_size, "workers": workers, "device": device, "on_bad": on_bad}
        yield from read_rows(sampler.manifest, sampler.rows, sampler.pixels, backend=backend, **how)

    return batches


def predictor_source(engine: Engine) -> Source:
    """The pixels that `predict` and servers make of single files."""
    predictor = Predictor(engine)
    return lambda sampler: batches_by(sampler, predictor.preprocess)


# ---------------------------------------------------------------- the comparison


def _open(engines: Mapping[str, Opened], stack: ExitStack) -> tuple[dict[str, Engine], dict[str, str]]:
    opened: dict[str, Engine] = {}
    absent: dict[str, str] = {}
    for name, entry in engines.items():
        if isinstance(entry, str):
            absent[name] = entry
        elif isinstance(entry, Engine):
            opened[name] = entry
        else:
            try:
                opened[name] = entry()
            except ImgclsError as error:
                absent[name] = f"{error.code}: {error.message}"
            else:
                stack.callback(opened[name].close)
    return opened, absent


def _compare(
    base: Iterable[Batch],
    streams: Mapping[str, Batches],
    reference: Engine,
    engines: Mapping[str, Engine],
    pixels: Mapping[str, Compared],
    scores: Mapping[str, Compared],
    sampler: Sampler,
) -> int:
    """Go through the batches of all loaders together; returns how many images the reference could not decode."""
    decoded = 0
    for batch in base:
        rows, ours = _array(batch.rows), _array(batch.pixels)
        good = rows >= 0
        decoded += int(good.sum())
        said = np.zeros((len(rows), reference.labels.size), np.float32)
        if good.any():
            said[good] = reference.scores(ours[good])
            for name, engine in engines.items():
                _compare_scores(scores[name], reference, rows[good], said[good], engine.scores(ours[good]))
        for name, stream in streams.items():
            theirs = next(stream)
            read = _array(theirs.rows)
            both = good & (read == rows)
            one = pixels[name]
            one.unlike += [int(row) for row in np.concatenate([rows[good & ~both], read[(read >= 0) & ~both]])]
            if both.any():
                other = _array(theirs.pixels)[both]
                one.values.add(rows[both], np.abs(other.astype(np.int16) - ours[both]).astype(np.float32), MAX_LEVELS)
                again = reference.scores(np.ascontiguousarray(other))
                one.scores.add(rows[both], np.abs(again - said[both]), MAX_SCORE)
                one.same += int(reference.labels.same_answers(said[both], again, reference.thresholds).sum())
    return len(sampler.rows) - decoded


def _compare_scores(one: Compared, reference: Engine, rows: np.ndarray, said: np.ndarray, other: np.ndarray) -> None:
    if other.shape != said.shape:  # another model's engine
        one.values.add(rows, np.full(said.shape, np.inf, np.float32), MAX_SCORE)
        return
    one.values.add(rows, np.abs(other - said), MAX_SCORE)
    one.same += int(reference.labels.same_answers(said, other, reference.thresholds).sum())


def _known(pixels: Pixels) -> str:
    """Name where DALI is known to leave the limits; the pixel policy and the page of the loader explain it."""
    if pixels.interpolation == "bicubic":
        return "DALI clips bicubic overshoot at hard edges after both passes, Pillow between them"
    if pixels.size >= pixels.resize_to:
        return "with crop_pct 1 the image's edge is in view, where DALI repeats the last pixel and Pillow does not"
    return ""


def _judge_pixels(one: Compared, manifest: Manifest) -> dict[str, Any]:
    values = one.values
    failure, worst = "", manifest.paths[values.worst] if values.worst >= 0 else None
    share = values.beyond / max(values.images, 1)
    if one.unlike:
        worst = manifest.paths[one.unlike[0]]
        failure = f"{one.name} and {REFERENCE} do not read the same files: {len(one.unlike):,} differ, first {worst}"
    elif values.largest > MAX_LEVELS or values.mean > MEAN_LEVELS:
        failure = (
            f"pixels of {one.name} differ from {REFERENCE}'s by up to {values.largest:g} levels (allowed {MAX_LEVELS}), on average "
            f"{values.mean:.3f} (allowed {MEAN_LEVELS}); {share:.3%} of the values by more than {MAX_LEVELS}; most in {worst}"
        )
    return {
        "name": one.name,
        "images": values.images,
        "max": _finite(max(values.largest, 0.0)),
        "mean": _finite(values.mean),
        "share_beyond": share,
        "unlike": len(one.unlike),
        "worst": worst,
        "score_diff": _finite(max(one.scores.largest, 0.0)),
        "same_top1": one.same,
        "verdict": "differs" if failure else "same",
        "failure": failure,
    }


def _judge_scores(one: Compared, manifest: Manifest) -> dict[str, Any]:
    # an FP16 file that ONNX Runtime computes in float32 on a CPU still has FP16's weights; `engines_of` names the file's precision
    values, full = one.values, one.precision == "fp32" and not one.name.endswith(REDUCED)
    failure, worst = "", manifest.paths[values.worst] if values.worst >= 0 else None
    if not np.isfinite(values.largest):
        failure = f"scores of {one.name} are not finite, or not as many as the model has; first in {worst}"
    elif full and values.largest > MAX_SCORE:
        answer = "class" if manifest.labels.is_single else "answers"
        failure = (
            f"scores of {one.name} differ from {REFERENCE}'s by up to {values.largest:.2e} (allowed {MAX_SCORE:.0e}), same {answer} on "
            f"{one.same:,} of {values.images:,} images; most in {worst}"
        )
    verdict = "differs" if failure else "same" if full else "reduced precision, see the gate"
    return {
        "name": one.name,
        "precision": one.precision,
        "images": values.images,
        "max": _finite(max(values.largest, 0.0)),
        "same_top1": one.same,
        "worst": worst,
        "verdict": verdict,
        "failure": failure,
    }


def _array(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _same(entry: Mapping[str, Any]) -> str:
    return f"{entry['same_top1']:,} of {entry['images']:,}"
