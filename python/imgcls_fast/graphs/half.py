"""FP16: which tensors of a graph it cannot hold, and a graph's conversion to it with float32 at the edges."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ..core import env
from ..core.phases import phase
from .qdq import (
    BFLOAT16,
    DEQUANTIZE,
    FLOAT,
    FLOAT16,
    FLOATS,
    FP32_ON_PURPOSE,
    MOVES,
    WEIGHTED,
    View,
    add_metadata,
    drop_unused,
    load,
    sort_nodes,
)

HEADROOM = 2.0  # unseen images may give values this much larger than the ones that were looked at
LARGEST_HALF = float(np.finfo(np.float16).max)  # 65504
_STEP = 16  # images in one forward pass
_NORMALISES = ("Transpose", "Mul", "Add", "Sub", "Div")
_SCORES = ("Softmax", "Sigmoid", "Concat", "Split", "Mul", "Div", "Identity")
_STAYS_FLOAT = ("Range",)
_KEEPS_INPUTS = {"Resize": 1}  # from this input on the operator takes float32 and nothing else


def session(model: Any | Path, *, faithful: bool = True) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        faithful: compute Q and DQ as they stand. ONNX Runtime's own fusion of FP16 Q/DQ graphs loses half of the signal (10.9 dB
            in place of 22.2 on a ResNet-18) unless it is switched off.

    Raises:
        HardwareError: H004 when onnxruntime is missing.
    """
    runtime = env.require("onnxruntime", "onnx", "INT8 calibration")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = env.usable_cpus()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others need the cores as well
    if faithful:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def tensor_ranges(onnx_fp32: Path, calibration: np.ndarray) -> dict[str, float]:
    """Largest absolute value of every float32 tensor over some images; NaN where one is not a number.

    Args:
        calibration: (N, S, S, C) uint8.

    Raises:
        HardwareError: H004 when onnx or onnxruntime is missing.
        ValueError: the graph is not one that ONNX Runtime can run.
    """
    import onnx

    model = load(onnx_fp32)
    view = View(model)
    made = [
        name
        for node in view.nodes
        for name in node.output
        if view.types.get(name) == FLOAT and name not in view.constants
    ]
    del model.graph.output[:]
    for k, name in enumerate(made):  # the sum carries a NaN, which a maximum may drop
        model.graph.node.append(onnx.helper.make_node("Abs", [name], [f"range_abs_{k}"]))
        model.graph.node.append(onnx.helper.make_node("ReduceMax", [f"range_abs_{k}"], [f"range_max_{k}"], keepdims=0))
        model.graph.node.append(onnx.helper.make_node("ReduceSum", [f"range_abs_{k}"], [f"range_sum_{k}"], keepdims=0))
        for kind in ("max", "sum"):
            model.graph.output.append(onnx.helper.make_tensor_value_info(f"range_{kind}_{k}", FLOAT, []))
    found = np.zeros((len(made), 2))
    for values in run_in_steps(session(model), calibration):
        found = np.maximum(found, np.abs(np.asarray(values, np.float64).reshape(-1, 2)))  # NaN wins in np.maximum
    worst = np.where(np.isfinite(found[:, 1]), found[:, 0], found[:, 1])
    return dict(zip(made, worst.tolist(), strict=True))


def run_in_steps(run: Any, calibration: np.ndarray) -> list[list[np.ndarray]]:
    """All outputs of a session for some images, a step at a time; a graph of fixed batch gets repeated images at the end."""
    (given,) = run.get_inputs()
    step = given.shape[0] if isinstance(given.shape[0], int) else _STEP
    fixed = isinstance(given.shape[0], int)
    images = filled(calibration, step) if fixed else calibration
    return [run.run(None, {given.name: images[first : first + step]}) for first in range(0, len(images), step)]


def filled(images: np.ndarray, step: int) -> np.ndarray:
    """The images, and the first ones again, until their number is a multiple of `step`."""
    return np.take(images, np.arange(-(-len(images) // step) * step), axis=0, mode="wrap")


def fp16_overflows(onnx_fp32: Path, calibration: np.ndarray) -> list[tuple[str, float]]:
    """Tensors whose values leave FP16's range, with their largest absolute value, largest first.

    The limit is 32,752: half of FP16's largest number, because other images may go further. Values that are infinite or NaN in
    float32 already come first.

    Args:
        calibration: (N, S, S, C) uint8, N >= 1.
    """
    ranges = tensor_ranges(onnx_fp32, calibration)
    beyond = [(name, value) for name, value in ranges.items() if not value <= LARGEST_HALF / HEADROOM]
    return sorted(beyond, key=lambda pair: (np.isfinite(pair[1]), -pair[1] if np.isfinite(pair[1]) else 0.0))


@phase("looking for values beyond FP16")
def beyond_half(onnx_fp32: Path, images: np.ndarray) -> str:
    """A sentence about the tensors that these images drive beyond FP16; "" when there are none.

    The scores of an FP16 file do not show it: ONNX Runtime on a CPU keeps float32 between its nodes.

    Args:
        images: (N, S, S, C) uint8.
    """
    found = fp16_overflows(onnx_fp32, images) if len(images) else []
    worst = [(name, value) for name, value in found if not value <= LARGEST_HALF]
    if not worst:
        return ""
    name, value = worst[0]
    return f"{len(worst)} tensors leave FP16's range on {len(images)} images, the farthest {name} ({value:.3g})"


def to_half(model: Any, overflowing: Collection[str] = ()) -> list[str]:
    """Convert a float32 graph, with or without Q/DQ, to FP16 in place.

    Float32 remain: normalisation of the pixels, the last softmax (of several tasks all of them, and the sigmoids), and nodes that
    touch an overflowing tensor (with the Q/DQ around them). Their names are written into the model's metadata for the lint.

    Returns:
        names of the layers (Conv, Gemm, MatMul) that remain.

    Raises:
        ValueError: the graph has control flow, which this cannot convert.
    """
    if any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        raise ValueError("a graph with control flow (If, Loop, Scan) cannot be converted to FP16")
    view = View(model)
    stays = _edges(view) | _overflowing(view, set(overflowing))
    _Converter(view, stays).convert()
    drop_unused(model)
    sort_nodes(model)
    del model.graph.value_info[:]
    left = [node.name for node in model.graph.node if node.op_type in WEIGHTED and node.name in stays]
    add_metadata(model, {FP32_ON_PURPOSE: "\n".join(left)})
    return left


def _edges(view: View) -> set[str]:
    """Names of the nodes between the pixels and the network, and between the network and the scores."""
    found: set[str] = set()
    waiting = [user for value in view.graph.input for user in view.users[value.name] if user.op_type == "Cast"]
    while waiting:
        node = waiting.pop()
        found.add(node.name)
        waiting += [
            user
            for user in view.users[node.output[0]]
            if user.op_type in _NORMALISES and all(n in view.constants or n == node.output[0] for n in user.input)
        ]
    ends = [value.name for value in view.graph.output]
    while ends:
        maker = view.maker.get(ends.pop())
        if maker is not None and maker.op_type in _SCORES and len(view.users[maker.output[0]]) <= 1:
            found.add(maker.name)
            ends += [name for name in maker.input if name not in view.constants]
    return found


def _overflowing(view: View, tensors: set[str]) -> set[str]:
    """Names of the nodes that touch a tensor or a constant that FP16 cannot hold; a Q/DQ goes with what it feeds."""
    for node in view.nodes:  # quantised values have the range of what was quantised
        if node.op_type == DEQUANTIZE and (pair := view.quantized(node.output[0])) and pair.source in tensors:
            tensors |= {node.output[0]}
    constants = {name: view.array(name) for name, tensor in view.constants.items() if tensor.data_type == FLOAT}
    large = {name for name, value in constants.items() if (np.abs(value[np.isfinite(value)]) > LARGEST_HALF).any()}
    tensors |= large
    found = {n.name for n in view.nodes if n.op_type in _STAYS_FLOAT or tensors.intersection([*n.input, *n.output])}
    grew = True
    while grew:
        grew = False
        for node in view.nodes:
            users = [user for name in node.output for user in view.users[name]]
            follows = node.op_type in (DEQUANTIZE, *MOVES) and users and all(user.name in found for user in users)
            if follows and node.name not in found:
                found.add(node.name)
                grew = True
    return found


class _Converter:
    """Gives every node inputs of the type that it computes in."""

    def __init__(self, view: View, stays: set[str]) -> None:
        self.view, self.stays = view, stays
        self.added: dict[str, Any] = {}  # by name: casts and half constants

    def type_of(self, tensor: str) -> int:
        """The type that a float32 tensor has afterwards."""
        maker = self.view.maker.get(tensor)
        return FLOAT if maker is None or maker.name in self.stays else FLOAT16

    def convert(self) -> None:
        graph = self.view.graph
        for node in self.view.nodes:
            want = FLOAT if node.name in self.stays else FLOAT16
            for k, name in enumerate(node.input):
                if self.view.types.get(name) == FLOAT and k < _KEEPS_INPUTS.get(node.op_type, len(node.input)):
                    node.input[k] = self.of_type(name, want)
            if want == FLOAT16:
                self._attributes(node)
        for value in graph.output:
            if self.view.types.get(value.name) == FLOAT and self.type_of(value.name) == FLOAT16:
                self._cast_output(value.name)

    def of_type(self, name: str, want: int) -> str:
        """The name of a tensor with the wanted type, made where it does not exist yet."""
        import onnx

        graph = self.view.graph
        if name in self.view.constants:
            if want == FLOAT:
                return name
            half = f"{name}_half"
            if half not in self.added:
                value = np.clip(self.view.array(name), -LARGEST_HALF, LARGEST_HALF)
                value = np.where(np.isfinite(self.view.array(name)), value, self.view.array(name)).astype(np.float16)
                self.added[half] = onnx.numpy_helper.from_array(value, half)
                graph.initializer.append(self.added[half])
            return half
        if self.type_of(name) == want:
            return name
        cast = f"{name}_to_{FLOATS[want]}"
        if cast not in self.added:
            self.added[cast] = onnx.helper.make_node("Cast", [name], [cast], name=cast, to=want)
            graph.node.append(self.added[cast])
        return cast

    def _attributes(self, node: Any) -> None:
        """Change the type in the attributes of nodes that make floats from something else."""
        import onnx

        if self.view.types.get(node.output[0]) != FLOAT:
            return
        if node.op_type == "Cast":
            next(attribute for attribute in node.attribute if attribute.name == "to").i = FLOAT16
        if node.op_type == "ConstantOfShape":
            given = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            value = (
                onnx.numpy_helper.to_array(given) if given is not None else np.zeros(1)
            )  # the default is a float32 zero
            del node.attribute[:]
            half = onnx.numpy_helper.from_array(np.asarray(value, np.float16))
            node.attribute.append(onnx.helper.make_attribute("value", half))

    def _cast_output(self, name: str) -> None:
        import onnx

        maker, half = self.view.maker[name], f"{name}_half"
        maker.output[list(maker.output).index(name)] = half
        for user in self.view.users[name]:
            user.input[list(user.input).index(name)] = half
        cast = onnx.helper.make_node("Cast", [half], [name], name=f"{name}_to_float32", to=FLOAT)
        self.view.graph.node.append(cast)


def float_scores(model: Any) -> None:
    """Let the last softmax compute in float32: the cast behind it moves in front of it.

    FP16 has 11 bits: probabilities of a thousand classes would lose their small ones.
    """
    view = View(model)
    for value in view.graph.output:
        cast = view.maker.get(value.name)
        if cast is None or cast.op_type != "Cast" or view.types.get(cast.input[0]) not in (FLOAT16, BFLOAT16):
            continue
        softmax = view.maker.get(cast.input[0])
        if softmax is not None and softmax.op_type in _SCORES and len(view.users[softmax.output[0]]) == 1:
            graph_output = cast.output[0]
            cast.output[0] = f"{graph_output}_cast_away"
            _float_from(view, softmax)
            softmax.output[0] = graph_output
    drop_unused(model)
    sort_nodes(model)
    del model.graph.value_info[:]


def _float_from(view: View, node: Any) -> None:
    """Make one node compute in float32, and the nodes before it that belong to the scores."""
    import onnx

    for k, name in enumerate(node.input):
        if view.types.get(name) not in (FLOAT16, BFLOAT16):
            continue
        before = view.maker.get(name)
        wide = f"{name}_float"
        if name in view.constants:
            view.graph.initializer.append(onnx.numpy_helper.from_array(view.array(name).astype(np.float32), wide))
            node.input[k] = wide
        elif before is not None and before.op_type in _SCORES and len(view.users[name]) == 1:
            _float_from(view, before)
        else:
            view.graph.node.append(onnx.helper.make_node("Cast", [name], [wide], name=wide, to=FLOAT))
            node.input[k] = wide
