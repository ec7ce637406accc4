"""INT8 by explicit Q/DQ, and FP16 or BF16 where ranges matter: made in a child process, taken over whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core import child, env
from ..core.errors import ExportError, HardwareError
from ..core.files import explained_write, sha256_json, sync_directory
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.text import command
from .qdq import UINT8, View, holds_quantization, load, opset
from .quantize_child import CALIBRATION, MADE, MODEL, REQUEST, RESULT

Method = Literal["max", "entropy"]
Quantizer = Literal["auto", "modelopt", "onnxruntime"]
# what ModelOpt's ONNX quantizer really imports; its own extra [onnx] pins old versions of more
_MODELOPT = ("modelopt", "requests", "lief", "onnxslim", "onnx_graphsurgeon")
_AUTOCAST = (*_MODELOPT, "polygraphy")
_FALLBACK_OPSET = 20  # ONNX Runtime's static quantizer fails on transformers at opset 21 and 23
_TAIL_LINES, _TAIL_CHARACTERS = 12, 2000


@phase("quantizing to INT8")
def quantize(
    onnx_fp32: Path,
    out: Path,
    calibration: np.ndarray,
    *,
    method: Method = "max",
    quantizer: Quantizer = "auto",
    exclude: Sequence[str] = (),
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Write an INT8 file from an FP32 file: symmetric Q/DQ, FP16 for the rest, uint8 `pixels`, float32 `scores`.

    A graph that holds Q/DQ already (from quantisation-aware training) keeps its own scales.

    Args:
        onnx_fp32: a float32 graph with one uint8 input (N, S, S, C).
        out: the file to write; it appears whole. A private folder beside it holds the work and is removed.
        calibration: (N, S, S, C) uint8, images of the training split, N >= 1, in the order of `calibration_rows`; they set
            the ranges, and the first 128 show what FP16 cannot hold.
        method: max (largest value) or entropy.
        quantizer: auto: ModelOpt if it is installed, else ONNX Runtime's; the facts name it, and why.
        exclude: names of layers to be left in FP16.
        timeout_s: give up after this many seconds.

    Returns:
        Facts for meta.json: quantizer, note (why not ModelOpt, or ""), versions, method, calibration (images, sha256),
        int8_layers (names), layers (count), excluded, freed, attention, opset, scales_raised (count, worst), overflowing, fp32_layers,
        tidied, seconds.

    Raises:
        HardwareError: H004 when the quantizer is missing; H003 when the disk refuses.
        ExportError: E003 when there are no images, the child fails or is killed, values are not finite, or no layer could be
            quantised.
    """
    model = load(onnx_fp32)
    _check_images(model, onnx_fp32.name, calibration)
    if holds_quantization(model):
        made_by, note = "training", "the graph has Q/DQ from quantisation-aware training; calibration was skipped"
    else:
        made_by, note = choose_quantizer(quantizer)
    _check_fallback(made_by, method, opset(model))
    _check_names(model, exclude)
    started = time.monotonic()
    request = {"task": "quantize", "quantizer": made_by, "method": method, "exclude": list(exclude)}
    result = _in_child(request, onnx_fp32, out, calibration, timeout_s)
    digest = hashlib.sha256(np.ascontiguousarray(calibration).tobytes()).hexdigest()
    return {
        "quantizer": made_by,
        "note": note,
        "versions": env.versions(("nvidia-modelopt", "onnx", "onnxruntime")),
        "method": method,
        "calibration": {"images": len(calibration), "sha256": digest},
        "excluded": list(exclude),
        **result,
        "seconds": round(time.monotonic() - started, 3),
    }


@phase("finding the layers that need float32")
def autocast(
    onnx_fp32: Path,
    out: Path,
    precision: str,
    calibration: np.ndarray,
    *,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Write an FP16 or BF16 file whose layers stay in float32 where their ranges demand it; for FP16 beside `fp16_overflows`.

    BF16 needs opset 22 and is raised to it.

    Args:
        calibration: (N, S, S, C) uint8, N >= 1, in the order of `calibration_rows`: the first 16 are looked at.

    Returns:
        Facts for meta.json: made_by, versions, fp32_layers (names), layers (count), opset, seconds, verified ("onnxruntime",
        "reference" for a small BF16 graph, else "structure-only") and max_score_diff to float32 (None: not run).

    Raises:
        HardwareError: H004 when ModelOpt or what it needs is missing; H003 when the disk refuses.
        ExportError: E003 as in `quantize`.
    """
    _check_images(load(onnx_fp32), onnx_fp32.name, calibration)
    for module in _AUTOCAST:
        env.require(module, "int8", "mixed precision by AutoCast") if not _installed(module) else None
    started = time.monotonic()
    result = _in_child({"task": "autocast", "precision": precision}, onnx_fp32, out, calibration, timeout_s)
    versions = env.versions(("nvidia-modelopt", "onnx", "onnxruntime"))
    return {
        "made_by": "modelopt.autocast",
        "versions": versions,
        **result,
        "seconds": round(time.monotonic() - started, 3),
    }


def choose_quantizer(wanted: Quantizer = "auto") -> tuple[str, str]:
    """The quantizer that will be used, and a sentence when it is not the better one.

    Raises:
        HardwareError: H004 when it is missing, or both are.
    """
    missing = [module for module in _MODELOPT if not _installed(module)]
    if not _installed("onnxruntime"):
        raise HardwareError(
            "H004", "onnxruntime is not installed, and INT8 quantisation needs it", try_=env.install_hint("int8")
        )  # fmt: skip
    if wanted == "onnxruntime":
        return "onnxruntime", ""
    if not missing:
        return "modelopt", ""
    if wanted == "modelopt":
        raise HardwareError(
            "H004", f"{', '.join(missing)} not installed, and the quantizer ModelOpt needs it", try_=env.install_hint("int8")
        )  # fmt: skip
    return "onnxruntime", (
        f"{', '.join(missing)} not installed: ONNX Runtime's static quantizer was used in place of NVIDIA ModelOpt "
        f"({env.install_hint('int8')})"
    )


def calibration_rows(manifest: Manifest, n: int, seed: int) -> np.ndarray:
    """Rows of the training split for calibration: `n` of them, or all, each class in its share and none left out if n allows.

    Returns:
        (min(n, training rows),) int64, a function of the manifest, n and the seed alone; in an order of which every
        beginning is a sample too (`Manifest.fair_order`), for whoever looks at the first few only. Where images have several
        labels the combinations come in their shares: one of each first would make rare ones the most frequent.
    """
    return manifest.fair_order(manifest.rows("train"), seed, each_first=manifest.labels.is_single)[:n]


def calibration_facts(manifest: Manifest, rows: np.ndarray, seed: int) -> dict[str, Any]:
    """Facts about calibration rows for meta.json: split, count, seed, rows of each class, and a hash of their files' digests."""
    return {
        "split": "train",
        "rows": len(rows),
        "seed": seed,
        "per_class": manifest.take(rows).counts().tolist(),
        "sha256": sha256_json([manifest.digest[row].tobytes().hex() for row in np.sort(rows)]),
    }


def allow_fake_quantize() -> None:
    """Let `torch.onnx.export` take modules of quantisation-aware training.

    PyTorch 2.14 has no shape function for the operators behind `fake_quantize_per_tensor_affine`; with one, they come out as
    QuantizeLinear and DequantizeLinear. To be called before the export; calling it again does nothing.
    """
    import torch

    def same_shape(x: Any, *_: Any) -> tuple[Any, Any]:
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)

    for name in _FAKE_QUANTISE:
        if name not in _ALLOWED:
            torch.library.register_fake(name)(same_shape)
            _ALLOWED.add(name)


_FAKE_QUANTISE = (
    "aten::fake_quantize_per_tensor_affine_cachemask",
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
)
_ALLOWED: set[str] = set()


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _check_images(model: Any, name: str, calibration: np.ndarray) -> None:
    """The images must be what the graph takes."""
    if len(calibration) == 0:
        raise ExportError(
            "E003",
            "there are no calibration images: the training split is empty, or none of its images could be decoded",
            try_="imgcls-fast data check DATA",
        )
    view = View(model)
    inputs = [value for value in view.graph.input if value.name not in view.constants]
    kind = inputs[0].type.tensor_type.elem_type if len(inputs) == 1 else None
    dims = [int(dim.dim_value) for dim in inputs[0].type.tensor_type.shape.dim[1:]] if len(inputs) == 1 else []
    if kind != UINT8 or calibration.dtype != np.uint8 or dims != list(calibration.shape[1:]):
        raise ExportError(
            "E003",
            f"{name} does not take calibration images of type {calibration.dtype} and shape {calibration.shape[1:]}: "
            f"it has {len(inputs)} input(s), the first of shape {dims}",
            try_="imgcls-fast export --onnx --precision fp32",
        )


def _check_fallback(made_by: str, method: str, version: int) -> None:
    if made_by == "onnxruntime" and version > _FALLBACK_OPSET:
        raise ExportError(
            "E003",
            f"ONNX Runtime's quantizer takes opset {_FALLBACK_OPSET} at most, and the graph has {version}",
            try_=command("export", "--onnx", "--precision", "int8", "--opset", _FALLBACK_OPSET),
        )
    if made_by == "onnxruntime" and method != "max":
        raise ExportError(
            "E003",
            f"calibration by {method} needs ModelOpt: ONNX Runtime's keeps every value of every image in memory",
            try_="imgcls-fast export --onnx --precision int8 --set export.calibration_method=max",
        )


def _check_names(model: Any, exclude: Sequence[str]) -> None:
    unknown = sorted(set(exclude) - {node.name for node in model.graph.node})
    if unknown:
        raise ExportError(
            "E003",
            f"the graph has no layer {', '.join(unknown[:5])} to leave in FP16",
            try_="imgcls-fast export --onnx --precision int8",
        )


# ---- the child ----


def _in_child(
    request: dict[str, Any], onnx_fp32: Path, out: Path, calibration: np.ndarray, timeout_s: float | None
) -> dict[str, Any]:
    """Run one request in a process of its own and move what it made to `out`."""
    with explained_write(out):
        folder = Path(tempfile.mkdtemp(prefix=".quantize-", dir=out.parent.absolute()))
    try:
        with explained_write(folder):
            shutil.copyfile(onnx_fp32, folder / MODEL)
            np.save(folder / CALIBRATION, np.ascontiguousarray(calibration), allow_pickle=False)
            (folder / REQUEST).write_text(json.dumps(request), "utf-8")
        _run(folder, timeout_s)
        with explained_write(out):
            result: dict[str, Any] = json.loads((folder / RESULT).read_text("utf-8"))
            os.replace(folder / MADE, out)
            sync_directory(out.parent)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, timeout_s: float | None) -> None:
    """Start the child, wait for it, and leave none behind."""
    words, options = (str(folder), str(os.getpid())), ("-X", "faulthandler")
    with open(folder / "stderr.txt", "wb") as stderr:
        quantizer = child.start(
            "graphs.quantize_child",
            *words,
            options=options,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        code = quantizer.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            "E003",
            f"quantisation was not finished after {timeout_s:.0f} s",
            try_="imgcls-fast export --onnx --precision int8 --calibration-images 128",
        ) from error
    finally:  # also at Ctrl-C; the child has nothing to tidy up, its folder is ours
        if quantizer.poll() is None:
            os.killpg(quantizer.pid, signal.SIGKILL)
        quantizer.wait()
        if quantizer.stdin is not None:
            quantizer.stdin.close()
    if code != 0:
        _explain(code, (folder / "stderr.txt").read_text("utf-8", "replace"))


def _explain(code: int, text: str) -> None:
    """Raise an error about the end of a child; its whole output is the cause, which --debug shows."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    tail = RuntimeError("\n".join(lines[-_TAIL_LINES:])[-_TAIL_CHARACTERS:])
    if code < 0:
        name = signal.Signals(-code).name
        memory = "the system's out-of-memory killer does that"
        raise ExportError(
            "E003",
            f"the process that quantises was killed by {name}",
            why=memory if name == "SIGKILL" else _last_words(lines),
            try_="imgcls-fast export --onnx --precision int8 --calibration-images 128",
        ) from tail
    raise ExportError(
        "E003",
        f"the process that quantises ended with exit code {code}",
        why=_last_words(lines),
        try_="imgcls-fast export --onnx --precision fp16",
    ) from tail


def _last_words(lines: list[str]) -> str:
    """The last output of the child; of a traceback the exception alone."""
    starts = [k for k, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    behind = lines[starts[-1] + 1 :] if starts else lines[-3:]
    words = [line for line in behind if not line.startswith(" ")] or behind[-1:] or ["it printed nothing"]
    return " ".join(words)[:500]
