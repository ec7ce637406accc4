"""Running TensorRT plans, with doubles that are as strict as the declared API; on a GPU, running them really.

The doubles compute the network by ONNX Runtime when a stream is waited for, from the memory that was bound, so that wrong
padding, a buffer that was read too early or a graph of another size give wrong numbers.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError, HardwareError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines import trt_plan, trt_runtime
from imgcls_fast.engines.base import Engine
from imgcls_fast.engines.trt_plan import CudaDevice
from imgcls_fast.engines.trt_runtime import TrtEngine
from imgcls_fast.exporting.trt_engine import TrtOptions, build_plan


def _doubles() -> ModuleType:
    name = "trt_doubles"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "trt" / "doubles.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


doubles = _doubles()
LABELS = LabelSpace.single(["a", "b", "c"])
PIXELS = Pixels(4, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3)
BUNDLE = "b" * 64


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = doubles.World()
    with doubles.installed(made, monkeypatch):
        yield made


class Made:
    """A plan with its sidecar, as `export --trt` leaves them."""

    def __init__(self, folder: Path, options: TrtOptions | None = None, **network: Any) -> None:
        self.onnx = doubles.tiny_onnx(folder / "model.onnx", **network)
        self.plan = folder / "run" / "exports" / "trt-fp16-01234567" / "model.plan"
        self.plan.parent.mkdir(parents=True)
        facts = build_plan(self.onnx, self.plan, options or TrtOptions(batches=(1, 4, 8)))
        self.meta: dict[str, Any] = {
            "target": "trt", "precision": "fp16", "file": "model.plan", "bundle": BUNDLE, "classes": list(LABELS.classes), **facts,
        }  # fmt: skip

    def open(self, **given: Any) -> TrtEngine:
        return TrtEngine(self.plan, self.meta, LABELS, PIXELS, **given)

    def right(self, pixels: np.ndarray) -> np.ndarray:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(self.onnx), providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(["scores"], {"pixels": part[None]})[0] for part in pixels])


@pytest.fixture
def made(world: Any, tmp_path: Path) -> Made:
    found = Made(tmp_path)
    world.calls.clear()
    return found


def images(n: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.random((n, 1, 1, 1)) * draw.random((n, 4, 4, 3)) * 255).astype(np.uint8)


def foreign(made: Made, said: str, **given: Any) -> ExportError:
    with pytest.raises(ExportError) as caught:
        made.open(**given)
    assert caught.value.code == "E005"
    assert said in caught.value.message, caught.value.message
    assert caught.value.try_ == f"imgcls-fast export {made.plan.parents[2]} --trt"
    return caught.value


# ---------------------------------------------------------------- scores


def test_it_keeps_the_engine_protocol(made: Made) -> None:
    engine = made.open()
    assert isinstance(engine, Engine)
    assert (engine.runtime, engine.thread_safe, engine.max_batch, engine.precision) == ("trt", True, 8, "fp16")
    assert engine.thresholds is None
    least = [0.25] * LABELS.size
    assert made.open(thresholds=least).thresholds.tolist() == least  # type: ignore[union-attr]
    assert engine.facts()["layers"]["count"] == 1


@pytest.mark.parametrize("n", [0, 1, 3, 8, 9, 20])
@pytest.mark.parametrize("network", [{}, {"batch": 8}, {"batch": 1}], ids=str)
def test_any_number_of_images_gets_the_scores_of_onnx_runtime(
    world: Any, tmp_path: Path, n: int, network: dict[str, int]
) -> None:
    made = Made(tmp_path, **network)
    engine, pixels = made.open(), images(n)
    for _ in range(4):  # plainly, captured, replayed, replayed
        scores = engine.scores(pixels)
        assert scores.shape == (n, 3) and scores.dtype == np.float32
        if n and network.get("batch") != 8:
            np.testing.assert_allclose(scores, made.right(pixels), atol=1e-6)
        elif n:
            np.testing.assert_allclose(scores, doubles.tiny_scores(pixels, weights_of(made)), atol=1e-6)


def weights_of(made: Made) -> np.ndarray:
    found: np.ndarray = doubles.weights_of(made.onnx)
    return found


def test_batches_of_different_sizes_in_turn_do_not_disturb_each_other(made: Made) -> None:
    engine = made.open()
    for turn, n in enumerate([8, 3, 8, 1, 3, 8, 1, 1, 3, 5, 8]):
        pixels = images(n, turn)
        np.testing.assert_allclose(engine.scores(pixels), made.right(pixels), atol=1e-6)


def test_what_was_given_out_is_not_changed_by_the_next_batch(made: Made) -> None:
    engine = made.open()
    first = engine.scores(images(4, 1))
    kept = first.copy()
    engine.scores(images(4, 2))
    np.testing.assert_array_equal(first, kept)


def test_a_batch_below_the_smallest_of_the_profile_is_padded(world: Any, tmp_path: Path) -> None:
    made = Made(tmp_path, TrtOptions(batches=(4, 4, 8)))
    engine, pixels = made.open(), images(2)
    np.testing.assert_allclose(engine.scores(pixels), made.right(pixels), atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 5, 5, 3), np.uint8)],
    ids=str,
)
def test_pixels_of_another_shape_or_type_are_refused(made: Made, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(N, 4, 4, 3\), got"):
        made.open().scores(wrong)


# ---------------------------------------------------------------- graphs


def test_each_size_runs_plainly_once_and_then_from_a_graph_of_its_own(world: Any, made: Made) -> None:
    engine = made.open()
    for _ in range(5):
        engine.scores(images(4))
        engine.scores(images(7))
    assert (world.plain, world.graphs) == (2, 2)
    assert world.calls.count("replay") == 8
    assert world.calls.count("create_execution_context") == 2  # a graph is tied to its context


def test_the_last_part_of_one_long_list_costs_no_capture(world: Any, made: Made) -> None:
    made.open().scores(images(19))
    assert world.graphs == 1  # of the full batches; 3 came once


def test_warming_up_makes_the_graphs_of_every_stream(world: Any, made: Made) -> None:
    engine = made.open(streams=3)
    engine.warmup(5)
    assert (world.graphs, world.plain) == (3, 3)
    engine.scores(images(5))
    assert (world.graphs, world.plain) == (3, 3)


def test_graphs_are_bounded_and_the_oldest_goes_first(world: Any, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_runtime, "_SIZES", 2)
    engine = made.open()
    for n in (1, 2, 1, 2, 1, 3, 3):
        pixels = images(n, n)
        np.testing.assert_allclose(engine.scores(pixels), made.right(pixels), atol=1e-6)
    assert world.graphs == 3
    assert world.freed[-2:] == ["graph", "context"]  # of size 2, in this order
    engine.scores(images(1))
    assert world.graphs == 3  # size 1 was used after size 2, and is still there


def test_a_network_that_cannot_be_captured_runs_plainly_and_says_so(world: Any, made: Made) -> None:
    world.refuse = {"capture"}
    engine = made.open()
    for turn in range(4):
        pixels = images(4, turn)
        np.testing.assert_allclose(engine.scores(pixels), made.right(pixels), atol=1e-6)
    assert world.calls.count("capture") == 1
    assert engine.facts()["cuda_graphs"].startswith("none: operation not permitted")


def test_nothing_runs_on_the_default_stream_and_nothing_is_allocated_on_the_way(world: Any, made: Made) -> None:
    engine = made.open()
    engine.warmup(4)
    world.refuse = {"memory"}  # any further allocation would raise
    engine.scores(images(4))
    assert 0 not in world.streams


# ---------------------------------------------------------------- many threads


@pytest.mark.parametrize("streams", [1, 3])
def test_many_threads_get_their_own_answers(made: Made, streams: int) -> None:
    engine = made.open(streams=streams)
    batches = [images(1 + k % 8, k) for k in range(40)]
    right = [doubles.tiny_scores(pixels, weights_of(made)) for pixels in batches]
    with ThreadPoolExecutor(6) as pool:
        for found, wanted in zip(pool.map(engine.scores, batches), right, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    engine.close()


def test_warming_up_while_others_ask_does_not_lock_up(made: Made) -> None:
    engine = made.open(streams=2)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(engine.scores, images(1 + k % 8)) for k in range(30)]
        warmed = [pool.submit(engine.warmup, 1 + k) for k in range(4)]
        for done in (*asked, *warmed):
            done.result(timeout=60)


# ---------------------------------------------------------------- bind


@pytest.mark.parametrize(("batch", "network"), [(1, {}), (5, {}), (8, {}), (3, {"batch": 8})], ids=str)
def test_a_bound_batch_is_replayed_from_its_own_buffers(
    world: Any, tmp_path: Path, batch: int, network: dict[str, int]
) -> None:
    import torch

    made = Made(tmp_path, **network)
    engine = made.open()
    bound = engine.bind(batch)
    assert world.graphs == 1
    assert tuple(bound.input.shape) == (batch, 4, 4, 3) and tuple(bound.output.shape) == (batch, 3)
    for turn in range(3):
        pixels = images(batch, turn)
        bound.input.copy_(torch.from_numpy(pixels))
        engine.scores(images(8, 99))  # does not touch them
        bound.replay()
        bound.wait()
        np.testing.assert_allclose(bound.output.numpy(), doubles.tiny_scores(pixels, weights_of(made)), atol=1e-6)
    assert world.calls.count("follow") == 3  # the caller's copy comes first


def test_replay_returns_before_anything_is_done(world: Any, made: Made) -> None:
    bound = made.open().bind(4)
    before = bound.output.clone()
    bound.input.fill_(200)
    bound.replay()
    assert (bound.output == before).all()
    bound.wait()
    assert not (bound.output == before).all()


@pytest.mark.parametrize("batch", [0, 9])
def test_a_batch_that_the_plan_does_not_take_cannot_be_bound(made: Made, batch: int) -> None:
    with pytest.raises(ValueError, match=r"batch must be in 1\.\.8"):
        made.open().bind(batch)


# ---------------------------------------------------------------- closing


def test_closing_frees_graphs_contexts_and_engine_in_this_order(world: Any, made: Made) -> None:
    engine = made.open(streams=2)
    engine.warmup(4)
    bound = engine.bind(4)
    world.freed.clear()
    engine.close()
    assert world.freed == ["graph", "context"] * 3 + ["engine"]
    with pytest.raises(RuntimeError, match="closed"):
        bound.replay()
    engine.close()  # twice is once


def test_a_closed_engine_says_so(made: Made) -> None:
    engine = made.open()
    engine.close()
    for ask in (lambda: engine.scores(images(1)), lambda: engine.warmup(1), lambda: engine.bind(1), engine.facts):
        with pytest.raises(RuntimeError, match="closed"):
            ask()


def test_closing_waits_for_those_who_are_being_served(made: Made) -> None:
    engine = made.open()
    lane = engine._take()
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    engine._pool.put(lane)
    closing.join(10)
    assert not closing.is_alive()


def test_a_bound_that_nobody_keeps_frees_its_memory(world: Any, made: Made) -> None:
    engine = made.open()
    world.freed.clear()
    engine.bind(4)
    assert sorted(world.freed) == ["context", "graph"]
    engine.close()


# ---------------------------------------------------------------- plans that do not belong here


def test_a_plan_whose_bytes_are_not_those_of_the_sidecar_is_never_deserialised(world: Any, made: Made) -> None:
    data = made.plan.read_bytes()
    for damage in (data[:-10], data[:5] + b"X" + data[6:], b"", b"garbage"):
        made.plan.write_bytes(damage)
        foreign(made, f"damaged: its {len(damage)} bytes")
    made.plan.unlink()
    foreign(made, "cannot be read: No such file")
    assert "deserialize_cuda_engine" not in world.calls


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bundle": "c" * 64}, "made from bundle cccccccc, not from bbbbbbbb"),
        ({"classes": ["a", "b"]}, "scores 2 classes, and the model has 3"),
        ({"classes": ["a", "c", "b"]}, "under other names or in another order"),
        ({"tensorrt": "10.13.3.9"}, "built by TensorRT 10.13.3.9, and this is 10.16.1.11 (it is not version compatible)"),
        ({"tensorrt": ""}, "names no TensorRT version"),
        ({"platform": "windows-amd64"}, "built on windows-amd64"),
        ({"gpu": "NVIDIA L4", "compute_capability": [8, 9]}, "built for NVIDIA L4 (compute capability 8.9, hardware 'this')"),
        ({"gpu": "NVIDIA H200"}, "and this is NVIDIA H100 80GB HBM3 (9.0)"),
        ({"hardware": "same-cc", "compute_capability": [8, 9]}, "hardware 'same-cc'"),
        ({"hardware": "ampere+", "compute_capability": [7, 5]}, "hardware 'ampere+'"),
        ({"hardware": "any"}, "hardware 'any'"),
        ({"gpu": None, "compute_capability": None}, "compute capability unknown"),
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_of_another_machine_or_model_is_refused_before_it_is_deserialised(
    world: Any, made: Made, change: dict[str, Any], said: str
) -> None:
    made.meta |= change
    foreign(made, said, bundle=BUNDLE)
    assert "deserialize_cuda_engine" not in world.calls


@pytest.mark.parametrize(
    ("built", "running", "runs"),
    [
        ("10.13.3.9", "10.16.1.11", True), ("10.13.3.9", "11.4.0.106", True), ("11.0.0.114", "11.4.0.106", True),
        ("10.16.1.11", "10.13.3.9", False), ("11.0.0.114", "10.16.1.11", False), ("9.3.0.1", "10.16.1.11", False),
        ("10.16.1.11", "12.0.0.1", False),
    ],
)  # fmt: skip
def test_version_compatible_plans_run_on_later_versions_as_the_support_matrix_says(
    world: Any, made: Made, built: str, running: str, runs: bool
) -> None:
    made.meta |= {"tensorrt": built, "version_compatible": True}
    sys.modules["tensorrt"].__version__ = running  # type: ignore[attr-defined]
    if runs:
        made.open()
        assert world.config["host_code"] is True  # the lean runtime of its version is inside the plan
    else:
        foreign(made, f"which TensorRT {running} does not run")


def test_the_same_version_needs_no_compatibility_and_host_code_stays_forbidden(world: Any, made: Made) -> None:
    world.version = made.meta["tensorrt"] = "10.16.1.11.post1"
    made.open()
    assert world.config["host_code"] is False


@pytest.mark.parametrize(
    ("hardware", "gpu", "capability"),
    [("same-cc", "NVIDIA H200", (9, 0)), ("ampere+", "NVIDIA L4", (8, 9)), ("ampere+", "NVIDIA B200", (10, 0))],
)
def test_a_plan_for_more_gpus_runs_on_them(
    world: Any, made: Made, hardware: str, gpu: str, capability: tuple[int, int]
) -> None:
    made.meta["hardware"] = hardware
    world.gpu, world.capability = gpu, capability
    made.open()


def test_a_plan_that_tensorrt_does_not_load_is_e005_with_its_words(world: Any, made: Made) -> None:
    world.refuse = {"deserialize_cuda_engine"}
    assert "magicTag mismatch" in foreign(made, "refused to load it").why


def test_a_plan_of_another_network_is_found_after_loading_although_the_sidecar_agrees(
    world: Any, made: Made, tmp_path: Path
) -> None:
    other = Made(tmp_path / "classes", classes=5)
    foreign(other, "it makes 5 scores of images (4, 4, 3), and the model makes 3 of (4, 4, 3)")
    other = Made(tmp_path / "side", side=6)
    foreign(other, "images (6, 6, 3)")


# ---------------------------------------------------------------- every call that TensorRT can refuse


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("create_execution_context", "refused to make an execution context"),
        ("set_input_shape", "refused the input shape (4, 4, 4, 3)"),
        ("infer_shapes", "refused to infer shapes: pixels not known"),
        ("get_tensor_shape", "refused the output shape (4, 3): it gives (5, 3)"),
        ("set_tensor_address", "refused the address of pixels"),
        ("execute_async_v3", "refused to enqueue a batch"),
    ],
)  # fmt: skip
def test_every_false_and_none_is_an_error_and_the_stream_can_be_used_again(
    world: Any, made: Made, call: str, said: str
) -> None:
    engine = made.open()
    world.refuse = {call}
    with pytest.raises(ExportError) as caught:
        engine.scores(images(4))
    assert caught.value.code == "E005" and said in caught.value.message
    if call in ("set_input_shape", "execute_async_v3"):
        assert "IExecutionContext::" in caught.value.why
    world.refuse = set()
    np.testing.assert_allclose(engine.scores(images(4)), made.right(images(4)), atol=1e-6)


def test_too_little_memory_is_h002(world: Any, made: Made) -> None:
    world.refuse = {"memory"}
    with pytest.raises(HardwareError, match=r"has not the memory for model\.plan") as caught:
        made.open()
    assert caught.value.code == "H002" and "Tried to allocate" in caught.value.why


def test_a_gpu_that_is_gone_and_a_runtime_that_cannot_start_are_h001(world: Any, made: Made) -> None:
    world.starts = False
    with pytest.raises(HardwareError, match="cannot start: CUDA initialization failure") as caught:
        made.open()
    assert caught.value.code == "H001"
    world.gpus = 0
    with pytest.raises(HardwareError, match="no usable GPU") as caught:
        made.open()
    assert caught.value.code == "H001"


# ---------------------------------------------------------------- the doubles themselves


def test_the_double_of_cuda_has_exactly_the_methods_of_the_real_one(world: Any) -> None:
    double = trt_plan.CudaDevice
    real = {name: value for name, value in vars(CudaDevice).items() if not name.startswith("_")}
    own = {name: value for name, value in vars(double).items() if not name.startswith("_")}
    assert own.keys() == real.keys()
    for name in real:
        assert list(inspect.signature(getattr(double, name)).parameters) == list(
            inspect.signature(getattr(CudaDevice, name)).parameters
        ), name


def test_the_double_notices_scores_that_were_read_too_early(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made.open()
    monkeypatch.setattr(trt_plan.CudaDevice, "wait", lambda self, stream: None)
    assert (engine.scores(images(4)) == 77).all()


def test_the_double_notices_an_enqueue_that_a_capture_did_not_follow(world: Any, made: Made) -> None:
    engine = made.open()
    lane = engine._take()
    size = lane._new_size(4)
    lane._capture(size)  # without a plain run before
    assert size.graph is None and not size.capturable


# ---------------------------------------------------------------- our half of CUDA, where a GPU is


@pytest.mark.gpu
@pytest.mark.skipif(not CudaDevice.count(), reason="needs a GPU")
class TestCuda:
    def test_a_graph_replays_what_was_captured_with_new_content(self) -> None:
        import torch

        device = CudaDevice()
        stream = device.stream()
        a, b = (device.zeros((4,), torch.float32, stream) for _ in range(2))
        sent, fetched = (device.pinned((4,), torch.float32) for _ in range(2))

        def work() -> None:
            with torch.cuda.stream(stream):
                torch.add(a, 1, out=b)

        with device.active():
            work()
            graph = device.capture(stream, work)
            for value in (1.0, 5.0):
                sent.fill_(value)
                device.copy(a, sent, stream)
                device.replay(graph, stream)
                device.copy(fetched, b, stream)
                device.wait(stream)
                assert (fetched == value + 1).all()
        assert stream.cuda_stream and a.data_ptr() % 256 == 0

    def test_a_capture_that_fails_leaves_the_stream_usable(self) -> None:
        import torch

        device = CudaDevice()
        stream = device.stream()

        def work() -> None:
            raise ExportError("E005", "refused")

        with device.active(), pytest.raises((ExportError, RuntimeError)):
            device.capture(stream, work)
        made = device.zeros((4,), torch.float32, stream)
        device.wait(stream)
        assert (made == 0).all()

    def test_facts_name_the_gpu(self) -> None:
        facts = CudaDevice().facts()
        assert facts["gpu"] and len(facts["compute_capability"]) == 2 and facts["cuda"]


# ---------------------------------------------------------------- really, where TensorRT and a GPU are


@pytest.mark.gpu
@pytest.mark.skipif(bool(trt_plan.trt_missing()), reason=f"needs TensorRT and a GPU: {trt_plan.trt_missing()}")
class TestOnAGpu:
    @pytest.mark.parametrize("network", [{}, {"batch": 8}], ids=str)
    def test_scores_are_those_of_the_formula_for_any_number_of_images(
        self, tmp_path: Path, network: dict[str, int]
    ) -> None:
        made = Made(tmp_path, **network)
        engine = made.open(streams=2)
        for n in (1, 3, 8, 20, 3, 3, 8):
            pixels = images(n, n)
            np.testing.assert_allclose(engine.scores(pixels), doubles.tiny_scores(pixels, weights_of(made)), atol=1e-4)
        engine.close()

    def test_a_bound_batch_is_replayed(self, tmp_path: Path) -> None:
        import torch

        made = Made(tmp_path)
        bound = made.open().bind(5)
        for turn in range(3):
            pixels = images(5, turn)
            bound.input.copy_(torch.from_numpy(pixels))
            bound.replay()
            bound.wait()
            np.testing.assert_allclose(
                bound.output.cpu().numpy(), doubles.tiny_scores(pixels, weights_of(made)), atol=1e-4
            )

    def test_threads_get_their_own_answers(self, tmp_path: Path) -> None:
        made = Made(tmp_path)
        engine = made.open(streams=3)
        batches = [images(1 + k % 8, k) for k in range(60)]
        with ThreadPoolExecutor(6) as pool:
            for pixels, found in zip(batches, pool.map(engine.scores, batches), strict=True):
                np.testing.assert_allclose(found, doubles.tiny_scores(pixels, weights_of(made)), atol=1e-4)

    def test_a_plan_that_was_cut_is_refused_even_when_the_sidecar_agrees(self, tmp_path: Path) -> None:
        import hashlib

        made = Made(tmp_path)
        cut = made.plan.read_bytes()[:-100]
        made.plan.write_bytes(cut)
        foreign(made, "damaged")
        made.meta["sha256"] = hashlib.sha256(cut).hexdigest()
        foreign(made, "refused to load it")
