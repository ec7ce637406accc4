"""The process that quantises: `quantize_child FOLDER PARENT`, started by `core/child.py`.

ModelOpt replaces functions of ONNX Runtime's quantizer when it is imported, and a quantizer can run out of memory or crash: so it
runs in a process of its own, in a folder of its own, and dies with its parent. The folder holds request.json, model.onnx and
calibration.npy; the process writes made.onnx and result.json. Its stderr is kept for the error message.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

REQUEST, MODEL, CALIBRATION, MADE, RESULT = "request.json", "model.onnx", "calibration.npy", "made.onnx", "result.json"
_PR_SET_PDEATHSIG = 1
_STEP = 16  # images in one forward pass
_RANGE_ROWS = 128  # images that are looked at for values beyond FP16; they come in fair order, so the first are a sample
# ONNX's reference evaluator is written for clarity: a graph of this size takes it seconds
_REFERENCE_BYTES, _REFERENCE_SIDE, _REFERENCE_IMAGES = 1_200_000, 64, 4
_BF16_OPSET = 22  # the first whose convolutions take bfloat16


def die_with(parent: int) -> None:
    """Be killed when the parent ends, however it ends.

    The kernel's signal comes at the death of the thread that started this process, and is lost when that thread has died
    already; so the parent's number is compared afterwards, and a pipe from the parent (stdin) is watched as well.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    while os.read(0, 1):  # nothing is ever written; the end of the file is the end of the parent
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Do what request.json asks for."""
    folder, parent = Path(arguments[0]), int(arguments[1])
    die_with(parent)
    tempfile.tempdir = str(folder)  # quantizers leave files behind
    import numpy as np

    request = json.loads((folder / REQUEST).read_text("utf-8"))
    calibration = np.load(folder / CALIBRATION, allow_pickle=False)
    result = {"quantize": write_int8, "autocast": autocast}[request["task"]](folder, request, calibration)
    (folder / RESULT).write_text(json.dumps(result), "utf-8")


def write_int8(folder: Path, request: dict[str, Any], calibration: Any) -> dict[str, Any]:
    """Q/DQ into the graph, FP16 for the rest, and what has to be repaired afterwards."""
    import onnx

    from . import half, qdq

    original = onnx.load(str(folder / MODEL))
    facts: dict[str, Any] = {
        "attention": bool(qdq.attention_products(qdq.View(original))),
        "range_images": min(_RANGE_ROWS, len(calibration)),
    }
    overflows = half.fp16_overflows(folder / MODEL, calibration[:_RANGE_ROWS])
    _refuse_nan(overflows)
    given = original.graph.input[0].type.tensor_type.shape.dim
    step = given[0].dim_value or min(_STEP, len(calibration))
    images = half.filled(calibration, step) if given[0].dim_value else calibration
    model = _MAKERS[request["quantizer"]](folder, request, original, images, step, bool(overflows))
    freed = qdq.free_layers(model, request["exclude"]) if request["exclude"] else []
    facts["tidied"] = qdq.tidy(model)
    if _is_half(model):
        half.float_scores(model)
        kept: list[str] = []
    else:
        kept = half.to_half(model, [name for name, _ in overflows])
    raised = qdq.clamp_scales(model)
    if bad := qdq.bad_scales(model):
        raise ValueError(f"{len(bad)} scales are NaN, infinite, zero or negative, first {bad[0]}")
    facts |= {"scales_raised": raised, "overflowing": overflows, "fp32_layers": kept, "freed": freed}
    qdq.drop_unused(model)
    qdq.add_metadata(model, qdq.metadata(original))
    view = qdq.View(model)
    layers = sum(1 for _ in view.layers())
    if not view.int8_layers():
        raise ValueError(f"none of the {layers} layers was quantised (fewer than 16 channels are not worth it)")
    _save(model, folder)
    _scores(folder / MADE, images[: step if given[0].dim_value else _REFERENCE_IMAGES])
    view = qdq.View(model)
    return facts | {
        "int8_layers": view.int8_layers(),
        "layers": sum(1 for _ in view.layers()),
        "opset": qdq.opset(model),
    }


def _refuse_nan(overflows: list[tuple[str, float]]) -> None:
    wrong = [(name, value) for name, value in overflows if not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors hold NaN or infinity on the calibration images, first {wrong[0][0]} ({wrong[0][1]})"
        )


def _is_half(model: Any) -> bool:
    """Whether the quantizer has made the rest FP16 already."""
    from .qdq import FLOAT16, View

    view = View(model)
    return any(view.types.get(node.output[0]) == FLOAT16 for node in view.nodes)


def _with_modelopt(
    folder: Path, request: dict[str, Any], original: Any, images: Any, step: int, overflows: bool
) -> Any:
    """NVIDIA's quantizer, placed for TensorRT. The ranges are taken on the CPU: no GPU and no TensorRT are needed.

    In a network with attention neither the attention's products nor the additions are quantised: ViT-Tiny (12 layers, random
    weights) gives 9.1 dB with ModelOpt's defaults, 28.1 dB so.
    """
    import onnx

    from . import qdq

    (name,) = (value.name for value in original.graph.input)
    attention = bool(qdq.attention_products(qdq.View(original)))
    shape = "x".join(str(side) for side in (step, *images.shape[1:]))
    import_module("modelopt.onnx.quantization").quantize(
        str(folder / MODEL),
        quantize_mode="int8",
        calibration_data={name: images},
        calibration_method=request["method"],
        calibration_eps=["cpu"],
        calibration_shapes=f"{name}:{shape}",
        high_precision_dtype="fp32" if overflows else "fp16",  # its conversion does not look at ranges
        disable_mha_qdq=attention,
        op_types_to_exclude=["Add"] if attention else None,
        nodes_to_exclude=[re.escape(node) + "$" for node in request["exclude"]],  # taken as patterns
        opset=max(19, qdq.opset(original)),  # for FP16 scales
        output_path=str(folder / MADE),
        log_level="ERROR",
    )
    return onnx.load(str(folder / MADE))


def _with_onnxruntime(
    folder: Path, request: dict[str, Any], original: Any, images: Any, step: int, overflows: bool
) -> Any:
    """ONNX Runtime's static quantizer, made to place Q/DQ as TensorRT wants them: symmetric, in front of the layers only."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    from . import qdq

    if qdq.opset(original) < 19:
        onnx.save(onnx.version_converter.convert_version(original, 20), str(folder / MODEL))
    (name,) = (value.name for value in original.graph.input)
    layers = ["Conv", "Gemm", "MatMul"]
    quantize_static(
        str(folder / MODEL),
        str(folder / MADE),
        _Reader(name, images, step),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=layers,
        nodes_to_exclude=[*request["exclude"], *qdq.attention_products(qdq.View(original))],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": layers,
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1, "Gemm": 0},
        },
    )
    return onnx.load(str(folder / MADE))


class _Reader:
    """Batches of images, as ONNX Runtime's calibration asks for them."""

    def __init__(self, name: str, images: Any, step: int) -> None:
        self.name = name
        self.batches = iter([images[first : first + step] for first in range(0, len(images), step)])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def _as_trained(folder: Path, request: dict[str, Any], original: Any, images: Any, step: int, overflows: bool) -> Any:
    """Quantisation-aware training has placed Q/DQ and scales: they are kept."""
    import onnx

    return onnx.load(str(folder / MODEL))


_MAKERS = {"modelopt": _with_modelopt, "onnxruntime": _with_onnxruntime, "training": _as_trained}


def autocast(folder: Path, request: dict[str, Any], calibration: Any) -> dict[str, Any]:
    """FP16 or BF16 where the ranges allow it, by ModelOpt's AutoCast; float32 remains at the edges and where they do not."""
    import onnx

    from . import half, qdq

    precision = request["precision"]
    original = onnx.load(str(folder / MODEL))
    (name,) = (value.name for value in original.graph.input)
    step = original.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    images = half.filled(calibration, step)[:step] if step else calibration[:_STEP]
    _refuse_nan(half.fp16_overflows(folder / MODEL, images))
    model = import_module("modelopt.onnx.autocast").convert_to_mixed_precision(
        str(folder / MODEL),
        low_precision_type=precision,
        keep_io_types=True,
        calibration_data={name: images},
        data_max=half.LARGEST_HALF / half.HEADROOM if precision == "fp16" else math.inf,  # BF16 has float32's range
        init_max=half.LARGEST_HALF if precision == "fp16" else math.inf,
        providers=["cpu"],
        opset=max(qdq.opset(original), _BF16_OPSET if precision == "bf16" else 0),
    )
    half.float_scores(model)
    view = qdq.View(model)
    layers = [node for node, _ in view.layers()]
    kept = [node.name for node in layers if view.types.get(node.input[0]) == qdq.FLOAT]
    qdq.add_metadata(model, qdq.metadata(original) | {qdq.FP32_ON_PURPOSE: "\n".join(kept)})
    qdq.drop_unused(model)
    _save(model, folder)
    seen = _verify(folder, images[: step or _REFERENCE_IMAGES], precision)
    return {"fp32_layers": kept, "layers": len(layers), "opset": qdq.opset(model), **seen}


def _verify(folder: Path, images: Any, precision: str) -> dict[str, Any]:
    """Scores of the made file beside those of the float32 file; BF16 runs on no CPU runtime, so that only small graphs can be run."""
    import numpy as np
    import onnx

    small = (folder / MODEL).stat().st_size <= _REFERENCE_BYTES and images.shape[1] <= _REFERENCE_SIDE
    if precision == "bf16" and not small:
        return {"verified": "structure-only", "max_score_diff": None}
    exact = _scores(folder / MODEL, images)
    if precision == "bf16":
        evaluator: Any = import_module("onnx.reference").ReferenceEvaluator(str(folder / MADE))
        found = evaluator.run(None, {onnx.load(str(folder / MADE)).graph.input[0].name: images})[0]
    else:
        found = _scores(folder / MADE, images)
    worst = float(np.abs(np.asarray(found, np.float64) - exact).max())
    if not np.isfinite(worst):
        raise ValueError(f"the {precision} graph gives NaN or infinity")
    return {"verified": "reference" if precision == "bf16" else "onnxruntime", "max_score_diff": worst}


def _scores(path: Path, images: Any) -> Any:
    """Scores of a few images, which must be numbers; a graph that ONNX Runtime does not load is an error here, not later."""
    import numpy as np

    from . import half

    scores = np.concatenate([found[0] for found in half.run_in_steps(half.session(path), images)])
    if not np.isfinite(scores).all():
        raise ValueError(f"the scores of {path.name} are NaN or infinite")
    return scores


def _save(model: Any, folder: Path) -> None:
    """Check the graph and write it; the parent renames it."""
    import onnx

    onnx.checker.check_model(model)
    onnx.save(model, str(folder / MADE))
    with open(folder / MADE, "rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
