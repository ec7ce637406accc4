"""The picture of candidates: everyone is in it, and latencies that cannot be compared are not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from imgcls_fast.exporting.pareto import Candidate, draw, frontier, pareto_plot

CANDIDATES = [
    Candidate("fp32", 0.912, 1.9, "trt", "reference"),
    Candidate("fp16", 0.9118, 0.82, "trt", "pass", 0.9085),
    Candidate("int8", 0.871, 0.41, "trt", "fail", 0.858),
    Candidate("int8, 2 layers in fp16", 0.898, 0.44, "trt", "underpowered", 0.889),
    Candidate("int8, 4 layers in fp16", 0.9052, 0.47, "trt", "pass", 0.9015, chosen=True),
    Candidate("slow int8", 0.9, 0.6, "trt", "pass", 0.897),
    Candidate("on the CPU", 0.9052, 0.3, "onnx", "pass", 0.9015),
    Candidate("bf16 $x$", 0.91, None, "", "pass"),
]


def points(figure):
    """(x, y) of every drawn candidate, and whether its face is white."""
    found = {}
    for line in figure.axes[0].lines:
        if line.get_marker() in "soX^" and line.get_markersize() < 10:
            for x, y in zip(*line.get_data(), strict=True):
                found[float(x), round(float(y), 3)] = to_hex(line.get_markerfacecolor()) == "#ffffff"
    return found


def figure_of(candidates=CANDIDATES, exported_for="trt"):
    return draw(candidates, exported_for=exported_for, batch=1, rows="500 search rows")


def test_only_comparable_candidates_that_may_be_exported_are_on_the_frontier():
    assert [c.name for c in frontier(CANDIDATES, "trt")] == ["int8, 4 layers in fp16", "fp16", "fp32"]
    assert [c.name for c in frontier(CANDIDATES, "onnx")] == ["on the CPU"]
    assert frontier([], "trt") == []
    same = [Candidate(str(k), 0.9, 1.0, "trt", "pass") for k in range(2)]
    assert len(frontier(same, "trt")) == 1


def test_every_timed_candidate_has_a_point_and_a_name_and_the_others_are_listed():
    figure = figure_of()
    axes = figure.axes[0]
    timed = [c for c in CANDIDATES if c.latency_ms is not None]
    assert set(points(figure)) == {(c.latency_ms, round(100 * c.accuracy, 3)) for c in timed}
    assert sorted(text.get_text() for text in axes.texts) == sorted(c.name for c in timed)
    assert "not timed: bf16 \\$x\\$ (91.00 %, passes)" in figure._supxlabel.get_text()
    assert math.isnan(CANDIDATES[-1].point[0])


def test_foreign_latencies_are_hollow_labelled_and_off_the_line():
    figure = figure_of()
    axes = figure.axes[0]
    hollow = {at for at, white in points(figure).items() if white}
    assert hollow == {(0.3, 90.52)}
    (line,) = (line for line in axes.lines if line.get_gid() == "frontier")
    assert list(line.get_xdata()) == [0.47, 0.82, 1.9] and np.allclose(line.get_ydata(), [90.52, 91.18, 91.2])
    labels = axes.get_legend_handles_labels()[1]
    assert {
        "FP32",
        "passes",
        "passes\n(not comparable)",
        "fails",
        "too few rows to tell",
        "frontier",
        "exported",
    } <= set(labels)
    assert "ONNX Runtime, which says nothing about TensorRT" in axes.get_xlabel()
    assert "(ms)" in axes.get_xlabel() and "timed in TensorRT" in axes.get_xlabel() and "(%)" in axes.get_ylabel()


def test_on_a_cpu_no_candidate_of_tensorrt_is_ranked():
    figure = figure_of([Candidate(f"c{k}", 0.9 - k / 100, 1.0 + k, "openvino", "pass") for k in range(3)])
    assert all(points(figure).values()) and not [line for line in figure.axes[0].lines if line.get_gid() == "frontier"]
    assert "timed in TensorRT" not in figure.axes[0].get_xlabel()


def test_names_do_not_cover_each_other():
    crowd = [Candidate(f"int8, {k} layers in fp16", 0.9 + k / 400, 0.4 + k / 100, "trt", "pass") for k in range(6)]
    figure = figure_of(crowd)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shown", [CANDIDATES, CANDIDATES[:1], CANDIDATES[-1:], [], CANDIDATES * 3], ids=len)
def test_the_picture_is_a_png_whatever_is_in_it(shown, tmp_path: Path):
    pareto_plot(shown, tmp_path / "pareto.png", exported_for="trt", rows="500 search rows")
    with Image.open(tmp_path / "pareto.png") as image:
        values = np.asarray(image.convert("RGB"))
        assert image.format == "PNG" and image.width > 800 and (values[0, 0] == 255).all() and values.std() > 1
    assert [path.name for path in tmp_path.iterdir()] == ["pareto.png"]
