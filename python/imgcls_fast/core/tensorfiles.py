"""The header of a safetensors file, compared with the file before a library allocates what it claims."""

from __future__ import annotations

from math import prod
from typing import Any, BinaryIO

from .bounds import TENSOR_HEADER_BYTES, TENSORS
from .files import parse_json

_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
_DIMENSIONS = 16


def check_safetensors(file: BinaryIO) -> int:
    """Number of tensors, after the header has been compared with the file: one range per tensor, all bytes, each once.

    Raises:
        ValueError: the header is larger than `bounds.TENSOR_HEADER_BYTES`, names a tensor twice, or does not fit the file.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > TENSOR_HEADER_BYTES:
        raise ValueError(f"it claims a header of {length:,} bytes; at most {TENSOR_HEADER_BYTES:,} are read")
    if 8 + length > size:
        raise ValueError(f"it claims a header of {length:,} bytes, and has {size:,}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    header.pop("__metadata__", None)
    if len(header) > TENSORS:
        raise ValueError(f"it has {len(header):,} tensors; at most {TENSORS:,} are read")
    ranges = sorted(_range(name, value) for name, value in header.items())
    at = 0
    for begin, end, name in ranges:
        if begin != at:
            how = "overlaps another" if begin < at else "leaves a gap before it"
            raise ValueError(f"tensor {name[:60]!r} begins at {begin:,} and {how}: {at:,} was expected")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"its tensors end at byte {at:,}, and it has {size - 8 - length:,} bytes of them")
    return len(header)


def _range(name: str, value: Any) -> tuple[int, int, str]:
    entry: dict[str, Any] = value if isinstance(value, dict) else {}
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    dtype = entry.get("dtype")
    if not _numbers(shape, range(_DIMENSIONS + 1)) or not _numbers(offsets, (2,)):
        raise ValueError(f"tensor {name[:60]!r} has no shape and offsets of whole numbers")
    (begin, end), item = offsets, _ITEM_BYTES.get(str(dtype))
    if item is not None and end - begin != prod(shape) * item:
        raise ValueError(f"tensor {name[:60]!r} claims {prod(shape):,} values of {dtype} in {end - begin:,} bytes")
    return begin, end, name


def _numbers(value: Any, lengths: Any) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(type(n) is int and 0 <= n < 1 << 53 for n in value)
