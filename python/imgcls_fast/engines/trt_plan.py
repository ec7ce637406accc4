"""What a TensorRT plan is tied to: one version of TensorRT, one kind of GPU, one model; and what TensorRT reports when it fails.

Deserialising a plan runs native code out of it, so the facts of the sidecar (meta.json) are compared first, and a plan whose
digest is not the sidecar's is not touched.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.env import install_hint
from ..core.errors import ExportError, HardwareError
from ..core.labels import LabelSpace
from ..core.text import command

if TYPE_CHECKING:
    import tensorrt as trt

OLDEST = (10, 13)  # the first version that the tests check; strong typing alone would work from 10.12 on
DRIVER = Path("/proc/driver/nvidia/version")

# Which major versions run a version-compatible plan of which: NVIDIA's support matrix of 11.4 (never an older one)
_RUNS_PLANS_OF = {10: (10,), 11: (10, 11)}
_AMPERE = (8, 0)
_KEPT_MESSAGES = 64


class Messages:
    """Errors that TensorRT reported, oldest first, each once.

    The process's logger and an engine's error recorder report the same error in two forms.
    """

    def __init__(self) -> None:
        self.texts: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self.out_of_memory = False

    def add(self, text: str, *, out_of_memory: bool = False) -> None:
        text = " ".join(text.split())
        self.out_of_memory |= out_of_memory or "out of memory" in text.lower()
        if text and not any(text in known or known in text for known in self.texts):
            self.texts.append(text)

    def summary(self, most: int = 3) -> str:
        """The first few, as one line; empty when there was none."""
        more = len(self.texts) - most
        return "; ".join(list(self.texts)[:most]) + (f"; and {more} more" if more > 0 else "")


_listeners: list[Messages] = []


@contextmanager
def listening(heard: Messages | None = None) -> Iterator[Messages]:
    """Collect what TensorRT reports meanwhile, from all its threads."""
    heard = heard or Messages()
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.remove(heard)


@cache
def logger() -> trt.ILogger:
    """The logger of this process. TensorRT keeps the first one that it is given and ignores the others, so there is one."""
    import tensorrt as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 refuses an object whose C++ half was never made

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                for heard in tuple(_listeners):
                    heard.add(msg)

    return Log()


class CudaDevice:
    """Everything that is asked of CUDA, by way of torch. The tests' double implements this class and nothing else."""

    def __init__(self, index: int = 0) -> None:
        self.index = index

    @staticmethod
    def count() -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def facts(self) -> dict[str, Any]:
        """Name, compute capability, driver, CUDA."""
        driver = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text("utf-8")) if DRIVER.exists() else None
        return {
            "gpu": torch.cuda.get_device_name(self.index),
            "compute_capability": list(torch.cuda.get_device_capability(self.index)),
            "driver": driver.group() if driver else "",
            "cuda": torch.version.cuda or "",
        }

    def active(self) -> AbstractContextManager[Any]:
        """Make it the current device: TensorRT works on the current one of the calling thread."""
        device: AbstractContextManager[Any] = torch.cuda.device(self.index)
        return device

    def stream(self) -> Any:
        """A new stream, never the default one: on that TensorRT synchronises the whole device around each call."""
        return torch.cuda.Stream(self.index)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Any) -> Tensor:
        """Device memory, zeroed on `stream`, aligned to 512 bytes by torch's allocator (TensorRT asks for 256)."""
        with torch.cuda.stream(stream):
            return torch.zeros(shape, dtype=dtype, device=f"cuda:{self.index}")

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to by itself."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """A graph of what `enqueue` puts on `stream`. Other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                enqueue()
            finally:
                graph.capture_end()
        return graph

    def replay(self, graph: Any, stream: Any) -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    def follow(self, stream: Any) -> None:
        """What `stream` is given next waits for what the caller has put on its own current stream."""
        current = torch.cuda.current_stream(self.index)
        if current != stream:
            stream.wait_stream(current)

    def wait(self, stream: Any) -> None:
        stream.synchronize()


def version_of(text: str) -> tuple[int, ...]:
    """(10, 14, 1, 48) of "10.14.1.48.post1"."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:4])


def trt_missing() -> str:
    """Empty where TensorRT (10.13 or later) and a GPU are usable, else a sentence that names what is missing."""
    return _missing()[1]


def _missing() -> tuple[str, str]:
    """(code of the error, what is missing)."""
    try:
        import tensorrt as trt
    except ModuleNotFoundError:
        return "H004", "TensorRT is not installed"
    except (ImportError, OSError) as error:
        return "H004", f"TensorRT is installed, but cannot be loaded: {error}"
    if version_of(trt.__version__)[:2] < OLDEST:
        return "H004", f"TensorRT is {trt.__version__}, and {'.'.join(map(str, OLDEST))} or later is needed"
    return ("", "") if CudaDevice.count() else ("H001", "there is no usable GPU")


def require_trt(purpose: str, **explained: str) -> None:
    """Raise unless TensorRT and a GPU are usable.

    Args:
        explained: `where` and `why` of the error.

    Raises:
        HardwareError: H004 when TensorRT is missing, too old or broken, H001 without a GPU.
    """
    code, missing = _missing()
    if code:
        command = install_hint("trt") if code == "H004" else "imgcls-fast doctor"
        raise HardwareError(code, f"{missing}, and {purpose} needs it", try_=command, **explained)


def machine(device: CudaDevice) -> dict[str, Any]:
    """What a plan depends on: versions, GPU, driver, system."""
    import tensorrt as trt

    system = f"{platform.system()}-{platform.machine()}".lower()
    return {"tensorrt": trt.__version__, "platform": system, **device.facts()}


def start_runtime(heard: Messages) -> trt.Runtime:
    """A TensorRT runtime.

    Raises:
        HardwareError: H001 when TensorRT cannot start here (a driver that is too old, a GPU that it does not know).
    """
    import tensorrt as trt

    try:
        return trt.Runtime(logger())
    except TypeError as error:  # what pybind11 makes of a factory that gave nothing
        raise HardwareError(
            "H001", f"TensorRT {trt.__version__} cannot start: {heard.summary() or error}", try_="imgcls-fast doctor"
        ) from error


# ---------------------------------------------------------------- the sidecar


def check_plan(
    plan: Path, meta: Mapping[str, Any], labels: LabelSpace, here: Mapping[str, Any], bundle: str = ""
) -> bytes:
    """Read a plan that belongs to this machine and model by its sidecar; nothing is deserialised.

    Args:
        meta: content of meta.json; what `exporting.trt_engine.build_plan` returned is in it.
        here: `machine(...)`.
        bundle: digest of the bundle that the caller means; empty: not compared.

    Raises:
        ExportError: E005, naming what differs.
    """
    try:
        data = plan.read_bytes()
    except OSError as error:
        raise foreign(plan, f"it cannot be read: {error.strerror}") from error
    if not data or hashlib.sha256(data).hexdigest() != meta.get("sha256"):
        raise foreign(plan, f"it is damaged: its {len(data)} bytes do not have the SHA-256 of meta.json")
    if bundle and meta.get("bundle") != bundle:
        raise foreign(plan, f"it was made from bundle {str(meta.get('bundle'))[:8]}, not from {bundle[:8]}")
    classes = list(meta.get("classes", labels.classes))  # before an export is finished, nothing names them yet
    if len(classes) != labels.size:
        raise foreign(plan, f"it scores {len(classes)} classes, and the model has {labels.size}")
    if classes != list(labels.classes):
        raise foreign(plan, "it scores the same number of classes under other names or in another order")
    for reason in (_other_version(meta, here), _other_gpu(meta, here)):
        if reason:
            raise foreign(plan, reason)
    return data


def foreign(plan: Path, reason: str, *, why: str = "") -> ExportError:
    """E005 of a plan; the command builds it again for its run."""
    inside = len(plan.parents) > 2 and plan.parents[1].name == "exports"
    run = plan.parents[2] if inside else None
    return ExportError("E005", f"{plan} cannot be used: {reason}", why=why, try_=command("export", run, "--trt"))


def _other_version(meta: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    built, running = str(meta.get("tensorrt", "")), str(here["tensorrt"])
    a, b = version_of(built), version_of(running)
    if not a:
        return "its sidecar names no TensorRT version"
    if meta.get("platform") != here["platform"]:
        return f"it was built on {meta.get('platform')}, and this is {here['platform']}"
    if a == b:
        return ""
    if not meta.get("version_compatible"):
        return f"it was built by TensorRT {built}, and this is {running} (it is not version compatible)"
    if a > b or a[0] not in _RUNS_PLANS_OF.get(b[0], ()):
        return f"it was built by TensorRT {built}, which TensorRT {running} does not run, version compatible or not"
    return ""


def _other_gpu(meta: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    gpu, running = meta.get("gpu"), here["gpu"]
    a, b = tuple(meta.get("compute_capability") or ()), tuple(here["compute_capability"])
    hardware = meta.get("hardware", "this")
    fits = {
        "this": a == b and gpu == running,  # tactics were timed on that very model of GPU
        "same-cc": a == b,
        "ampere+": a >= _AMPERE and b >= _AMPERE,
    }.get(hardware, False)
    if fits:
        return ""
    built = ".".join(map(str, a)) or "unknown"
    return (
        f"it was built for {gpu} (compute capability {built}, hardware {hardware!r}), "
        f"and this is {running} ({'.'.join(map(str, b))})"
    )
