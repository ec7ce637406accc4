"""Reading and editing ONNX graphs that hold QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core import env

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# these move values and compute nothing, so that a quantised tensor stays one
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
FLOAT, UINT8, INT8, FLOAT16, BFLOAT16 = 1, 2, 3, 10, 16  # onnx.TensorProto.DataType
FLOATS = {FLOAT: "float32", FLOAT16: "float16", BFLOAT16: "bfloat16", 11: "float64"}
SMALLEST_HALF = float(np.finfo(np.float16).smallest_normal)  # 6.104e-5
FP32_ON_PURPOSE = "imgcls_fast.fp32_nodes"  # in the model's metadata: names, one per line


@dataclass(frozen=True)
class Quantized:
    """One pair Q -> DQ, or a lone DQ of stored INT8 values.

    Args:
        source: the float tensor in front of the Q; of a lone DQ the INT8 tensor.
        scale, zero: names of the constants of the DQ ("" where there is no zero point).
        axis: the axis of a per-channel scale.
        quantize: the Q node, or None.
        dequantize: the DQ node.
    """

    source: str
    scale: str
    zero: str
    axis: int
    quantize: Any
    dequantize: Any


class View:
    """Who makes and who uses each tensor of a graph. After an edit make a new view.

    Args:
        model: an onnx.ModelProto.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constants |= {
            node.output[0]: node.attribute[0].t
            for node in self.nodes
            if node.op_type == "Constant" and node.attribute[0].HasField("t")
        }
        self.maker = {output: node for node in self.nodes for output in node.output}
        self.users: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.users[name].append(node)

    def op(self, tensor: str) -> str:
        """The operator that makes a tensor; "" for inputs and constants."""
        node = self.maker.get(tensor)
        return node.op_type if node is not None else ""

    def array(self, name: str) -> np.ndarray:
        """The value of a constant."""
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self.constants[name]))

    @cached_property
    def types(self) -> dict[str, int]:
        """Element type of every tensor whose type is known."""
        import onnx

        try:
            graph = onnx.shape_inference.infer_shapes(self.model).graph
        except onnx.shape_inference.InferenceError:  # of an operator that ONNX does not know
            graph = self.graph
        values = [*graph.input, *graph.output, *graph.value_info]
        found = {value.name: int(value.type.tensor_type.elem_type) for value in values}
        return found | {name: int(tensor.data_type) for name, tensor in self.constants.items()}

    def behind(self, tensor: str) -> str:
        """The tensor in front of the operators that only move values."""
        while self.op(tensor) in MOVES:
            tensor = self.maker[tensor].input[0]
        return tensor

    def quantized(self, tensor: str) -> Quantized | None:
        """The pair that a tensor comes from, also through operators that only move values; None: it is not quantised."""
        dequantize = self.maker.get(self.behind(tensor))
        if dequantize is None or dequantize.op_type != DEQUANTIZE:
            return None
        quantize = self.maker.get(dequantize.input[0])
        if quantize is not None and quantize.op_type == "Clip":  # PyTorch's per-channel quantiser clips to its range
            quantize = self.maker.get(quantize.input[0])
        if quantize is not None and quantize.op_type != QUANTIZE:
            quantize = None
        source = quantize.input[0] if quantize is not None else dequantize.input[0]
        zero = dequantize.input[2] if len(dequantize.input) > 2 else ""
        return Quantized(source, dequantize.input[1], zero, attribute(dequantize, "axis", 1), quantize, dequantize)

    def layers(self) -> Iterator[tuple[Any, list[Quantized | None]]]:
        """Every Conv, ConvTranspose, Gemm and MatMul with what its two operands come from."""
        for node in self.nodes:
            if node.op_type in WEIGHTED:
                yield node, [self.quantized(name) for name in node.input[:2]]

    def int8_layers(self) -> list[str]:
        """Names of the layers that have both operands quantised."""
        return [node.name for node, operands in self.layers() if all(operands)]


def attribute(node: Any, name: str, default: Any) -> Any:
    """An attribute of a node, or its default."""
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def load(path: Path) -> Any:
    """An onnx.ModelProto with its weights.

    Raises:
        HardwareError: H004 when onnx is missing.
    """
    onnx = env.require("onnx", "onnx", "reading an ONNX graph")
    return onnx.load(str(path))


def opset(model: Any) -> int:
    """The version of the standard operators."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def holds_quantization(model: Any) -> bool:
    """Whether a graph has Q/DQ already, as after quantisation-aware training."""
    return any(node.op_type in (QUANTIZE, DEQUANTIZE) for node in model.graph.node)


def attention_products(view: View) -> list[str]:
    """Names of the two MatMuls around each Softmax, and of each Attention: what makes a graph a transformer."""
    found: list[str] = []
    for node in view.nodes:
        if node.op_type == "Attention":
            found.append(node.name)
        if node.op_type != "Softmax":
            continue
        before = node.input[0]
        while view.op(before) in (*MOVES, "Add", "Mul", "Div", "Where", "Cast"):  # scale, mask, position bias
            before = next((n for n in view.maker[before].input if n not in view.constants), "")
        after = [user for user in view.users[node.output[0]] if user.op_type == "MatMul"]
        if view.op(before) == "MatMul" and after:
            found += [view.maker[before].name, *(user.name for user in after)]
    return found


def metadata(model: Any) -> dict[str, str]:
    """The entries of the model's metadata."""
    return {entry.key: entry.value for entry in model.metadata_props}


def add_metadata(model: Any, entries: dict[str, str]) -> None:
    """Write entries into the model's metadata; empty ones are left out."""
    import onnx

    onnx.helper.set_model_props(model, {k: v for k, v in (metadata(model) | entries).items() if v})


def drop_unused(model: Any) -> None:
    """Remove nodes, constants and operator-set imports that nothing needs.

    ONNX Runtime's preparation adds imports of eight domains (com.microsoft, org.pytorch.aten, ...) that no node is of.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    while True:
        used = outputs | {name for node in graph.node for name in node.input}
        dead = [node for node in graph.node if not used.intersection(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    domains = {node.domain if node.domain != "ai.onnx" else "" for node in graph.node}
    kept = [(entry.domain, entry.version) for entry in model.opset_import if entry.domain in domains]
    del model.opset_import[:]
    for domain, version in kept:
        model.opset_import.add(domain=domain, version=version)


def sort_nodes(model: Any) -> None:
    """Put every node behind the ones that it needs, in the old order where possible."""
    graph = model.graph
    maker = {output: k for k, node in enumerate(graph.node) for output in node.output}
    nodes, done, order = list(graph.node), set[int](), list[Any]()
    for first in range(len(nodes)):
        stack = [first]
        while stack:
            k = stack[-1]
            waits = [maker[n] for n in nodes[k].input if n in maker and maker[n] not in done] if k not in done else []
            if waits:
                stack.extend(waits)
                continue
            stack.pop()
            if k not in done:
                done.add(k)
                order.append(nodes[k])
    ordered = [type(node).FromString(node.SerializeToString()) for node in order]
    del graph.node[:]
    graph.node.extend(ordered)


def clamp_scales(model: Any) -> dict[str, Any]:
    """Raise FP16 scales below the smallest normal number (6.104e-5) to it; also those that have become zero.

    A convolution channel that batch normalisation has almost switched off gets a scale that FP16 holds with few bits or
    not at all; the GPU may flush it to zero, and a division by it gives infinities. The larger scale makes the few values of
    that channel coarser, which nobody sees.

    Returns:
        count (channels changed) and worst (the smallest scale found, 0.0 where FP16 holds nothing of it; None: none was changed).
    """
    from onnx import numpy_helper

    view = View(model)
    scales = {node.input[1] for node in view.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)}
    pairs: dict[str, np.ndarray] = {}  # by the DQ's scale: the Q holds a copy of it
    for name in scales & view.constants.keys():
        tensor = view.constants[name]
        if tensor.data_type != FLOAT16:
            continue
        value = view.array(name)
        low = (value < SMALLEST_HALF) & (value >= 0)
        if low.any():
            tensor.CopyFrom(numpy_helper.from_array(np.where(low, np.float16(SMALLEST_HALF), value), tensor.name))
            pairs[name] = value[low]
    changed = [pairs[node.input[1]] for node in view.nodes if node.op_type == DEQUANTIZE and node.input[1] in pairs]
    values = np.concatenate([part.reshape(-1) for part in changed]) if changed else np.zeros(0)
    return {"count": int(values.size), "worst": float(values.min()) if values.size else None}


def bad_scales(model: Any) -> list[str]:
    """Names of the scales that are NaN, infinite, zero or negative: the calibration saw such values."""
    view = View(model)
    scales = [node.input[1] for node in view.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]
    known = [name for name in dict.fromkeys(scales) if name in view.constants]
    return [name for name in known if not (np.isfinite(v := view.array(name).astype(np.float64)) & (v > 0)).all()]


ACTIVATIONS = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Mish", "Tanh",
)  # fmt: skip


def split_activations(view: View) -> Iterator[tuple[Any, Quantized]]:
    """Activations that are kept from being fused with the layer before them by a pair of Q and DQ."""
    for node in view.nodes:
        pair = view.quantized(node.input[0]) if node.op_type in ACTIVATIONS else None
        if pair and view.op(pair.source) in (*WEIGHTED, "BatchNormalization") and len(view.users[pair.source]) == 1:
            yield node, pair


def double_additions(view: View) -> Iterator[tuple[Any, list[Quantized]]]:
    """Additions of two activations that are both quantised."""
    for node in view.nodes:
        if node.op_type in ("Add", "Sum") and len(node.input) == 2:
            pairs = [
                pair for name in node.input if (pair := view.quantized(name)) and pair.source not in view.constants
            ]
            if len(pairs) == 2:
                yield node, pairs


def quantized_branches(view: View) -> Iterator[tuple[Any, int, Quantized]]:
    """Additions that could be fused with a layer, were it not for a pair between the two, while the other side has none."""
    for node in view.nodes:
        if node.op_type not in ("Add", "Sum") or len(node.input) != 2:
            continue
        for k, name in enumerate(node.input):
            pair, other = view.quantized(name), node.input[1 - k]
            if pair is None or view.op(pair.source) not in WEIGHTED or other in view.constants:
                continue
            alone = all(len(view.users[tensor]) == 1 for tensor in (pair.source, pair.dequantize.output[0]))
            if alone and view.quantized(other) is None and view.op(other) not in WEIGHTED:
                yield node, k, pair


def quantized_softmaxes(view: View) -> Iterator[Any]:
    """Q nodes behind a softmax."""
    for node in view.nodes:
        if node.op_type == QUANTIZE and view.op(view.behind(node.input[0])) == "Softmax":
            yield node


def tidy(model: Any) -> dict[str, int]:
    """Take away Q/DQ that quantizers place and that cost accuracy, or keep TensorRT from fusing layers.

    ModelOpt 0.47 quantises between a convolution and a HardSwish, which it does not know as an activation; both sides of the
    18 residual additions of torchvision's ConvNeXt-T; and the softmax of ResNeSt, which is no attention between products.

    Returns:
        how many of each kind.
    """
    view = View(model)
    activations = [(node, 0, pair) for node, pair in split_activations(view)]
    additions = list(quantized_branches(view))
    for node, pairs in double_additions(view):  # the side that nobody else reads can be fused with the addition
        layers = [k for k, pair in enumerate(pairs) if view.op(pair.source) in WEIGHTED]
        alone = [k for k, pair in enumerate(pairs) if len(view.users[pair.dequantize.output[0]]) == 1]
        k = next(iter(layers + alone), 0)
        additions.append((node, k, pairs[k]))
    for node, k, pair in activations + additions:
        _bypass(view, node, k, pair)
    softmaxes = list(quantized_softmaxes(view))
    for quantize in softmaxes:
        for dequantize in view.users[quantize.output[0]]:
            for user in view.users[dequantize.output[0]]:
                for k, name in enumerate(user.input):
                    user.input[k] = quantize.input[0] if name == dequantize.output[0] else name
    drop_unused(model)
    return {"activations": len(activations), "additions": len(additions), "softmaxes": len(softmaxes)}


def free_layers(model: Any, names: Collection[str]) -> list[str]:
    """Let layers compute without quantisation: their operands are taken from in front of the Q.

    What makes a layer bad in INT8 is most often the range of its input tensor. So poolings before it are freed as well, and
    additions that read the same tensor through a Q; other layers that read it are not, they have their own name.

    Returns:
        names of everything that was freed.

    Raises:
        KeyError: no layer has that name.
    """
    view = View(model)
    by_name = {node.name: node for node in view.nodes}
    freed: list[str] = []
    waiting = [by_name[name] for name in names]
    while waiting:
        node = waiting.pop()
        if node.name in freed:
            continue
        freed.append(node.name)
        for k, name in enumerate(node.input):
            pair = view.quantized(name)
            source = pair.source if pair is not None else name
            if pair is not None and pair.quantize is not None:
                _bypass(view, node, k, pair)
            if source not in view.constants:
                waiting += [*_additions_of(view, source), *([view.maker[source]] if view.op(source) in POOLS else [])]
    drop_unused(model)
    return freed


def _additions_of(view: View, tensor: str) -> list[Any]:
    """Additions that read a tensor through a Q."""
    pairs = [dq for q in view.users[tensor] if q.op_type == QUANTIZE for dq in view.users[q.output[0]]]
    return [user for dq in pairs for user in view.users[dq.output[0]] if user.op_type == "Add"]


def _bypass(view: View, node: Any, k: int, pair: Quantized) -> None:
    """Input `k` of a node no longer comes through a pair; what moves values between the two stays."""
    last, position = node, k
    while view.maker[last.input[position]] is not pair.dequantize:
        last, position = view.maker[last.input[position]], 0
    last.input[position] = pair.source
