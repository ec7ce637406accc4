"""The bytes of an ONNX file, walked before protobuf builds a tree of them and a runtime allocates what they claim.

Two bytes of a file become a hundred of memory, a tensor may claim any size, and data may lie in other files in eight
places of the format. The walk reads each field once and copies nothing.

Format: onnx/onnx.proto (field numbers), protobuf.dev/programming-guides/encoding (varints and wire types).
"""

from __future__ import annotations

import mmap
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from .bounds import ONNX_BYTES, ONNX_DEPTH, ONNX_FIELDS

# message -> {field: message}; what is not listed is skipped
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
_INNER: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _TENSOR: {},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
}
_NAMES = ("model", "graph", "node", "attribute", "tensor", "sparse tensor", "function", "training")
# TensorProto.DataType -> bits of one element
_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    14: 64,
    15: 128,
    16: 16,
    17: 8,
    18: 8,
    19: 8,
    20: 8,
    21: 4,
    22: 4,
    23: 4,
    24: 8,
    25: 2,
    26: 2,
}
_PAYLOAD = (4, 5, 6, 7, 10, 11)  # typed data: float, int32, string, int64, double, uint64


class HostileOnnx(ValueError):
    """A file that goes beyond its bounds, or is not what it claims."""


@dataclass
class OnnxFacts:
    """What the walk has seen.

    Args:
        fields: fields of all messages.
        outside: names of tensors whose data lie in other files, wherever they stand.
        operators: nodes by type, those of sub-graphs and functions included.
        functions: functions that the file defines itself.
        sparse: sparse tensors.
        unordered: name of the first node that takes what only it or a later node makes; "" where there is none.
    """

    fields: int = 0
    outside: list[str] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    functions: int = 0
    sparse: int = 0
    unordered: str = ""


@dataclass
class _Tensor:
    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0
    raw: int = -1  # bytes; -1: none
    payload: int = 0  # bytes of typed data
    external: bool = False


def check_onnx(path: Path) -> OnnxFacts:
    """Walk a file within `bounds.ONNX_...`.

    Raises:
        HostileOnnx: with the byte at which it goes beyond them, or is cut or garbled.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > ONNX_BYTES:
        raise HostileOnnx(f"it has {size:,} bytes; at most {ONNX_BYTES:,} are read")
    if not size:
        raise HostileOnnx("it is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        walk = _Walk(content)
        walk.message(_MODEL, 0, size, 0)
        return walk.facts


class _Walk:
    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.facts = content, OnnxFacts()

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, position behind it)"""
        value = shift = 0
        while at < end and shift < 70:
            byte = self.content[at]
            value |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
        raise HostileOnnx(f"it is cut or garbled at byte {at:,}")

    def message(self, kind: int, at: int, end: int, depth: int) -> _Node:
        """Walk one message; `depth` counts graphs inside each other. Returns the names of a node."""
        if depth > ONNX_DEPTH:
            raise HostileOnnx(f"its graphs are nested more than {ONNX_DEPTH} deep, at byte {at:,}")
        inner, tensor, node = _INNER[kind], _Tensor(), _Node()
        order = _Order()
        self.facts.functions += kind == _FUNCTION
        self.facts.sparse += kind == _SPARSE
        while at < end:
            self.facts.fields += 1
            if self.facts.fields > ONNX_FIELDS:
                raise HostileOnnx(f"it has more than {ONNX_FIELDS:,} fields, at byte {at:,}")
            key, at = self.varint(at, end)
            number, wire = key >> 3, key & 7
            begin = at
            if wire == 0:
                value, at = self.varint(at, end)
            elif wire == 2:
                value, begin = self.varint(at, end)
                at = begin + value
            elif wire in (1, 5):
                value, at = 0, at + (8 if wire == 1 else 4)
            else:
                raise HostileOnnx(f"it is garbled at byte {at:,}: no field of a {_NAMES[kind]} is written so")
            if at > end:
                raise HostileOnnx(f"it is cut or garbled at byte {begin:,}: a field is longer than its {_NAMES[kind]}")
            if wire == 2 and number in inner:
                found = self.message(inner[number], begin, at, depth + (inner[number] == _GRAPH))
                if inner[number] == _NODE:
                    self.facts.unordered = order.add(found) or self.facts.unordered
            elif kind == _TENSOR:
                self.tensor_field(tensor, number, wire, value, begin, at)
            elif kind == _NODE and wire == 2:
                node.add(number, self.content[begin:at])
        if kind == _TENSOR:
            self.demand_size(tensor, end)
        elif kind == _NODE:
            self.facts.operators[node.operator] += 1
        return node

    def tensor_field(self, tensor: _Tensor, number: int, wire: int, value: int, begin: int, end: int) -> None:
        if number == 1 and wire == 0:
            tensor.dims.append(value)
        elif number == 1 and wire == 2:
            while begin < end and len(tensor.dims) < 64:
                value, begin = self.varint(begin, end)
                tensor.dims.append(value)
        elif number == 2 and wire == 0:
            tensor.kind = value
        elif number == 8 and wire == 2:
            tensor.name = self.content[begin : min(end, begin + 200)].decode("utf-8", "replace")
        elif number == 9 and wire == 2:
            tensor.raw = value
        elif number in _PAYLOAD:
            tensor.payload += end - begin
        elif number == 13 or (number == 14 and value == 1):
            tensor.external = True

    def demand_size(self, tensor: _Tensor, at: int) -> None:
        """Refuse a tensor that claims more values than it holds bytes for."""
        if tensor.external:
            self.facts.outside.append(tensor.name)
            return
        if len(tensor.dims) > 32 or any(dim >= 1 << 40 for dim in tensor.dims):
            raise HostileOnnx(f"tensor {tensor.name!r} has an absurd shape, at byte {at:,}")
        count, bits = prod(tensor.dims), _BITS.get(tensor.kind, 0)
        have = max(tensor.raw, tensor.payload)
        fits = count <= 2 * have  # a byte is the least that a value of typed data takes; of 4 bits, two share one
        if tensor.raw >= 0 and bits:
            fits = (count * bits + 7) // 8 == tensor.raw
        if not fits:
            raise HostileOnnx(f"tensor {tensor.name!r} claims {count:,} values and holds {have:,} bytes, at byte {at:,}")


class _Node:
    """Names of one node."""

    def __init__(self) -> None:
        self.inputs: list[bytes] = []
        self.outputs: list[bytes] = []
        self.name = self.operator = ""

    def add(self, number: int, text: bytes) -> None:
        if number in (1, 2):
            (self.inputs if number == 1 else self.outputs).append(text)
        elif number == 3:
            self.name = text[:200].decode("utf-8", "replace")
        elif number == 4:
            self.operator = text[:200].decode("utf-8", "replace")


class _Order:
    """Whether each node of one graph takes only what nodes before it made."""

    def __init__(self) -> None:
        self.made: set[bytes] = set()
        self.taken: dict[bytes, str] = {}  # not made so far -> the node that took it

    def add(self, node: _Node) -> str:
        """The name of a node that took what this one makes, or what it makes itself; else empty."""
        for name in node.inputs:
            if name and name not in self.made:
                self.taken.setdefault(name, node.name or node.operator)
        late = next((name for name in node.outputs if name in self.taken), None)
        self.made.update(node.outputs)
        return "" if late is None else self.taken[late]
