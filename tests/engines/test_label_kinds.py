"""Models with several tasks and with classes of which any number may hold: the same answers from every runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgcls_fast.core.batch import Batch
from imgcls_fast.core.errors import ExportError
from imgcls_fast.core.exports import find_export
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.engines.agreement import compare_engines
from imgcls_fast.engines.predictor import Predictor
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.engines.scoring import predict
from imgcls_fast.engines.torch_runtime import CompiledEngine, TorchEngine, load_model

LABELS = LabelSpace((Task("kind", ("a", "b", "c")), Task("marks", ("w", "x", "y", "z"), "any_of")))
HEAT = (2.5, 0.8)
LEAST = (0.5, 0.5, 0.5, 0.3, 0.5, 0.625, 0.9)


@pytest.fixture(scope="module")
def bundle(shared_bundle_of: Callable[..., Any]) -> Any:
    return shared_bundle_of(labels=LABELS, temperature=HEAT, thresholds=LEAST)


@pytest.fixture(scope="module")
def pixels(bundle: Any, pictures: list[np.ndarray]) -> np.ndarray:
    predictor = Predictor(open_engine(bundle))
    return np.stack([predictor.preprocess(picture) for picture in pictures[:12]])


@pytest.fixture(scope="module")
def expected(bundle: Any, pixels: np.ndarray) -> np.ndarray:
    """The formula, in double precision."""
    with torch.no_grad():
        logits = load_model(bundle)(torch.from_numpy(pixels)).double()
    return torch.cat([torch.softmax(logits[:, :3] / HEAT[0], 1), torch.sigmoid(logits[:, 3:] / HEAT[1])], 1).numpy()


def demand_equal(engine: Any, pixels: np.ndarray, expected: np.ndarray) -> None:
    scores = engine.scores(pixels)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    np.testing.assert_allclose(scores[:, :3].sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(engine.thresholds, np.asarray(LEAST, np.float32))
    assert engine.labels == LABELS


def test_torch_scales_each_task_by_its_own_temperature(bundle: Any, pixels: np.ndarray, expected: np.ndarray) -> None:
    demand_equal(open_engine(bundle), pixels, expected)
    assert not np.allclose(expected[:, 3:].sum(1), 1)


@pytest.mark.slow
def test_onnx_and_openvino_have_softmax_and_sigmoid_inside(
    bundle: Any, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from imgcls_fast.graphs.onnx_graph import export_onnx

    export = export_onnx(bundle, tmp_path, [pixels[:4]])
    assert export.meta["temperatures"] == list(HEAT) and export.meta["thresholds"] == list(LEAST)
    assert export.meta["comparison"]["same_top1"] == 4
    engine = open_engine(bundle, "onnx", exports=tmp_path)
    demand_equal(engine, pixels, expected)
    np.testing.assert_allclose(engine.scores(pixels[:1]), expected[:1], atol=2e-6)
    found = compare_engines(open_engine(bundle), engine, [pixels])
    assert (found.images, found.same_top1, found.same_clear) == (12, 12, found.clear) and found.clear > 6
    pytest.importorskip("openvino")
    demand_equal(open_engine(bundle, "openvino", exports=tmp_path), pixels, expected)


@pytest.mark.slow
def test_a_package_of_aotinductor_does_so_too(
    bundle: Any, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    from imgcls_fast.core.exports import way_of
    from imgcls_fast.exporting.programs import write_program

    write_program(bundle, tmp_path, [pixels[:4]], way_of("aoti"))
    demand_equal(open_engine(bundle, "aoti", exports=tmp_path), pixels, expected)


@pytest.mark.slow
def test_compiled_code_does_so_too(bundle: Any, pixels: np.ndarray) -> None:
    model = torch.nn.Sequential(Mean(), torch.nn.Linear(3, LABELS.size))
    given = {"temperature": HEAT, "thresholds": LEAST}
    eager = TorchEngine(model, LABELS, bundle.pixels, **given)
    demand_equal(CompiledEngine(model, LABELS, bundle.pixels, **given), pixels, eager.scores(pixels))


class Mean(torch.nn.Module):
    """The mean colour of each image, in 0..1."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((1, 2)) / 255


def test_an_export_of_another_temperature_is_refused(bundle: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from imgcls_fast.core.exports import choose, common_meta, finish, is_of, new_export

    with new_export(tmp_path, "onnx", "fp32", "0" * 8) as folder:
        (folder / "model.onnx").write_bytes(b"graph")
        choose(finish(folder, bundle, "onnx", "fp32", "model.onnx", {}))
    assert is_of(find_export(tmp_path, bundle, "onnx").meta, bundle)
    assert is_of(common_meta(bundle), replace(bundle, thresholds=None))  # applied outside of the graph
    with pytest.raises(ExportError) as refused:
        find_export(tmp_path, replace(bundle, temperatures=(2.5, 0.9)), "onnx")
    assert refused.value.code == "E001"


def test_predictions_keep_the_thresholds_and_what_is_unknown(bundle: Any, pixels: np.ndarray) -> None:
    targets = np.tile(np.array([1, 0, 0, 1, 0, np.nan, 1], np.float32), (2, 1))
    engine = open_engine(bundle)
    batch = Batch(pixels[:2], targets, np.ones(2, np.float32), np.array([1, 0]))
    found = predict(engine, [batch], paths=["0.jpg", "1.jpg"])
    np.testing.assert_array_equal(found.thresholds, engine.thresholds)
    assert np.isnan(found.targets).sum() == 2  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.answers, LABELS.decide(found.scores, np.asarray(LEAST)))


class Fixed:
    """An engine whose scores are given."""

    def __init__(self, labels: LabelSpace, scores: Any, thresholds: Any = None) -> None:
        self.labels, self.rows = labels, np.asarray(scores, np.float32)
        self.thresholds = None if thresholds is None else np.asarray(thresholds, np.float32)

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        return self.rows[: len(pixels)]


def test_two_engines_agree_where_every_clear_answer_to_every_task_is_the_same() -> None:
    labels = LabelSpace((Task("kind", ("a", "b")), Task("marks", ("x", "y"), "any_of")))
    own = [[0.9, 0.1, 0.8, 0.1], [0.9, 0.1, 0.8, 0.4], [0.51, 0.49, 0.5, 0.4], [0.2, 0.8, 0.1, 0.1]]
    its = [[0.9, 0.1, 0.8, 0.1], [0.9, 0.1, 0.7, 0.6], [0.49, 0.51, 0.4, 0.4], [0.2, 0.8, 0.1, 0.39]]
    least = [0, 0, 0.5, 0.4]  # thresholds of one_of columns do not matter
    found = compare_engines(Fixed(labels, own, least), Fixed(labels, its), [np.zeros((4, 1), np.uint8)], margin=0.05)  # type: ignore[arg-type]
    # row 1: y was on its threshold, so it held, and holds. Row 2: no answer is clear, and two are different. Row 3: the same
    assert (found.images, found.same_top1) == (4, 3)
    assert (found.clear, found.same_clear) == (3, 3)
    its[3][3] = 0.41
    found = compare_engines(Fixed(labels, own, least), Fixed(labels, its), [np.zeros((4, 1), np.uint8)], margin=0.05)  # type: ignore[arg-type]
    assert (found.clear, found.same_clear) == (3, 2)
    same = labels.same_answers(np.asarray(own, np.float32), np.asarray(its, np.float32), least)
    assert same.tolist() == [True, True, False, False]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_comparison_sees_a_graph_that_ignores_its_input(wrong: bool) -> None:
    scores = np.random.default_rng(0).dirichlet((50, 1, 1), 30).astype(np.float32)
    labels = LabelSpace.single("abc")
    other = np.repeat(scores.mean(0, keepdims=True), 30, 0) if wrong else scores
    found = compare_engines(Fixed(labels, scores), Fixed(labels, other), [np.zeros((30, 1), np.uint8)])  # type: ignore[arg-type]
    assert found.same_top1 == 30
    assert (found.relative_l2 > 0.9) is wrong


def test_one_task_of_several_answers_are_the_classes_above_their_thresholds(
    shared_bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    marks = LabelSpace((Task("label", ("w", "x", "y", "z"), "any_of"),))
    bundle = shared_bundle_of(labels=marks, temperature=1.0, thresholds=(0.3, 0.5, 0.625, 1.0))
    predictor = Predictor(open_engine(bundle), top_k=2)
    answers, scores = predictor(pictures[:8]), predictor.predict(pictures[:8])
    held = scores >= np.array([0.3, 0.5, 0.625, 1.0])
    assert 0 < held.sum() < held.size
    for answer, row, holds in zip(answers, scores, held, strict=True):
        assert {name for name, _ in answer.labels} == {marks.classes[k] for k in np.flatnonzero(holds)}
        order = np.argsort(-row, kind="stable")
        assert [name for name, _ in answer.top] == [marks.classes[k] for k in order[:2]]
        assert answer.label == "|".join(name for name, _ in answer.labels) and math.isnan(answer.confidence)
        assert answer.to_dict() == {
            "path": answer.path,
            "labels": [list(pair) for pair in answer.labels],
            "top": [list(pair) for pair in answer.top],
        }
    assert "labels=" in repr(answers[0]) and len({hash(answer) for answer in answers}) == 8


def test_a_model_with_several_tasks_answers_each_of_them(
    bundle: Any, pixels: np.ndarray, pictures: list[np.ndarray]
) -> None:
    predictor = Predictor(open_engine(bundle), top_k=3)
    answer = predictor(pictures[0])
    scores = predictor.predict(pictures[0])[0]
    assert predictor.classes[3] == "marks: w"
    kind, marks = answer.tasks["kind"], answer.tasks["marks"]
    assert kind.label == "abc"[scores[:3].argmax()] and kind.confidence == pytest.approx(scores[:3].max(), abs=1e-6)
    assert [name for name, _ in marks.labels] == [
        "wxyz"[k] for k in np.argsort(-scores[3:]) if scores[3 + k] >= np.float32(LEAST[3 + k])
    ]
    assert len(marks.top) == 3 and answer.label == "" and answer.top == ()
    assert answer.labels[0][0] == f"kind: {kind.label}"
    told = answer.to_dict()
    assert set(told) == {"path", "tasks"}
    assert set(told["tasks"]["kind"]) == {"label", "confidence", "top"} and set(told["tasks"]["marks"]) == {"labels", "top"}
