"""A stranger's ONNX file is run once in a child before it is opened here; this user's own files are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError
from imgcls_fast.core.files import read_sealed, sha256_file, write_sealed
from imgcls_fast.core.trust import SIGNATURE
from imgcls_fast.engines import runtimes, trial
from imgcls_fast.engines.runtimes import open_engine

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def bomb(path: Path, side: int, classes: int) -> None:
    """A graph with the right edges, of which every node is harmless, that joins a tensor with itself 45 times."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["floats"], ["x0"], keepdims=0),
        helper.make_node("Reshape", ["x0", "one"], ["y0"]),
        *[helper.make_node("Concat", [f"y{k}", f"y{k}"], [f"y{k + 1}"], axis=0) for k in range(45)],
        helper.make_node("ReduceSum", ["y45"], ["sum"], keepdims=0),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=0),
        helper.make_node("Add", ["mean", "sum"], ["scores"]),
    ]
    constants = [numpy_helper.from_array(np.array([1]), "one"), numpy_helper.from_array(np.array([1, 2]), "axes")]
    edges = [
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", side, side, 3]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", classes]),
    ]
    graph = helper.make_graph(nodes, "g", edges[:1], edges[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))


def unsigned(export: Any) -> None:
    """As if somebody else had made it."""
    meta = read_sealed(export.folder / "meta.json")
    meta.pop(SIGNATURE, None)
    write_sealed(export.folder / "meta.json", {**meta, "sha256": sha256_file(export.path)})


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_stranger_s_graph_that_needs_a_terabyte_ends_a_child_and_not_us(runtime: str, exported: Any) -> None:
    pytest.importorskip(runtime if runtime == "openvino" else "onnxruntime")
    bundle, exports, export = exported
    bomb(export.path, bundle.pixels.size, bundle.labels.size)
    unsigned(export)
    with pytest.raises(ExportError) as refused:
        open_engine(bundle, runtime, exports=exports, precision="fp32")
    assert refused.value.code == "E005"
    assert "a process that tried it" in refused.value.message and "model.onnx" in refused.value.message


def test_a_stranger_s_good_graph_is_opened_and_tried_once(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, exports, export = exported
    tried: list[str] = []
    start = trial.child.start
    monkeypatch.setattr(trial.child, "start", lambda *words, **more: tried.append(words[0]) or start(*words, **more))  # type: ignore[func-returns-value]
    monkeypatch.setattr(trial, "_passed", set())
    own = open_engine(bundle, "onnx", exports=exports, precision="fp32")
    assert tried == []
    unsigned(export)
    pixels = np.random.default_rng(0).integers(0, 256, (2, bundle.pixels.size, bundle.pixels.size, 3)).astype(np.uint8)
    for _ in range(2):
        engine = open_engine(bundle, "onnx", exports=exports, precision="fp32")
        np.testing.assert_array_equal(engine.scores(pixels), own.scores(pixels))
    assert tried == ["engines.trial"]


def test_what_the_bytes_show_comes_before_the_child(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, exports, export = exported
    monkeypatch.setattr(runtimes, "demand_survivable", lambda *words: pytest.fail("a child was started"))
    export.path.write_bytes(b"\xff" * 100)
    unsigned(export)
    with pytest.raises(ExportError, match="garbled"):
        open_engine(bundle, "onnx", exports=exports, precision="fp32")


@pytest.mark.parametrize(
    "batch", ["x", *(pytest.param(batch, marks=pytest.mark.slow) for batch in (-1, 10**9, None))], ids=str
)
def test_no_batch_in_a_stranger_s_meta_gets_a_bomb_past_the_child(batch: Any, exported: Any) -> None:
    bundle, exports, export = exported
    bomb(export.path, bundle.pixels.size, bundle.labels.size)
    unsigned(export)
    write_sealed(export.folder / "meta.json", {**read_sealed(export.folder / "meta.json"), "batch": batch})
    with pytest.raises(ExportError, match="a process that tried it"):
        open_engine(bundle, "onnx", exports=exports, precision="fp32")


def test_a_graph_that_loads_and_cannot_run_on_the_promised_pixels_is_refused(exported: Any) -> None:
    bundle, exports, export = exported
    bomb(export.path, 2 * bundle.pixels.size, bundle.labels.size)
    unsigned(export)
    with pytest.raises(ExportError, match="a process that tried it"):
        open_engine(bundle, "onnx", exports=exports, precision="fp32")
