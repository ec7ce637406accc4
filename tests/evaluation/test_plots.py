"""Pictures come out as PNG bytes whatever is missing, and leave no global state behind."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.evaluation import plots, scatter
from imgcls_fast.evaluation.metrics import judge

EPOCH = {"epoch": 1, "train_loss": 0.9, "val_loss": 0.8, "val_accuracy": 0.7, "val_macro_f1": 0.6, "lr": 1e-3}
NAMES = ("confusion", "coverage", "precision_recall", "reliability", "roc")


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG on white paper in which something is drawn."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(png)) as image:
        values = np.asarray(image.convert("RGB"))
        assert image.format == "PNG" and (values[0, 0] == 255).all() and values.std() > 1
        return image.size


def drawn_all(predictions) -> dict[str, bytes]:
    pictures = plots.judgement_plots(predictions, judge(predictions, bootstrap=0))
    assert sorted(pictures) == list(NAMES)
    for png in pictures.values():
        width, height = size_of(png)
        assert 300 < width < 2600 and 300 < height < 2600
    return pictures


@pytest.mark.parametrize("kind", ["usual", "one row"])
def test_every_picture_of_a_judgement_is_a_png(kind, drawn, predictions_of):
    drawn_all(predictions_of(*drawn(1 if kind == "one row" else 90, 3)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["absent", "one true class", "perfect"])
def test_curves_of_absent_classes_and_of_perfect_scores_are_drawn_without_a_warning(kind, drawn, predictions_of):
    scores, truth = drawn(40, 3)
    truth = {"absent": np.where(truth == 2, 0, truth), "one true class": truth * 0}.get(kind, truth)
    ours = predictions_of(np.eye(3, dtype=np.float32)[truth] if kind == "perfect" else scores, truth)
    metrics = judge(ours, bootstrap=0)
    for png in (plots.roc(ours, metrics), plots.precision_recall(ours, metrics)):
        assert min(size_of(png)) > 300


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [12, 60])
def test_many_classes_fit_and_only_the_lowest_ten_have_curves(size, drawn, predictions_of):
    ours = predictions_of(*drawn(10 * size, size))
    metrics = judge(ours, bootstrap=0)
    assert 600 < size_of(plots.confusion(metrics.confusion, metrics.classes))[1] < 2600
    assert min(size_of(plots.roc(ours, metrics))) > 300
    curves = [c.roc_auc for c in metrics.per_class]
    shown = plots._worst(range(size), curves)
    assert sorted(curves[k] for k in shown) == sorted(curves)[:10]


@pytest.mark.filterwarnings("error")
def test_any_class_name_can_be_drawn(drawn, predictions_of):
    names = [r"$\frac{$", "_hidden", "花 🐱", "two\nlines", os.fsdecode(b"caf\xe9"), "x" * 300, "$a$ & <b>", ""]
    ours = predictions_of(*drawn(80, len(names)), names)
    metrics = judge(ours, bootstrap=0)
    assert min(size_of(plots.confusion(metrics.confusion, names))) > 300
    assert min(size_of(plots.precision_recall(ours, metrics))) > 300
    assert plots._labels(["plain", "_hidden", "花", "a$b"]) == ["plain", " _hidden", "class 2", r"a\$b"]


def test_a_cell_of_the_confusion_is_darker_the_larger_its_share():
    def middle(counts) -> np.ndarray:
        png = plots.confusion(np.array(counts), ["a", "b"])
        return np.asarray(Image.open(io.BytesIO(png)).convert("L"), np.float64)

    diagonal, reverse = middle([[90, 10], [10, 90]]), middle([[10, 90], [90, 10]])
    height, width = diagonal.shape
    upper_left = np.s_[height // 8 : height // 4, width // 4 : width // 3]
    assert diagonal[upper_left].mean() < reverse[upper_left].mean() - 30


@pytest.mark.parametrize(
    "epochs",
    [
        [],
        [{}],
        [EPOCH],
        [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "val_loss": 1.0}],
        [EPOCH | {"epoch": None, "val_loss": None}, EPOCH | {"epoch": 2}],
        [EPOCH | {"epoch": k, "train_loss": math.nan, "val_loss": math.inf, "note": "text"} for k in (1, 2)],
        [EPOCH | {"epoch": k} for k in range(1, 60)],
    ],
    ids=["none", "empty", "one epoch", "gaps", "null", "not finite", "many"],
)
def test_training_curves_tolerate_missing_values_and_one_epoch(epochs):
    pictures = plots.training_curves(epochs)
    assert pictures and all(min(size_of(picture)) > 300 for picture in pictures.values())


def test_each_panel_is_a_picture_of_its_own_and_those_without_values_are_left_out():
    for keys, names in ((["train_loss"], ["loss"]), (["train_loss", "lr"], ["loss", "lr"]),
                        (["train_loss", "lr", "val_accuracy"], ["loss", "validation", "lr"])):  # fmt: skip
        pictures = plots.training_curves([{k: EPOCH[k] for k in keys}] * 2)
        assert list(pictures) == [f"curves_{name}" for name in names]
        assert all(size_of(picture)[0] < 700 for picture in pictures.values())  # readable at the width of a phone


def test_numbers_of_numpy_are_numbers_and_equal_input_gives_equal_bytes():
    plain = [{"epoch": k, "train_loss": 1 / k} for k in (1, 2, 4)]
    numpy = [{"epoch": np.int64(epoch["epoch"]), "train_loss": np.float32(epoch["train_loss"])} for epoch in plain]
    assert plots.training_curves(plain) == plots.training_curves(numpy) != plots.training_curves(plain[:2])


def test_threads_can_draw_at_the_same_time(drawn, predictions_of):
    metrics = judge(predictions_of(*drawn(50, 3)), bootstrap=0)
    with ThreadPoolExecutor(2) as pool:
        pictures = list(pool.map(lambda _: plots.coverage(metrics), range(4)))
    assert set(pictures) == {plots.coverage(metrics)}


def test_pyplot_is_never_imported_and_matplotlib_only_where_something_is_drawn():
    code = """
import sys, numpy as np
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.evaluation import metrics, plots, report
assert not any(name.split(".")[0] in ("matplotlib", "jinja2", "sklearn", "torch") for name in sys.modules)
scores = np.float32([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
ours = Predictions(np.arange(3), scores, np.eye(2, dtype=np.float32)[[0, 1, 1]], LabelSpace.single("ab"), ("x",) * 3)
plots.roc(ours, metrics.judge(ours, bootstrap=0))
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_legend_of_the_reliability_picture_names_every_colour_in_it(drawn, predictions_of):
    scores, truth = drawn(300, 3)
    scores[:100] = np.float32([0.9, 0.05, 0.05])  # some bins too sure, others too cautious
    figure = plots._reliability(judge(predictions_of(scores, truth), bootstrap=0))
    top = figure.axes[0]
    bars = {bar.get_facecolor() for bar in top.patches if bar.get_height() > 0}
    legend = figure.legends[0]
    assert bars == {patch.get_facecolor() for patch in legend.get_patches()} and len(bars) == 3
    assert all(color[3] == 1 for color in bars)  # what is drawn over another would have a third colour
    figure.draw_without_rendering()
    assert not legend.get_window_extent().overlaps(top.get_window_extent())


def test_axes_of_accuracy_end_at_one(drawn, predictions_of):
    metrics = judge(predictions_of(*drawn(90, 3, skill=9)), bootstrap=0)
    for figure in (plots._coverage(metrics), plots._reliability(metrics)):
        axes = figure.axes[0]
        figure.draw_without_rendering()
        assert axes.get_ylim()[1] == 1 and max(axes.get_yticks()) <= 1.0001
        assert all(not line.get_clip_on() for line in axes.lines if line.get_linestyle() == "-")


def test_the_axis_of_accuracy_against_latency_ends_at_a_hundred():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    (points,) = axes.plot([1.0, 2.0], [99.0, 100.0], "o")
    scatter.style_axes(axes, "t", [1.0, 2.0])
    assert axes.get_ylim()[1] == 100 and axes.get_ylim()[0] < 99 and not points.get_clip_on()


def test_engines_of_a_run_are_drawn_with_accuracy_and_latency_and_only_where_there_are_two():
    row = {"name": "torch", "precision": "fp32", "latency": {"end_to_end": {"p50_ms": 5.0}},
           "accuracy": {"accuracy": 0.99, "low": 0.97, "high": 1.0, "split": "test"}}  # fmt: skip
    other = row | {"name": "onnx int8", "precision": "int8", "latency": {"end_to_end": {"p50_ms": 2.0}}}
    assert min(size_of(scatter.engines_picture([row, other]) or b"")) > 300
    assert scatter.engines_picture([row, other | {"accuracy": None}]) is None
