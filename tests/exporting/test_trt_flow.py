"""`export --trt` from a trained run to an engine that predicts: all of it but TensorRT and the GPU, whose places doubles take.

The doubles compute the very ONNX file that was built, by ONNX Runtime, so that pixels, padding, labels and sidecar are the true ones.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import imgcls_fast as ic
from imgcls_fast.core.bundle import read_bundle
from imgcls_fast.core.errors import ExportError, HardwareError
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.exporting import materials


def _doubles() -> ModuleType:
    name = "trt_doubles"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "trt" / "doubles.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


doubles = _doubles()


@pytest.fixture(scope="module")
def run(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the embedded digits, one epoch long."""
    return Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("flow") / "run"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    made = doubles.World()
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path))
    monkeypatch.setattr(materials, "_SHORT", {"warmup_s": 0.01, "duration_s": 0.05})  # no figure is wanted
    with doubles.installed(made, monkeypatch):
        yield made


def test_a_run_becomes_an_engine_that_scores_as_torch_does_and_is_refused_elsewhere(world: Any, run: Path) -> None:
    told: list[float] = []
    export = ic.export(run, "trt", precision="fp32", progress=lambda name, fraction: told.append(fraction))
    assert export.path.name == "model.plan" and told[-1] == 1.0
    assert export.meta["tensorrt"] == world.version and export.meta["hardware"] == "this"
    assert export.meta["profile"]["max"] == [64, 32, 32, 3]

    bundle = read_bundle(run / "bundle")
    engine = open_engine(bundle, "trt", exports=run / "exports")
    assert (engine.runtime, engine.max_batch) == ("trt", 64)
    pixels = np.random.default_rng(0).integers(0, 255, (70, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(engine.scores(pixels), open_engine(bundle, "torch").scores(pixels), atol=1e-4)
    engine.close()

    world.gpu = "NVIDIA L4"
    with pytest.raises(ExportError) as caught:
        open_engine(bundle, "trt", exports=run / "exports")
    assert caught.value.code == "E005" and caught.value.try_ == f"imgcls-fast export {run} --trt"


def test_without_tensorrt_the_linted_file_is_left_and_the_error_says_where(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it fails
    with pytest.raises(HardwareError) as caught:
        ic.export(run, "trt", precision="fp32", say=lambda sentence: None)
    assert caught.value.code == "H004" and caught.value.exit_code == 4
    left = Path(caught.value.where.removeprefix("the ONNX file was left at "))
    assert left.is_file() and left.parent.parent == run / "exports"
    assert f"trtexec --onnx={left}" in caught.value.why
