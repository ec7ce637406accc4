"""Reports of a TensorRT build: errors with the layer named, progress that can stop it, and what became of the layers."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import ExportError, HardwareError, ImgclsError, Interrupted
from ..core.text import command
from ..engines.trt_plan import Messages

if TYPE_CHECKING:
    import tensorrt as trt

Made = TypeVar("Made")

_POLL_S = 0.2
_SHOWN = 3  # errors of a parser in one message
_TYPES = {  # from what is least precise to what is most, as the inspectors of 10.x and 11.x spell them
    "fp8": re.compile(r"fp8", re.I),
    "int8": re.compile(r"(?<!u)int8", re.I),
    "bf16": re.compile(r"bf16|bfloat16", re.I),
    "fp16": re.compile(r"fp16|half|(?<!b)float16", re.I),
    "fp32": re.compile(r"fp32|float32|\bfloat\b", re.I),
}
_HEAVY = re.compile(
    r"conv|gemm|matmul|matrix|mha|attention|fully", re.I
)  # types of layers that do most of the arithmetic
_MOVES = re.compile(r"reformat|constant|shuffle|noop|identity|signal|wait|quantize", re.I)  # that do none

# How TensorRT names a layer in its errors; the first pattern that fits wins.
_LAYER = (
    re.compile(
        r"for node (\{.+?\}|.+?)(?: due to .*)?[.)]*$"
    ),  # Could not find any implementation for node {ForeignNode[a...b]}.)
    re.compile(r"\bI[A-Z]\w*Layer[ :]+[`'\"]?(/?[^\s`'\":]+)"),  # IShuffleLayer /head/Reshape: reshaping failed
    re.compile(
        r"\b(?:layer|node)(?: \d+)?(?: with name)?:? [`'\"{\[]?(/?[^\s`'\"}\],:]+)", re.I
    ),  # In node 3 with name: /a and operator
    re.compile(r"\((/[^\s:()]+): "),  # Error Code 4: API Usage Error (/features/0/Conv: kernel weights ...)
)
_NAMELIKE = re.compile(
    r"[a-z].*[/._\[\d]|[/._\[\d].*[a-z]", re.I
)  # /conv, node_conv_3; not "has" of "layer has", nor a number


# ---------------------------------------------------------------- errors


def unreadable(onnx: Path, errors: Iterable[trt.ParserError], heard: Messages) -> ExportError:
    """E004 that names node, operator and reason of the parser's first errors."""
    texts = []
    for error in errors:
        node = error.node_name() or (f"number {error.node()}" if error.node() >= 0 else "")
        operator = error.node_operator()
        place = f"node {node} ({operator})" if node and operator else f"node {node}" if node else ""
        texts.append(": ".join(part for part in (place, _short(error.desc())) if part))
    more = len(texts) - _SHOWN
    told = "; ".join(texts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return ExportError(
        "E004",
        f"TensorRT cannot read {onnx}: {told or heard.summary() or 'it gives no reason'}",
        why="an operator, type or shape that its ONNX parser does not know",
        try_="imgcls-fast export --trt --opset 18",
    )


def failed(onnx: Path, heard: Messages, *, workspace_gb: float, largest: int) -> ImgclsError:
    """What to raise when the builder gave no plan."""
    larger = command("export", "--trt", "--set", f"export.trt_workspace_gb={2 * workspace_gb:g}")
    if heard.out_of_memory:
        return HardwareError(
            "H002",
            f"the GPU has not the memory to build an engine from {onnx.name}",
            why=_short(heard.summary()),
            try_=command("export", "--trt", "--max-batch", max(1, largest // 2)),
        )
    layer = next((found for found in map(layer_of, heard.texts) if found), "")
    return ExportError(
        "E004",
        f"TensorRT built no engine from {onnx}" + (f": layer {layer}" if layer else ""),
        why=_short(heard.summary()) or "it gave no reason",
        try_=larger,
    )


def layer_of(text: str) -> str:
    """The layer that an error of TensorRT is about; empty where it names none."""
    names = (found.group(1) for found in (pattern.search(text) for pattern in _LAYER) if found)
    return next((name for name in names if _NAMELIKE.search(name)), "")


def _short(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def error_recorder(heard: Messages) -> trt.IErrorRecorder:
    """An error recorder that adds to `heard`."""
    import tensorrt as trt

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.found: list[tuple[trt.ErrorCodeTRT, str]] = []

        def report_error(self, arg0: trt.ErrorCodeTRT, arg1: str) -> bool:
            self.found.append((arg0, arg1))
            heard.add(arg1, out_of_memory=int(arg0) == int(trt.ErrorCodeTRT.FAILED_ALLOCATION))
            return False  # no error is handled here; TensorRT gives up by itself

        def num_errors(self) -> int:
            return len(self.found)

        get_num_errors = num_errors  # the name by which the bindings call it from C++

        def get_error_code(self, arg0: int) -> trt.ErrorCodeTRT:
            return self.found[arg0][0] if arg0 < len(self.found) else trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def get_error_desc(self, arg0: int) -> str:
            return self.found[arg0][1] if arg0 < len(self.found) else ""

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.found.clear()

    return Recorder()


# ---------------------------------------------------------------- progress


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """The builder's phases, which lie inside each other, as one fraction; and the way to stop it.

    Called from threads of TensorRT. An exception cannot pass through them: it stops the build, and `demand_done` raises it.

    Args:
        told: called with (name of the phase, fraction of its outermost phase that is done, 0..1, never falling).
        should_stop: asked after each step.
    """

    def __init__(self, told: Callable[[str, float], None] | None, should_stop: Callable[[], bool] | None) -> None:
        self._told, self._should_stop = told, should_stop
        self._phases: dict[str, _Phase] = {}
        self._furthest = 0.0
        self._lock = threading.RLock()
        self._failure: BaseException | None = None
        self._stopped = False

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            if not self._phases:
                self._furthest = 0.0
            self._phases[name] = _Phase(parent, max(1, steps))
            self._tell(name)

    def step(self, name: str, step: int) -> bool:
        """Whether the builder shall go on."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = min(step + 1, phase.steps)
            self._tell(name)
            return self._failure is None and not self._stopped

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def stop(self, error: BaseException) -> None:
        """End the build at its next step, and raise `error` from `demand_done`."""
        self._failure = self._failure or error

    def demand_done(self) -> None:
        """Raise what stopped the build, if anything but TensorRT did."""
        if self._failure is not None:
            raise self._failure
        if self._stopped:
            raise Interrupted(
                "X130", "the TensorRT build was stopped; nothing was written", try_="imgcls-fast export --trt"
            )

    def _tell(self, name: str) -> None:
        if self._failure is not None or self._stopped:
            return
        self._furthest = max(self._furthest, self._fraction())
        try:
            if self._told is not None:
                self._told(name, self._furthest)
            self._stopped = self._should_stop is not None and self._should_stop()
        except (ImgclsError, KeyboardInterrupt) as error:
            self._failure = error
        except BaseException as error:
            self._failure = error
            raise  # a fault: the bindings print it

    def _fraction(self) -> float:
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        return max((self._part(root) for root in roots), default=0.0)

    def _part(self, name: str) -> float:
        phase = self._phases[name]
        inner = max((self._part(child) for child, other in self._phases.items() if other.parent == name), default=0.0)
        return min(1.0, (phase.done + inner) / phase.steps)


def interruptible(work: Callable[[], Made], progress: Progress) -> Made:
    """Do the work in another thread, so that this one can take signals: Python's handlers run in the main thread only, and that
    would be inside TensorRT for minutes. A signal whose handler raises stops the build at its next step."""
    with _heeded(progress), ThreadPoolExecutor(1, "tensorrt") as pool:
        future = pool.submit(work)
        while not future.done():
            wait([future], _POLL_S)
    progress.demand_done()
    return future.result()


@contextmanager
def _heeded(progress: Progress) -> Iterator[None]:
    """What handlers of SIGINT and SIGTERM raise stops the progress and goes no further: raised between any two instructions, it
    could leave the pool before the build is asked to end."""

    def taking(former: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def take(number: int, frame: FrameType | None) -> None:
            try:
                former(number, frame)
            except (ImgclsError, KeyboardInterrupt) as error:
                progress.stop(error)

        return take

    former: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    former[number] = handler
                    signal.signal(number, taking(handler))
        yield
    finally:
        for taken, handler in former.items():
            signal.signal(taken, handler)


def progress_monitor(progress: Progress) -> trt.IProgressMonitor:
    """TensorRT's view of a `Progress`."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


# ---------------------------------------------------------------- what became of the layers


def summarise(text: str) -> dict[str, Any]:
    """Layers of an engine by type and precision, from the inspector's JSON.

    A layer's precision is the narrowest type among its inputs and weights (of its outputs, where those have none). The engine's
    is that of most of its convolutions and matrix products; of all layers that compute, where none is called so.

    Returns:
        layers {count, by_type, by_precision} and effective_precision ("" where the inspector lists no types).
    """
    try:
        layers = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):  # names are not always escaped
        layers = []
    rows = [
        (str(layer.get("LayerType", "")), _precision_of(layer)) if isinstance(layer, dict) else ("", "")
        for layer in layers
    ]
    computing = [row for row in rows if row[1] and not _MOVES.search(row[0])]
    heavy = Counter(precision for kind, precision in computing if _HEAVY.search(kind))
    counted = heavy or Counter(precision for _, precision in computing)
    order = list(_TYPES)
    return {
        "layers": {
            "count": len(rows),
            "by_type": dict(Counter(kind or "unknown" for kind, _ in rows)),
            "by_precision": dict(Counter(precision or "unknown" for _, precision in rows)),
        },
        "effective_precision": max(counted, key=lambda name: (counted[name], -order.index(name)), default=""),
    }


def _precision_of(layer: dict[str, Any]) -> str:
    weights = layer.get("Weights")
    told = [*_formats(layer.get("Inputs")), *([str(weights.get("Type", ""))] if isinstance(weights, dict) else [])]
    return _narrowest(told) or _narrowest(_formats(layer.get("Outputs")))


def _formats(tensors: Any) -> list[str]:
    listed = tensors if isinstance(tensors, list) else []
    keys = ("Format/Datatype", "DataType", "Datatype", "Format")
    return [" ".join(str(t[key]) for key in keys if key in t) for t in listed if isinstance(t, dict)]


def _narrowest(texts: list[str]) -> str:
    return next((name for name, pattern in _TYPES.items() if any(map(pattern.search, texts))), "")
