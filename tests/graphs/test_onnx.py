"""ONNX: the same scores as torch on real images, or no export at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.config_verbs import ExportConfig
from imgcls_fast.core.errors import ExportError, GateFailed
from imgcls_fast.core.exports import Export
from imgcls_fast.engines.predictor import Predictor
from imgcls_fast.engines.runtimes import open_engine

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from imgcls_fast.graphs import onnx_graph
from imgcls_fast.graphs.onnx_graph import export_onnx


def batches(bundle: Any, pictures: list[np.ndarray], size: int = 16) -> Iterator[np.ndarray]:
    predictor = Predictor(open_engine(bundle))
    for first in range(0, len(pictures), size):
        yield np.stack([predictor.preprocess(picture) for picture in pictures[first : first + size]])


@pytest.mark.parametrize(
    ("arch", "size", "color"),
    [
        ("small-cnn", 32, "rgb"),
        ("small-cnn", 32, "gray"),
        pytest.param("torchvision/mobilenet_v3_small", 64, "rgb", marks=pytest.mark.slow),
        pytest.param("timm/resnet10t", 64, "rgb", marks=pytest.mark.slow),
    ],
)
def test_onnx_runtime_agrees_with_torch_on_real_images(
    arch: str, size: int, color: str, bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    bundle = bundle_of(arch, size=size, color=color, temperature=1.7)
    exports = bundle.directory.parent / "exports"
    made = export_onnx(bundle, exports, batches(bundle, pictures)).meta
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


def test_the_graph_is_one_file_of_standard_operators_with_everything_inside(
    exported: tuple[Any, Path, Export],
) -> None:
    import onnx

    _bundle, exports, made = exported
    graph = onnx.load(str(made.path))
    (pixels,), (scores,) = graph.graph.input, graph.graph.output
    assert (pixels.name, scores.name) == ("pixels", "scores")
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in pixels.type.tensor_type.shape.dim][1:] == [32, 32, 3]
    assert pixels.type.tensor_type.shape.dim[0].dim_param
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert made.meta["opset"] == next(entry.version for entry in graph.opset_import if not entry.domain)
    folder = made.path.parent
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "model.onnx"]
    assert json.loads((exports / "index.json").read_text())["onnx"] == folder.name
    assert sorted(path.name for path in exports.iterdir()) == sorted(["index.json", folder.name])


@pytest.mark.parametrize("how", ["one bit", "gone", "meta"])
def test_a_tampered_export_is_refused_with_the_command_that_makes_it_anew(
    how: str, exported: tuple[Any, Path, Export]
) -> None:
    bundle, exports, made = exported
    path = made.path
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


def test_an_export_of_another_temperature_is_not_taken_for_this_model(
    exported: tuple[Any, Path, Export],
) -> None:
    from dataclasses import replace

    bundle, exports, _ = exported
    with pytest.raises(ExportError):
        open_engine(replace(bundle, temperatures=(1.0,)), "onnx", exports=exports)


def test_a_graph_that_disagrees_is_refused_and_nothing_is_left(
    bundle_of: Callable[..., Any], pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of()
    exports = bundle.directory.parent / "exports"
    original = onnx_graph.scorer_of

    def wrong(*arguments: Any, **more: Any) -> Any:
        scorer = original(*arguments, **more)
        scorer.temperature = tuple(1.5 * heat for heat in scorer.temperature)
        return scorer

    monkeypatch.setattr(onnx_graph, "scorer_of", wrong)
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


def test_no_images_to_compare_means_no_export(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    exports = bundle.directory.parent / "exports"
    with pytest.raises(ExportError, match="no images"):
        export_onnx(bundle, exports, [])
    assert list(exports.iterdir()) == []


# --- the graph --------------------------------------------------------------------------------------------------------


def written(bundle: Any, path: Path, **how: Any) -> Any:
    import onnx

    onnx_graph.write_graph(bundle, path, **how)
    return onnx.load(str(path))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("batch", [None, 3])
def test_the_bytes_have_one_consumer_which_makes_floats_of_them(
    precision: str, batch: int | None, bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = bundle_of("timm/resnet10t", size=32)
    graph = written(bundle, tmp_path / "m.onnx", precision=precision, batch=batch, opset=22).graph
    (consumer,) = (node for node in graph.node if "pixels" in node.input)
    assert consumer.op_type == "Cast"
    first = graph.input[0].type.tensor_type.shape.dim[0]
    assert first.dim_value == batch if batch else first.dim_param == "batch"
    weights = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4 and tensor.dims[-1] > 1}
    assert weights == {{"fp32": 1, "fp16": 10, "bf16": 16}[precision]}
    scores = graph.output[0].type.tensor_type
    assert (scores.elem_type, scores.shape.dim[1].dim_value) == (1, 3)


@pytest.mark.parametrize(("opset", "count"), [(20, 0), (23, 2)])
def test_attention_is_one_operator_from_opset_23_on(
    opset: int, count: int, bundle_of: Callable[..., Any], pictures: list[np.ndarray], tmp_path: Path
) -> None:
    bundle = bundle_of("timm/vit_tiny_patch16_224", size=32, args={"depth": 2})
    path = tmp_path / "m.onnx"
    graph = written(bundle, path, opset=opset).graph
    assert sum(node.op_type == "Attention" for node in graph.node) == count
    facts = onnx_graph.verify_graph(path, bundle, batches(bundle, pictures), "fp32", 1e-4)
    assert facts["comparison"]["relative_l2"] < 1e-5


def test_the_file_says_what_it_is(exported: tuple[Any, Path, Export]) -> None:
    import onnx

    bundle, _, made = exported
    props = {entry.key: entry.value for entry in onnx.load(str(made.path)).metadata_props}
    assert json.loads(props["imgcls_fast.classes"]) == list(bundle.labels.classes) == made.meta["classes"]
    assert props["imgcls_fast.bundle"] == bundle.digest
    assert json.loads(props["imgcls_fast.pixels"]) == json.loads(json.dumps(bundle.pixels.to_dict()))
    assert made.meta["input"] == {"name": "pixels", "dtype": "uint8", "shape": ["batch", 32, 32, 3]}


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision_is_compared_as_far_as_a_runtime_allows(
    precision: Any, bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    small, large = bundle_of(), bundle_of("timm/resnet10t", size=64)
    exports = small.directory.parent / "exports"
    made = export_onnx(small, exports, list(batches(small, pictures)), precision=precision).meta
    assert made["verified"] == ("onnxruntime" if precision == "fp16" else "reference")
    assert 0 < made["comparison"]["relative_l2"] < 5e-2
    assert made["opset"] == (20 if precision == "fp16" else 22)
    if precision == "bf16":
        exports = large.directory.parent / "exports"
        made = export_onnx(large, exports, list(batches(large, pictures)), precision="bf16").meta
        assert (made["verified"], made["comparison"]) == ("structure-only", None)


@pytest.mark.slow
def test_the_same_export_is_made_once(exported: tuple[Any, Path, Export], pictures: list[np.ndarray]) -> None:
    bundle, exports, first = exported
    images = list(batches(bundle, pictures[:4]))
    again = export_onnx(bundle, exports, [])  # no images: nothing is compared again
    assert again.path == first.path
    with pytest.raises(ExportError):
        export_onnx(bundle, exports, [], settings=ExportConfig(opset=21))
    first.path.write_bytes(b"damaged")
    assert export_onnx(bundle, exports, images).meta["sha256"] == first.meta["sha256"]


def test_scores_of_several_tasks_are_softmax_or_sigmoid_of_their_own_columns() -> None:
    import torch

    from imgcls_fast.core.labels import LabelSpace, Task
    from imgcls_fast.models.classifier import probabilities

    labels = LabelSpace((Task("kind", ("a", "b", "c")), Task("marks", ("x", "y"), "any_of")))
    logits = torch.randn(4, 5)
    scores = probabilities(logits, labels, 2.0)
    torch.testing.assert_close(scores[:, :3].sum(1), torch.ones(4))
    torch.testing.assert_close(scores[:, 3:], torch.sigmoid(logits[:, 3:] / 2))
