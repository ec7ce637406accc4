"""ONNX files that ask for more than they are worth: refused from their bytes, before onnx or a runtime sees them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError
from imgcls_fast.core.onnx_bytes import check_onnx
from imgcls_fast.engines.onnx_runtime import read_graph

onnx = pytest.importorskip("onnx")


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def model(graph: bytes, more: bytes = b"") -> bytes:
    return number(1, 8) + message(7, graph) + more


def node(kind: str, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = (), attributes: bytes = b"") -> bytes:
    names = b"".join(message(1, n.encode()) for n in inputs) + b"".join(message(2, n.encode()) for n in outputs)
    return message(1, names + message(4, kind.encode()) + attributes)


OUTSIDE = (
    message(8, b"far") + number(2, 1) + number(1, 4) + message(13, message(1, b"location") + message(2, b"/etc/passwd"))
)
LOCATED = message(8, b"far") + number(2, 1) + number(1, 4) + number(14, 1)


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = node("If", attributes=message(5, message(6, graph)))
    return graph


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "data outside, of a weight": (lambda: model(message(5, OUTSIDE)), "in other files, first 'far'"),
    "data outside, by location alone": (lambda: model(message(5, LOCATED)), "in other files"),
    "data outside, of a constant": (lambda: model(node("Constant", attributes=message(5, message(5, OUTSIDE)))), "in other"),
    "data outside, of a list of constants": (lambda: model(node("X", attributes=message(5, message(10, OUTSIDE)))), "in other"),
    "data outside, in a sub-graph": (
        lambda: model(node("If", attributes=message(5, message(6, message(5, OUTSIDE))))), "in other files"),
    "data outside, in a list of sub-graphs": (
        lambda: model(node("If", attributes=message(5, message(11, message(5, OUTSIDE))))), "in other files"),
    "data outside, of a sparse tensor": (lambda: model(message(15, message(1, OUTSIDE))), "in other files"),
    "data outside, of the indices of one": (lambda: model(message(15, message(2, OUTSIDE))), "in other files"),
    "data outside, of a sparse constant": (
        lambda: model(node("Constant", attributes=message(5, message(22, message(1, OUTSIDE))))), "in other files"),
    "data outside, in a function": (
        lambda: model(b"", message(25, message(7, message(5, message(5, OUTSIDE))))), "in other files"),
    "data outside, in the default of a function": (lambda: model(b"", message(25, message(11, message(5, OUTSIDE)))), "in other"),
    "data outside, in a training graph": (lambda: model(b"", message(20, message(1, message(5, OUTSIDE)))), "in other files"),
    "a tensor of 4 TB": (
        lambda: model(message(5, message(8, b"big") + number(2, 1) + number(1, 1 << 20) * 2)), "'big' claims 1,099,511,627,776"),
    "a packed shape of 4 TB": (
        lambda: model(message(5, number(2, 1) + message(1, varint(1 << 20) * 2) + message(9, bytes(4)))), "claims"),
    "a shape of 2 ** 60": (lambda: model(message(5, number(2, 1) + number(1, 1 << 60))), "absurd shape"),
    "a negative shape": (lambda: model(message(5, number(2, 1) + number(1, (1 << 64) - 1))), "absurd shape"),
    "too few raw bytes": (lambda: model(message(5, number(2, 1) + number(1, 3) + message(9, bytes(8)))), "holds 8 bytes"),
    "40 million empty nodes": (lambda: model(b"\x0a\x00" * 40_000_000), "500,000 fields"),
    "40 million empty tensors": (lambda: model(b"\x2a\x00" * 40_000_000), "holds 0 bytes"),
    "graphs 200 deep": (lambda: model(nested(200)), "more than 32 deep"),
    "a loop without end": (lambda: model(node("Loop", ("n",), ("y",))), "a Loop"),
    "a scan": (lambda: model(node("Scan", ("n",), ("y",))), "a Scan"),
    "a function": (lambda: model(b"", message(25, message(1, b"f"))), "1 functions"),
    "a sparse tensor": (lambda: model(message(15, number(3, 1 << 40))), "1 sparse tensors"),
    "a node that feeds itself": (lambda: model(node("Relu", ("x",), ("x",))), "a later one makes"),
    "two nodes that feed each other": (
        lambda: model(node("Relu", ("a",), ("b",)) + node("Relu", ("b",), ("a",))), "a later one makes"),
    "a field longer than the file": (lambda: model(b"") + varint(7 << 3 | 2) + varint(1 << 60), "longer than its model"),
    "a number without end": (lambda: b"\xff" * 1000, "garbled at byte"),
    "a group": (lambda: varint(7 << 3 | 3) * 100_000, "garbled at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_within_bounds(name: str, tmp_path: Path, in_bounds: Callable[..., Any]) -> None:
    content, words = HOSTILE[name]
    (tmp_path / "m.onnx").write_bytes(content())
    found = in_bounds(read_graph, tmp_path / "m.onnx", memory_mib=256)
    assert found.code == "E005", found
    assert "m.onnx" in found.text and words in found.text, found.text
    assert len(found.text) < 1000


def test_a_file_of_three_gigabytes_is_refused_without_reading_it(tmp_path: Path, in_bounds: Callable[..., Any]) -> None:
    with open(tmp_path / "m.onnx", "wb") as file:
        file.truncate(3 << 30)
    found = in_bounds(read_graph, tmp_path / "m.onnx", cpu_s=5, memory_mib=64)
    assert found.code == "E005" and "at most" in found.text


def plain_graph(path: Path) -> Path:
    from onnx import TensorProto, helper, numpy_helper

    kinds = [np.float32, np.float16, np.int8, np.uint8, np.int64, np.int32, np.bool_, np.float64]
    tensors = [numpy_helper.from_array(np.ones((2, 3), kind), np.dtype(kind).name) for kind in kinds]
    tensors += [
        helper.make_tensor("typed", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]),
        helper.make_tensor("halves", TensorProto.FLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("numbers", TensorProto.INT64, [3], [0, -1, 1 << 40]),
        helper.make_tensor("words", TensorProto.STRING, [2], [b"ab", b"cd"]),
        helper.make_tensor("nothing", TensorProto.FLOAT, [0, 4], []),
        helper.make_tensor("one", TensorProto.INT8, [], [1]),
        helper.make_tensor("nibbles", TensorProto.INT4, [3], [1, 2, 3]),
    ]
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["z"], name="last")]
    edge = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "xz"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", edge[:1], edge[1:], tensors)), str(path))
    return path


def test_tensors_of_every_type_and_way_of_writing_are_no_fault(tmp_path: Path) -> None:
    seen = check_onnx(plain_graph(tmp_path / "m.onnx"))
    assert (seen.outside, seen.functions, seen.sparse, seen.unordered) == ([], 0, 0, "")
    assert seen.operators == {"Relu": 2}


def test_a_mutated_graph_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path, draw, refused = plain_graph(tmp_path / "m.onnx"), random.Random(0), 0
    content = path.read_bytes()
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed if draw.random() < 0.8 else changed[: draw.randrange(len(changed))])
        try:
            read_graph(path)
        except ExportError as error:
            assert error.code == "E005"
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["data outside, of a list of constants", "data outside, in a function"])
def test_the_lint_finds_data_outside_wherever_it_stands(name: str, tmp_path: Path) -> None:
    from imgcls_fast.graphs.lint import lint

    function = message(25, message(7, message(5, message(5, OUTSIDE))))
    inside = node("X", attributes=message(5, message(10, OUTSIDE)))
    (tmp_path / "m.onnx").write_bytes(model(node("Relu"), function) if "function" in name else model(inside))
    assert [(f.rule, f.node) for f in lint(tmp_path / "m.onnx", "fp32")] == [("external-data", "far")]
