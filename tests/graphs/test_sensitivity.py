"""The layers that INT8 harms: measured against the formula, found where one was planted, and rescued by few in FP16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

from imgcls_fast.graphs import quantize
from imgcls_fast.graphs.half import session
from imgcls_fast.graphs.lint import lint
from imgcls_fast.graphs.qdq import View
from imgcls_fast.graphs.sensitivity import layer_sqnr, rescue

QUANTIZERS = [pytest.param("modelopt", marks=pytest.mark.slow), "onnxruntime"]  # ModelOpt takes four seconds


@dataclass(frozen=True)
class Verdict:
    """As the gate answers."""

    verdict: str


# ---- SQNR ----


def test_the_figure_is_the_one_of_the_formula(onnx_of: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 20), torch.nn.ReLU(), torch.nn.Linear(20, 16))
    source, out = onnx_of(net, tmp_path / "fp32.onnx", size=4), tmp_path / "int8.onnx"
    images = np.random.default_rng(0).integers(0, 255, (40, 4, 4, 3), np.uint8)
    quantize.quantize(source, out, images, quantizer="onnxruntime")
    view = View(onnx.load(str(out)))
    scales = {
        node.name: [view.array(pair.scale).astype(np.float32) for pair in operands if pair]
        for node, operands in view.layers()
    }

    def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(x / scale), -128, 127) * scale

    x = np.moveaxis(images.astype(np.float32), 3, 1).reshape(40, -1) / 64 - 2
    expected = {}
    for name, layer in (("node_linear", net[1]), ("node_linear_1", net[3])):
        weight, bias = (tensor.detach().numpy() for tensor in (layer.weight, layer.bias))
        y = x @ weight.T + bias
        noisy = rounded(x, scales[name][0]) @ rounded(weight, scales[name][1][:, None]).T + bias
        expected[name] = 10 * np.log10((y**2).sum() / ((y - noisy) ** 2).sum())
        x = np.maximum(y, 0)  # the next layer gets the float32 activations
    found = layer_sqnr(source, out, images)
    assert [value for _, value in found] == sorted(value for _, value in found)
    assert dict(found) == pytest.approx(expected, abs=0.05)


def test_files_of_two_networks_are_told_apart(onnx_of: Callable[..., Path], trained: Any, tmp_path: Path) -> None:
    import torch

    other = onnx_of(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Flatten()), tmp_path / "other.onnx")
    quantize.quantize(trained.plain, tmp_path / "int8.onnx", trained.calibration[:8], quantizer="onnxruntime")
    with pytest.raises(ExportError) as refused:
        layer_sqnr(other, tmp_path / "int8.onnx", trained.calibration[:8])
    assert refused.value.code == "E003"


# ---- the search ----


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_channel_of_a_thousand_fold_is_rescued_with_few_layers_in_fp16(
    quantizer: Any, trained: Any, tmp_path: Path
) -> None:
    if quantizer == "modelopt":
        pytest.importorskip("modelopt")
    exact = trained.accuracy(trained.planted)
    assert (trained.scores(trained.planted).argmax(1) == trained.scores(trained.plain).argmax(1)).all()
    plain = tmp_path / "plain.onnx"
    facts = quantize.quantize(trained.planted, plain, trained.calibration, quantizer=quantizer)
    assert trained.accuracy(plain) < exact - 0.3, "plain INT8 shall fail"
    ranked = layer_sqnr(trained.planted, plain, trained.calibration)
    assert ranked[0][0] == trained.layer and ranked[0][1] < 3 and ranked[1][1] > 20

    def make(layers: Sequence[str]) -> Path:
        out = tmp_path / f"{len(layers)}.onnx"
        quantize.quantize(trained.planted, out, trained.calibration, quantizer=quantizer, exclude=layers)
        return out

    def passes(path: Path) -> Verdict:
        return Verdict("pass" if trained.accuracy(path) >= exact - 0.01 else "fail")

    found = rescue(ranked, make, passes, budget_s=300)
    assert found.chosen is not None and found.ended == "found"
    assert found.chosen.layers == (trained.layer,) and len(found.chosen.layers) <= 0.2 * len(facts["int8_layers"])
    assert [candidate.layers for candidate in found.history] == [(trained.layer,)]
    assert lint(found.chosen.path, "int8") == []
    view = View(onnx.load(str(found.chosen.path)))
    assert set(facts["int8_layers"]) - set(view.int8_layers()) == {trained.layer}


@pytest.mark.slow
def test_a_tensor_that_is_pooled_and_added_is_freed_everywhere(onnx_of: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("modelopt")  # the one that quantises poolings and additions
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.stem(x).relu())
            return self.head((x + self.body(x)).relu()).mean((2, 3))

    source, out = onnx_of(Block(), tmp_path / "fp32.onnx", size=16), tmp_path / "int8.onnx"
    images = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), np.uint8)
    facts = quantize.quantize(source, out, images, quantizer="modelopt", exclude=["node_conv2d_1"])
    assert lint(out, "int8") == [] and "node_conv2d_1" in facts["freed"]
    view = View(onnx.load(str(out)))
    nodes = {node.op_type: node for node in view.nodes}
    body = next(node for node in view.nodes if node.name == "node_conv2d_1")
    for node in (nodes["MaxPool"], nodes["Add"], body):
        assert not any(view.quantized(name) for name in node.input), node.name
    (exact, found) = (session(path).run(None, {"pixels": images})[0] for path in (source, out))
    np.testing.assert_allclose(found, exact, atol=0.02)


RANKED = [(f"layer{k}", float(k)) for k in range(40)]


def search(enough: int, **options: Any) -> tuple[Any, list[int]]:
    """A search over forty layers of which the worst `enough` have to be in FP16; a candidate takes ten seconds."""
    now, counts = [0.0], list[int]()

    def make(layers: Sequence[str]) -> Path:
        assert list(layers) == [name for name, _ in RANKED[: len(layers)]]
        counts.append(len(layers))
        now[0] += 10
        return Path(f"{len(layers)}.onnx")

    def passes(path: Path) -> Verdict:
        return Verdict("pass" if int(path.stem) >= enough else "underpowered")

    return rescue(RANKED, make, passes, **{"budget_s": 1000, "share": 0.5, "clock": lambda: now[0]} | options), counts


@pytest.mark.parametrize(
    ("enough", "tried"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 4, 3]), (7, [1, 2, 4, 8, 6, 7]), (20, [1, 2, 4, 8, 16, 20, 18, 19])],
)
def test_the_search_doubles_and_then_bisects_to_the_fewest_layers(enough: int, tried: list[int]) -> None:
    found, counts = search(enough)
    assert counts == tried
    assert found.chosen is not None and len(found.chosen.layers) == enough and found.ended == "found"
    assert [len(candidate.layers) for candidate in found.history] == tried
    assert all(candidate.seconds == 10 for candidate in found.history)


def test_the_search_ends_at_its_share_with_nothing() -> None:
    found, counts = search(21)
    assert found.chosen is None and found.ended == "share" and counts == [1, 2, 4, 8, 16, 20]
    found, counts = search(2, share=0.001)
    assert found.chosen is None and counts == [1], "one layer is always allowed"
    assert rescue([], lambda layers: Path(), lambda path: Verdict("pass"), budget_s=9).chosen is None


def test_the_search_begins_nothing_that_it_has_no_time_for() -> None:
    found, counts = search(20, budget_s=35)
    assert found.chosen is None and found.ended == "time" and counts == [1, 2, 4]
    found, counts = search(6, budget_s=45)
    assert counts == [1, 2, 4, 8] and found.ended == "time"
    assert found.chosen is not None and len(found.chosen.layers) == 8, "what has passed is kept"
    assert search(1, budget_s=0)[1] == []
