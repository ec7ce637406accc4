"""`export --onnx`: uint8 NHWC pixels in, probabilities out, verified in ONNX Runtime on real images."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import env
from ..core.bundle import Bundle
from ..core.errors import ExportError, GateFailed
from ..core.files import explained_write, sha256_file, sha256_json, sync_directory, write_json
from ..engines.base import Engine
from ..engines.runtimes import OnnxEngine, TorchEngine, load_model

_DOMAINS = ("", "ai.onnx")  # standard operators only


class Scorer(nn.Module):
    """The whole way from pixels to scores, as one module: (N, H, W, C) uint8 -> (N, K) float32 probabilities."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.softmax(self.model(pixels).float() / self.temperature, 1)


@dataclass(frozen=True)
class Comparison:
    """Two engines on the same images.

    Args:
        images: how many.
        same_top1: how many got the same class.
        max_score_diff: largest absolute difference of a score.
    """

    images: int
    same_top1: int
    max_score_diff: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare_engines(reference: Engine, other: Engine, batches: Iterable[np.ndarray]) -> Comparison:
    """Score the same (n, H, W, C) uint8 batches with both."""
    images, same, worst = 0, 0, 0.0
    for pixels in batches:
        a, b = reference.scores(pixels), other.scores(pixels)
        images += len(a)
        same += int((a.argmax(1) == b.argmax(1)).sum())
        worst = max(worst, float(np.abs(a - b).max()))
    return Comparison(images, same, worst)


def export_onnx(
    bundle: Bundle, exports: Path, batches: Iterable[np.ndarray], *, opset: int = 20, max_score_diff: float = 1e-4
) -> dict[str, Any]:
    """Write exports/onnx-fp32-<key8>/model.onnx, compare it with torch, and only then name it in exports/index.json.

    Args:
        bundle: what to export.
        exports: folder of the run's exports.
        batches: (n, H, W, C) uint8 real images for the comparison; not empty.
        opset: ONNX operator set.
        max_score_diff: largest score difference allowed.

    Returns:
        The content of meta.json, with "path".

    Raises:
        HardwareError: H004 when onnx, onnxscript or onnxruntime is missing.
        ExportError: E001 when the graph cannot be made or is not plain ONNX.
        GateFailed: E901 when scores differ by more than `max_score_diff` or a top-1 class differs; nothing is kept.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        env.require(module, "onnx", "export --onnx")
    versions = env.versions(("torch", "onnx", "onnxscript", "onnxruntime"))
    key = sha256_json(
        {"bundle": bundle.digest, "temperature": bundle.temperature, "opset": opset, "versions": versions}
    )[:8]
    folder = exports / f"onnx-fp32-{key}"
    temporary = exports / f".onnx-fp32-{key}.{os.getpid()}"
    with explained_write(exports):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            path = temporary / "model.onnx"
            model = load_model(bundle)
            _write_graph(Scorer(model, bundle.temperature).eval(), bundle, path, opset)
            written = _check_graph(path)
            reference = TorchEngine(model, bundle.labels, bundle.pixels, temperature=bundle.temperature)
            result = compare_engines(reference, OnnxEngine(path, bundle.labels, bundle.pixels), batches)
            _judge(result, max_score_diff)
            meta = {
                "file": "model.onnx",
                "sha256": sha256_file(path),
                "bytes": path.stat().st_size,
                "bundle": bundle.digest,
                "temperature": bundle.temperature,
                "opset": written,
                "input": {
                    "name": "pixels",
                    "dtype": "uint8",
                    "shape": ["batch", bundle.pixels.size, bundle.pixels.size, bundle.pixels.channels],
                },
                "output": {"name": "scores", "dtype": "float32", "shape": ["batch", bundle.labels.size]},
                "classes": list(bundle.labels.classes),
                "pixels": bundle.pixels.to_dict(),
                "comparison": result.to_dict(),
                "versions": versions,
            }
            write_json(temporary / "meta.json", meta)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
            sync_directory(exports)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _name_chosen(exports, folder.name)
    return {"path": str(folder / "model.onnx"), **meta}


def _write_graph(scorer: nn.Module, bundle: Bundle, path: Path, opset: int) -> None:
    side, channels = bundle.pixels.size, bundle.pixels.channels
    example = torch.zeros((2, side, side, channels), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                scorer,
                (example,),
                str(path),
                dynamo=True,
                opset_version=opset,
                input_names=["pixels"],
                output_names=["scores"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=65536)}},
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            "E001",
            f"{bundle.arch.get('arch')} cannot be exported to ONNX opset {opset}: {first}",
            try_="imgcls-fast export --onnx --opset 18 --debug",
        ) from error


def _check_graph(path: Path) -> int:
    """One file, standard operators, valid. Returns its operator set."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False)
    onnx.checker.check_model(graph)
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in graph.graph.node if node.domain not in _DOMAINS})
    if foreign:
        raise ExportError("E001", f"the graph holds operators that are not standard ONNX: {', '.join(foreign)}")
    if any(tensor.external_data for tensor in graph.graph.initializer):
        raise ExportError("E001", "the graph keeps weights outside its file")
    return next(int(entry.version) for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))


def _judge(result: Comparison, max_score_diff: float) -> None:
    if result.images == 0:
        raise ExportError(
            "E001",
            "there are no images to compare the exported model on",
            try_="imgcls-fast export RUN --onnx   (with the images in place)",
        )
    if result.max_score_diff > max_score_diff or result.same_top1 < result.images:
        raise GateFailed(
            "E901",
            f"ONNX Runtime disagrees with torch on {result.images} images: largest score difference {result.max_score_diff:.2e} "
            f"(allowed {max_score_diff:.0e}), same class on {result.same_top1} of {result.images}",
            why="nothing was exported",
            try_="imgcls-fast export --onnx --opset 18",
        )


def _name_chosen(exports: Path, folder: str) -> None:
    import json

    path = exports / "index.json"
    index = json.loads(path.read_text("utf-8")) if path.exists() else {}
    write_json(path, {**index, "onnx": folder})
