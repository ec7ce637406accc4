"""What TensorRT refuses or runs slowly, looked for in an ONNX file without TensorRT: one function for each rule, in one table.

The rules are for the files that `export` writes (one image input, one score output). They are about the graph; whether INT8
keeps the accuracy is for the gate to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..core import env
from ..core.errors import ExportError
from ..core.onnx_bytes import check_onnx
from .qdq import (
    BFLOAT16,
    DEQUANTIZE,
    FLOAT,
    FLOAT16,
    FLOATS,
    FP32_ON_PURPOSE,
    INT8,
    MOVES,
    QUANTIZE,
    SMALLEST_HALF,
    UINT8,
    WEIGHTED,
    Quantized,
    View,
    attribute,
    double_additions,
    metadata,
    opset,
    quantized_branches,
    quantized_softmaxes,
    split_activations,
)

Found = Iterator[tuple[str, str]]  # (name of the node or tensor, what is wrong with it)


@dataclass(frozen=True)
class Finding:
    """One place where a graph breaks a rule.

    Args:
        rule: id of the rule.
        node: name of the node or tensor ("" for the whole file).
        message: what is there.
    """

    rule: str
    node: str
    message: str


@dataclass(frozen=True)
class Rule:
    """One demand on a graph.

    Args:
        id: short name, as findings carry it.
        sentence: the demand.
        source: where the rule comes from.
        check: finds the places that break it.
        precisions: the files that it is about.
    """

    id: str
    sentence: str
    source: str
    check: Callable[[View], Found]
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")


def lint(path: Path, precision: str) -> list[Finding]:
    """Check a file against every rule for its precision.

    Args:
        precision: fp32, fp16, bf16 or int8; what the file is meant to be.

    Raises:
        HardwareError: H004 when onnx is missing.
        ExportError: E001 when the file is not an ONNX graph.
    """
    onnx = env.require("onnx", "onnx", "checking an exported graph")
    decode_error: type[Exception] = import_module("google.protobuf.message").DecodeError
    try:
        seen = check_onnx(path)
        view = View(onnx.load(str(path), load_external_data=False))  # the paths of outside data may lead anywhere
    except (decode_error, ValueError, OSError) as error:
        raise ExportError(
            "E001", f"{path} is not a readable ONNX graph: {error}", try_="imgcls-fast export --onnx"
        ) from error
    if not view.nodes:
        raise ExportError("E001", f"{path} holds no ONNX graph", try_="imgcls-fast export --onnx")
    outside = [Finding("external-data", name, _OUTSIDE) for name in seen.outside]  # wherever they stand
    return outside or lint_view(view, precision)


def lint_view(view: View, precision: str) -> list[Finding]:
    """The same for a graph in memory."""
    rules = [rule for rule in RULES if precision in rule.precisions]
    return [Finding(rule.id, node, message) for rule in rules for node, message in rule.check(view)]


def demand_clean(findings: list[Finding], path: Path) -> None:
    """Refuse a graph with findings.

    Raises:
        ExportError: E002, naming the first places and the rules.
    """
    if not findings:
        return
    first = findings[0]
    rule = next(rule for rule in RULES if rule.id == first.rule)
    more = [f"{f.node}: {f.message} [{f.rule}]" for f in findings[1:4]]
    rest = f"; and {len(findings) - 4} more" if len(findings) > 4 else ""
    raise ExportError(
        "E002",
        f"{path.name} breaks {len({f.rule for f in findings})} rule(s) in {len(findings)} place(s): "
        + "; ".join([f"{first.node}: {first.message} [{first.rule}]", *more])
        + rest,
        where=str(path),
        why=f"{rule.sentence} ({rule.source})",
        try_="imgcls-fast export --onnx --precision fp16"
        if rule.precisions == _INT8
        else "imgcls-fast export --onnx --opset 20",
    )


# ---- quantisation ----


def _pairs(view: View) -> Iterator[Any]:
    return (node for node in view.nodes if node.op_type in (QUANTIZE, DEQUANTIZE))


def _zero_point(view: View) -> Found:
    for node in _pairs(view):
        if len(node.input) < 3 or node.input[2] not in view.constants:
            continue
        zero = view.array(node.input[2])
        if view.constants[node.input[2]].data_type != INT8:
            yield node.name, f"the zero point is of type {zero.dtype}, not int8"
        elif np.any(zero != 0):
            yield node.name, f"a zero point is {int(zero.reshape(-1)[np.flatnonzero(zero)[0]])}, not 0"


def _missing_zero_point(view: View) -> Found:
    for node in _pairs(view):
        given = len(node.input) > 2 and node.input[2]
        if node.op_type == QUANTIZE and not given and attribute(node, "output_dtype", 0) != INT8:
            yield node.name, "no zero point: the values are uint8 by default"
        if (
            node.op_type == DEQUANTIZE
            and not given
            and view.types.get(node.input[0]) == UINT8
            and not view.op(node.input[0])
        ):
            yield node.name, "no zero point, and the stored values are uint8"


def _dynamic_scale(view: View) -> Found:
    for node in _pairs(view):
        for name in node.input[1:3]:
            if name and name not in view.constants:
                yield node.name, f"{name} is computed by {view.op(name) or 'the caller'} while the network runs"


def _scales(view: View) -> Iterator[tuple[Any, np.ndarray]]:
    for node in _pairs(view):
        if node.input[1] in view.constants and view.constants[node.input[1]].data_type in FLOATS:
            yield node, np.asarray(view.array(node.input[1])).astype(np.float64)


def _scale_value(view: View) -> Found:
    for node, scale in _scales(view):
        wrong = scale[~(np.isfinite(scale) & (scale > 0))]
        if wrong.size:
            yield (
                node.name,
                f"{wrong.size} of {scale.size} scales are not positive numbers, first {wrong.reshape(-1)[0]}",
            )


def _subnormal_scale(view: View) -> Found:
    for node, scale in _scales(view):
        low = scale[(scale > 0) & (scale < SMALLEST_HALF)]
        if low.size and view.constants[node.input[1]].data_type == FLOAT16:
            yield node.name, f"{low.size} of {scale.size} FP16 scales are subnormal, smallest {low.min():.1e}"


def _scale_opset(view: View) -> Found:
    if opset(view.model) < 19:
        for node in _pairs(view):
            if node.input[1] in view.constants and view.constants[node.input[1]].data_type in (FLOAT16, BFLOAT16):
                yield node.name, f"an FP16 scale in opset {opset(view.model)}"


def _is_weight(view: View, pair: Quantized) -> bool:
    return pair.source in view.constants


def _activation_per_channel(view: View) -> Found:
    for node in view.nodes:
        if node.op_type == DEQUANTIZE and (pair := view.quantized(node.output[0])) is not None:
            size = view.array(pair.scale).size if pair.scale in view.constants else 1
            if size > 1 and not _is_weight(view, pair):
                yield node.name, f"{size} scales for the activation {pair.source}"


def _weight_axis(view: View) -> Found:
    for node, operands in view.layers():
        pair, axis = operands[1] if len(operands) > 1 else None, 1 if node.op_type == "ConvTranspose" else 0
        if pair and node.op_type.startswith("Conv") and pair.scale in view.constants and _is_weight(view, pair):
            rank = len(view.constants[pair.source].dims)
            if view.array(pair.scale).size > 1 and pair.axis % rank != axis:
                yield node.name, f"the weight's scales go along axis {pair.axis}, not {axis}"


def _half_quantized(view: View) -> Found:
    for node, operands in view.layers():
        if any(operands) and not all(operands):
            bare = node.input[operands.index(None)]
            yield node.name, f"{node.op_type} has a quantised operand and one that is not: {bare}"


def _nothing_quantized(view: View) -> Found:
    if not view.int8_layers():
        yield "", "no Conv, Gemm or MatMul is quantised"


def _residual_add(view: View) -> Found:
    for node, _ in double_additions(view):
        yield node.name, "both inputs are quantised; the branch that ends in the layer to fuse with must not be"
    for node, k, _ in quantized_branches(view):
        yield node.name, f"the layer's branch is quantised and the residual {node.input[1 - k]} is not"


def _before_activation(view: View) -> Found:
    for node, pair in split_activations(view):
        yield node.name, f"Q/DQ between {view.op(pair.source)} and {node.op_type} keep the two from being fused"


def _softmax(view: View) -> Found:
    for node in quantized_softmaxes(view):
        yield node.name, "probabilities in steps of 1/127: an attention spread over 197 tokens rounds to 0 or 2/127"


def _rescale(view: View) -> Found:
    for node in view.nodes:
        if node.op_type not in (*MOVES, "Concat", "Split", "Slice"):
            continue
        data = node.input if node.op_type == "Concat" else node.input[:1]
        before = [view.quantized(name) for name in data if name not in view.constants]
        after = [user for name in node.output for user in view.users[name] if user.op_type == QUANTIZE]
        names = [pair.scale for pair in before if pair] + [user.input[1] for user in after]
        scales = {float(view.array(name).reshape(-1)[0]) for name in names if name in view.constants}
        if before and all(before) and len(scales) > 1 and (after or node.op_type == "Concat"):
            yield (
                node.name,
                f"{node.op_type} moves values between {len(scales)} different scales: a pass over memory of its own",
            )


# ---- precision ----


def _fp32_island(view: View) -> Found:
    wanted = set(metadata(view.model).get(FP32_ON_PURPOSE, "").split("\n"))
    for node, operands in view.layers():
        full = view.types.get(node.input[0]) == FLOAT and not any(operands)
        if full and node.name not in wanted:
            yield node.name, f"{node.op_type} computes in float32"
    for node in view.nodes:
        if node.op_type == "Attention" and view.types.get(node.input[0]) == FLOAT and node.name not in wanted:
            yield node.name, "Attention computes in float32"


def _batch_norm(view: View) -> Found:
    for node in view.nodes:
        if node.op_type == "BatchNormalization":
            before = node.input[0]
            if view.op(before) in WEIGHTED and len(view.users[before]) == 1:
                yield node.name, f"not folded into {view.maker[before].name or view.op(before)}"


# ---- the file ----


def _uint8(view: View) -> Found:
    given = [value for value in view.graph.input if value.name not in view.constants]
    for value in given:
        users = view.users[value.name]
        kind = value.type.tensor_type.elem_type
        if value.name == "pixels" and kind != UINT8:
            yield value.name, f"pixels are of type {FLOATS.get(kind, kind)}, not uint8"
        elif kind == UINT8 and [user.op_type for user in users] != ["Cast"]:
            yield (
                value.name,
                f"the bytes go to {', '.join(user.op_type for user in users) or 'nothing'}, not to one Cast alone",
            )
        elif kind == UINT8 and attribute(users[0], "to", 0) not in (FLOAT, FLOAT16, BFLOAT16):
            yield users[0].name, "the bytes are not cast to a float"


# "N" in the table of operators of the parser of TensorRT 10.15
_LACKING = frozenset(
    """
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence
    ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial
    NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss
    SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
    """.split()  # noqa: SIM905 (a list of forty names is read more easily without quotes)
)


def _operator(view: View) -> Found:
    for node in view.nodes:
        if node.domain in ("", "ai.onnx") and node.op_type in _LACKING:
            yield node.name, f"TensorRT has no {node.op_type}"


def _domain(view: View) -> Found:
    for node in view.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield node.name, f"{node.domain}.{node.op_type} is not standard ONNX"
    used = {node.domain for node in view.nodes}
    for entry in view.model.opset_import:
        if entry.domain not in ("", "ai.onnx") and entry.domain not in used:
            yield "", f"the operator set {entry.domain} is imported and not used"
    for function in view.model.functions:
        yield function.name, "a local function"


def _opset(view: View) -> Found:
    version = opset(view.model)
    if not 9 <= version <= 25:
        yield "", f"opset {version}"


_OUTSIDE = "its values are kept outside the file"


def _external_data(view: View) -> Found:
    for tensor in view.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            yield tensor.name, _OUTSIDE


def _dynamic_size(view: View) -> Found:
    for value in [*view.graph.input, *view.graph.output]:
        for k, dim in enumerate(value.type.tensor_type.shape.dim):
            if k and not dim.dim_value:
                yield value.name, f"dimension {k} is not fixed ({dim.dim_param or 'unknown'})"


_GUIDE = "NVIDIA TensorRT, Working with Quantized Types"
_PARSER = "operators.md of the ONNX parser of TensorRT 10.15"
_INT8 = ("int8",)
_REDUCED = ("fp16", "bf16", "int8")

RULES: tuple[Rule, ...] = (
    Rule("zero-point", "Zero points are int8 and zero.", _PARSER, _zero_point),
    Rule(
        "missing-zero-point",
        "Every Q declares its values as int8.",
        "ONNX QuantizeLinear: uint8 by default",
        _missing_zero_point,
    ),
    Rule(
        "dynamic-scale",
        "Scales are constants.",
        "TensorRT has no DynamicQuantizeLinear (" + _PARSER + ")",
        _dynamic_scale,
    ),
    Rule("scale-value", "Scales are positive numbers.", _GUIDE, _scale_value),
    Rule(
        "subnormal-scale",
        "FP16 scales are at least 6.104e-5.",
        "IEEE 754 binary16: smaller ones lose bits",
        _subnormal_scale,
    ),
    Rule("scale-opset", "FP16 scales need opset 19.", "ONNX QuantizeLinear-19", _scale_opset),
    Rule("activation-per-channel", "Activations have one scale.", _GUIDE, _activation_per_channel),
    Rule("weight-axis", "Scales of a convolution's weight go along its output channels.", _GUIDE, _weight_axis),
    Rule("half-quantised", "A layer has both operands quantised or none.", _GUIDE, _half_quantized),
    Rule("nothing-quantised", "An INT8 file has an INT8 layer.", "imgcls-fast", _nothing_quantized, _INT8),
    Rule("residual-add", "Of a residual addition only the residual is quantised.", _GUIDE, _residual_add),
    Rule("before-activation", "Nothing is quantised between a layer and its activation.", _GUIDE, _before_activation),
    Rule("softmax", "A softmax is not quantised.", "measured: 9.1 dB with, 28.1 dB without on ViT-Tiny", _softmax),
    Rule("rescale", "Values are moved at one scale.", _GUIDE, _rescale),
    Rule(
        "fp32-island",
        "Layers compute in the precision of the file.",
        "strong typing: TensorRT obeys the graph",
        _fp32_island,
        _REDUCED,
    ),
    Rule("batch-norm", "Batch normalisation is folded into the layer before it.", _GUIDE, _batch_norm),
    Rule(
        "uint8",
        "The first and only user of the bytes is a Cast to a float.",
        "DataType.UINT8 of TensorRT 11.4; " + _PARSER,
        _uint8,
    ),
    Rule("operator", "TensorRT's parser has every operator.", _PARSER, _operator),
    Rule("domain", "All operators are standard ONNX.", _PARSER, _domain),
    Rule("opset", "The operator set is 9 to 25.", "TensorRT 10.1: 9 to 20; 10.15: to 24; 11: to 25", _opset),
    Rule("external-data", "The weights are inside the file.", "one file, one digest", _external_data),
    Rule("dynamic-size", "Only the batch is dynamic.", "one optimisation profile for each engine", _dynamic_size),
)
