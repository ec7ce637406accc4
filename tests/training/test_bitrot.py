"""Bit rot: every damage to what is read back is found or has no effect; `benchmarks/bitrot.py` does 200 of each kind per file."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgcls_fast.core.errors import ImgclsError
from imgcls_fast.core.exports import GATE, META, choose, finish, new_export, read_export
from imgcls_fast.core.files import SEAL, read_sealed, write_json
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.training.checkpoint import Checkpoint, save_checkpoint
from imgcls_fast.training.progress import Progress


def load_script() -> Any:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "bitrot.py"
    spec = importlib.util.spec_from_file_location("bitrot", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(bundle_of: Callable[..., Any]) -> Path:
    """What a run holds that is read back, without training: bundle, two exports, two checkpoints, manifest, scores."""
    bundle = bundle_of()
    folder: Path = bundle.directory.parent
    for precision in ("fp32", "int8"):
        with new_export(folder / "exports", "onnx", precision, "0a1b2c3d") as temporary:
            (temporary / "model.onnx").write_bytes(random.Random(precision).randbytes(10_000))
            made = finish(temporary, bundle, "onnx", precision, "model.onnx", {"opset": 20, "latency": [1.5, None]})
        made.write_gate({"verdict": "pass", "drop_pp": 0.25, "classes": list(bundle.labels.classes)})
        choose(made)
    for step in (1, 2):
        tensors = {"w": torch.rand(700, generator=torch.Generator().manual_seed(step)), "n": torch.tensor(step)}
        progress = Progress(step=step, history=[{"epoch": 0, "loss": 0.5}], quarantined={"7": "cut off"})
        save_checkpoint(folder / "checkpoints", Checkpoint(tensors, progress, {"torch": "2"}), best=step == 1)
    n, draw = 12, np.random.default_rng(0)
    column = lambda dtype: draw.integers(0, 3, n).astype(dtype)  # noqa: E731
    manifest = Manifest(
        Path("/data"), PathList.of([f"{k}.jpg" for k in range(n)]), bundle.labels, (column(np.int32),), column(np.uint8),
        column(np.int32), column(np.int32), column(np.int32), column(np.uint8), draw.integers(0, 256, (n, 16)).astype(np.uint8),
        column(np.uint8), "photos", ("one",),
    )  # fmt: skip
    manifest.save(folder / "manifest.npz")
    rows = np.arange(n)
    scores = draw.random((n, 3)).astype(np.float32)
    paths = tuple(manifest.paths)
    Predictions(rows, scores, manifest.targets(rows), bundle.labels, paths, "f").save(folder / "eval" / "test")
    return folder


def test_every_damage_to_a_file_that_is_read_back_is_found_or_without_effect(run: Path) -> None:
    bitrot = load_script()
    readers = list(bitrot.readers(run))
    names = {file.name for file, _ in readers}
    assert names == {
        "tensors.safetensors", "state.json", "manifest.json", "bundle.json", "weights.safetensors", "index.json", "meta.json",
        "gate.json", "model.onnx", "manifest.npz", "scores.npy", "predictions.csv", "predictions.json",
    }  # fmt: skip
    for file, read in readers:
        found = bitrot.judge(file, read, 20, random.Random(file.name))
        assert found["wrong"] == [], file
        assert sum(found[kind].get("found", 0) for kind in bitrot.KINDS) > 40, (file, found)


def test_the_word_seal_may_itself_be_damaged(run: Path) -> None:
    bitrot = load_script()
    for file, read in list(bitrot.readers(run)):
        content = file.read_bytes()
        if b'"seal"' in content:
            file.write_bytes(content.replace(b'"seal"', b'"sEal"'))
            with pytest.raises(ImgclsError):
                read()
            file.write_bytes(content)


def test_files_of_versions_before_are_read_without_their_seals(run: Path) -> None:
    bitrot = load_script()
    before = [read() for _, read in bitrot.readers(run)]
    for file, _ in bitrot.readers(run):
        if file.suffix == ".json" and SEAL in (value := json.loads(file.read_text("utf-8"))):
            write_json(file, {name: inner for name, inner in value.items() if name not in (SEAL, "digests")}
                       if file.name == "predictions.json" else {k: v for k, v in value.items() if k != SEAL})  # fmt: skip
    assert [read() for _, read in bitrot.readers(run)] == before


def test_an_export_whose_verdict_is_damaged_is_made_again_and_a_damaged_index_is_named(run: Path) -> None:
    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.core.exports import find_export, find_key

    bundle, exports = read_bundle(run / "bundle"), run / "exports"
    assert find_key(exports, bundle, "onnx", "int8", "0a1b2c3d") is not None
    gate = exports / "onnx-int8-0a1b2c3d" / GATE
    content = gate.read_text()
    gate.write_text(content.replace("pass", "fail"))
    assert find_key(exports, bundle, "onnx", "int8", "0a1b2c3d") is None
    gate.write_text(content)
    index = exports / "index.json"
    index.write_text(index.read_text().replace("onnx-fp32-0a", "onnx-fp32-0b"))
    with pytest.raises(ImgclsError, match=r"index\.json is damaged") as refused:
        find_export(exports, bundle, "onnx", "fp32")
    assert refused.value.code == "E001"
    choose(read_export(exports / "onnx-fp32-0a1b2c3d"))
    assert find_export(exports, bundle, "onnx", "fp32").folder.name == "onnx-fp32-0a1b2c3d"


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "", "a/b", 3, None])
def test_an_index_and_a_meta_file_lead_nowhere_else(name: Any, run: Path) -> None:
    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.core.exports import find_export
    from imgcls_fast.core.files import write_sealed

    bundle, exports = read_bundle(run / "bundle"), run / "exports"
    folder = exports / "onnx-fp32-0a1b2c3d"
    meta = read_sealed(folder / META)
    write_sealed(folder / META, {**meta, "file": name})
    with pytest.raises(ImgclsError):
        find_export(exports, bundle, "onnx", "fp32")
    write_sealed(folder / META, meta)
    write_sealed(exports / "index.json", {"onnx-fp32": name})
    with pytest.raises(ImgclsError):
        find_export(exports, bundle, "onnx", "fp32")
