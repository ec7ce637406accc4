"""Torch behind the Engine protocol: functions, eager and compiled networks; and a bundle's network as one module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..core import env
from ..core.bundle import Bundle
from ..core.errors import ExportError, ModelError
from ..core.labels import LabelSpace
from ..core.pixels import Pixels
from ..models.build import ModelSpec, build_model, load_weights
from ..models.classifier import Classifier, probabilities
from ..models.kernels import use_kernels
from .base import blank, closed, dominant, least_scores
from .hush import hushed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MAX_BATCH = 1024
# A CUDA graph belongs to one batch size; the sizes are the powers of two up to this one.
_COMPILED_MAX_BATCH = 64
_COMPILED_SIZES = 32  # that dynamo may compile before it gives up, bound ones included


class FunctionEngine:
    """A function on torch tensors as an Engine: (n, H, W, C) uint8 -> (n, K) float32 scores. See `base.Engine`.

    Args:
        score: the function.
        precision: what it computes in.
        fixed: it takes batches of exactly `max_batch`; what is missing is padded.
        thresholds: least score per column, see `base.Engine`.
    """

    thread_safe = True

    def __init__(
        self,
        score: Callable[[Tensor], Tensor],
        labels: LabelSpace,
        pixels: Pixels,
        *,
        runtime: str,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        max_batch: int = MAX_BATCH,
        fixed: bool = False,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        self.labels, self.pixels, self.runtime = labels, pixels, runtime
        self.thresholds = least_scores(labels, thresholds)
        self.device, self.precision, self.max_batch = torch.device(device), precision, max_batch
        self._fixed = fixed
        self._function: Callable[[Tensor], Tensor] | None = score

    def facts(self) -> dict[str, Any]:
        """Version of torch and threads on the CPU."""
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def scores(self, pixels: Any) -> np.ndarray:
        """(N, K) float32 probabilities; one copy to the device and one back."""
        x = torch.from_numpy(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
        if not len(x):
            return np.zeros((0, self.labels.size), np.float32)
        with self._mode():
            x = x.to(self.device, non_blocking=True)
            parts = [self._part(x[first : first + self.max_batch]) for first in range(0, len(x), self.max_batch)]
            return np.asarray((parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy())

    def warmup(self, n: int) -> None:
        self.scores(blank(self.pixels, n))

    def bind(self, batch: int) -> TorchBound:
        """Buffers on the device.

        Raises:
            ValueError: another batch size than the fixed one.
        """
        if self._fixed and batch != self.max_batch:
            raise ValueError(f"this {self.runtime} engine takes batches of {self.max_batch}, got {batch}")
        return TorchBound(self, batch)

    def close(self) -> None:
        self._function = None

    def _mode(self) -> Any:
        return torch.inference_mode()

    def _part(self, x: Tensor) -> Tensor:
        if not self._fixed or len(x) == self.max_batch:
            return self._score(x)
        return self._score(padded(x, self.max_batch))[: len(x)]

    def _score(self, x: Tensor) -> Tensor:
        if self._function is None:
            raise closed(self.runtime)
        return self._function(x)


class TorchBound:
    """Tensors on an engine's device. See `base.Bound`."""

    def __init__(self, engine: FunctionEngine, batch: int) -> None:
        self._engine = engine
        self.input = torch.from_numpy(blank(engine.pixels, batch)).to(engine.device)
        self.output = torch.zeros((batch, engine.labels.size), device=engine.device)

    def replay(self) -> None:
        with self._engine._mode():
            self.output.copy_(self._engine._score(self.input))

    def wait(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)


class TorchEngine(FunctionEngine):
    """A torch module as an Engine. See `base.Engine`.

    Args:
        model: (N, H, W, C) uint8 -> (N, K) logits; put into eval mode only while scoring.
        temperature: one for all tasks, or one per task; scores are softmax or sigmoid of logits / temperature.
        precision: "bf16" or "fp16" for autocast of the forward pass; else the model computes in the type of its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: LabelSpace,
        pixels: Pixels,
        *,
        temperature: float | Sequence[float] = 1.0,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        max_batch: int = MAX_BATCH,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            self._scores_of_model,
            labels,
            pixels,
            runtime="torch",
            device=device,
            max_batch=max_batch,
            thresholds=thresholds,
        )
        self.model, self.temperature = model, temperature
        self._autocast = AUTOCAST.get(precision)
        self._operators = operators_of(model, self.device, self._autocast)
        self.precision = dominant(self._operators)

    def facts(self) -> dict[str, Any]:
        """Version of torch, threads, multiplying modules by the type that they compute in."""
        return super().facts() | {"operators": dict(self._operators)}

    def close(self) -> None:
        super().close()
        self.model = nn.Identity()

    def _scores_of_model(self, x: Tensor) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        try:
            return probabilities(self._logits(x), self.labels, self.temperature)
        finally:
            if was_training:
                self.model.train()

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            logits: Tensor = self.model(x)
        return logits


class CompiledEngine(TorchEngine):
    """`torch.compile` of the whole way from pixels to scores. See `base.Engine`.

    On a GPU in mode "reduce-overhead", which replays CUDA graphs: batches are padded to powers of two, so that there are
    few. On a CPU torch compiles the first size, then once for all others (measured: as fast as one compilation a size), and
    the weights are frozen into the code, which lays them out anew: ViT-T at batch 8 took 0.51 of the eager time with it and
    0.94 without (one thread). The first call of a size takes seconds to minutes: call `warmup`.

    Args:
        model: as for `TorchEngine`; it is put into eval mode.

    Raises:
        HardwareError: H004 where torch finds no compiler to call.
    """

    thread_safe = False  # CUDA graphs of torch belong to the thread that recorded them

    def __init__(
        self,
        model: nn.Module,
        labels: LabelSpace,
        pixels: Pixels,
        *,
        temperature: float | Sequence[float] = 1.0,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        max_batch: int | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        self._graphs = torch.device(device).type == "cuda"
        env.require_compiler(str(device), "the runtime compile", "--runtime torch")
        most = max_batch or (_COMPILED_MAX_BATCH if self._graphs else MAX_BATCH)
        super().__init__(
            model.eval(),
            labels,
            pixels,
            temperature=temperature,
            device=device,
            precision=precision,
            max_batch=most,
            thresholds=thresholds,
        )
        self.runtime = "compile"
        self._sizes: set[int] = set()
        mode = {"mode": "reduce-overhead", "dynamic": False} if self._graphs else {}
        self._function = torch.compile(_Scores(model, labels, temperature), **mode)  # type: ignore[call-overload]

    def _mode(self) -> Any:
        return torch.no_grad()

    def _part(self, x: Tensor) -> Tensor:
        if not self._graphs:
            return self._score(x)
        whole = padded(x, bucket(len(x), self.max_batch))
        return self._score(whole)[: len(x)].clone()  # the next replay writes into the same memory

    def _score(self, x: Tensor) -> Tensor:
        autocast = torch.autocast(
            self.device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None
        )
        with autocast:
            if len(x) in self._sizes:
                return super()._score(x)
            found = self._first(x)
        self._sizes.add(len(x))
        return found

    def _first(self, x: Tensor) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        # at its limit of sizes dynamo would go on in eager mode with no more than a line in the log
        limit = torch._dynamo.config.patch(recompile_limit=_COMPILED_SIZES, fail_on_recompile_limit_hit=True)
        try:
            with limit, hushed(), torch._inductor.config.patch(freezing=not self._graphs):
                return super()._score(x)
        except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler) as error:
            raise ExportError(
                "E004",
                f"torch.compile cannot build the model for a batch of {len(x)}: {first_line(error)}",
                try_="the same command with --runtime torch",
            ) from error


class _Scores(nn.Module):
    """What is compiled: pixels to scores, without the engine around it."""

    def __init__(self, model: nn.Module, labels: LabelSpace, temperature: float | Sequence[float]) -> None:
        super().__init__()
        self.model, self.labels, self.temperature = model, labels, temperature

    def forward(self, pixels: Tensor) -> Tensor:
        return probabilities(self.model(pixels), self.labels, self.temperature)


def padded(x: Tensor, n: int) -> Tensor:
    """A batch filled up to `n` with copies of its last image."""
    return torch.cat([x, x[-1:].expand(n - len(x), *x.shape[1:])]) if len(x) < n else x


def bucket(n: int, largest: int) -> int:
    """The size that a batch of `n` is padded to: a power of two, or `largest`."""
    return min(1 << (n - 1).bit_length(), largest)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name."""
    return next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: where TorchScript puts the reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def operators_of(model: nn.Module, device: torch.device, autocast: torch.dtype | None = None) -> Counter[str]:
    """Convolutions and linear layers by the precision that they compute in on `device`.

    Float32 layers may compute in TF32 or bfloat16, as `torch.backends` is set: on GPUs since Ampere convolutions do so unless
    that is switched off.
    """
    counts: Counter[str] = Counter()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _ConvNd | nn.Linear) and isinstance(weight, Tensor):
            name = _PRECISIONS.get(autocast or weight.dtype, str(autocast or weight.dtype))
            counts[_float32_as(isinstance(module, _ConvNd), device) if name == "fp32" else name] += 1
    return counts


def _float32_as(convolution: bool, device: torch.device) -> str:
    backends: Any = torch.backends
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "fp32"
        kind, known = (backends.cudnn.conv if convolution else backends.cuda.matmul), {"tf32": "tf32"}
    else:
        kind, known = (backends.mkldnn.conv if convolution else backends.mkldnn.matmul), {"bf16": "bf16"}
    setting = str(kind.fp32_precision)
    return known.get(str(backends.fp32_precision) if setting == "none" else setting, "fp32")


def load_model(bundle: Bundle) -> Classifier:
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


def halved(model: Classifier, dtype: torch.dtype) -> Classifier:
    """The same network with its backbone in `dtype`, in place; normalisation stays in float32."""
    model.backbone.to(dtype)
    model.backbone.register_forward_pre_hook(lambda module, inputs: tuple(x.to(dtype) for x in inputs))
    return model


class Scorer(nn.Module):
    """The whole way from pixels to scores, as one module: (N, H, W, C) uint8 -> (N, K) float32.

    Args:
        model: the classifier; its backbone is converted to `dtype` in place. Pixels and scores stay float32 at the edges.
        labels: softmax or sigmoid, per task.
        temperature: divides the logits; one for all tasks, or one per task.
        logits: stop before softmax and temperature.
    """

    def __init__(
        self,
        model: Classifier,
        labels: LabelSpace,
        temperature: float | Sequence[float],
        *,
        dtype: torch.dtype = torch.float32,
        logits: bool = False,
    ) -> None:
        super().__init__()
        model.backbone.to(dtype)
        self.model, self.labels, self.temperature, self.dtype, self.logits = model, labels, temperature, dtype, logits

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model.backbone(self.model.normalise(pixels).to(self.dtype))
        return found.float() if self.logits else probabilities(found, self.labels, self.temperature)


def scorer_of(bundle: Bundle, precision: str = "fp32", *, logits: bool = False) -> Scorer:
    """The trained network of a bundle, ready to be exported: the libraries' own attention, eval mode, on the CPU."""
    model = load_model(bundle)
    use_kernels(model, "off")  # exported graphs hold what other runtimes know how to fuse
    made = Scorer(model, bundle.labels, bundle.temperatures, dtype=DTYPES[precision], logits=logits)
    return made.eval()
