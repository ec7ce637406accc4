"""ONNX files in OpenVINO on a CPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..core import env
from ..core.labels import LabelSpace
from ..core.pixels import Pixels
from .base import blank, closed, dominant, least_scores
from .onnx_runtime import MAX_BATCH, PRECISION_NAMES, GraphEngine, checked_edges, explained, read_graph

_SS_DISABLE = 2  # of sigaltstack(2): there is none
# Operators that do the multiplying
_HEAVY_OPENVINO = frozenset(
    ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")
)


class OpenVinoEngine(GraphEngine):
    """An exported graph in OpenVINO on the CPU. See `base.Engine`.

    Args:
        path: as for `OnnxEngine`.
        compute: "f32" (as the file has it), or "bf16" to let OpenVINO round. Without a hint it rounds by itself on CPUs that
            have bfloat16 instructions.
        threads: CPU threads per batch; 0 uses every core.
        thresholds: least score per column, see `base.Engine`.

    Raises:
        HardwareError: H004 without OpenVINO.
        ExportError: E005 when the file is damaged, keeps weights elsewhere, or is not of this model.
    """

    thread_safe = True
    runtime = "openvino"

    def __init__(
        self,
        path: Path,
        labels: LabelSpace,
        pixels: Pixels,
        *,
        compute: str = "f32",
        threads: int = 0,
        max_batch: int = MAX_BATCH,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        openvino = quiet_openvino()
        read_graph(path)
        self.labels, self.pixels = labels, pixels
        self.thresholds = least_scores(labels, thresholds)
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": compute}
        counted = env.cpus()
        if not threads and counted.threads < counted.affinity:  # it counts the mask by itself, and no quota
            threads = counted.threads
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        with explained(path, (RuntimeError,)), kept_signal_stack():
            model = openvino.Core().read_model(str(path))
            self._fixed = _openvino_edges(path, model, pixels, labels.size)
            self._compiled: Any = openvino.Core().compile_model(model, "CPU", settings)
        self.max_batch = self._fixed or max_batch
        self._requests = threading.local()  # one per thread that asks
        counts = _openvino_counts(self._compiled.get_runtime_model())
        self.precision = dominant(counts)
        self._facts = {
            "openvino": openvino.__version__,
            "operators": dict(counts),
            "threads": threads,
            "hint": str(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()),
            "devices": list(self._compiled.get_property("EXECUTION_DEVICES")),
        }

    def facts(self) -> dict[str, Any]:
        """Version, multiplying operators by the type that they are compiled to, the precision hint, devices, threads."""
        return dict(self._facts)

    def bind(self, batch: int) -> OpenVinoBound:
        """An inference request with arrays of its own.

        Raises:
            ValueError: another batch size than the file's fixed one.
        """
        if self._compiled is None:
            raise closed("openvino")
        self._check_batch(batch)
        return OpenVinoBound(self._compiled.create_infer_request(), blank(self.pixels, batch), self.labels.size)

    def close(self) -> None:
        self._compiled, self._requests = None, threading.local()

    def _score(self, part: np.ndarray) -> np.ndarray:
        if self._compiled is None:
            raise closed("openvino")
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._compiled.create_infer_request()
        request.infer({"pixels": part}, share_inputs=True)
        return np.array(request.get_output_tensor().data)  # a copy: the next call writes into the same memory


class OpenVinoBound:
    """An inference request with its arrays. See `base.Bound`."""

    def __init__(self, request: Any, pixels: np.ndarray, columns: int) -> None:
        openvino = quiet_openvino()
        self._request = request
        self.input, self.output = pixels, np.zeros((len(pixels), columns), np.float32)
        request.set_input_tensor(openvino.Tensor(self.input, shared_memory=True))
        request.set_output_tensor(openvino.Tensor(self.output, shared_memory=True))

    def replay(self) -> None:
        self._request.infer()

    def wait(self) -> None:
        return None  # `infer` returns when it is done


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size_bytes", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give this thread its alternate signal stack back, whatever was done to it.

    OpenVINO's CPU plugin puts one of its own into the thread that loads it, and unmaps it when it goes: with two engines, or
    from another thread, the thread is left with memory that is no more, and the next signal that Python handles (a child
    that ends, Ctrl-C) kills the process without a word (OpenVINO 2026.4; seen with both engines closed).
    """
    call = getattr(ctypes.CDLL(None), "sigaltstack", None)
    before = _Stack()
    if call is None or call(None, ctypes.byref(before)) != 0:  # not Linux
        yield
        return
    try:
        yield
    finally:
        before.flags &= _SS_DISABLE
        call(ctypes.byref(before), None)


def quiet_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    `import openvino` imports its model converter, which sends an "import" event through openvino_telemetry unless the user
    has opted out in a file in the home directory. The converter does without when that package cannot be imported.

    Raises:
        HardwareError: H004 without OpenVINO.
    """
    name = "openvino_telemetry"
    if "openvino" in sys.modules or name in sys.modules:
        return env.require("openvino", "openvino", "the runtime openvino")
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's way to say: not there
    try:
        return env.require("openvino", "openvino", "the runtime openvino")
    finally:
        del sys.modules[name]


def _openvino_counts(model: Any) -> Counter[str]:
    """Multiplying operators of a compiled model by precision."""
    counts: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        facts = node.get_rt_info()
        if str(facts["layerType"].value) in _HEAVY_OPENVINO:
            kind = str(facts["runtimePrecision"].value)
            counts[PRECISION_NAMES.get(kind, kind)] += 1
    return counts


def _openvino_edges(path: Path, model: Any, pixels: Pixels, columns: int) -> int | None:
    def edge(port: Any) -> tuple[str, str, tuple[Any, ...]]:
        shape = tuple(d.get_length() if d.is_static else str(d) for d in port.get_partial_shape())
        return port.get_any_name(), str(port.get_element_type().get_type_name()), shape

    image = (pixels.size, pixels.size, pixels.channels)
    inputs, outputs = [edge(port) for port in model.inputs], [edge(port) for port in model.outputs]
    return checked_edges(path, inputs, outputs, ("u8", "f32"), image, columns)
