"""`verify`: loaders and runtimes agree on real images, planted defects are found, and what is absent is listed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.cli.app import parse
from imgcls_fast.core.batch import Batch
from imgcls_fast.core.errors import DataError, GateFailed, HardwareError
from imgcls_fast.core.manifest import Manifest
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.scan import scan
from imgcls_fast.engines.agreement import MAX_SCORE
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.engines.torch_runtime import TorchEngine
from imgcls_fast.loading.loader import comparison_rows, dali_missing
from imgcls_fast.loading.sampler import Sampler
from imgcls_fast.measuring import verify
from imgcls_fast.measuring.verify import (
    compare_run,
    demand_same,
    loader_source,
    predictor_source,
    usual_sources,
    verify_run,
    verify_table,
)

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> Manifest:
    """45 of the test photos, every ninth: among them turned, gray, CMYK, PNG and WebP files."""
    manifest = scan(shared_data / "photos", ScanOptions(threads=2)).manifest
    return manifest.take(manifest.rows("test")[::5])


@pytest.fixture
def drawn(tmp_path: Path, pictures: list[np.ndarray]) -> Manifest:
    """12 pictures in two classes, as PNG files."""
    for k, picture in enumerate(pictures[:12]):
        folder = tmp_path / "pictures" / ("even" if k % 2 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{k}.png")
    manifest = scan(tmp_path / "pictures", ScanOptions(threads=1)).manifest
    return manifest.with_splits(np.array([0, 1, 2] * 4))


class Changed:
    """A torch engine with a planted defect in its input or output; `precision` is what it claims."""

    def __init__(self, engine: Any, before: Any = None, after: Any = None, precision: str = "fp32") -> None:
        self._engine, self._before, self._after, self.precision = engine, before, after, precision
        self.labels, self.pixels, self.max_batch, self.thread_safe = engine.labels, engine.pixels, 16, True
        self.runtime, self.closed, self.thresholds = "double", False, None

    def scores(self, pixels: Any) -> np.ndarray:
        scores = self._engine.scores(np.ascontiguousarray(self._before(pixels)) if self._before else pixels)
        return self._after(scores) if self._after else scores

    def warmup(self, n: int) -> None: ...

    def close(self) -> None:
        self.closed = True


def shifted(sampler: Sampler) -> Iterator[Batch]:
    """The torch loader with a crop that is one pixel too far to the right."""
    for batch in loader_source("torch")(sampler):
        yield replace(batch, pixels=batch.pixels.roll(-1, 2))


# ---------------------------------------------------------------- agreement


def test_loaders_and_runtimes_agree_on_real_photos(photos: Manifest, bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of(size=64, classes=5)
    reference = open_engine(bundle)
    result = verify_run(bundle, photos, reference, {"again": lambda: open_engine(bundle)}, images=45)
    assert result["images"] == 45 and result["undecodable"] == 0 and result["failures"] == []
    names = {entry["name"] for entry in result["pixels"]["compared"]} | set(result["pixels"]["absent"])
    assert names == {"predictor", "dali-cpu", "dali-gpu"}
    for entry in result["pixels"]["compared"]:
        assert entry["images"] == 45 and entry["max"] <= 2 and entry["mean"] <= 0.25 and entry["verdict"] == "same"
    (predictor,) = (entry for entry in result["pixels"]["compared"] if entry["name"] == "predictor")
    assert predictor["max"] == 0 and predictor["score_diff"] == 0, "predict and eval must see the same pixels"
    (again,) = result["scores"]["compared"]
    assert again["max"] <= 1e-6 and again["same_top1"] == 45
    json.dumps(result, allow_nan=False)


@needs_dali
def test_bicubic_pixels_of_dali_are_refused_with_the_known_reason(
    photos: Manifest, bundle_of: Callable[..., Any]
) -> None:
    """Not a defect that was planted: the default of pretrained timm models. The mean and the classes stay as they are."""
    bundle = bundle_of(size=128, classes=5)
    bundle = replace(bundle, pixels=replace(bundle.pixels, interpolation="bicubic"))
    result = compare_run(bundle, photos, open_engine(bundle), {}, images=20)
    (dali,) = (entry for entry in result["pixels"]["compared"] if entry["name"] == "dali-cpu")
    assert dali["max"] > 2 and dali["mean"] <= 0.25 and dali["share_beyond"] < 2e-3
    with pytest.raises(GateFailed) as refused:
        demand_same(result)
    assert "overshoot" in refused.value.why and "--loader torch" in refused.value.try_


# ---------------------------------------------------------------- planted defects


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (lambda pixels: pixels[..., ::-1], None, "scores of onnx differ"),
        (lambda pixels: pixels.transpose(0, 2, 1, 3), None, "scores of onnx differ"),
        (None, lambda scores: scores + np.float32(2e-4), "scores of onnx differ"),
        (None, lambda scores: scores * np.float32("nan"), "not finite"),
        (None, lambda scores: scores[:, :2], "not as many as the model has"),
    ],
    ids=["channels swapped", "transposed", "offset", "nan", "a class too few"],
)
def test_a_planted_defect_of_an_engine_is_found(before, after, found, drawn, bundle_of):
    bundle = bundle_of()
    reference = open_engine(bundle)
    broken = Changed(open_engine(bundle), before, after)
    with pytest.raises(GateFailed) as refused:
        verify_run(bundle, drawn, reference, {"onnx": broken}, sources={}, run="runs/last")
    error = refused.value
    assert (error.code, error.exit_code) == ("E904", 5)
    assert found in error.message and error.where in drawn.paths[:] and error.where in error.message
    assert error.try_ == "imgcls-fast export runs/last --onnx"
    parse(shlex.split(error.try_)[1:])
    assert not broken.closed, "it was the caller's"


@pytest.mark.parametrize("defect", ["crop", "channels", "brighter"])
def test_a_planted_defect_of_a_loader_is_found(defect, drawn, bundle_of):
    def broken(sampler: Sampler) -> Iterator[Batch]:
        change = {"channels": lambda x: x.flip(3), "brighter": lambda x: (x.int() + 3).clamp(0, 255).byte()}.get(defect)
        for batch in loader_source("torch")(sampler):
            yield replace(batch, pixels=change(batch.pixels)) if change else batch

    source = shifted if defect == "crop" else broken
    bundle = bundle_of()
    with pytest.raises(GateFailed) as refused:
        verify_run(bundle, drawn, open_engine(bundle), {}, sources={"dali-cpu": source})
    assert refused.value.code == "E904" and "pixels of dali-cpu differ" in refused.value.message
    assert refused.value.where in drawn.paths[:]
    parse(shlex.split(refused.value.try_)[1:])


def test_a_loader_that_reads_other_files_is_found(drawn, bundle_of):
    def forgetful(sampler: Sampler) -> Iterator[Batch]:
        for batch in loader_source("torch")(sampler):
            rows = batch.rows.clone()
            rows[3] = -1
            yield replace(batch, rows=rows)

    bundle = bundle_of()
    with pytest.raises(GateFailed, match="do not read the same files: 1 differ"):
        verify_run(bundle, drawn, open_engine(bundle), {}, sources={"dali-cpu": forgetful})


def test_the_mean_is_judged_as_well_as_the_maximum(drawn, bundle_of):
    def dimmer(sampler: Sampler) -> Iterator[Batch]:
        for batch in loader_source("torch")(sampler):
            yield replace(batch, pixels=batch.pixels - (batch.pixels > 0).byte())

    bundle = bundle_of()
    result = compare_run(bundle, drawn, open_engine(bundle), {}, sources={"dimmer": dimmer})
    (entry,) = result["pixels"]["compared"]
    assert entry["max"] == 1 and entry["mean"] > 0.25 and entry["share_beyond"] == 0 and entry["failure"]


def test_every_failure_is_listed_and_the_error_names_the_others(drawn, bundle_of):
    bundle = bundle_of()
    reference = open_engine(bundle)
    swap = Changed(open_engine(bundle), lambda pixels: pixels[..., ::-1])
    result = compare_run(bundle, drawn, reference, {"openvino": swap, "trt": swap}, sources={"shifted": shifted})
    assert len(result["failures"]) == 3
    with pytest.raises(GateFailed) as refused:
        demand_same(result)
    assert "shifted" in refused.value.message and "openvino, trt" in refused.value.why


# ---------------------------------------------------------------- what is not judged, and what is not there


def test_reduced_precision_is_reported_and_left_to_the_gate(drawn, bundle_of):
    bundle = bundle_of()
    rough = Changed(open_engine(bundle), after=lambda scores: np.round(scores, 2), precision="int8")
    result = verify_run(bundle, drawn, open_engine(bundle), {"trt": rough}, sources={})
    (entry,) = result["scores"]["compared"]
    assert entry["max"] > 1e-4 and not entry["failure"] and entry["precision"] == "int8"
    assert ("scores", "trt (int8)") in {row[:2] for row in verify_table(result)}
    broken = Changed(open_engine(bundle), after=lambda scores: scores * np.float32("nan"), precision="fp16")
    with pytest.raises(GateFailed, match="not finite"):
        verify_run(bundle, drawn, open_engine(bundle), {"trt": broken}, sources={})


def test_what_is_absent_is_listed_with_its_reason(drawn, bundle_of):
    def no_gpu() -> Any:
        raise HardwareError("H001", "there is no usable GPU")

    made: list[Changed] = []

    def opens() -> Any:
        made.append(Changed(open_engine(bundle)))
        return made[0]

    bundle = bundle_of()
    result = verify_run(
        bundle, drawn, open_engine(bundle), {"trt": no_gpu, "aoti": "no aoti export", "onnx": opens},
        sources={"dali-gpu": "there is no usable GPU"},
    )  # fmt: skip
    assert result["scores"]["absent"] == {"trt": "H001: there is no usable GPU", "aoti": "no aoti export"}
    assert result["pixels"]["absent"] == {"dali-gpu": "there is no usable GPU"}
    table = verify_table(result)
    assert ("scores", "aoti", "", "", "absent: no aoti export") in table and len(table) == 4
    assert made[0].closed, "who opens an engine closes it"


def test_rgba_has_no_dali_and_every_source_is_named(bundle_of):
    sources = usual_sources(open_engine(bundle_of(color="rgba")))
    assert list(sources) == ["predictor", "dali-cpu", "dali-gpu"]
    assert isinstance(sources["dali-cpu"], str) and isinstance(sources["dali-gpu"], str)


def test_undecodable_files_are_counted_and_the_predictor_agrees_about_them(drawn, bundle_of):
    bundle = bundle_of()
    reference = open_engine(bundle)
    rows = comparison_rows(drawn, 3)
    drawn.path(int(rows[1])).write_bytes(b"no image any more")
    result = verify_run(bundle, drawn, reference, {}, images=3, sources={"predictor": predictor_source(reference)})
    assert (result["images"], result["undecodable"]) == (2, 1)
    for row in rows:
        drawn.path(int(row)).write_bytes(b"no image any more")
    with pytest.raises(DataError) as refused:
        verify_run(bundle, drawn, reference, {}, images=3, sources={})
    assert refused.value.code == "D012"
    with pytest.raises(DataError, match="no images"):
        verify_run(bundle, drawn.take(np.zeros(0, np.int64)), reference, {}, sources={})


def test_batches_are_no_larger_than_the_smallest_engine_allows(drawn, bundle_of):
    bundle = bundle_of()
    seen: list[int] = []

    class Small(TorchEngine):
        def scores(self, pixels: Any) -> np.ndarray:
            seen.append(len(pixels))
            return super().scores(pixels)

    whole = open_engine(bundle)
    small = Small(whole.model, bundle.labels, bundle.pixels, temperature=bundle.temperatures, max_batch=5)  # type: ignore[union-attr]
    result = verify_run(bundle, drawn, whole, {"small": small}, sources={"predictor": predictor_source(whole)})
    assert max(seen) == 5 and sum(seen) == result["images"] == 12
    assert MAX_SCORE == 1e-4 and (verify.MAX_LEVELS, verify.MEAN_LEVELS) == (2, 0.25)
