"""Opens an engine for a bundle: the network itself, or one of its exports in the runtime that reads it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core.bundle import Bundle
from ..core.errors import ConfigError, ExportError, HardwareError, near
from ..core.exports import Export, demand_trusted, find_export
from ..core.files import plain_path
from ..core.targets import READS, RUNTIMES
from ..core.trust import is_own
from .base import Engine
from .onnx_runtime import OnnxEngine, cuda_provider, read_graph
from .openvino_runtime import OpenVinoEngine
from .torch_runtime import AUTOCAST, CompiledEngine, TorchEngine, halved, load_model
from .trial import demand_survivable


def open_engine(
    bundle: Bundle,
    runtime: str = "torch",
    *,
    device: str = "cpu",
    exports: Path | None = None,
    precision: str | None = None,
    batch: int | None = None,
    threads: int = 0,
    trust: bool = False,
) -> Engine:
    """An engine for a bundle.

    Args:
        runtime: torch, compile, aoti, onnx, openvino, trt, or auto: on a GPU the chosen TensorRT plan, else torch; on a CPU
            the FP32 ONNX export in ONNX Runtime, else torch.
        device: "cpu" or "cuda[:n]". ONNX Runtime without its CUDA part, OpenVINO, and packages made for a CPU run on the CPU.
        exports: the folder that holds the exports of this bundle.
        precision: fp32, fp16, bf16 or int8; None: fp32 of torch, and of exports the one that was chosen last.
        batch: the largest batch of one pass; None: as the runtime likes it.
        threads: CPU threads per batch in ONNX Runtime and OpenVINO; 0 uses every core. Torch's are set for the process.
        trust: also open native code that this user has not exported; auto never does.

    Raises:
        ConfigError: C003 for an unknown runtime, C004 for a precision or device that it does not have.
        ExportError: E001 when there is no export of exactly these weights, or its file is damaged; E005 when it belongs to
            another machine; E006 when it holds native code that this user has not made.
        HardwareError: H001, H004 when hardware or a library is missing.
    """
    folder = exports or bundle.directory.parent / "exports"
    if runtime == "auto":
        return _open_auto(bundle, device, folder, precision, batch, threads)
    if runtime in ("torch", "compile"):
        return _open_torch(bundle, runtime, device, precision, batch)
    if runtime not in OPENERS:
        guess = near(runtime, RUNTIMES) or "torch"
        names = ", ".join(repr(name) for name in RUNTIMES)
        raise ConfigError("C003", f"runtime must be one of {names}, got {runtime!r}", try_=f"--runtime {guess}")
    export = find_export(folder, bundle, READS[runtime], precision)
    return open_export(bundle, export, runtime, device=device, batch=batch, threads=threads, trust=trust)


def open_export(
    bundle: Bundle,
    export: Export,
    runtime: str,
    *,
    device: str = "cpu",
    batch: int | None = None,
    threads: int = 0,
    trust: bool = False,
) -> Engine:
    """An engine for one export, whichever index.json names. It is not checked whether it is of this bundle.

    Args:
        runtime: one of `OPENERS`, which reads this kind of export.
        device, batch, threads, trust: as for `open_engine`.

    Raises:
        ExportError: E001, E005, E006; HardwareError: H001, H004.
    """
    demand_trusted(export, trust=trust)
    more: dict[str, Any] = {"thresholds": bundle.thresholds} | ({} if batch is None else {"max_batch": batch})
    place = Export(plain_path(export.folder), export.meta)
    if export.meta.get("target") == "onnx" and not is_own(export.meta):
        read_graph(place.path)  # what its bytes show comes first
        demand_survivable(place.path, str(export.meta["sha256"]), runtime, bundle.pixels)
    return OPENERS[runtime](place, bundle, device, threads, more)


def _open_torch(bundle: Bundle, runtime: str, device: str, precision: str | None, batch: int | None) -> TorchEngine:
    if precision == "int8":
        raise ConfigError(
            "C004", f"the runtime {runtime} has no int8", try_="imgcls-fast export --onnx --precision int8, then --runtime openvino"
        )  # fmt: skip
    model = load_model(bundle).to(device)
    if precision in AUTOCAST:
        model = halved(model, AUTOCAST[precision])
    kind = CompiledEngine if runtime == "compile" else TorchEngine
    more: dict[str, Any] = {"thresholds": bundle.thresholds} | ({} if batch is None else {"max_batch": batch})
    return kind(model, bundle.labels, bundle.pixels, temperature=bundle.temperatures, device=device, **more)


def _open_auto(
    bundle: Bundle, device: str, exports: Path, precision: str | None, batch: int | None, threads: int
) -> Engine:
    """The first runtime of the list in `open_engine` that can answer here."""
    gpu = torch.device(device).type == "cuda"
    needed, first = ("tensorrt", "trt") if gpu else ("onnxruntime", "onnx")
    if importlib.util.find_spec(needed) is not None:
        # on a CPU only the FP32 file is for ONNX Runtime: the INT8 file is made for TensorRT, and slower there
        asked = precision or (None if gpu else "fp32")
        try:
            return open_engine(bundle, first, device=device, exports=exports, precision=asked, batch=batch, threads=threads)  # fmt: skip
        except (ExportError, HardwareError) as error:  # none, stale, of another machine: torch gives the same answers
            if error.code == "E006":
                warnings.warn(f"{error.message}: torch answers instead", stacklevel=2)
    return _open_torch(bundle, "torch", device, precision, batch)


def _open_aoti(export: Export, bundle: Bundle, device: str, threads: int, more: dict[str, Any]) -> Engine:
    from .aoti_runtime import AotiEngine

    made = str((export.meta.get("host") or {}).get("device", "cpu"))  # a package knows its kind of device
    device = device if torch.device(device).type == made else made
    return AotiEngine(export.path, export.meta, bundle.labels, bundle.pixels, device=device, **more)


def _open_onnx(export: Export, bundle: Bundle, device: str, threads: int, more: dict[str, Any]) -> Engine:
    device = device if cuda_provider() else "cpu"
    return OnnxEngine(export.path, bundle.labels, bundle.pixels, device=device, threads=threads, **more)


def _open_openvino(export: Export, bundle: Bundle, device: str, threads: int, more: dict[str, Any]) -> Engine:
    return OpenVinoEngine(export.path, bundle.labels, bundle.pixels, threads=threads, **more)


def _open_trt(export: Export, bundle: Bundle, device: str, threads: int, more: dict[str, Any]) -> Engine:
    from .trt_runtime import TrtEngine

    index = torch.device(device).index or 0
    return TrtEngine(
        export.path,
        export.meta,
        bundle.labels,
        bundle.pixels,
        device=index,
        bundle=bundle.digest,
        thresholds=bundle.thresholds,
    )


# how each runtime of `targets.READS` opens its file
OPENERS: dict[str, Callable[[Export, Bundle, str, int, dict[str, Any]], Engine]] = {
    "aoti": _open_aoti,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "trt": _open_trt,
}
