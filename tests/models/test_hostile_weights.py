"""Weights files that claim what they do not hold: refused in bounded time and memory, before a library allocates."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from imgcls_fast.core.errors import ModelError
from imgcls_fast.models.weights import read_state


def tensors(header: object, content: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def entry(begin: int, end: int, shape: list[Any] | str = "n", dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape == "n" else shape, "data_offsets": [begin, end]}


ENTRY = '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
SAFETENSORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a header of 745 GB": (lambda: tensors({}, length=745 << 30), "header of"),
    "a header of 64 MiB": (lambda: tensors("{" + " " * (64 << 20) + "}"), "at most"),
    "a header longer than the file": (lambda: tensors({}, length=5000), "and has"),
    "overlapping tensors": (lambda: tensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "a gap": (lambda: tensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "gap"),
    "bytes that nobody names": (lambda: tensors({"a": entry(0, 4)}, bytes(12)), "end at byte 4"),
    "a tensor behind the end": (lambda: tensors({"a": entry(0, 1 << 40)}, bytes(12)), "end at byte"),
    "a tensor twice": (lambda: tensors("{" + ENTRY + "," + ENTRY + "}", bytes(4)), "twice"),
    "a shape that is not its bytes": (lambda: tensors({"a": entry(0, 4, [1 << 40], "F32")}, bytes(4)), "claims"),
    "NaN in a shape": (lambda: tensors('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), "whole"),
    "a negative shape": (lambda: tensors({"a": entry(0, 4, [-2, -2])}, bytes(4)), "whole numbers"),
    "a thousand dimensions": (lambda: tensors({"a": entry(0, 1, [1] * 1000)}, bytes(1)), "whole numbers"),
    "100,000 brackets": (lambda: tensors("[" * 100_000), "levels deep"),
    "50,001 tensors": (lambda: tensors({f"{k}": entry(k, k + 1) for k in range(50_001)}, bytes(50_001)), "50,001"),
    "a header that is a list": (lambda: tensors([]), "not an object"),
    "nothing": (lambda: b"", ""),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused_within_bounds(
    name: str, tmp_path: Path, in_bounds: Callable[..., Any]
) -> None:
    content, words = SAFETENSORS[name]
    (tmp_path / "w.safetensors").write_bytes(content())
    found = in_bounds(read_state, tmp_path / "w.safetensors", memory_mib=512)
    assert found.code == "M003", found
    assert "w.safetensors" in found.text and words in found.text, found.text
    assert len(found.text) < 1000


def pickled(*, before: bytes = b"", state: dict[str, Any] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save, with opcodes put before those of its pickle, or packed otherwise."""
    plain = io.BytesIO()
    torch.save(state or {"a": torch.zeros(3)}, plain)
    out = io.BytesIO()
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(out, "w", method) as other:
        for name in archive.namelist():
            content = archive.read(name)
            other.writestr(name, content[:2] + before + content[2:] if name.endswith("data.pkl") else content)
    return out.getvalue()


# a tuple of two equal tuples of two equal tuples ..., as the key of a dictionary: hashing it takes 2 ** 60 steps
SHARED = b"}(" + b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(60)) + b"K\x01u0"
TORCH: dict[str, tuple[Callable[[], bytes], str]] = {
    "a key that takes for ever to hash": (lambda: pickled(before=SHARED), "deep"),
    "compressed tensors": (
        lambda: pickled(state={"a": torch.zeros(16 << 20)}, method=zipfile.ZIP_DEFLATED), "compressed"),
    "a pickle of 4 million steps": (lambda: pickled(before=b"N0" * (2 << 20)), "steps"),
    "a hundred gigabytes of nothing": (lambda: pickled(before=b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x19\x85R0"), ""),
    "a key that is a number": (lambda: pickled(state={1: torch.zeros(1)}), "a key is a int"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_a_hostile_torch_file_is_refused_within_bounds(
    name: str, tmp_path: Path, in_bounds: Callable[..., Any]
) -> None:
    content, words = TORCH[name]
    (tmp_path / "w.pt").write_bytes(content())
    found = in_bounds(read_state, tmp_path / "w.pt", memory_mib=1024)
    assert found.code == "M003", found
    assert "w.pt" in found.text and words in found.text, found.text
    assert len(found.text) < 1000


@pytest.mark.parametrize("kind", ["safetensors", "pt", "old"])
def test_a_mutated_file_is_read_or_refused_and_nothing_else(kind: str, tmp_path: Path) -> None:
    state = {"a.weight": torch.rand(4, 3), "a.bias": torch.rand(4).half(), "n": torch.tensor(3)}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        path.write_bytes(save(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pt")
    assert read_state(path).keys() == state.keys()
    content, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(130):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            changed[draw.randrange(min(len(changed), 900))] = draw.randrange(256)
        path.write_bytes(changed if draw.random() < 0.8 else changed[: draw.randrange(len(changed))])
        try:
            read_state(path)
        except ModelError as error:
            assert error.code == "M003"
            refused += 1
    assert refused > 20


def test_files_of_many_tensors_are_read(tmp_path: Path) -> None:
    state = {f"blocks.{k}.weight": torch.rand(2, 3) for k in range(2000)}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_bytes(save(state))
    for name in ("w.pt", "w.safetensors"):
        found = read_state(tmp_path / name)
        assert found.keys() == state.keys()
        assert torch.equal(found["blocks.1999.weight"], state["blocks.1999.weight"])
