"""Whole exports: trained networks, real images, the gate; what may leave, what may not, and what is said."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import imgcls_fast as ic
from imgcls_fast.core.bundle import Bundle, read_bundle, write_bundle
from imgcls_fast.core.config_verbs import ExportConfig
from imgcls_fast.core.errors import ConfigError, GateFailed, HardwareError
from imgcls_fast.core.exports import list_exports
from imgcls_fast.core.run import Run
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.exporting.int8 import promising
from imgcls_fast.exporting.materials import Materials
from imgcls_fast.exporting.session import export_bundle
from imgcls_fast.graphs.lint import lint

pytest.importorskip("onnxruntime")
pytest.importorskip("modelopt")

CLASSES = ("airplane", "automobile", "bird", "frog")
MODELS = {
    "cnn": {"model": "small-cnn", "model.args": {"depths": [1, 1, 1]}, "train.epochs": 5},
    "vit": {
        "model": "timm/vit_tiny_patch16_224",
        "model.args": {"patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 4},
        "train.epochs": 5,
    },
}


@pytest.fixture(scope="module")
def trained(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs on four classes of CIFAR-10, each trained when it is first asked for; 3,200 images judge, none of which trains."""
    folder = tmp_path_factory.mktemp("cifar")
    rows = cifar().write_rows(shared_data / "cifar10", folder / "rows", classes=CLASSES, train=1200, val=800, test=50)
    made: dict[str, Run] = {}

    def train(name: str) -> Run:
        if name not in made:
            more = {key: value for key, value in MODELS[name].items() if "." in key}
            fixed = {"train.baseline": False, "pixels.crop_pct": 1.0, "train.seed": 1}
            out = str(folder / name)
            made[name] = ic.train(rows, out=out, model=MODELS[name]["model"], img_size=32, overrides={**more, **fixed})
        return made[name]

    return train


def cifar() -> Any:
    """The neighbouring module, which is no test."""
    spec = importlib.util.spec_from_file_location("cifar", Path(__file__).with_name("cifar.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def materials_of(run: Run, bundle: Bundle | None = None, **settings: Any) -> tuple[Materials, list[str]]:
    bundle = bundle or read_bundle(run.bundle_path)
    said: list[str] = []
    config = ExportConfig(**{"max_drop": 1.0, "calibration_images": 256, "verify_images": 64, **settings})
    exports = bundle.directory.parent / "exports"
    return Materials(bundle, run.manifest, exports, config, run=str(run.directory), say=said.append), said


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_int8_of_a_trained_network_is_clean_agrees_and_passes(name: str, trained: Callable[[str], Run]) -> None:
    run = trained(name)
    assert run.metrics("val")["accuracy"] > (0.7 if name == "cnn" else 0.55)
    materials, said = materials_of(run)
    made = export_bundle(materials, "onnx", "int8")
    gate = made.gate
    assert gate is not None
    assert len(materials.gate_data) >= 3000
    assert gate["rows"] + gate["search"][0]["rows"] == len(materials.gate_data)
    assert (gate["verdict"], gate["simulated"]) == ("pass", False), said
    assert gate["bound_pp"] <= 1.0
    everything = open_engine(materials.bundle, "onnx", exports=materials.exports)
    x = np.concatenate(materials.comparison)
    assert (everything.scores(x).argmax(1) == materials.reference.scores(x).argmax(1)).mean() >= 0.95
    agreement = (gate["agreement"] * gate["rows"] + gate["search"][0]["agreement"] * gate["search"][0]["rows"]) / len(
        materials.gate_data
    )
    assert agreement >= 0.98
    assert lint(made.path, "int8") == []
    quantization = made.meta["quantisation"]
    assert quantization["calibration"]["split"] == "train"
    assert len(quantization["int8_layers"]) >= 0.6 * quantization["layers"]  # of attention, the products stay in FP16
    assert (made.folder / "pareto.png").stat().st_size > 10_000
    assert made.meta["latency"]["one"]["end_to_end"]["count"] >= 10
    assert sorted(p.name for p in made.folder.iterdir()) == ["gate.json", "meta.json", "model.onnx", "pareto.png"]
    assert export_bundle(materials_of(run)[0], "onnx", "int8").path == made.path  # what passed is not made again


@pytest.mark.slow
def test_calibration_and_training_rows_never_judge(trained: Callable[[str], Run]) -> None:
    run = trained("cnn")
    materials, said = materials_of(run, gate_rows="val+test")
    materials.extra = run.manifest.take(materials.calibration_rows[:50])
    judges = {digest.tobytes() for digest in materials.gate_data.manifest.digest}
    training = {digest.tobytes() for digest in run.manifest.digest[run.manifest.rows("train")]}
    assert not judges & training
    assert any("50 calibration" in sentence for sentence in said)


@pytest.mark.slow
def test_a_network_calibrated_on_black_images_is_refused(trained: Callable[[str], Run]) -> None:
    materials, _ = materials_of(trained("cnn"), search_s=0, calibration_images=64)
    materials.calibration = np.zeros_like(materials.calibration)
    with pytest.raises(GateFailed) as refused:
        export_bundle(materials, "onnx", "int8")
    assert refused.value.exit_code == 5  # E902 or E903: how much is lost depends on the biases that black leaves alive
    (left,) = (export for export in list_exports(materials.exports) if export.gate and export.gate["verdict"] != "pass")
    assert left.gate is not None and left.gate["agreement"] < 0.98, "the judged file stays for whoever wants to look"
    index = materials.exports / "index.json"  # there once another export of this run has passed
    assert not index.exists() or left.folder.name not in json.loads(index.read_text()).values(), "but nothing uses it"


def widened(bundle: Bundle, folder: Path, factor: float = 1000.0) -> Bundle:
    """The same network with one channel multiplied before its ReLU and divided after it: equal in float, ruinous in INT8."""
    from safetensors.torch import load_file, save

    state = load_file(bundle.weights)
    prefix = "backbone.stages.1.0." if "backbone.stages.1.0.first.0.weight" in state else _first_block(state)
    norm, after = f"{prefix}first.1", f"{prefix}second.0.weight"
    channel = int(state[f"{norm}.bias"].argmax())  # one that lives
    state[f"{norm}.weight"][channel] *= factor
    state[f"{norm}.bias"][channel] *= factor
    state[after][:, channel] /= factor
    return write_bundle(
        folder, lambda file: file.write(save(state)) and None, arch=bundle.arch, labels=bundle.labels,
        pixels=bundle.pixels, temperature=bundle.temperature, provenance={},
    )  # fmt: skip


def _first_block(state: dict[str, torch.Tensor]) -> str:
    name = next(key for key in state if key.endswith("first.0.weight"))
    return name.removesuffix("first.0.weight")


@pytest.mark.slow
def test_a_channel_that_int8_cannot_hold_is_found_and_kept_in_fp16(
    trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained("cnn")
    wide = widened(read_bundle(run.bundle_path), tmp_path / "wide" / "bundle")
    materials, said = materials_of(run, wide)
    original = open_engine(read_bundle(run.bundle_path))
    x = np.concatenate(materials.comparison)
    assert (original.scores(x).argmax(1) == materials.reference.scores(x).argmax(1)).mean() >= 0.99
    made = export_bundle(materials, "onnx", "int8")
    gate, facts = made.gate, made.meta["quantisation"]
    assert gate is not None
    assert gate["search"][0]["drop_pp"] > 1.0, "plain INT8 would have done"
    assert gate["verdict"] == "pass"
    assert 1 <= len(facts["excluded"]) <= 0.2 * facts["layers"]
    assert made.meta["search"]["ended"] == "found"
    assert any("looking for the layers" in sentence for sentence in said)
    assert lint(made.path, "int8") == []


@pytest.mark.slow
def test_a_hundred_photos_cannot_prove_half_a_point(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "photos"
    run = ic.train(
        folder, out=str(tmp_path / "run"), model="small-cnn", img_size=32, epochs=1, overrides={"train.baseline": False}
    )
    materials, _ = materials_of(run, max_drop=0.5, search_fraction=0.01, search_s=0, calibration_images=64)
    assert len(materials.gate_data) == 100
    materials.reference.scores = lambda pixels, own=materials.reference.scores: own(pixels)  # type: ignore[method-assign]
    with pytest.raises(GateFailed) as refused:
        export_bundle(materials, "onnx", "int8")
    if refused.value.code == "E903":
        assert "rows like these would show it" in refused.value.message or refused.value.why
        assert "--gate-data" in refused.value.try_ or "fp16" in refused.value.try_
    assert refused.value.exit_code == 5
    materials.say = (said := []).append
    made = export_bundle(materials, "onnx", "fp16")  # not proven, and nobody asked for a proof
    assert made.gate is not None and made.gate["verdict"] == "underpowered"
    assert made.gate["rows_needed"] is None or made.gate["rows_needed"] > 100
    assert any("not proven" in sentence for sentence in said)
    materials.strict = True
    with pytest.raises(GateFailed) as unproven:
        export_bundle(materials, "onnx", "fp16")
    assert unproven.value.code == "E903"


@pytest.mark.slow
def test_without_tensorrt_the_file_for_it_stays_and_the_command_is_said(trained: Callable[[str], Run]) -> None:
    if importlib.util.find_spec("tensorrt") and torch.cuda.is_available():
        pytest.skip("TensorRT and a GPU are here")
    materials, said = materials_of(trained("cnn"))
    with pytest.raises(HardwareError) as missing:
        export_bundle(materials, "trt")
    error = missing.value
    assert (error.code, error.exit_code) in (("H004", 4), ("H001", 4))
    assert "trtexec --onnx=" in error.why
    path = Path(error.where.split(" at ")[1])
    assert path.name == "model.onnx" and lint(path, "fp16") == []
    gate = json.loads(path.with_name("gate.json").read_text())
    assert gate["simulated"] is True
    assert gate["judge"]["exported_for"] == "trt"
    assert "TensorRT" in said[0] or "GPU" in said[0]
    index = json.loads((materials.exports / "index.json").read_text())
    assert "trt" not in index


@pytest.mark.slow
def test_a_model_that_bursts_fp16_keeps_the_layers_that_need_float32(
    trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained("cnn")
    wide = widened(read_bundle(run.bundle_path), tmp_path / "burst" / "bundle", factor=1e6)
    materials, said = materials_of(run, wide)
    made = export_bundle(materials, "onnx", "fp16")
    assert any("AutoCast" in sentence for sentence in said)
    assert made.meta["comparison"]["same_clear"] == made.meta["comparison"]["clear"]
    assert made.meta["autocast"]
    assert made.gate is not None and made.gate["verdict"] == "pass"


def test_a_wrong_target_or_precision_is_said_before_anything_is_done(bundle_of: Callable[..., Any]) -> None:
    materials = Materials(bundle_of(), None, Path("nowhere"), ExportConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as unknown:
        export_bundle(materials, "tensorrt")
    assert unknown.value.code == "C003"
    with pytest.raises(ConfigError) as impossible:
        export_bundle(materials, "aoti", "int8")
    assert impossible.value.code == "C004"
    with pytest.raises(ConfigError) as nonsense:
        export_bundle(materials, "onnx", "int4")
    assert nonsense.value.code == "C003"
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("lost", "gained", "n", "expected"),
    [(0, 0, 50, True), (2, 0, 50, False), (0, 0, 5000, True), (20, 0, 5000, True), (18, 2, 2000, False), (5, 2, 2000, True)],
)  # fmt: skip
def test_what_is_worth_the_verdict_rows(lost: int, gained: int, n: int, expected: bool) -> None:
    from imgcls_fast.evaluation.paired import Judgement, tango_upper_bound

    judgement = Judgement(
        rows=n, lost=lost, gained=gained, agreement=1.0, accuracy=0.9, reference_accuracy=0.9, drop=(lost - gained) / n,
        bound=tango_upper_bound(lost, gained, n), lower_bound=-1.0, max_drop=0.01, p_value=1.0, per_class=(),
        verdict="pass" if tango_upper_bound(lost, gained, n) <= 0.01 else "underpowered", simulated=False, rows_needed=None,
    )  # fmt: skip
    assert promising(judgement) is expected
    assert promising(replace(judgement, verdict="pass"))
