"""torch eager, compiled and packaged: the same scores, honest precision; and which runtime `open_engine` takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imgcls_fast.core.errors import ConfigError, ExportError
from imgcls_fast.core.exports import choose, finish, new_export
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines import runtimes, torch_runtime
from imgcls_fast.engines.aoti_runtime import AotiEngine, aoti_host, foreign_host
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.engines.torch_runtime import CompiledEngine, FunctionEngine, TorchEngine, bucket, operators_of, padded

SIDE = 6
LABELS = LabelSpace.single(["a", "b", "c"])
PIXELS = Pixels(SIDE, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3)


class Small(nn.Module):
    """A convolution and a linear layer on uint8 pixels: compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * (SIDE - 2) ** 2, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float().permute(0, 3, 1, 2) / 64 - 2
        return self.head(torch.relu(self.conv(x)).flatten(1))


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)


def engine_of(**more: Any) -> TorchEngine:
    return TorchEngine(Small(), LABELS, PIXELS, **more)


# ---- what all torch engines share ----


def test_more_than_a_batch_is_split_and_none_gives_none() -> None:
    x = images(7)
    whole, split = engine_of(), engine_of(max_batch=3)
    np.testing.assert_allclose(split.scores(x), whole.scores(x), atol=1e-6)
    np.testing.assert_allclose(split.scores(torch.from_numpy(x)), whole.scores(x), atol=1e-6)
    assert split.scores(x[:0]).shape == (0, 3)


def test_a_function_of_one_batch_size_is_padded() -> None:
    sizes: list[int] = []

    def score(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.float().mean((1, 2))

    engine = FunctionEngine(score, LABELS, PIXELS, runtime="f", max_batch=4, fixed=True)
    np.testing.assert_allclose(engine.scores(images(6)), images(6).mean((1, 2)), rtol=1e-5)
    assert sizes == [4, 4]
    with pytest.raises(ValueError, match="batches of 4, got 2"):
        engine.bind(2)


def test_bound_tensors_stay_where_they_are_and_follow_their_input() -> None:
    engine = engine_of()
    bound = engine.bind(2)
    place = bound.output
    for part in (images(2, 1), images(2, 2)):
        bound.input.copy_(torch.from_numpy(part))
        bound.replay()
        bound.wait()
        np.testing.assert_allclose(place.numpy(), engine.scores(part), atol=1e-6)


def test_a_closed_engine_says_so() -> None:
    engine = engine_of()
    bound = engine.bind(1)
    engine.close()
    for call in (lambda: engine.scores(images(1)), bound.replay):
        with pytest.raises(RuntimeError, match="torch engine is closed"):
            call()


def test_each_task_gets_the_scores_of_its_kind() -> None:
    labels = LabelSpace((Task("one", ("a", "b")), Task("any", ("c",), "any_of")))
    engine = TorchEngine(Small(), labels, PIXELS, temperature=2.0)
    x = images(4)
    with torch.no_grad():
        logits = Small()(torch.from_numpy(x)).double() / 2
    found = engine.scores(x)
    np.testing.assert_allclose(found[:, :2], torch.softmax(logits[:, :2], 1), atol=1e-6)
    np.testing.assert_allclose(found[:, 2], torch.sigmoid(logits[:, 2]), atol=1e-6)


# ---- precision ----


def test_the_precision_is_that_of_the_weights_or_of_autocast() -> None:
    assert (engine_of().precision, engine_of(precision="bf16").precision) == ("fp32", "bf16")
    assert TorchEngine(Small().half(), LABELS, PIXELS).precision == "fp16"
    assert TorchEngine(nn.Identity(), LABELS, PIXELS).precision == "fp32"
    assert engine_of().facts()["operators"] == {"fp32": 2}


def test_tf32_of_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch computes convolutions in TF32 on GPUs since Ampere, and matrix products in float32, unless told otherwise."""
    gpu = torch.device("cuda")
    for capability, expected in (((7, 5), {"fp32": 2}), ((9, 0), {"tf32": 1, "fp32": 1})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert operators_of(Small(), gpu) == expected
    with products_in("cuda", "tf32"):
        assert operators_of(Small(), gpu) == {"tf32": 2}
        assert operators_of(Small().half(), gpu) == {"fp16": 2}


def test_a_cpu_that_may_round_to_bfloat16_is_told() -> None:
    with products_in("mkldnn", "bf16"):
        assert engine_of().facts()["operators"] == {"fp32": 1, "bf16": 1}


@contextmanager
def products_in(backend: str, name: str) -> Iterator[None]:
    """Let float32 matrix products of a backend be computed in another type."""
    switch: Any = getattr(torch.backends, backend).matmul
    before = switch.fp32_precision
    switch.fp32_precision = name
    try:
        yield
    finally:
        switch.fp32_precision = before


def test_half_precision_leaves_normalisation_and_scores_in_float32(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    full, half = open_engine(bundle), open_engine(bundle, precision="bf16")
    assert (full.precision, half.precision) == ("fp32", "bf16")
    assert half.model.scale.dtype == torch.float32  # type: ignore[attr-defined]
    np.testing.assert_allclose(half.scores(x), full.scores(x), atol=0.05)
    assert np.abs(half.scores(x) - full.scores(x)).max() > 0
    with pytest.raises(ConfigError) as refused:
        open_engine(bundle, precision="int8")
    assert refused.value.code == "C004"


# ---- torch.compile ----


@pytest.mark.slow
def test_compiled_scores_are_those_of_eager_with_few_compilations() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    engine, eager = CompiledEngine(Small(), LABELS, PIXELS, temperature=1.5), engine_of(temperature=1.5)
    for n in (1, 2, 7, 12, 5, 1, 3, 33):
        np.testing.assert_allclose(engine.scores(images(n)), eager.scores(images(n)), atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 3
    assert (engine.runtime, engine.thread_safe) == ("compile", False)
    bound = engine.bind(3)
    bound.input.copy_(torch.from_numpy(images(3)))
    bound.replay()
    np.testing.assert_allclose(bound.output.numpy(), eager.scores(images(3)), atol=1e-5)


@pytest.mark.slow
def test_too_many_compilations_are_an_error_and_not_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch_runtime, "_COMPILED_SIZES", 1)
    engine = CompiledEngine(Small(), LABELS, PIXELS)
    engine.warmup(1)
    with pytest.raises(ExportError) as refused:
        engine.warmup(2)
    assert refused.value.code == "E004"


def test_a_machine_without_compiler_is_e004_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def compile_nothing(module: nn.Module, **options: Any) -> Any:
        def fail(x: Tensor) -> Tensor:
            raise InvalidCxxCompiler

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(ExportError) as refused:
        CompiledEngine(Small(), LABELS, PIXELS).scores(images(1))
    assert refused.value.code == "E004"
    assert "--runtime torch" in refused.value.try_


def test_with_cuda_graphs_batches_are_powers_of_two_and_answers_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    memory = torch.zeros(64, 3)  # a graph writes into the same memory each time

    def compile_nothing(module: nn.Module, **options: Any) -> Any:
        def replay(x: Tensor) -> Tensor:
            sizes.append(len(x))
            return memory[: len(x)].copy_(module(x))

        return replay

    monkeypatch.setattr(torch, "compile", compile_nothing)
    engine = CompiledEngine(Small(), LABELS, PIXELS)
    engine._graphs, engine.max_batch = True, 16
    x = images(40)
    np.testing.assert_allclose(engine.scores(x[:21]), engine_of().scores(x[:21]), atol=1e-6)
    assert sizes == [16, 8]
    sizes.clear()
    engine.scores(x[:3])
    assert sizes == [4]


def test_buckets_are_powers_of_two_up_to_the_largest() -> None:
    assert [bucket(n, 48) for n in (1, 2, 3, 8, 9, 33, 48)] == [1, 2, 4, 8, 16, 48, 48]
    x = torch.arange(6).view(3, 2)
    assert padded(x, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert padded(x, 3) is x


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_on_a_gpu_agree_with_the_cpu(runtime: str, precision: str, bundle_of: Callable[..., Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bundle = bundle_of()
    x = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
    expected = open_engine(bundle).scores(x)
    engine: Any = open_engine(bundle, runtime, device="cuda", precision=precision, batch=8)
    for n in (1, 3, 11, 3):
        np.testing.assert_allclose(engine.scores(x[:n]), expected[:n], atol=2e-2)
    bound = engine.bind(4)
    bound.input.copy_(torch.from_numpy(x[:4]))
    for _ in range(3):
        bound.replay()
    bound.wait()
    np.testing.assert_allclose(bound.output.cpu().numpy(), expected[:4], atol=2e-2)


# ---- packages ----


def test_a_host_runs_what_needs_no_more_than_it_has() -> None:
    here = aoti_host("cpu")
    assert foreign_host(here, here) == ""
    assert foreign_host({**here, "instructions": here["instructions"][:-1]}, here) == ""
    assert "avx9000" in foreign_host({**here, "instructions": [*here["instructions"], "avx9000"]}, here)
    assert "torch 1.0" in foreign_host({**here, "torch": "1.0"}, here)
    assert "machine riscv" in foreign_host({**here, "machine": "riscv"}, here)
    gpu = {**here, "device": "cuda", "compute_capability": "9.0"}
    assert "device cuda" in foreign_host(gpu, here)
    assert "compute_capability 9.0" in foreign_host(gpu, {**gpu, "compute_capability": "8.0"})
    assert "does not say" in foreign_host({}, here)


def test_a_foreign_package_is_refused_before_it_is_loaded_and_a_damaged_one_when_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"no package at all")
    meta: dict[str, Any] = {"host": {**aoti_host("cpu"), "torch": "2.0.0"}, "effective_precision": "fp32"}
    with pytest.raises(ExportError) as refused:
        AotiEngine(path, meta, LABELS, PIXELS)
    assert (refused.value.code, "torch 2.0.0" in refused.value.message) == ("E005", True)
    with pytest.raises(ExportError) as damaged:
        AotiEngine(path, {**meta, "host": aoti_host("cpu")}, LABELS, PIXELS)
    assert damaged.value.code == "E005"
    assert "cannot be loaded" in damaged.value.message


# ---- which runtime ----


@pytest.mark.parametrize(("typed", "meant"), [("onxx", "onnx"), ("tensort", "trt"), ("openvin", "openvino")])
def test_an_unknown_runtime_is_c003_with_the_nearest(typed: str, meant: str, bundle_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        open_engine(bundle_of(), typed)
    assert refused.value.code == "C003"
    assert "'openvino'" in refused.value.message
    assert refused.value.try_ == f"--runtime {meant}"


@pytest.mark.parametrize("runtime", ["aoti", "onnx", "openvino", "trt"])
def test_a_missing_export_names_the_command_that_makes_it(runtime: str, bundle_of: Callable[..., Any]) -> None:
    with pytest.raises(ExportError) as refused:
        open_engine(bundle_of(), runtime)
    target = "onnx" if runtime == "openvino" else runtime
    assert (refused.value.code, f"--{target}" in refused.value.try_) == ("E001", True)


@pytest.fixture
def onnx_export(exported: tuple[Any, Path, Any]) -> tuple[Any, Callable[[str], Path]]:
    """A bundle, and a function that exports it as a "precision" (always the FP32 graph) and returns the file."""
    bundle, exports, made = exported
    graph = made.path.read_bytes()
    shutil.rmtree(exports)

    def make(precision: str) -> Path:
        with new_export(exports, "onnx", precision, "01234567") as folder:
            (folder / "model.onnx").write_bytes(graph)
            export = finish(folder, bundle, "onnx", precision, "model.onnx", {})
        choose(export)
        return export.path

    return bundle, make


def test_auto_takes_the_fp32_file_on_a_cpu_and_torch_where_there_is_none(
    onnx_export: tuple[Any, Callable[[str], Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, make = onnx_export
    assert open_engine(bundle, "auto").runtime == "torch"
    make("int8")  # made for TensorRT, and slow in ONNX Runtime: never taken unasked
    assert open_engine(bundle, "auto").runtime == "torch"
    assert open_engine(bundle, "auto", precision="int8").runtime == "onnx"
    assert open_engine(bundle, "onnx").runtime == "onnx"
    path = make("fp32")
    found = open_engine(bundle, "auto", batch=8, threads=1)
    assert (found.runtime, found.max_batch) == ("onnx", 8)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    assert open_engine(bundle, "auto").runtime == "torch"  # damaged
    with pytest.raises(ExportError):
        open_engine(bundle, "onnx", precision="fp32")
    make("fp32")
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    assert open_engine(bundle, "auto").runtime == "torch"  # no ONNX Runtime


def test_openvino_opens_the_onnx_export(onnx_export: tuple[Any, Callable[[str], Path]]) -> None:
    pytest.importorskip("openvino")
    bundle, make = onnx_export
    meta = json.loads(make("fp32").with_name("meta.json").read_text())
    assert meta["target"] == "onnx"
    engine, x = open_engine(bundle, "openvino", threads=1), images(3).repeat(6, 1).repeat(6, 2)[:, :32, :32]
    np.testing.assert_allclose(engine.scores(x), open_engine(bundle).scores(x), atol=1e-4)
    assert (engine.runtime, engine.precision) == ("openvino", "fp32")
