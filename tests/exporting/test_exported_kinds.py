"""Exports of models that answer several questions, or one with several answers: ONNX, programs, engines, the gate, Triton."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.bundle import Bundle
from imgcls_fast.core.config_verbs import ExportConfig
from imgcls_fast.core.errors import GateFailed
from imgcls_fast.core.exports import finish, list_exports, new_export, way_of
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.scan import scan
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.evaluation.paired import Judgement, MeanDrop
from imgcls_fast.exporting.gate import demand, figures_of, plain_int8_loses, split_rows
from imgcls_fast.exporting.int8 import promising
from imgcls_fast.exporting.materials import Materials
from imgcls_fast.exporting.session import export_bundle
from imgcls_fast.exporting.triton import TritonOptions, write_triton
from imgcls_fast.exporting.triton_config import check_repository, from_pbtxt, one
from imgcls_fast.graphs.lint import lint
from imgcls_fast.graphs.quantize import calibration_rows

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

LABELS = LabelSpace((Task("kind", ("a", "b", "c")), Task("cells", ("p", "q", "r", "s"), "any_of")))
CELLS = LabelSpace((LABELS.tasks[1],))
LEAST = (0.5, 0.5, 0.5, 0.4, 0.5, 0.6, 0.5)
FLOAT, HALF = 1, 10


def neighbour(name: str) -> ModuleType:
    """Another module of the tests."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "trt" / "doubles.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def with_answers_of(bundle: Bundle, manifest: Manifest, unknown: float) -> Manifest:
    """The images with what the network itself answers to them, a share of it unknown: it then is right everywhere."""
    pixels = np.stack([np.asarray(Image.open(manifest.path(row))) for row in range(len(manifest))])
    truth = LABELS.decide(open_engine(bundle).scores(pixels), np.float32(LEAST))
    draw = np.random.default_rng(2)
    kind, cells = truth[:, :3].argmax(1).astype(np.int32), truth[:, 3:].astype(np.int8)
    kind[draw.random(len(kind)) < unknown] = -1
    cells[draw.random(cells.shape) < unknown] = -1
    return replace(manifest, labels=LABELS, answers=(kind, cells))


@pytest.fixture
def materials(bundle_of: Callable[..., Any], tmp_path: Path) -> Callable[..., Materials]:
    """Makes what the exports of a network with two tasks share; 20 % of the labels are missing."""
    draw = np.random.default_rng(0)
    pictures = (draw.random((240, 1, 1, 3)) * draw.random((240, 32, 32, 3)) * 255).astype(np.uint8)
    (tmp_path / "data" / "all").mkdir(parents=True)
    (tmp_path / "data" / "none").mkdir()
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "data" / ("none" if k % 2 else "all") / f"{k:03}.png")
    found = scan(tmp_path / "data", ScanOptions(threads=1)).manifest
    bundle = bundle_of(args={"width": 16}, labels=LABELS, temperature=(1.5, 0.7), thresholds=LEAST, crop_pct=1.0)
    manifest = with_answers_of(bundle, found.with_splits(np.arange(240) % 3), 0.2)

    def make(**settings: Any) -> Materials:
        config = ExportConfig(
            **{"quantizer": "onnxruntime", "calibration_images": 64, "verify_images": 16, "search_s": 0, **settings}
        )
        made = Materials(bundle, manifest, tmp_path / "exports", config)
        made.say = (said := []).append
        made.said = said  # type: ignore[attr-defined]
        return made

    return make


def tail_types(path: Path) -> dict[str, list[int]]:
    """Operators of the graph behind its last layer, with the types of their outputs."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    last = max(k for k, node in enumerate(model.graph.node) if node.op_type == "Gemm")
    found: dict[str, list[int]] = {}
    for node in model.graph.node[last + 1 :]:
        found.setdefault(node.op_type, []).extend(types[name] for name in node.output)
    return found


@pytest.mark.slow
def test_every_export_of_two_tasks_scores_as_torch_does_and_is_judged_by_both_figures(
    materials: Callable[..., Materials]
) -> None:
    shared = materials(max_drop=20.0)
    x = np.concatenate(shared.comparison)
    exact = open_engine(shared.bundle).scores(x)
    np.testing.assert_allclose(exact[:, :3].sum(1), 1, atol=1e-5)
    assert exact[:, 3:].sum(1).max() > 1.5, "any number of cells may hold"
    for precision, allowed in (("fp32", 1e-5), ("fp16", 5e-3), ("int8", 0.05)):
        made = export_bundle(shared, "onnx", precision)
        tail = tail_types(made.path)
        assert {"Softmax", "Sigmoid", "Concat"} <= tail.keys() and "QuantizeLinear" not in tail
        assert set(tail["Softmax"] + tail["Sigmoid"] + tail["Concat"]) == {FLOAT}
        assert lint(made.path, precision) == []
        engine = open_engine(shared.bundle, "onnx", exports=shared.exports, precision=precision)
        # the mean: single scores of a network with random weights turn over in INT8
        assert np.abs(engine.scores(x) - exact).mean() <= allowed
        np.testing.assert_allclose(engine.thresholds, np.float32(LEAST))
    gate = made.gate
    assert gate is not None and gate["verdict"] == "pass" and "per label" in gate["method"]
    assert gate["reference_accuracy"] == 1 and gate["per_label"]["reference_accuracy"] == 1
    assert gate["per_label"]["accuracy"] >= gate["accuracy"], "a row with one wrong answer is not all wrong"
    assert {"cells: p", "cells: s"} <= {entry["class"] for entry in gate["per_class"]} <= set(LABELS.classes)
    assert made.meta["quantisation"]["calibration"]["per_class"] == shared.manifest.take(shared.calibration_rows).counts().tolist()
    program = export_bundle(shared, "pt2")
    assert program.meta["comparison"]["max_score_diff"] <= 1e-4

    strict = materials(max_drop=0.1)
    with pytest.raises(GateFailed) as refused:
        export_bundle(strict, "onnx", "int8")
    judged = next(export.gate for export in list_exports(strict.exports) if (export.gate or {}).get("max_drop_pp") == 0.1)
    assert judged["verdict"] == {"E902": "fail", "E903": "underpowered"}[refused.value.code]
    if judged["rows_needed"]:
        assert f"{judged['rows_needed']:,} rows like these" in refused.value.message


@pytest.mark.slow
def test_int8_by_modelopt_leaves_the_answers_of_every_task_in_float32(
    bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("modelopt")
    from imgcls_fast.graphs.onnx_graph import write_graph
    from imgcls_fast.graphs.quantize import quantize

    bundle = bundle_of(args={"width": 16}, labels=LABELS, temperature=(1.5, 0.7))
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    write_graph(bundle, tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", x, quantizer="modelopt")
    tail = tail_types(tmp_path / "int8.onnx")
    assert set(tail["Softmax"] + tail["Sigmoid"] + tail["Concat"]) == {FLOAT} and "QuantizeLinear" not in tail
    assert lint(tmp_path / "int8.onnx", "int8") == []


@pytest.mark.slow
def test_an_engine_of_two_tasks_is_built_compared_and_judged(
    materials: Callable[..., Materials], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from imgcls_fast.exporting import materials as module

    doubles = neighbour("trt_doubles")
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_SHORT", {"warmup_s": 0.01, "duration_s": 0.05})
    with doubles.installed(doubles.World(), monkeypatch):
        made = export_bundle(materials(max_drop=20.0), "trt", "fp16")
    assert made.gate is not None and (made.gate["verdict"], made.gate["simulated"]) == ("pass", False)
    assert made.gate["per_label"]["rows_needed"] is not None
    assert made.meta["comparison"]["same_clear"] == made.meta["comparison"]["clear"]


# ---------------------------------------------------------------- rows


def test_calibration_and_gate_rows_hold_each_label_in_its_share_where_most_combinations_are_rare() -> None:
    n, draw = 3000, np.random.default_rng(0)
    task = Task("tags", tuple(f"tag {k}" for k in range(10)), "any_of")
    tags = (draw.random((n, 10)) < np.linspace(0.02, 0.5, 10)).astype(np.int8)
    manifest = Manifest(
        root=Path("/nowhere"), paths=PathList.of([f"{k:04}.png" for k in range(n)]), labels=LabelSpace((task,)), answers=(tags,),
        split=np.zeros(n, np.uint8), group=np.full(n, -1, np.int32), width=np.full(n, 8, np.int32), height=np.full(n, 8, np.int32),
        orientation=np.ones(n, np.uint8), digest=draw.integers(0, 256, (n, 16), np.uint8), flags=np.zeros(n, np.uint8), source={},
    )  # fmt: skip
    assert len(np.unique(manifest.stratum)) > 300
    chosen = calibration_rows(manifest, 256, 0)
    assert len(np.unique(chosen)) == 256
    parts = split_rows(manifest.stratum, 0, 0.25)
    for rows, allowed in ((chosen, 0.06), (parts.search, 0.04), (parts.verdict, 0.02)):
        assert np.abs(tags[rows].mean(0) - tags.mean(0)).max() <= allowed
    crowded = manifest.fair_order(np.arange(n))[:256]
    assert np.abs(tags[crowded].mean(0) - tags.mean(0)).max() > 0.1, "one of each combination first"


# ---------------------------------------------------------------- words


def judged(exact: tuple[float, float, float], label: tuple[float, float, float], needed: int | None = None) -> Judgement:
    """A judgement of 500 rows and a budget of a point, from (drop, bound, lower bound) of both figures, in points."""

    def side(drop: float, bound: float, lower: float) -> Any:
        return "pass" if bound <= 1 else "fail" if lower > 1 else "underpowered"

    both = (side(*exact), side(*label))
    mean = MeanDrop(0.95 - label[0] / 100, 0.95, *(v / 100 for v in label), side(*label), needed)
    return Judgement(
        rows=500, lost=9, gained=4, agreement=0.97, accuracy=0.8 - exact[0] / 100, reference_accuracy=0.8,
        drop=exact[0] / 100, bound=exact[1] / 100, lower_bound=exact[2] / 100, max_drop=0.01, p_value=1.0, per_class=(),
        verdict=next(word for word in ("fail", "underpowered", "pass") if word in both), simulated=False,
        rows_needed=needed, per_label=mean,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("exact", "label", "code", "said"),
    [
        ((3, 5, 1.5), (0.2, 0.8, -1), "E902", ["lost 3 points of exact match", "9 lost and 4 gained of 500 rows"]),
        ((0.5, 0.9, -1), (2, 3, 1.2), "E902", ["lost 2 points of per-label accuracy", "95.00% -> 93.00%"]),
        ((0.5, 1.4, -1), (0.2, 0.7, -1), "E903", ["at most 1 points of exact match", "may be 1.4", "900 rows like these"]),
        ((0.5, 0.9, -1), (0.4, 1.7, -1), "E903", ["at most 1 points of per-label accuracy", "may be 1.7"]),
        ((0.5, 1.4, -1), (0.4, 1.7, -1), "E903", ["exact match", "of per-label accuracy a drop of 0.4 that may be 1.7"]),
    ],
)
def test_a_refusal_names_the_figure_that_did_not_hold(exact: Any, label: Any, code: str, said: list[str]) -> None:
    with pytest.raises(GateFailed) as refused:
        demand(judged(exact, label, 900), way_of("onnx", "int8"))
    assert refused.value.code == code
    for words in said:
        assert words in refused.value.message


def test_both_figures_must_promise_before_the_verdict_rows_are_asked() -> None:
    assert promising(judged((0.4, 2, -1), (0.3, 2, -1)))
    assert not promising(judged((0.4, 2, -1), (0.6, 2, -1)))
    assert [figure.name for figure in figures_of(judged((0, 0, 0), (0, 0, 0)))] == ["exact match", "per-label accuracy"]
    assert "0.40 points of exact match and 0.60 points of per-label accuracy" in plain_int8_loses(
        judged((0.4, 2, -1), (0.6, 2, -1))
    )


# ---------------------------------------------------------------- Triton


def file_of(bundle: Any) -> Any:
    """A file with the inputs and outputs of an export; nothing computes it here."""
    side, helper = bundle.pixels.size, onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Cast", ["pixels"], ["x"], to=FLOAT), helper.make_node("Identity", ["w"], ["scores"])],
        "file",
        [helper.make_tensor_value_info("pixels", 2, ["batch", side, side, 3])],
        [helper.make_tensor_value_info("scores", FLOAT, ["batch", bundle.labels.size])],
        [helper.make_tensor("w", FLOAT, [1, bundle.labels.size], [0.0] * bundle.labels.size)],
    )
    with new_export(bundle.directory.parent / "exports", "onnx", "fp32", "00000000") as temporary:
        onnx.save(helper.make_model(graph), str(temporary / "model.onnx"))
        return finish(temporary, bundle, "onnx", "fp32", "model.onnx", {"opset": 20, "batch": None})


def test_triton_serves_qualified_names_and_how_scores_become_answers(
    bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = bundle_of(labels=LABELS, temperature=(1.5, 0.7), thresholds=LEAST)
    folder = tmp_path / "repository"
    write_triton(bundle, file_of(bundle), folder, TritonOptions(name="blood", dali=False, threads=2))
    lines = (folder / "blood" / "labels.txt").read_text("utf-8").splitlines()
    assert lines == ["kind: a", "kind: b", "kind: c", "cells: p", "cells: q", "cells: r", "cells: s"]
    config = from_pbtxt((folder / "blood" / "config.pbtxt").read_text("utf-8"))
    told = {one(entry, "key"): one(one(entry, "value"), "string_value") for entry in config["parameters"]}
    assert json.loads(told["tasks"]) == LABELS.to_dict()["tasks"] and json.loads(told["thresholds"]) == list(LEAST)
    assert told["intra_op_thread_count"] == "2"
    assert check_repository(folder, bundle) == []
    assert any("thresholds" in wrong for wrong in check_repository(folder, replace(bundle, thresholds=(0.5,) * 7)))


def test_triton_has_nothing_to_add_about_one_label_and_no_thresholds_of_classes_that_exclude_each_other(
    bundle_of: Callable[..., Any],
) -> None:
    from imgcls_fast.exporting.triton_config import score_facts

    assert score_facts(bundle_of()) == {}
    two = LabelSpace((LABELS.tasks[0], Task("side", ("left", "right"))))
    assert list(score_facts(bundle_of(labels=two, temperature=(1.0, 1.0)))) == ["tasks"]
    assert json.loads(score_facts(bundle_of(labels=CELLS))["thresholds"]) == [0.5] * 4
