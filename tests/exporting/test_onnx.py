"""ONNX: the same scores as torch on real images, or no export at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError, GateFailed
from imgcls_fast.engines.predictor import Predictor
from imgcls_fast.engines.runtimes import open_engine

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from imgcls_fast.exporting import onnx_graph
from imgcls_fast.exporting.onnx_graph import export_onnx


def batches(bundle: Any, pictures: list[np.ndarray], size: int = 16) -> Iterator[np.ndarray]:
    predictor = Predictor(open_engine(bundle))
    for first in range(0, len(pictures), size):
        yield np.stack([predictor.preprocess(picture) for picture in pictures[first : first + size]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "color"),
    [
        ("small-cnn", 32, "rgb"),
        ("small-cnn", 32, "gray"),
        ("torchvision/mobilenet_v3_small", 64, "rgb"),
        ("timm/resnet10t", 64, "rgb"),
    ],
)
def test_onnx_runtime_agrees_with_torch_on_real_images(
    arch: str, size: int, color: str, bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    bundle = bundle_of(arch, size=size, color=color, temperature=1.7)
    exports = bundle.directory.parent / "exports"
    made = export_onnx(bundle, exports, batches(bundle, pictures))
    assert made["comparison"]["images"] == made["comparison"]["same_top1"] == 40
    assert made["comparison"]["max_score_diff"] <= 1e-4
    torch_engine, onnx_engine = open_engine(bundle), open_engine(bundle, "onnx", exports=exports)
    x = np.concatenate(list(batches(bundle, pictures)))
    for n in (1, 5, 32):  # any batch size
        a, b = torch_engine.scores(x[:n]), onnx_engine.scores(x[:n])
        np.testing.assert_allclose(b, a, atol=1e-4)
        assert (a.argmax(1) == b.argmax(1)).all()
        np.testing.assert_allclose(b.sum(1), 1, atol=1e-5)
    assert float(np.ptp(a, axis=0).max()) > 1e-3, "all images get the same scores, so agreement means nothing"


@pytest.fixture
def exported(bundle_of: Callable[..., Any], pictures: list[np.ndarray]) -> tuple[Any, Path, dict[str, Any]]:
    bundle = bundle_of(temperature=3.0)
    exports = bundle.directory.parent / "exports"
    return bundle, exports, export_onnx(bundle, exports, batches(bundle, pictures[:4]))


@pytest.mark.slow
def test_the_graph_is_one_file_of_standard_operators_with_everything_inside(
    exported: tuple[Any, Path, dict[str, Any]],
) -> None:
    import onnx

    _bundle, exports, made = exported
    graph = onnx.load(made["path"])
    (pixels,), (scores,) = graph.graph.input, graph.graph.output
    assert (pixels.name, scores.name) == ("pixels", "scores")
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in pixels.type.tensor_type.shape.dim][1:] == [32, 32, 3]
    assert pixels.type.tensor_type.shape.dim[0].dim_param
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert made["opset"] == next(entry.version for entry in graph.opset_import if not entry.domain)
    folder = Path(made["path"]).parent
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "model.onnx"]
    assert json.loads((exports / "index.json").read_text())["onnx"] == folder.name
    assert sorted(path.name for path in exports.iterdir()) == sorted(["index.json", folder.name])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one bit", "gone", "meta"])
def test_a_tampered_export_is_refused_with_the_command_that_makes_it_anew(
    how: str, exported: tuple[Any, Path, dict[str, Any]]
) -> None:
    bundle, exports, made = exported
    path = Path(made["path"])
    if how == "one bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    elif how == "gone":
        path.unlink()
    else:
        path.with_name("meta.json").write_text("{}")
    with pytest.raises(ExportError) as refused:
        open_engine(bundle, "onnx", exports=exports)
    assert refused.value.code == "E001"
    assert "--onnx" in refused.value.try_


@pytest.mark.slow
def test_an_export_of_another_temperature_is_not_taken_for_this_model(
    exported: tuple[Any, Path, dict[str, Any]],
) -> None:
    from dataclasses import replace

    bundle, exports, _ = exported
    with pytest.raises(ExportError):
        open_engine(replace(bundle, temperature=1.0), "onnx", exports=exports)


@pytest.mark.slow
def test_a_graph_that_disagrees_is_refused_and_nothing_is_left(
    bundle_of: Callable[..., Any], pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of()
    exports = bundle.directory.parent / "exports"
    original = onnx_graph._write_graph

    def wrong(scorer: Any, *arguments: Any) -> None:
        scorer.temperature *= 1.5
        original(scorer, *arguments)

    monkeypatch.setattr(onnx_graph, "_write_graph", wrong)
    with pytest.raises(GateFailed) as refused:
        export_onnx(bundle, exports, batches(bundle, pictures[:8]))
    assert (refused.value.code, refused.value.exit_code) == ("E901", 5)
    assert "8 images" in refused.value.message
    assert list(exports.iterdir()) == []


def test_a_network_that_cannot_be_exported_is_e001_and_nothing_is_left(
    bundle_of: Callable[..., Any], pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    bundle = bundle_of()
    exports = bundle.directory.parent / "exports"

    def fail(*arguments: Any, **more: Any) -> None:
        raise torch.onnx.OnnxExporterError("no translation for aten.odd")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"aten\.odd"):
        export_onnx(bundle, exports, batches(bundle, pictures[:4]))
    assert list(exports.iterdir()) == []


@pytest.mark.slow
def test_no_images_to_compare_means_no_export(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    exports = bundle.directory.parent / "exports"
    with pytest.raises(ExportError, match="no images"):
        export_onnx(bundle, exports, [])
    assert list(exports.iterdir()) == []
