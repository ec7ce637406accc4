"""Which layers INT8 harms, and the search for the fewest that have to stay in FP16."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ExportError
from ..core.phases import phase
from .half import run_in_steps, session
from .qdq import DEQUANTIZE, FLOAT, QUANTIZE, Quantized, View, load

SHARE = 0.2  # of the INT8 layers that may stay in FP16; with more of them INT8 is hardly worth having


@phase("ranking the layers that INT8 harms")
def layer_sqnr(fp32: Path, int8: Path, calibration: np.ndarray) -> list[tuple[str, float]]:
    """Signal to quantisation noise of every INT8 layer by itself, in dB, worst first.

    Every layer gets the activations of the float32 network, once as they are and once through the Q/DQ of the INT8 file, and the
    two outputs are compared: what a layer inherits from the ones before it does not count. All layers are in one graph beside the
    float32 network, so that one pass over the images is enough, and only two sums for each layer leave it.

    Args:
        fp32: the float32 graph that `int8` was made from.
        int8: its quantised file.
        calibration: (N, S, S, C) uint8, N >= 1.

    Returns:
        (name, 10 log10(sum of y^2 / sum of (y - y_int8)^2)) for each layer; infinite where nothing is lost.

    Raises:
        HardwareError: H004 when onnx or onnxruntime is missing.
        ExportError: E003 when the two files are not of one network.
    """
    model = load(fp32)
    names = _add_twins(model, View(load(int8)), int8)
    sums = np.zeros((len(names), 2))
    for values in run_in_steps(session(model), calibration):
        sums += np.asarray(values, np.float64).reshape(-1, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * np.log10(sums[:, 0] / sums[:, 1])
    ratio[sums[:, 1] == 0] = np.inf
    ratio[np.isnan(ratio)] = -np.inf  # a layer that gives NaN is worse than any other
    return sorted(zip(names, ratio.tolist(), strict=True), key=lambda pair: pair[1])


def _add_twins(model: Any, quantized: View, int8: Path) -> list[str]:
    """Put a Q/DQ twin beside each layer of a float32 graph; its outputs become two sums of squares for each. Returns the names."""
    import onnx

    nodes = {node.name: node for node in model.graph.node}
    del model.graph.output[:]
    names: list[str] = []
    for layer, operands in quantized.layers():
        if not all(operands):
            continue
        if layer.name not in nodes:
            raise ExportError("E003", f"{int8} has a layer {layer.name} that the float32 graph does not have",
                              try_="imgcls-fast export --onnx --precision int8")  # fmt: skip
        twin, prefix = onnx.NodeProto(), f"twin_{len(names)}"
        twin.CopyFrom(nodes[layer.name])
        twin.name = prefix
        for k, pair in enumerate(operands):
            if pair is not None:
                twin.input[k] = _fake_quantized(model, twin.input[k], quantized, layer.input[k], pair, f"{prefix}_{k}")
        twin.output[0] = prefix
        exact = nodes[layer.name].output[0]
        model.graph.node.append(twin)
        model.graph.node.append(onnx.helper.make_node("Sub", [exact, prefix], [f"{prefix}_error"]))
        for tensor, out in ((exact, f"{prefix}_signal"), (f"{prefix}_error", f"{prefix}_noise")):
            model.graph.node.append(onnx.helper.make_node("ReduceSumSquare", [tensor], [out], keepdims=0))
            model.graph.output.append(onnx.helper.make_tensor_value_info(out, FLOAT, []))
        names.append(layer.name)
    return names


def _fake_quantized(model: Any, tensor: str, quantized: View, there: str, pair: Quantized, prefix: str) -> str:
    """Add Q and DQ behind a float32 tensor, with the scale that it has in the INT8 file."""
    import onnx

    scale = quantized.array(pair.scale).astype(np.float32)
    if scale.size > 1 and pair.dequantize.output[0] != there:
        raise ExportError(
            "E003",
            f"the scales of {there} are in front of a {quantized.op(there)}: its layer cannot be measured",
            try_="imgcls-fast export --onnx --precision int8 --search 0",
        )
    for name, value in ((f"{prefix}_scale", scale), (f"{prefix}_zero", np.zeros(scale.shape, np.int8))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    constants = [f"{prefix}_scale", f"{prefix}_zero"]
    axis: dict[str, Any] = {"axis": pair.axis} if scale.size > 1 else {}
    model.graph.node.append(onnx.helper.make_node(QUANTIZE, [tensor, *constants], [f"{prefix}_q"], **axis))
    model.graph.node.append(onnx.helper.make_node(DEQUANTIZE, [f"{prefix}_q", *constants], [f"{prefix}_dq"], **axis))
    return f"{prefix}_dq"


# ---- the search ----


@dataclass(frozen=True)
class Candidate:
    """An INT8 file with some layers in FP16, and its result on the search rows.

    Args:
        layers: names of the layers in FP16.
        path: the file.
        seconds: time to make and to judge it.
        passed: whether the search rows let it pass.
        result: the answer of the callback.
    """

    layers: tuple[str, ...]
    path: Path
    seconds: float
    passed: bool
    result: Any


@dataclass(frozen=True)
class Rescue:
    """The end of a search.

    Args:
        chosen: the candidate with the fewest layers in FP16 that passed; None when none passed in time.
        history: all candidates, in the order in which they were tried.
        ended: "found", "share" (the largest share allowed did not pass) or "time".
    """

    chosen: Candidate | None
    history: tuple[Candidate, ...]
    ended: str


def rescue(
    ranked: Sequence[tuple[str, float]],
    make: Callable[[Sequence[str]], Path],
    passes: Callable[[Path], Any],
    *,
    budget_s: float,
    share: float = SHARE,
    clock: Callable[[], float] = time.monotonic,
) -> Rescue:
    """Keep the worst layers in FP16 until the search rows are content, then put back as many as possible.

    1, 2, 4, ... of the worst layers are tried, up to a share of all; from the first number that passes, bisection goes down to the
    smallest that does (as if more layers in FP16 were never worse). Each file is made anew. What is judged here are search rows:
    the chosen file has still to face rows that the search has not seen.

    Args:
        ranked: `layer_sqnr` of the file that failed.
        make: writes the file with these layers in FP16.
        passes: judges a file on the search rows; its answer has `verdict`, which is "pass" or something else.
        budget_s: no candidate is begun when the longest so far would not fit into the time that is left.
        share: share of the layers that may be in FP16, 0 < share <= 1; one layer is always allowed.
        clock: seconds.

    Returns:
        The chosen candidate and the history.
    """
    names = [name for name, _ in ranked]
    most = min(len(names), max(1, int(share * len(names))))
    started, history = clock(), list[Candidate]()

    def attempt(count: int) -> Candidate | None:
        """One candidate; None when there is no time for it."""
        longest = max((candidate.seconds for candidate in history), default=0.0)
        if clock() - started + longest > budget_s or budget_s <= 0:
            return None
        begun = clock()
        path = make(names[:count])
        result = passes(path)
        found = Candidate(tuple(names[:count]), path, clock() - begun, result.verdict == "pass", result)
        history.append(found)
        return found

    failing, chosen, count = 0, None, 1
    while chosen is None and failing < most:
        tried = attempt(count)
        if tried is None:
            return Rescue(None, tuple(history), "time")
        chosen, failing = (tried, failing) if tried.passed else (None, count)
        count = min(2 * count, most)
    while chosen is not None and len(chosen.layers) - failing > 1:
        middle = (len(chosen.layers) + failing) // 2
        tried = attempt(middle)
        if tried is None:
            return Rescue(chosen, tuple(history), "time")
        chosen, failing = (tried, failing) if tried.passed else (chosen, middle)
    return Rescue(chosen, tuple(history), "found" if chosen else "share")
