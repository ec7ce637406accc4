"""INT8 files: lint clean, of the same opinion as the float32 network, and one clear error for everything that goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError, HardwareError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import SPLITS, Manifest, PathList

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

from imgcls_fast.graphs import half, qdq, quantize
from imgcls_fast.graphs.lint import lint, lint_view

QUANTIZERS = [pytest.param("modelopt", marks=pytest.mark.slow), "onnxruntime"]  # ModelOpt takes four seconds


def noise(n: int, size: int = 32) -> np.ndarray:
    draw = np.random.default_rng(0)
    return (draw.random((n, 1, 1, 3)) * draw.integers(0, 255, (n, size, size, 3))).astype(np.uint8)


def no_modelopt(monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    real = quantize._installed
    monkeypatch.setattr(quantize, "_installed", lambda name: name not in ("modelopt", *more) and real(name))


# ---- what comes out ----


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_trained_network_keeps_its_opinion_and_the_file_is_clean(
    quantizer: Any, trained: Any, tmp_path: Path
) -> None:
    if quantizer == "modelopt":
        pytest.importorskip("modelopt")
    out = tmp_path / "model.onnx"
    facts = quantize.quantize(trained.plain, out, trained.calibration, quantizer=quantizer)
    assert lint(out, "int8") == []
    exact, found = trained.scores(trained.plain), trained.scores(out)
    assert found.dtype == np.float32
    assert (exact.argmax(1) == found.argmax(1)).mean() >= 0.98
    assert np.abs(exact - found).max() > 0, "nothing was quantised"
    assert facts["quantizer"] == quantizer and facts["note"] == ""
    assert facts["calibration"]["images"] == 128 and len(facts["calibration"]["sha256"]) == 64
    assert len(facts["int8_layers"]) >= 9 and facts["opset"] == 20 and facts["fp32_layers"] == []
    model = onnx.load(str(out))
    assert {node.domain for node in model.graph.node} == {""} == {entry.domain for entry in model.opset_import}
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["pixels", "scores"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch is no longer dynamic"
    assert qdq.View(model).maker["scores"].op_type == "Softmax", "the softmax shall compute in float32"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_openvino_which_really_computes_in_int8_agrees(trained: Any, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    out = tmp_path / "model.onnx"
    quantize.quantize(trained.plain, out, trained.calibration, quantizer="onnxruntime")
    compiled = openvino.Core().compile_model(
        str(out), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled(trained.images)[0]
    assert (found.argmax(1) == trained.scores(trained.plain).argmax(1)).mean() >= 0.98


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_of_a_transformer_neither_attention_nor_residuals_are_quantised(
    quantizer: Any, bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    from imgcls_fast.graphs.onnx_graph import write_graph

    if quantizer == "modelopt":
        pytest.importorskip("modelopt")
    bundle = bundle_of("timm/vit_tiny_patch16_224", args={"depth": 2, "patch_size": 8, "embed_dim": 48, "num_heads": 3})
    source, out = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    write_graph(bundle, source)
    facts = quantize.quantize(source, out, noise(24), quantizer=quantizer)
    assert facts["attention"] and lint(out, "int8") == []
    view = qdq.View(onnx.load(str(out)))
    products = set(qdq.attention_products(view))
    assert len(products) == 4 and not products & set(facts["int8_layers"])
    assert len(facts["int8_layers"]) >= 9  # the patches, and four linear layers of each block
    additions = [node for node in view.nodes if node.op_type == "Add"]
    assert not any(view.quantized(name) for node in additions for name in node.input)
    assert qdq.metadata(view.model)["imgcls_fast.bundle"] == bundle.digest, "the quantizer lost the metadata"
    exact, found = (half.run_in_steps(half.session(path), noise(24)[:8])[0][0] for path in (source, out))
    assert np.abs(exact - found).max() < 0.1


def test_a_fixed_batch_and_a_rest_of_images(onnx_of: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.Flatten()
    )
    source = onnx_of(net, tmp_path / "fp32.onnx", batch=4, size=8)
    facts = quantize.quantize(source, tmp_path / "int8.onnx", noise(10, 8), quantizer="onnxruntime")
    assert facts["calibration"]["images"] == 10 and lint(tmp_path / "int8.onnx", "int8") == []
    (scores,) = half.session(tmp_path / "int8.onnx").run(None, {"pixels": noise(4, 8)})
    assert scores.shape[0] == 4


# ---- quantisation-aware training ----


def test_scales_of_quantisation_aware_training_are_kept(onnx_of: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from torch import Tensor, nn

    class Quantized(nn.Conv2d):
        weight_scale: Tensor
        scale: Tensor

        def __init__(self, inputs: int, outputs: int, observed: bool) -> None:
            super().__init__(inputs, outputs, 3)
            self.register_buffer("weight_scale", self.weight.detach().abs().amax((1, 2, 3)) / 127)
            self.observed = observed
            self.register_buffer("scale", torch.tensor(4 / 127))  # as an observer leaves it

        def forward(self, x: Tensor) -> Tensor:
            if self.observed:
                zero = torch.zeros((), dtype=torch.int32)
                x = torch.fake_quantize_per_tensor_affine(x, self.scale, zero, -128, 127)
            else:
                x = torch.fake_quantize_per_tensor_affine(x, 4 / 127, 0, -128, 127)
            zeros = torch.zeros_like(self.weight_scale, dtype=torch.int32)
            weight = torch.fake_quantize_per_channel_affine(self.weight, self.weight_scale, zeros, 0, -128, 127)
            return self._conv_forward(x, weight, self.bias)

    quantize.allow_fake_quantize()
    net = nn.Sequential(
        Quantized(3, 16, False), nn.ReLU(), Quantized(16, 32, True), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )  # fmt: skip
    source, out = onnx_of(net, tmp_path / "qat.onnx", size=12), tmp_path / "int8.onnx"
    facts = quantize.quantize(source, out, noise(4, 12))
    assert facts["quantizer"] == "training" and "calibration was skipped" in facts["note"]
    assert len(facts["int8_layers"]) == 2 and facts["layers"] == 3
    assert lint(out, "int8") == []
    view = qdq.View(onnx.load(str(out)))
    scales = [view.array(node.input[1]).reshape(-1) for node in view.nodes if node.op_type == "DequantizeLinear"]
    assert sorted(len(scale) for scale in scales) == [1, 1, 16, 32]
    assert [float(scale[0]) for scale in scales if len(scale) == 1] == pytest.approx([4 / 127] * 2, rel=1e-3)
    exact, found = (half.run_in_steps(half.session(path), noise(4, 12))[0][0] for path in (source, out))
    np.testing.assert_allclose(found, exact, atol=5e-3)


# ---- FP16 around INT8 ----


def test_scales_that_fp16_holds_badly_are_raised_and_counted(trained: Any, tmp_path: Path) -> None:
    model = onnx.load(str(trained.plain))
    weight = next(tensor for tensor in model.graph.initializer if tensor.dims[:2] == [32, 16])
    value = np.array(onnx.numpy_helper.to_array(weight))
    for channel, scale in ((3, 1e-7), (5, 1e-12)):  # channels that batch normalisation has switched off
        value[channel] *= scale / np.abs(value[channel]).max() * 127
    weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    onnx.save(model, str(tmp_path / "fp32.onnx"))
    facts = quantize.quantize(
        tmp_path / "fp32.onnx", tmp_path / "int8.onnx", trained.calibration, quantizer="onnxruntime"
    )
    assert facts["scales_raised"] == {"count": 2, "worst": 0.0}
    assert lint(tmp_path / "int8.onnx", "int8") == []
    assert trained.accuracy(tmp_path / "int8.onnx") >= trained.accuracy(tmp_path / "fp32.onnx") - 0.02


def test_a_float_that_the_graph_makes_itself_becomes_fp16_too(onnx_of: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from torch import Tensor, nn

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = x.new_zeros(x.shape[0], 1, 8, 8)  # as the windows of torchvision's Swin
            mask[:, :, 2:] = 3
            return torch.nn.functional.conv2d(x, torch.ones(4, 3, 1, 1)).add(mask).flatten(1)

    source = onnx_of(Masked(), tmp_path / "fp32.onnx", size=8)
    model = onnx.load(str(source))
    assert "ConstantOfShape" in {node.op_type for node in model.graph.node}
    exact = half.session(source).run(None, {"pixels": noise(3, 8)})[0]
    assert half.to_half(model) == []
    assert lint_view(qdq.View(model), "fp16") == []
    np.testing.assert_allclose(half.session(model).run(None, {"pixels": noise(3, 8)})[0], exact, atol=5e-3)


def test_values_beyond_fp16_are_named_largest_first(trained: Any) -> None:
    found = half.fp16_overflows(trained.overflowing, trained.calibration[:32])
    assert found and found[0][1] == max(value for _, value in found) > 65504
    assert "conv2d_4" in {name for name, _ in found}
    assert half.fp16_overflows(trained.plain, trained.calibration[:32]) == []


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_fp16_cannot_hold_stays_in_float32(quantizer: Any, trained: Any, tmp_path: Path) -> None:
    if quantizer == "modelopt":
        pytest.importorskip("modelopt")
    out = tmp_path / "int8.onnx"
    facts = quantize.quantize(
        trained.overflowing, out, trained.calibration, quantizer=quantizer, exclude=[trained.layer]
    )
    assert facts["overflowing"] and set(facts["fp32_layers"]) == {"node_conv2d_4", trained.layer}
    assert lint(out, "int8") == []
    assert trained.accuracy(out) >= trained.accuracy(trained.plain) - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_autocast_leaves_float32_where_ranges_demand_it(precision: Any, trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    out = tmp_path / "model.onnx"
    facts = quantize.autocast(trained.overflowing, out, precision, trained.calibration)
    assert lint(out, precision) == []
    assert facts["verified"] == ("onnxruntime" if precision == "fp16" else "reference")
    assert facts["max_score_diff"] < (0.01 if precision == "fp16" else 0.1)
    assert ("node_conv2d_4" in facts["fp32_layers"]) == (precision == "fp16")
    assert facts["opset"] == (20 if precision == "fp16" else 22)
    assert len(facts["fp32_layers"]) < facts["layers"]
    if precision == "fp16":
        assert trained.accuracy(out) == pytest.approx(trained.accuracy(trained.plain), abs=0.005)


# ---- who quantises ----


def test_the_fallback_is_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    no_modelopt(monkeypatch)
    made_by, note = quantize.choose_quantizer("auto")
    assert made_by == "onnxruntime" and "modelopt not installed" in note and "pip install" in note
    assert quantize.choose_quantizer("onnxruntime") == ("onnxruntime", "")
    with pytest.raises(HardwareError) as refused:
        quantize.choose_quantizer("modelopt")
    assert refused.value.code == "H004" and "modelopt" in refused.value.message


def test_without_both_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    no_modelopt(monkeypatch, "onnxruntime")
    with pytest.raises(HardwareError) as refused:
        quantize.choose_quantizer("auto")
    assert refused.value.code == "H004" and refused.value.try_.startswith("pip install")


def test_the_note_reaches_the_facts(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_modelopt(monkeypatch)
    facts = quantize.quantize(trained.plain, tmp_path / "int8.onnx", trained.calibration[:8])
    assert facts["quantizer"] == "onnxruntime" and "in place of NVIDIA ModelOpt" in facts["note"]


# ---- what goes wrong ----


def refused(error: Callable[[], Any], folder: Path) -> ExportError:
    """The E003 of a call that leaves the folder as it was."""
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    with pytest.raises(ExportError) as caught:
        error()
    assert caught.value.code == "E003" and caught.value.try_.startswith("imgcls-fast ")
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before
    return caught.value


def test_images_that_cannot_calibrate_are_refused_before_any_work(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "int8.onnx").write_bytes(b"the file before")
    for images in (noise(0), noise(4, 16), noise(4).astype(np.float32)):
        refused(lambda images=images: quantize.quantize(trained.plain, tmp_path / "int8.onnx", images), tmp_path)  # type: ignore[misc]
        refused(
            lambda images=images: quantize.autocast(trained.plain, tmp_path / "int8.onnx", "fp16", images), tmp_path
        )  # type: ignore[misc]


def changed(source: Path, to: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(str(source))
    change(model)
    to.mkdir()
    (to / "fp32.onnx").write_bytes(model.SerializeToString())
    return to / "fp32.onnx"


def test_nan_activations_are_named(trained: Any, tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [16])
        value = np.array(onnx.numpy_helper.to_array(bias))
        value[0] = np.nan
        bias.CopyFrom(onnx.numpy_helper.from_array(value, bias.name))

    source = changed(trained.plain, tmp_path / "model", poison)
    error = refused(lambda: quantize.quantize(source, source.with_name("out.onnx"), noise(8)), source.parent)
    assert "NaN" in error.why and "conv2d" in error.why and "Traceback" not in str(error)


def test_an_operator_that_nobody_has_is_named(trained: Any, tmp_path: Path) -> None:
    def invent(model: Any) -> None:
        relu = next(node for node in model.graph.node if node.op_type == "Relu")
        relu.op_type, relu.domain = "Shine", "example.org"
        model.opset_import.add(domain="example.org", version=1)

    source = changed(trained.plain, tmp_path / "model", invent)
    error = refused(lambda: quantize.quantize(source, source.with_name("out.onnx"), noise(8)), source.parent)
    assert "Shine" in error.message + error.why


def test_a_graph_that_is_too_new_for_the_fallback_is_refused(trained: Any, tmp_path: Path) -> None:
    def renew(model: Any) -> None:
        model.opset_import[0].version = 21

    source = changed(trained.plain, tmp_path / "model", renew)
    call = lambda: quantize.quantize(source, source.with_name("out.onnx"), noise(8), quantizer="onnxruntime")  # noqa: E731
    assert "--opset 20" in refused(call, source.parent).try_


def test_what_the_fallback_cannot_do_and_layers_that_do_not_exist_are_refused(trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    call = lambda: quantize.quantize(trained.plain, out, noise(8), quantizer="onnxruntime", method="entropy")  # noqa: E731
    assert "entropy" in refused(call, tmp_path).message
    call = lambda: quantize.quantize(trained.plain, out, noise(8), exclude=["node_nobody"])  # noqa: E731
    assert "node_nobody" in refused(call, tmp_path).message


def test_a_file_without_int8_layers_is_refused(onnx_of: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten())
    source = onnx_of(net, tmp_path / "fp32.onnx", size=4)
    error = refused(
        lambda: quantize.quantize(source, tmp_path / "out.onnx", noise(2, 4), quantizer="onnxruntime"), tmp_path
    )
    assert "none of the 0 layers" in error.why


# ---- calibration rows ----


def manifest_of(counts: dict[str, list[int]]) -> Manifest:
    """Images of several classes in each split."""
    split = [SPLITS.index(name) for name, per_class in counts.items() for n in per_class for _ in range(n)]
    label = [k for per_class in counts.values() for k, n in enumerate(per_class) for _ in range(n)]
    n = len(label)
    classes = len(next(iter(counts.values())))
    ones = np.ones(n, np.int32)
    digest = np.random.default_rng(0).integers(0, 256, (n, 16), np.uint8)
    return Manifest(
        Path("/nowhere"), PathList.of([f"{k}.jpg" for k in range(n)]), LabelSpace.single([f"c{k}" for k in range(classes)]),
        (np.array(label, np.int32),), np.array(split, np.uint8), -ones, ones, ones, ones.astype(np.uint8), digest,
        0 * ones.astype(np.uint8),
    )  # fmt: skip


def test_calibration_rows_are_training_rows_with_every_class_in_its_share() -> None:
    manifest = manifest_of({"train": [600, 300, 90, 2], "val": [50, 50, 50, 50], "test": [9, 9, 9, 9]})
    rows = quantize.calibration_rows(manifest, 100, 0)
    assert len(rows) == len(set(rows)) == 100
    assert (manifest.split[rows] == SPLITS.index("train")).all()
    per_class = np.bincount(manifest.label[rows], minlength=4)
    assert per_class[3] >= 1
    np.testing.assert_allclose(per_class[:3], [60, 30, 9], atol=2)
    assert len(quantize.calibration_rows(manifest, 4, 0)) == 4
    assert set(manifest.label[quantize.calibration_rows(manifest, 4, 0)]) == {0, 1, 2, 3}
    assert len(quantize.calibration_rows(manifest, 10_000, 0)) == 992
    assert len(quantize.calibration_rows(manifest_of({"val": [3, 3]}), 10, 0)) == 0


def test_calibration_rows_depend_on_the_seed_and_nothing_else_and_are_recorded() -> None:
    manifest = manifest_of({"train": [60, 30], "val": [5, 5]})
    a, b, c = (quantize.calibration_rows(manifest, 20, seed) for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any()
    facts = [quantize.calibration_facts(manifest, rows, 0) for rows in (a, b, c)]
    assert facts[0] == facts[1] and facts[0]["sha256"] != facts[2]["sha256"]
    assert facts[0]["rows"] == 20 == sum(facts[0]["per_class"]) and facts[0]["split"] == "train"
    other = replace(manifest, digest=manifest.digest[::-1].copy())
    assert quantize.calibration_facts(other, a, 0)["sha256"] != facts[0]["sha256"], (
        "the hash is one of the files' content"
    )
