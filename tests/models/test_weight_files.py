"""Weights files of strangers: refused before a library opens them, whatever they ask for."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from imgcls_fast.core.bounds import TENSOR_HEADER_BYTES
from imgcls_fast.core.errors import ImgclsError, ModelError
from imgcls_fast.models import ModelSpec, build_model, load_weights, read_state


class Calls:
    """A pickle that calls a function when it is opened."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def twice(rounds: int) -> Calls:
    """`_codecs.encode(..., "hex")` doubles its bytes, and torch lets it pass: 30 rounds make a gigabyte of one byte."""
    import codecs

    value: Any = b"x"
    for _ in range(rounds):
        value = Calls(codecs.encode, value, "hex")
    return value


def rewritten(path: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> None:
    with zipfile.ZipFile(path) as file:
        records = [(info, file.read(info)) for info in file.infolist()]
    with zipfile.ZipFile(path, "w") as file:
        for info, content in records:
            change(file, info, content)


def bytearray_on_demand(path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Calls(bytearray, 10**12)}, path)


def doubling(path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": twice(40)}, path)


def doubling_of_old(path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": twice(40)}, path, _use_new_zipfile_serialization=False)


def tensor_on_demand(path: Path) -> None:
    torch.save({"w": Calls(torch.Tensor, 10**5, 10**5)}, path)


def compressed_zeros(path: Path) -> None:
    torch.save({"w": torch.zeros(4_000_000)}, path)
    rewritten(path, lambda file, info, content: file.writestr(info.filename, content, zipfile.ZIP_DEFLATED))


def two_of_one_name(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)

    def double(file: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
        file.writestr(info.filename, content)
        if info.filename.endswith("data.pkl"):
            file.writestr(info.filename, pickle.dumps({"w": Calls(eval, "1")}, 2))

    with pytest.warns(UserWarning, match="Duplicate"):
        rewritten(path, double)


def overlapping(path: Path) -> None:
    """Every record of the list is the first one's bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", bytes(10_000))
        for k in range(50):
            info = zipfile.ZipInfo(f"a/data/{k}")
            info.file_size = info.compress_size = 10_000
            info.header_offset, info.CRC = 0, 0
            file.filelist.append(info)


def endless_directory(path: Path) -> None:
    entry = b"PK\x01\x02" + bytes(24) + (400).to_bytes(2, "little") + bytes(16) + b"n" * 400
    content = entry * 21_000
    end = b"PK\x05\x06" + bytes(8) + len(content).to_bytes(4, "little") + (4).to_bytes(4, "little") + bytes(2)
    path.write_bytes(b"PK\x03\x04" + content + end)


def tar_of_old(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "9" * 20_000}) as file:
        file.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def steps_without_end(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"N0" * 3_000_000 + b"N.")


HOSTILE = [
    bytearray_on_demand, doubling, doubling_of_old, tensor_on_demand, compressed_zeros, two_of_one_name, overlapping,
    endless_directory, tar_of_old, steps_without_end,
]  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_what_asks_for_more_than_its_size_is_refused_before_torch_opens_it(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    make(path)
    opened: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *given, **named: opened.append(given))
    with pytest.raises(ModelError) as refused:
        read_state(path)
    assert (refused.value.code, opened) == ("M003", [])
    assert str(path) in refused.value.message


def header(length: int, text: bytes = b"{}") -> bytes:
    return length.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header(745 << 30), header(2**64 - 1), header(TENSOR_HEADER_BYTES + 1) + bytes(TENSOR_HEADER_BYTES), header(3), b"", b"abc",
        header(62, b'{"w":{"dtype":"F32","shape":[200000000000],"data_offsets":[0,4]}}'[:62]) + bytes(4),
        header(66, b'{"w":{"dtype":"F32","shape":[200000000000],"data_offsets":[0,4]}} ') + bytes(4),
        header(61, b'{"w":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}'.ljust(61)) + bytes(4),
    ],
    ids=["745 GB", "all ones", "above the bound", "too long by one", "empty", "short", "cut", "745 GB shape", "no such type"],
)  # fmt: skip
def test_a_header_of_safetensors_that_lies_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as refused:
        read_state(path)
    assert refused.value.code == "M003"


@pytest.mark.parametrize(
    "value",
    [torch.ones(1).expand(10**11), torch.ones(3).to_sparse(), torch.empty(10**9, device="meta")],
    ids=["stride 0", "sparse", "meta"],
)  # fmt: skip
def test_tensors_larger_than_what_is_stored_of_them_are_refused(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"pos_embed": value, "w": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(ModelError) as refused:
        read_state(tmp_path / "model.pt")
    assert refused.value.code == "M003"


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_what_torch_writes_of_tensors_is_read(new: bool, tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    state = {"a": shared, "b": shared[3:6], "c": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), "d": torch.tensor(3),
             "e": torch.ones(2, 3).t(), "f": torch.zeros(0), "g": torch.tensor([True])}  # fmt: skip
    torch.save(
        {"state_dict": state, "epoch": 3, "lr": [0.1]}, tmp_path / "model.pt", _use_new_zipfile_serialization=new
    )
    found = read_state(tmp_path / "model.pt")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "old.pth"])
def test_four_hundred_mutated_files_are_loaded_or_refused(name: str, tmp_path: Path) -> None:
    model = build_model(ModelSpec("small-cnn", num_outputs=3, arch_args={"width": 4, "depths": [1]}))
    path = tmp_path / name
    state = {key: value.contiguous() for key, value in model.backbone.state_dict().items()}
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "model.pt")
    whole, draw = path.read_bytes(), np.random.default_rng(1)
    n, refused = len(whole), 0
    for k in range(400):
        mutated = bytearray(whole)
        near = (min(n, 2000), -min(n, 4000), n)[int(draw.integers(0, 3))]  # headers stand at both ends
        place = int(draw.integers(0, near)) if near > 0 else n + int(draw.integers(near, 0))
        noise = draw.integers(0, 256, int(draw.integers(1, 9)), np.uint8).tobytes()
        if k % 5 == 0:
            mutated[place] ^= 1 << int(draw.integers(0, 8))
        elif k % 5 == 1:
            del mutated[place:]
        elif k % 5 == 2:
            mutated[place : place + len(noise)] = noise
        elif k % 5 == 3:
            mutated[place : place + 8] = b"\xff" * 8
        else:
            del mutated[place : place + 20]
        path.write_bytes(mutated)
        try:
            load_weights(model, path)
        except ImgclsError as error:
            assert error.code in ("M002", "M003")
            refused += 1
    assert refused > 200
