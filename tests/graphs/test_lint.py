"""The lint: every rule finds its own planted defect and nothing else, and clean graphs have no findings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from imgcls_fast.graphs.lint import RULES, Finding, demand_clean, lint, lint_view
from imgcls_fast.graphs.qdq import FLOAT, FLOAT16, UINT8, View, tidy

HALF = np.float16


class Graph:
    """A small INT8 network with FP16 around it: two convolutions, a residual, a classifier, a softmax in float32."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        draw = np.random.default_rng(0)
        self.add("Cast", ["pixels"], "bytes", to=FLOAT16)
        self.add("Transpose", ["bytes"], "nchw", perm=[0, 3, 1, 2])
        self.add("Mul", ["nchw", self.constant("scale", np.array(1 / 64, HALF))], "normalised")
        self.pair("normalised", 0.03)
        for name, shape in (("first", (16, 3, 3, 3)), ("second", (16, 16, 3, 3))):
            self.constant(f"{name}_w", draw.normal(0, 0.2, shape).astype(HALF))
            self.pair(f"{name}_w", np.full(16, 0.005), axis=0)
        self.add("Conv", ["normalised_dq", "first_w_dq"], "conv1", pads=[1, 1, 1, 1])
        self.add("Relu", ["conv1"], "relu1")
        self.pair("relu1", 0.05)
        self.add("Conv", ["relu1_dq", "second_w_dq"], "conv2", pads=[1, 1, 1, 1])
        self.add("Add", ["conv2", "relu1_dq"], "sum")
        self.add("Relu", ["sum"], "relu2")
        self.add("GlobalAveragePool", ["relu2"], "pooled")
        self.add("Flatten", ["pooled"], "flat")
        self.add("Gemm", ["flat", self.constant("head", draw.normal(0, 1, (16, 5)).astype(HALF))], "logits")
        self.add("Cast", ["logits"], "wide", to=FLOAT)
        self.add("Softmax", ["wide"], "scores", axis=1)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
        node = onnx.helper.make_node(op, list(inputs), [output], name=f"node_{output}", **attributes)
        self.nodes.append(node)
        return node

    def pair(self, tensor: str, scale: Any, axis: int | None = None, dtype: Any = HALF) -> str:
        """Q and DQ behind a tensor; the name of what comes out."""
        scale = np.asarray(scale, dtype)
        for k in (1, 2):  # ModelOpt gives the Q and the DQ constants of their own
            self.constant(f"{tensor}_s{k}", scale)
            self.constant(f"{tensor}_z{k}", np.zeros(scale.shape, np.int8))
        more = {} if axis is None else {"axis": axis}
        self.add("QuantizeLinear", [tensor, f"{tensor}_s1", f"{tensor}_z1"], f"{tensor}_q", **more)
        self.add("DequantizeLinear", [f"{tensor}_q", f"{tensor}_s2", f"{tensor}_z2"], f"{tensor}_dq", **more)
        return f"{tensor}_dq"

    def node(self, output: str) -> Any:
        return next(node for node in self.nodes if output in node.output)

    def scale_of(self, tensor: str, value: Any, dtype: Any = HALF) -> None:
        for k in (1, 2):
            self.constants[f"{tensor}_s{k}"] = np.asarray(value, dtype)
            self.constants[f"{tensor}_z{k}"] = np.zeros(np.shape(value), np.int8)

    def model(self, opset: int = 20) -> Any:
        sizes = ["batch", 32, 32, 3]
        graph = onnx.helper.make_graph(
            self.nodes,
            "small",
            [onnx.helper.make_tensor_value_info("pixels", UINT8, sizes)],
            [onnx.helper.make_tensor_value_info("scores", FLOAT, ["batch", 5])],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def zero_point_of_three(g: Graph) -> None:
    g.constants["relu1_z1"] = g.constants["relu1_z2"] = np.array(3, np.int8)


def zero_point_of_uint8(g: Graph) -> None:
    g.constants["relu1_z1"] = g.constants["relu1_z2"] = np.array(0, np.uint8)


def no_zero_point(g: Graph) -> None:
    for name in ("relu1_q", "relu1_dq"):
        del g.node(name).input[2]


def scale_computed_at_run_time(g: Graph) -> None:
    k = g.nodes.index(g.node("relu1_q"))
    g.nodes.insert(k, onnx.helper.make_node("ReduceMax", ["relu1"], ["largest"], name="node_largest", keepdims=0))
    g.node("relu1_q").input[1] = g.node("relu1_dq").input[1] = "largest"


def scale_of_nan(g: Graph) -> None:
    g.scale_of("relu1", np.nan)


def scale_of_zero(g: Graph) -> None:
    g.scale_of("second_w", [0.0, *[0.005] * 15])


def subnormal_scale(g: Graph) -> None:
    g.scale_of("second_w", [1e-6, *[0.005] * 15])


def activation_with_sixteen_scales(g: Graph) -> None:
    g.scale_of("relu1", np.full(16, 0.05))
    for name in ("relu1_q", "relu1_dq"):
        g.node(name).attribute.append(onnx.helper.make_attribute("axis", 1))


def weight_scales_along_the_inputs(g: Graph) -> None:
    for name in ("second_w_q", "second_w_dq"):
        g.node(name).attribute[0].i = 1


def weight_left_alone(g: Graph) -> None:
    g.node("conv2").input[1] = "second_w"


def nothing_quantized(g: Graph) -> None:
    g.node("conv1").input[:] = ["normalised", "first_w"]
    g.node("conv2").input[:] = ["relu1", "second_w"]
    g.node("sum").input[:] = ["conv2", "relu1"]
    g.nodes = [node for node in g.nodes if "Quant" not in node.op_type and "Dequant" not in node.op_type]


def insert_pair(g: Graph, tensor: str, user: str, scale: float, dtype: Any = HALF) -> None:
    """A pair between a tensor and one of its users."""
    place, k = g.nodes.index(g.node(user)), list(g.node(user).input).index(tensor)
    behind, g.nodes = g.nodes[place:], g.nodes[:place]
    behind[0].input[k] = g.pair(tensor, scale, dtype=dtype)
    g.nodes += behind


def residual_and_branch_quantized(g: Graph) -> None:
    insert_pair(g, "conv2", "sum", 0.05)


def branch_quantized_in_place_of_the_residual(g: Graph) -> None:
    insert_pair(g, "conv2", "sum", 0.05)
    g.node("sum").input[1] = "relu1"


def pair_before_the_activation(g: Graph) -> None:
    insert_pair(g, "conv1", "relu1", 0.05)


def softmax_quantized(g: Graph) -> None:
    g.node("scores").output[0] = "probabilities"
    g.pair("probabilities", 1 / 127, dtype=np.float32)
    g.node("probabilities_dq").output[0] = "scores"


def moved_between_two_scales(g: Graph) -> None:
    place = g.nodes.index(g.node("conv1"))
    behind, g.nodes = g.nodes[place:], g.nodes[:place]
    g.add("Transpose", ["normalised_dq"], "turned", perm=[0, 1, 3, 2])
    behind[0].input[0] = g.pair("turned", 0.04)
    g.nodes += behind


def classifier_in_float32(g: Graph) -> None:
    place = g.nodes.index(g.node("logits"))
    g.constants["head"] = g.constants["head"].astype(np.float32)
    g.nodes[place : place + 2] = [
        onnx.helper.make_node("Cast", ["flat"], ["flat32"], name="node_flat32", to=FLOAT),
        onnx.helper.make_node("Gemm", ["flat32", "head"], ["wide"], name="node_wide"),
    ]


def batch_norm_left(g: Graph) -> None:
    for name in ("gain", "shift", "mean", "variance"):
        g.constant(name, np.ones(16, HALF))
    node = onnx.helper.make_node(
        "BatchNormalization", ["conv2", "gain", "shift", "mean", "variance"], ["normed"], name="node_normed"
    )
    g.nodes.insert(g.nodes.index(g.node("sum")), node)
    g.node("sum").input[0] = "normed"


def bytes_are_transposed(g: Graph) -> None:
    g.nodes[:2] = [
        onnx.helper.make_node("Transpose", ["pixels"], ["turned"], name="node_turned", perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Cast", ["turned"], ["nchw"], name="node_nchw", to=FLOAT16),
    ]


def shape_of_the_bytes(g: Graph) -> None:
    g.add("Shape", ["pixels"], "sizes")


def unknown_operator(g: Graph) -> None:
    g.nodes.append(onnx.helper.make_node("DynamicQuantizeLinear", ["wide"], ["a", "b", "c"], name="node_dynamic"))


def foreign_domain(g: Graph) -> None:
    g.nodes.append(onnx.helper.make_node("FusedGelu", ["wide"], ["gelu"], name="node_gelu", domain="com.microsoft"))


def cast_behind_the_layers(g: Graph) -> None:
    """Below opset 19 a DQ gives float32 whatever its scale is; the classifier shall be FP16 all the same."""
    g.nodes.insert(g.nodes.index(g.node("pooled")), onnx.helper.make_node("Cast", ["relu2"], ["again"], to=FLOAT16))
    g.node("pooled").input[0] = "again"


def nothing(g: Graph) -> None:
    pass


def junk_import(model: Any) -> None:
    model.opset_import.add(domain="com.microsoft", version=1)


def dynamic_height(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"


def old_opset(model: Any) -> None:
    model.opset_import[0].version = 18


def next_opset(model: Any) -> None:
    model.opset_import[0].version = 26


def outside_weights(model: Any) -> None:
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head")
    head.data_location = head.EXTERNAL
    head.external_data.add(key="location", value="../../etc/passwd")
    head.ClearField("raw_data")


PLANTS: list[tuple[str, Callable[[Graph], None], Callable[[Any], None] | None]] = [
    ("zero-point", zero_point_of_three, None),
    ("zero-point", zero_point_of_uint8, None),
    ("missing-zero-point", no_zero_point, None),
    ("dynamic-scale", scale_computed_at_run_time, None),
    ("scale-value", scale_of_nan, None),
    ("scale-value", scale_of_zero, None),
    ("subnormal-scale", subnormal_scale, None),
    ("scale-opset", cast_behind_the_layers, old_opset),
    ("activation-per-channel", activation_with_sixteen_scales, None),
    ("weight-axis", weight_scales_along_the_inputs, None),
    ("half-quantised", weight_left_alone, None),
    ("nothing-quantised", nothing_quantized, None),
    ("residual-add", residual_and_branch_quantized, None),
    ("residual-add", branch_quantized_in_place_of_the_residual, None),
    ("before-activation", pair_before_the_activation, None),
    ("softmax", softmax_quantized, None),
    ("rescale", moved_between_two_scales, None),
    ("fp32-island", classifier_in_float32, None),
    ("batch-norm", batch_norm_left, None),
    ("uint8", bytes_are_transposed, None),
    ("uint8", shape_of_the_bytes, None),
    ("operator", unknown_operator, None),
    ("domain", foreign_domain, None),
    ("domain", nothing, junk_import),
    ("opset", nothing, next_opset),
    ("external-data", nothing, outside_weights),
    ("dynamic-size", nothing, dynamic_height),
]


def file_of(tmp_path: Path, plant: Callable[[Graph], None], change: Callable[[Any], None] | None = None) -> Path:
    graph = Graph()
    plant(graph)
    model = graph.model()
    if change is not None:
        change(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_the_small_network_has_no_findings_and_runs(tmp_path: Path) -> None:
    from imgcls_fast.graphs.half import session

    path = file_of(tmp_path, nothing)
    assert lint(path, "int8") == []
    onnx.checker.check_model(str(path))
    (scores,) = session(path).run(None, {"pixels": np.zeros((2, 32, 32, 3), np.uint8)})
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(("rule", "plant", "change"), PLANTS, ids=lambda value: getattr(value, "__name__", value))
def test_every_defect_is_found_by_exactly_its_rule(
    rule: str, plant: Callable[[Graph], None], change: Callable[[Any], None] | None, tmp_path: Path
) -> None:
    findings = lint(file_of(tmp_path, plant, change), "int8")
    assert {finding.rule for finding in findings} == {rule}
    assert all(finding.message for finding in findings)


def test_every_rule_has_a_planted_defect() -> None:
    assert {rule.id for rule in RULES} == {rule for rule, _, _ in PLANTS}
    assert all(rule.sentence.endswith(".") and rule.source for rule in RULES)
    assert len({rule.id for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_bytes_go_to_one_cast_in_every_precision(precision: str, tmp_path: Path) -> None:
    assert "uint8" in {finding.rule for finding in lint(file_of(tmp_path, bytes_are_transposed), precision)}


def test_a_layer_kept_in_float32_on_purpose_is_no_island(tmp_path: Path) -> None:
    graph = Graph()
    classifier_in_float32(graph)
    model = graph.model()
    assert [finding.node for finding in lint_view(View(model), "int8")] == ["node_wide"]
    onnx.helper.set_model_props(model, {"imgcls_fast.fp32_nodes": "node_wide"})
    assert lint_view(View(model), "int8") == []


def test_float32_layers_are_no_islands_in_a_float32_file(tmp_path: Path) -> None:
    assert lint(file_of(tmp_path, classifier_in_float32), "fp32") == []


def test_findings_become_one_error_that_names_the_places(tmp_path: Path) -> None:
    path = file_of(tmp_path, scale_of_nan)
    with pytest.raises(ExportError) as refused:
        demand_clean(lint(path, "int8"), path)
    assert refused.value.code == "E002"
    assert "node_relu1_q" in refused.value.message and "[scale-value]" in refused.value.message
    assert refused.value.try_.startswith("imgcls-fast export")
    many = [Finding("opset", f"n{k}", "x") for k in range(9)]
    with pytest.raises(ExportError, match="and 5 more"):
        demand_clean(many, path)
    demand_clean([], path)


@pytest.mark.parametrize("content", [b"", b"not a graph at all", b"\x08\x0a\x12"], ids=["empty", "text", "torn"])
def test_a_damaged_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError) as refused:
        lint(path, "int8")
    assert refused.value.code == "E001"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("small-cnn", {"width": 16}),
        ("timm/vit_tiny_patch16_224", {"depth": 2, "patch_size": 8, "embed_dim": 48, "num_heads": 3}),
    ],
    ids=["small-cnn", "vit"],
)
def test_what_is_exported_is_clean_in_float32_fp16_and_int8(
    arch: str, args: dict[str, Any], bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    from imgcls_fast.graphs.onnx_graph import write_graph
    from imgcls_fast.graphs.quantize import quantize

    bundle = bundle_of(arch, size=32, args=args)
    for precision in ("fp32", "fp16"):
        write_graph(bundle, tmp_path / f"{precision}.onnx", precision=precision)
        assert lint(tmp_path / f"{precision}.onnx", precision) == []
    images = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images, quantizer="onnxruntime")
    assert lint(tmp_path / "int8.onnx", "int8") == []


def test_the_page_on_int8_lists_every_rule_with_its_files() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "int8.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| .* \| ([\w, ]+) \|$", page, re.MULTILINE))
    every = ("fp32", "fp16", "bf16", "int8")
    assert rows == {rule.id: "all" if rule.precisions == every else ", ".join(rule.precisions) for rule in RULES}


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (pair_before_the_activation, "activations"),
        (residual_and_branch_quantized, "additions"),
        (branch_quantized_in_place_of_the_residual, "additions"),
        (softmax_quantized, "softmaxes"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_quantizers_place_badly_is_taken_away(plant: Callable[[Graph], None], kind: str) -> None:
    graph = Graph()
    plant(graph)
    if kind == "softmaxes":  # the output of the file itself keeps its name: something has to read the probabilities
        graph.node("scores").output[0] = "probabilities_dq"
        graph.add("Identity", ["probabilities_dq"], "scores")
    model = graph.model()
    assert lint_view(View(model), "int8")
    counts = tidy(model)
    assert counts.pop(kind) == 1 and set(counts.values()) == {0}
    assert lint_view(View(model), "int8") == []
    onnx.checker.check_model(model)
    assert len(View(model).int8_layers()) == 2
