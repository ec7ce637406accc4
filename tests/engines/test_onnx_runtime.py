"""ONNX Runtime and OpenVINO: right scores, honest precision, and clear words for files that are not this model's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError, HardwareError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines.base import Engine, dominant, score_in_parts
from imgcls_fast.engines.onnx_runtime import OnnxEngine, cuda_provider, read_graph
from imgcls_fast.engines.openvino_runtime import OpenVinoEngine

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIDE, CLASSES, WIDTH = 12, 3, 16
LABELS = LabelSpace.single(["a", "b", "c"])
PIXELS = Pixels(SIDE, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3)


def onnx_runtime(path: Path, **more: Any) -> OnnxEngine:
    return OnnxEngine(path, LABELS, PIXELS, threads=1, **more)


def openvino(path: Path, **more: Any) -> OpenVinoEngine:
    pytest.importorskip("openvino")
    return OpenVinoEngine(path, LABELS, PIXELS, threads=1, **more)


BOTH = pytest.mark.parametrize("open_file", [onnx_runtime, openvino], ids=["onnx", "openvino"])


def write_graph(
    path: Path, *, quantized: str = "", batch: int | str = "batch", names: tuple[str, str] = ("pixels", "scores"),
    side: int = SIDE, classes: int = CLASSES, dtype: str = "UINT8", relu: bool = True,
) -> Path:  # fmt: skip
    """Four convolutions and a softmax, made by hand; `quantized` is the type of the scales of explicit Q/DQ, fp16 or fp32.

    Without `relu` a convolution stands between Q/DQ pairs, as ONNX Runtime wants it; TensorRT wants no pair before a ReLU.
    """
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    half = quantized == "fp16"
    kind, proto = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    pixels, scores = names
    constants = {"scale": np.float32(1 / 64), "sharp": np.float32(1)}
    nodes = [
        helper.make_node("Cast", [pixels], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["planes", "scale"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["x"], to=proto),
    ]
    x, channels = "x", 3
    for k, width in enumerate((WIDTH, WIDTH, WIDTH, classes)):
        weight = draw.normal(size=(width, channels, 3, 3)) / np.sqrt(4 * channels)
        constants[f"bias{k}"] = (draw.normal(size=width) / 8).astype(kind)
        weight_name, in_name = f"weight{k}", x
        if quantized:
            step = np.abs(weight).max((1, 2, 3)) / 127
            constants[f"weight{k}_q"] = np.round(weight / step[:, None, None, None]).astype(np.int8)
            constants |= {f"step{k}": step.astype(kind), f"zeros{k}": np.zeros(width, np.int8)}
            constants |= {f"range{k}": kind(6 / 127), f"zero{k}": np.int8(0)}
            in_name = f"in{k}"
            nodes += [
                helper.make_node("DequantizeLinear", [f"weight{k}_q", f"step{k}", f"zeros{k}"], [weight_name], axis=0),
                helper.make_node("QuantizeLinear", [x, f"range{k}", f"zero{k}"], [f"codes{k}"]),
                helper.make_node("DequantizeLinear", [f"codes{k}", f"range{k}", f"zero{k}"], [in_name]),
            ]
        else:
            constants[weight_name] = weight.astype(kind)
        last = k == 3
        nodes.append(helper.make_node("Conv", [in_name, weight_name, f"bias{k}"], [f"conv{k}"], pads=[1] * 4))
        nodes += [] if last or not relu else [helper.make_node("Relu", [f"conv{k}"], [f"relu{k}"])]
        x, channels = f"conv{k}" if last or not relu else f"relu{k}", width
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
        helper.make_node("Cast", ["logits"], ["long"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["long", "sharp"], ["sharper"]),
        helper.make_node("Softmax", ["sharper"], [scores], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(pixels, getattr(TensorProto, dtype), [batch, side, side, 3])],
        [helper.make_tensor_value_info(scores, TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def images(n: int) -> np.ndarray:
    """Blocks of different brightness: noise alone would give all images the same scores."""
    draw = np.random.default_rng(1)
    return draw.integers(0, 256, (n, 1, 1, 3)).astype(np.float32).repeat(SIDE, 1).repeat(SIDE, 2).astype(
        np.uint8
    ) // 2 + draw.integers(0, 128, (n, SIDE, SIDE, 3), np.uint8)


def truth(path: Path, pixels: np.ndarray) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    scores: np.ndarray = ReferenceEvaluator(str(path)).run(["scores"], {"pixels": pixels})[0]
    assert np.ptp(scores, 0).max() > 0.1, "the images all get the same scores"
    return scores


@BOTH
def test_scores_are_those_of_the_graph_at_any_batch_size(open_file: Callable[..., Engine], tmp_path: Path) -> None:
    path = write_graph(tmp_path / "m.onnx")
    engine, x = open_file(path, max_batch=4), images(9)
    expected = truth(path, x)
    assert isinstance(engine, Engine)
    for n in (1, 3, 4, 9):
        found = engine.scores(x[:n])
        assert (found.shape, found.dtype) == ((n, CLASSES), np.float32)
        np.testing.assert_allclose(found, expected[:n], atol=2e-5)
    assert engine.scores(x[:0]).shape == (0, CLASSES)
    assert engine.precision == "fp32"
    engine.warmup(2)


@BOTH
def test_a_fixed_batch_is_padded_and_split_without_anybody_noticing(
    open_file: Callable[..., Any], tmp_path: Path
) -> None:
    engine, x = open_file(write_graph(tmp_path / "fixed.onnx", batch=4)), images(9)
    expected = truth(write_graph(tmp_path / "free.onnx"), x)
    assert engine.max_batch == 4
    for n in (1, 4, 9):
        np.testing.assert_allclose(engine.scores(x[:n]), expected[:n], atol=2e-5)
    with pytest.raises(ValueError, match="batches of 4, got 3"):
        engine.bind(3)
    assert engine.bind(4).output.shape == (4, CLASSES)


@BOTH
def test_bound_buffers_stay_where_they_are_and_follow_their_input(
    open_file: Callable[..., Any], tmp_path: Path
) -> None:
    engine, x = open_file(write_graph(tmp_path / "m.onnx")), images(6)
    bound = engine.bind(3)
    place = bound.output
    for part in (x[:3], x[3:]):
        np.copyto(bound.input, part)
        bound.replay()
        bound.wait()
        np.testing.assert_allclose(place, engine.scores(part), atol=1e-6)


@BOTH
def test_answers_are_the_callers_own(open_file: Callable[..., Engine], tmp_path: Path) -> None:
    """A runtime that hands out its buffer would change an answer at the next call."""
    engine, x = open_file(write_graph(tmp_path / "m.onnx")), images(8)
    first = engine.scores(x[:4])
    kept = first.copy()
    engine.scores(x[4:])
    np.testing.assert_array_equal(first, kept)


@BOTH
def test_threads_do_not_mix_their_answers(open_file: Callable[..., Engine], tmp_path: Path) -> None:
    engine, x = open_file(write_graph(tmp_path / "m.onnx")), images(64)
    assert engine.thread_safe
    expected = engine.scores(x)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: engine.scores(x[k : k + 1]), list(range(64)) * 3))
    np.testing.assert_allclose(np.concatenate(found), np.tile(expected, (3, 1)), atol=1e-5)


@BOTH
def test_a_closed_engine_says_so(open_file: Callable[..., Any], tmp_path: Path) -> None:
    engine = open_file(write_graph(tmp_path / "m.onnx"))
    engine.close()
    engine.close()
    for call in (lambda: engine.scores(images(1)), lambda: engine.warmup(1), lambda: engine.bind(1)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# ---- precision ----


@pytest.mark.parametrize("scales", ["fp32", "fp16"])
def test_openvino_runs_an_int8_file_in_int8_and_says_so(scales: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "q.onnx", quantized=scales)
    engine, x = openvino(path), images(8)
    assert engine.precision == "int8"
    assert engine.facts()["operators"]["int8"] >= 3
    np.testing.assert_allclose(engine.scores(x), truth(path, x), atol=0.05)


def test_onnx_runtime_fuses_q_dq_with_fp32_scales_and_not_with_fp16_scales(tmp_path: Path) -> None:
    """With FP16 scales its fused operators lose half of the signal of ResNet-18 on a CPU, so they are switched off there."""
    x = images(8)
    for scales, precision, disabled in (("fp32", "int8", False), ("fp16", "fp32", True)):
        path = write_graph(tmp_path / f"{scales}.onnx", quantized=scales, relu=False)
        engine = onnx_runtime(path)
        assert (engine.precision, engine.facts()["disable_quant_qdq"]) == (precision, disabled)
        assert read_graph(path).fp16_quantized == disabled
        np.testing.assert_allclose(engine.scores(x), truth(path, x), atol=0.05)


def test_openvino_computes_float32_unless_it_is_told_to_round(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "m.onnx")
    exact, rounded = openvino(path), openvino(path, compute="bf16")
    assert (exact.precision, exact.facts()["hint"]) == ("fp32", "f32")
    import openvino as ov

    can = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert rounded.precision == ("bf16" if can else "fp32")
    assert set(rounded.facts()["operators"]) <= {"bf16", "fp32"}


def test_the_facts_name_providers_and_threads(tmp_path: Path) -> None:
    facts = onnx_runtime(write_graph(tmp_path / "m.onnx")).facts()
    assert set(facts["providers"]) == {"CPUExecutionProvider"}
    assert facts["operators"] == {"fp32": 4}
    assert facts["threads"] == 1


def test_the_precision_of_most_operators_wins_and_the_wider_of_equals() -> None:
    assert dominant(Counter({"int8": 53, "fp32": 1})) == "int8"
    assert dominant(Counter({"int8": 2, "fp32": 2})) == "fp32"
    assert dominant(Counter({"fp16": 2, "tf32": 2})) == "tf32"
    assert dominant(Counter({"odd": 1})) == "odd"
    assert dominant(Counter()) == "fp32"


# ---- files that are not this model's ----


def spoiled(how: str, folder: Path) -> Path:
    path = folder / "m.onnx"
    if how == "missing":
        return path
    shapes: dict[str, dict[str, Any]] = {
        "input name": {"names": ("input", "scores")}, "output name": {"names": ("pixels", "probabilities")},
        "side": {"side": 16}, "classes": {"classes": 4}, "type": {"dtype": "FLOAT"},
    }  # fmt: skip
    write_graph(path, **shapes.get(how, {}))
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "weights elsewhere":
        (folder / "other").mkdir()
        onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
        (folder / "w.bin").rename(folder / "other" / "w.bin")
    return path


@BOTH
@pytest.mark.parametrize(
    "how", ["missing", "cut", "noise", "empty", "weights elsewhere", "input name", "output name", "side", "classes", "type"]
)  # fmt: skip
def test_a_file_of_another_model_or_a_damaged_one_is_e005(
    how: str, open_file: Callable[..., Engine], tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as refused:
        open_file(spoiled(how, tmp_path))
    error = refused.value
    assert error.code == "E005"
    assert "m.onnx" in error.message
    assert error.try_.startswith("imgcls-fast export")
    if how in ("side", "classes"):
        assert "expected" in error.why
        assert "found" in error.why


def test_a_gpu_without_onnx_runtimes_cuda_part_is_h004(tmp_path: Path) -> None:
    if cuda_provider():
        pytest.skip("this ONNX Runtime has its CUDA provider")
    with pytest.raises(HardwareError) as refused:
        onnx_runtime(write_graph(tmp_path / "m.onnx"), device="cuda")
    assert (refused.value.code, refused.value.try_) == ("H004", "pip install onnxruntime-gpu")


@pytest.mark.gpu
def test_onnx_runtime_on_a_gpu_agrees_with_the_graph(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available() or not cuda_provider():
        pytest.skip("needs a CUDA device and onnxruntime-gpu")
    path = write_graph(tmp_path / "m.onnx")
    engine, x = onnx_runtime(path, device="cuda"), images(5)
    np.testing.assert_allclose(engine.scores(x), truth(path, x), atol=1e-4)
    bound = engine.bind(5)
    bound.input.copy_(torch.from_numpy(x))
    torch.cuda.synchronize()
    bound.replay()
    bound.wait()
    np.testing.assert_allclose(bound.output.cpu().numpy(), truth(path, x), atol=1e-4)


# ---- manners ----

_LISTEN = """
import socket, sys
spoken = []
socket.socket.connect = lambda self, address: spoken.append(address) or (_ for _ in ()).throw(OSError("offline"))
{importing}
print(sorted(name for name in sys.modules if name.startswith("openvino_telemetry")), spoken)
"""


def test_openvino_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    found = {}
    for name, importing in (
        ("ours", "from imgcls_fast.engines.openvino_runtime import quiet_openvino; quiet_openvino().Core()"),
        ("plain", "import openvino"),
    ):
        home = tmp_path / name
        home.mkdir()
        (home / "intel").mkdir()
        (home / "intel" / "openvino_telemetry").write_text("0")  # declined: this test sends nothing either
        environment = {**os.environ, "HOME": str(home)}
        code = _LISTEN.format(importing=importing)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout.strip().splitlines()[-1]
    assert found["ours"] == "[] []"
    if "openvino_telemetry" not in found["plain"]:
        pytest.skip("this OpenVINO does not load its telemetry by itself")


def test_parts_are_padded_only_where_the_batch_is_fixed() -> None:
    seen: list[int] = []

    def score(part: np.ndarray) -> np.ndarray:
        seen.append(len(part))
        return part.reshape(len(part), -1)[:, :2].astype(np.float32)

    x = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    for fixed, sizes in ((False, [3, 3, 1]), (True, [3, 3, 3])):
        seen.clear()
        found = score_in_parts(score, x, 3, 2, fixed=fixed)
        np.testing.assert_array_equal(found, x.reshape(7, -1)[:, :2])
        assert seen == sizes


_SIGNALLED = """
import faulthandler, signal, subprocess, sys
from pathlib import Path
faulthandler.enable()  # with a signal stack of its own, as pytest has
signal.signal(signal.SIGCHLD, lambda *_: None)  # as a loader of torch has
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines.openvino_runtime import OpenVinoEngine
labels, pixels = LabelSpace.single(["a", "b", "c"]), Pixels(*eval(sys.argv[2]))
first = OpenVinoEngine(Path(sys.argv[1]), labels, pixels)
second = OpenVinoEngine(Path(sys.argv[1]), labels, pixels)
for engine in (first, second):
    engine.warmup(1)
    engine.close()
del first, second, engine
subprocess.run([sys.executable, "-c", "pass"], check=True)
print("alive")
"""


def test_a_process_outlives_its_openvino_engines_when_a_signal_comes(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = write_graph(tmp_path / "m.onnx")
    spec = (PIXELS.size, PIXELS.crop_pct, PIXELS.interpolation, PIXELS.color, PIXELS.exif, PIXELS.mean, PIXELS.std)
    words = [sys.executable, "-c", _SIGNALLED, str(path), repr(spec)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
