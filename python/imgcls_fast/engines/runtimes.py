"""The runtimes behind the Engine protocol, and `open_engine`, which chooses one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import env
from ..core.bundle import Bundle
from ..core.errors import ConfigError, ExportError, ModelError
from ..core.files import sha256_file
from ..core.manifest import LabelSpace
from ..core.pixels import Pixels
from ..models.build import ModelSpec, build_model, load_weights
from ..models.kernels import use_kernels

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """A torch module as an Engine. See `base.Engine`.

    Args:
        model: (N, H, W, C) uint8 -> (N, K) logits; put into eval mode only while scoring.
        temperature: scores are softmax(logits / temperature).
        precision: fp32, bf16 or fp16 autocast of the forward pass.
    """

    thread_safe = True
    runtime = "torch"

    def __init__(
        self,
        model: nn.Module,
        labels: LabelSpace,
        pixels: Pixels,
        *,
        temperature: float = 1.0,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        max_batch: int = 1024,
    ) -> None:
        self.model, self.labels, self.pixels = model, labels, pixels
        self.temperature, self.device, self.precision, self.max_batch = (
            temperature,
            torch.device(device),
            precision,
            max_batch,
        )

    @torch.inference_mode()
    def scores(self, pixels: Any) -> np.ndarray:
        """(N, K) float32 probabilities; one copy to the device and one back."""
        x = torch.from_numpy(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
        x = x.to(self.device, non_blocking=True)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(
                self.device.type, AUTOCAST.get(self.precision, torch.bfloat16), enabled=self.precision in AUTOCAST
            ):
                logits = self.model(x)
        finally:
            if was_training:
                self.model.train()
        return torch.softmax(logits.float() / self.temperature, 1).cpu().numpy()

    def warmup(self, n: int) -> None:
        self.scores(np.zeros((n, self.pixels.size, self.pixels.size, self.pixels.channels), np.uint8))

    def close(self) -> None:
        self.model = nn.Identity()


class OnnxEngine:
    """An exported graph in ONNX Runtime on the CPU. See `base.Engine`."""

    thread_safe = True
    runtime = "onnx"
    precision = "fp32"

    def __init__(
        self, path: Path, labels: LabelSpace, pixels: Pixels, *, threads: int = 0, max_batch: int = 1024
    ) -> None:
        onnxruntime = env.require("onnxruntime", "onnx", "the runtime onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.labels, self.pixels, self.max_batch = labels, pixels, max_batch

    def scores(self, pixels: Any) -> np.ndarray:
        """(N, K) float32 probabilities; softmax and temperature are inside the graph."""
        (scores,) = self.session.run(["scores"], {"pixels": np.ascontiguousarray(pixels)})
        return np.asarray(scores, np.float32)

    def warmup(self, n: int) -> None:
        self.scores(np.zeros((n, self.pixels.size, self.pixels.size, self.pixels.channels), np.uint8))

    def close(self) -> None:
        self.session = None


def load_model(bundle: Bundle) -> nn.Module:
    """The trained network of a bundle, in eval mode, on the CPU.

    Raises:
        ModelError: M002 or M004 when the weights do not fit the architecture.
    """
    model = build_model(ModelSpec.from_dict(bundle.arch))
    report = load_weights(model, bundle.weights)
    if report.fresh:
        raise ModelError(
            "M004",
            f"{bundle.weights} lacks {len(report.fresh)} tensors, first {report.fresh[0]}",
            try_="imgcls-fast runs list",
        )
    use_kernels(model, "proven")
    return model.eval()


def open_engine(
    bundle: Bundle, runtime: str = "torch", *, device: str = "cpu", exports: Path | None = None
) -> TorchEngine | OnnxEngine:
    """An engine for a bundle.

    Args:
        runtime: "torch" or "onnx".
        device: for torch.
        exports: the folder that holds the exports of this bundle (for onnx).

    Raises:
        ConfigError: C003 for an unknown runtime.
        ExportError: E001 when there is no export of exactly these weights, or its file is damaged.
    """
    if runtime == "torch":
        model = load_model(bundle).to(device)
        return TorchEngine(model, bundle.labels, bundle.pixels, temperature=bundle.temperature, device=device)
    if runtime == "onnx":
        return OnnxEngine(
            find_export(exports or bundle.directory.parent / "exports", bundle, "onnx"), bundle.labels, bundle.pixels
        )
    raise ConfigError("C003", f"runtime must be one of 'torch', 'onnx', got {runtime!r}", try_="--runtime torch")


def find_export(exports: Path, bundle: Bundle, target: str) -> Path:
    """The file of the export that exports/index.json names for `target`, checked against the bundle and its own digest.

    Raises:
        ExportError: E001, with the command that makes it.
    """
    again = f"imgcls-fast export {exports.parent} --{target}"
    try:
        index = json.loads((exports / "index.json").read_text("utf-8"))
        folder = exports / index[target]
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise ExportError("E001", f"{exports.parent} has no {target} export", try_=again) from error
    path = folder / meta.get("file", "model.onnx")
    same = meta.get("bundle") == bundle.digest and meta.get("temperature") == bundle.temperature
    if not same or not path.is_file() or sha256_file(path) != meta.get("sha256"):
        raise ExportError("E001", f"{path} is damaged, or was made from another model", try_=again)
    return path
