"""Engines beside eager PyTorch: from uint8 images on the host to scores on the host.

ResNet-50 and ViT-T at 224x224, ten classes. Their backbones are random, but behave like trained ones where rounding is
concerned (batch statistics of real images, damped residual branches), and a linear head is fitted on their features of 256
handwritten digits; so an accuracy on 128 other digits stands beside each engine, and an INT8 engine can lose some. Float32
engines must give eager's scores to 1e-4. The INT8 file is the one that TensorRT would get; what ONNX Runtime makes of it is
published even though it loses. The precision is the one that the runtime really computes in, read from its own profile.

`compile` is timed at batch 1 unless `--full` is given: each batch size is compiled anew, in each process, since inductor's
cache takes no frozen weights. On a GPU everything but eager float32 is FP16 or INT8, with CUDA graphs where the runtime has
them; nothing of that has been run yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duels import Contender, Contest, Disagree, Pair, Setup
from PIL import Image
from safetensors.torch import save

from imgcls_fast.core import env
from imgcls_fast.core.bundle import Bundle, read_bundle, write_bundle
from imgcls_fast.core.errors import ImgclsError
from imgcls_fast.core.exports import way_of
from imgcls_fast.core.files import write_json
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines.agreement import MAX_SCORE
from imgcls_fast.engines.base import Engine
from imgcls_fast.engines.onnx_runtime import OnnxEngine
from imgcls_fast.engines.openvino_runtime import OpenVinoEngine
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.engines.timing import fill
from imgcls_fast.evaluation.metrics import accuracy_interval
from imgcls_fast.exporting.programs import write_program
from imgcls_fast.graphs.onnx_graph import write_graph
from imgcls_fast.graphs.quantize import autocast, quantize
from imgcls_fast.models.build import Classifier, ModelSpec, build_model

ARCHITECTURES = {
    "resnet50": "torchvision/resnet50", "vit-t": "timm/vit_tiny_patch16_224", "small-cnn": "small-cnn",
}  # fmt: skip
CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FITTED, JUDGED, CALIBRATION, CHECKED = 256, 128, 32, 16  # images
ROUNDED = 0.7  # relative L2 of others (unrelated scores: 1.4)
NO_SLOWER, TWICE = 1.05, 0.5
RESNET50_OFFLINE = 94_620  # images/s of one H200, INT8, MLPerf Inference v4.1 closed, Offline
CPU = (
    "compile",
    "aoti",
    "onnx fp32",
    "onnx int8",
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
    "trt fp16",
    "trt int8",
)
GPU = ("eager fp16", "compile fp16", "aoti fp16", "onnx fp32", "trt fp16", "trt int8")
EVERY = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _contest(model: str, batches: tuple[int, ...], size: int = 224, **more: Any) -> Contest:
    name = f"{model}, batches {', '.join(map(str, batches))}"
    params = {"model": model, "batches": list(batches), "size": size}
    return Contest("engines", name, "engines", params, prepare="prepare", **more)


CONTESTS = [
    *(_contest(model, (1, 8, 32), devices=("cpu",)) for model in ("resnet50", "vit-t")),
    *(_contest(model, EVERY, devices=("cuda",)) for model in ("resnet50", "vit-t")),
    _contest("small-cnn", (8, 32), 32, devices=("cpu",), small=True, threads=1),
]


@pytest.mark.parametrize("contest", CONTESTS, ids=str)
def bench_engines(duel: Callable[[Contest], list[dict[str, Any]]], contest: Contest) -> None:
    first = duel(contest)[0]
    assert first["cases"] or first["slow"], first["absent"]


def engines(work: Path, model: str, batches: list[int], size: int, device: str, full: bool = False) -> Setup:
    """Every runtime on one model, at several batch sizes; on one thread by CPU time, which a busy machine does not change."""
    folder = work / model
    bundle = read_bundle(folder / "bundle", verify=False)
    names = ("eager", "aoti", "onnx fp32") if model == "small-cnn" else ("eager", *(CPU if device == "cpu" else GPU))
    pixels, labels = digits(FITTED, FITTED + JUDGED, size)
    pairs = [Pair(name, rival, _goals(model, name, rival, batches)) for name, rival in _rivals(names)]
    skipped = []
    if device == "cpu" and not full and "compile" in names:
        skipped = [
            (_case(model, batch), "compile", "each batch size is compiled anew (--full)") for batch in batches[1:]
        ]
    left_out = {(case, name) for case, name, _ in skipped}

    def opened(name: str) -> Contender:
        engine = open_one(name, folder, bundle, device)
        cases = {batch: _case(model, batch) for batch in batches if (_case(model, batch), name) not in left_out}
        return Contender(
            {case: partial(engine.scores, pixels[np.arange(batch) % len(pixels)]) for batch, case in cases.items()},
            _scores(engine, pixels[:CHECKED], batches[0]),
            engine.precision,
            engine.facts() | _file_facts(folder, name),  # type: ignore[attr-defined]
            _device_calls(engine, pixels, batches[:1], model),
            partial(_worth, engine, pixels, labels, batches[0]),
            engine.close,
        )

    limits = {}
    if model == "resnet50" and device == "cuda":
        limits = {
            _case(model, b): ("MLPerf v4.1, H200 offline INT8", partial(float, b / RESNET50_OFFLINE)) for b in batches
        }
    return Setup(
        {name: partial(opened, name) for name in names},
        pairs,
        partial(check, exact=device == "cpu"),
        clock="cpu" if torch.get_num_threads() == 1 else "wall",
        images={_case(model, batch): batch for batch in batches},
        limits=limits,
        skipped=skipped,
    )


def _case(model: str, batch: int) -> str:
    return f"{model}, batch {batch}"


def _rivals(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each against eager; quantised and half precision also against float32 in the same runtime."""
    same = {
        "openvino int8": "openvino fp32",
        "openvino bf16": "openvino fp32",
        "onnx int8": "onnx fp32",
        "trt int8": "trt fp16",
    }
    pairs = [(name, "eager") for name in names if name != "eager"]
    return pairs + [(name, rival) for name, rival in same.items() if name in names and rival in names]


def _goals(model: str, name: str, rival: str, batches: list[int]) -> dict[str, float]:
    first = _case(model, batches[0])
    if name in ("aoti", "onnx fp32") and rival == "eager" and model != "small-cnn":
        return {first: NO_SLOWER}
    return {first: TWICE} if (model, name, rival) == ("resnet50", "openvino int8", "openvino fp32") else {}


def check(name: str, outputs: Mapping[str, Any], exact: bool) -> dict[str, Any]:
    """Scores against those of eager PyTorch in float32."""
    a, b = outputs[name].astype(np.float64), outputs["eager"].astype(np.float64)
    worst = float(np.abs(a - b).max())
    error = float(np.linalg.norm((a - a.mean(0)) - (b - b.mean(0))) / np.linalg.norm(b - b.mean(0)))
    rounded = not exact or any(word in name for word in ("int8", "bf16", "fp16"))
    if error > ROUNDED if rounded else worst > MAX_SCORE:
        raise Disagree(f"{name} and eager disagree: scores by {worst:.1e}, relative L2 {error:.2f}")
    same = int((a.argmax(1) == b.argmax(1)).sum())
    return {
        "max_score_diff": float(f"{worst:.2e}"),
        "relative_l2": float(f"{error:.2e}"),
        "same_top1": same,
        "images": len(a),
    }


def _scores(engine: Engine, pixels: np.ndarray, batch: int) -> np.ndarray:
    """In batches of the size that is timed first: what was compiled for it is what must be right."""
    return np.concatenate([engine.scores(pixels[k : k + batch]) for k in range(0, len(pixels), batch)])


def _worth(engine: Engine, pixels: np.ndarray, labels: np.ndarray, batch: int) -> dict[str, float]:
    """Accuracy with the 95 % interval that `eval` gives."""
    right = int((_scores(engine, pixels, batch).argmax(1) == labels).sum())
    found = right / len(pixels), *accuracy_interval(right, len(pixels))
    return dict(zip(("accuracy", "accuracy_low", "accuracy_high"), (round(float(x), 4) for x in found), strict=True))


def _device_calls(engine: Engine, pixels: np.ndarray, batches: list[int], model: str) -> dict[str, Callable[[], Any]]:
    """The work on buffers in place, at the first batch size."""
    bind = getattr(engine, "bind", None)
    if bind is None:
        return {}

    def call(batch: int) -> Callable[[], Any]:
        bound = bind(batch)
        fill(bound.input, pixels[:batch])

        def replay() -> None:
            bound.replay()
            bound.wait()

        return replay

    return {_case(model, batch): call(batch) for batch in batches}


# --- models and files -------------------------------------------------------------------------------------------------


def digits(first: int, last: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, size, size, 3) uint8 enlarged handwritten digits, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[first:last]
    pictures = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in data.images[order]]
    big = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) for picture in pictures]
    return np.stack(big), data.target[order]


def prepare(work: Path, model: str, batches: list[int], size: int, device: str, full: bool = False) -> None:
    """Write the bundle and the files that the contenders open; what cannot be made here is missing later, with its reason."""
    folder = work / model
    if (folder / "done.json").exists():
        return
    bundle = write_model(folder, model, size)
    calibration, _ = digits(0, CALIBRATION, size)
    write_graph(bundle, folder / "fp32.onnx")
    reasons: dict[str, str] = {}
    half = "fp32" if device == "cpu" else "fp16"
    steps: dict[str, Callable[[], Any]] = {
        "aoti": lambda: write_program(
            bundle, folder / "exports", [calibration[:8]], way_of("aoti", half), device=device
        )
    }
    if model != "small-cnn":
        steps["int8"] = lambda: quantize(folder / "fp32.onnx", folder / "int8.onnx", calibration)
    if device == "cuda":
        steps["fp16"] = lambda: autocast(folder / "fp32.onnx", folder / "fp16.onnx", "fp16", calibration)
        for precision in ("fp16", "int8"):
            steps[f"trt {precision}"] = partial(_build, folder, precision, max(batches))
    for name, step in steps.items():
        try:
            step()
        except ImgclsError as error:
            reasons[name] = error.message
    (folder / "done.json").write_text(json.dumps(reasons), "utf-8")


def _build(folder: Path, precision: str, largest: int) -> None:
    from imgcls_fast.exporting.trt_engine import TrtOptions, build_plan

    plan = folder / f"{precision}.plan"
    options = TrtOptions(batches=(1, min(64, largest), largest))
    write_json(plan.with_suffix(".json"), build_plan(folder / f"{precision}.onnx", plan, options))


def write_model(folder: Path, model: str, size: int) -> Bundle:
    """A network with random features that are no noise, and a head that was fitted on them."""
    torch.manual_seed(0)
    network = build_model(ModelSpec(ARCHITECTURES[model], num_outputs=CLASSES, mean=MEAN, std=STD, image_size=size))
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            if name.endswith("bn3"):  # in random deep networks any rounding error grows from block to block
                torch.nn.init.constant_(module.weight, 0.2)
    pixels, labels = digits(0, FITTED, size)
    with torch.no_grad():
        network.train()
        network(torch.from_numpy(pixels[:32]))
    network.eval()
    _fit_head(network, pixels, labels)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    return write_bundle(
        folder / "bundle",
        lambda file: file.write(save(state)) and None,
        arch=network.spec.to_dict(),
        labels=LabelSpace.single([str(k) for k in range(CLASSES)]),
        pixels=Pixels(size, 0.875, "bilinear", "rgb", "apply", MEAN, STD),
        temperature=1.0,
        provenance={},
    )


def _fit_head(network: Classifier, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Ridge regression of the classes (+1 and -1) on standardised features, written into the last layer."""
    with torch.inference_mode():
        parts = [network.features(torch.from_numpy(pixels[k : k + 16])) for k in range(0, len(pixels), 16)]
    features = torch.cat(parts).double().numpy()
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / deviation
    targets = 2.0 * (labels[:, None] == np.arange(CLASSES)) - 1
    dual = np.linalg.solve(x @ x.T + 10.0 * len(x) * np.eye(len(x)), targets - targets.mean(0))
    weight = 8 * (x.T @ dual) / deviation[:, None]
    bias = 8 * targets.mean(0) - mean @ weight
    parameters = sorted(network.head_parameters(), key=lambda parameter: -parameter.ndim)
    with torch.no_grad():
        for parameter, value in zip(parameters, (weight.T, bias), strict=True):
            parameter.copy_(torch.from_numpy(value).float().reshape(parameter.shape))


def open_one(name: str, folder: Path, bundle: Bundle, device: str) -> Engine:
    """The engine behind a name.

    Raises:
        HardwareError: its runtime is not installed, or its file could not be made.
    """
    runtime, _, precision = name.partition(" ")
    threads = torch.get_num_threads()
    if runtime in ("eager", "compile", "aoti"):
        how = "torch" if runtime == "eager" else runtime
        return open_engine(bundle, how, device=device, exports=folder / "exports", precision=precision or "fp32")
    if runtime == "trt":
        env.require("tensorrt", "trt", "TensorRT")
        from imgcls_fast.engines.trt_runtime import TrtEngine

        plan = folder / f"{precision}.plan"
        meta = json.loads(plan.with_suffix(".json").read_text("utf-8"))
        return TrtEngine(plan, meta, bundle.labels, bundle.pixels)
    path = folder / ("int8.onnx" if precision == "int8" else "fp32.onnx")
    if runtime == "onnx":
        return OnnxEngine(path, bundle.labels, bundle.pixels, device=device, threads=threads)
    compute = "bf16" if precision == "bf16" else "f32"
    return OpenVinoEngine(path, bundle.labels, bundle.pixels, compute=compute, threads=threads)


def _file_facts(folder: Path, name: str) -> dict[str, Any]:
    precision = name.partition(" ")[2]
    path = folder / (
        f"{precision}.plan" if name.startswith("trt") else "int8.onnx" if precision == "int8" else "fp32.onnx"
    )
    return {"file_bytes": path.stat().st_size} if name.partition(" ")[0] in ("onnx", "openvino", "trt") else {}
