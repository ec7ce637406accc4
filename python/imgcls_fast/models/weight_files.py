"""What a stranger's weights file may hold, looked at before a library opens it.

`torch.load(weights_only=True)` runs no foreign code, but what it does run can fill the memory: `bytearray(10**12)`, thirty
rounds of `_codecs.encode(..., "hex")`, a compressed record of zeros. `safetensors` believes a header of 100 MB. So sizes and
the names in a pickle are checked first, at the cost of reading the pickle twice.
"""

from __future__ import annotations

import pickletools
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..core.bounds import PICKLE_STEPS
from ..core.errors import ModelError
from ..core.tensorfiles import check_safetensors as check_header

_MOST_DIRECTORY = 8 << 20  # bytes of a zip's list of records: as many
_SHARED_DEPTH = 32  # how deep tuples may be built of tuples that are used again; hashing takes 2 to the power of it
_OLD_PICKLES = 5  # in a row at the beginning of a file that torch wrote before 1.6
_TAIL = 1 << 17  # the end of a zip's list lies within it
_ZIP = b"PK\x03\x04"

# what torch itself writes around tensors; the rest that it would let pass is not needed, and some of it allocates on demand
_NAMES = {
    "collections OrderedDict",
    "collections Counter",
    "torch Size",
    "torch device",
    "torch.nn.parameter Parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "__builtin__ set",
    "builtins set",
}
# what zipfile, pickletools, torch and safetensors raise at damaged bytes (found by 1,200 mutated files)
DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)


def check_safetensors(path: Path) -> None:
    """Refuse a header that does not fit the file, or is longer than any network needs.

    Raises:
        ModelError: M003.
    """
    try:
        with open(path, "rb") as file:
            check_header(file)
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def check_torch(path: Path) -> None:
    """Refuse compressed or overlapping records, and pickles that name anything but tensors and what torch puts around them.

    Raises:
        ModelError: M003.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            file.seek(0)
            if start.startswith(_ZIP):
                _check_zip(path, file)
            elif _is_tar(start):
                raise _damaged(path, "it is a tar archive, as torch wrote them before 2017")
            else:
                for _ in range(_OLD_PICKLES):
                    _check_pickle(path, file)
    except DAMAGE as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def check_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Refuse tensors that are larger than their memory (a stride of 0 makes a terabyte of four bytes) or not plain.

    Raises:
        ModelError: M003.
    """
    for name, value in state.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_quantized
        if not plain or value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise _damaged(path, f"{name} is no plain tensor, or larger than what is stored of it")


def _check_zip(path: Path, file: IO[bytes]) -> None:
    size = path.stat().st_size
    if (listed := _directory_bytes(file, size)) > _MOST_DIRECTORY:
        raise _damaged(path, f"its list of records has {listed:,} bytes")
    with zipfile.ZipFile(file) as records:
        infos = records.infolist()
        names = {info.filename for info in infos}
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise _damaged(path, "its records are compressed, which torch does not do")
        if len(names) < len(infos) or sum(info.file_size for info in infos) > size:
            raise _damaged(path, "its records overlap")
        for info in infos:
            if info.filename.endswith(".pkl"):
                with records.open(info) as pickled:
                    _check_pickle(path, pickled)


def _directory_bytes(file: IO[bytes], size: int) -> int:
    """Length of a zip's list of records, as the end of the file states it."""
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise zipfile.BadZipFile("the list of records is missing")
    (length,) = struct.unpack_from("<I", tail, end + 12)
    if length == 0xFFFFFFFF and (large := tail.rfind(b"PK\x06\x06")) >= 0:
        (length,) = struct.unpack_from("<Q", tail, large + 40)
    return int(length)


def _check_pickle(path: Path, file: Any) -> None:
    """Read one pickle to its end without running it."""
    words, shared = ["", ""], _SharedTuples()
    for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
        if count > PICKLE_STEPS:
            raise _damaged(path, f"its pickle has more than {PICKLE_STEPS:,} steps")
        if shared.depth(opcode.name, value) > _SHARED_DEPTH:
            raise _damaged(path, f"its pickle builds tuples of tuples that are used again, more than {_SHARED_DEPTH} deep")
        if isinstance(value, str):
            words = [words[1], value]
        if opcode.name == "STACK_GLOBAL":
            value = " ".join(words)
        elif opcode.name not in ("GLOBAL", "INST"):
            continue
        if value not in _NAMES and not _is_torch_type(str(value)):
            raise ModelError(
                "M003",
                f"{path} holds more than tensors and was not opened",
                why=f"a pickle can run any program when it is opened (GLOBAL {value})",
                try_="where the file is trusted: c = torch.load(FILE, weights_only=False); "
                "safetensors.torch.save_file(c['state_dict'], 'model.safetensors')   (a whole model: c.state_dict())",
            )


class _SharedTuples:
    """How deep tuples are built of tuples that are used again, at the most.

    A tuple of two equal tuples of two equal tuples ... is small, and takes for ever to hash as a key of a dictionary.
    """

    def __init__(self) -> None:
        self.depth_of: dict[Any, int] = {}  # memo slot -> depth of the tuple in it
        self.deepest = self.made = 0
        self.last = ""

    def depth(self, opcode: str, argument: Any) -> int:
        """The depth after one more opcode."""
        if opcode in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self.made = self.deepest + 1
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            slot = len(self.depth_of) if opcode == "MEMOIZE" else argument
            self.depth_of[slot] = self.made if self.last.startswith("TUPLE") else 0
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            self.deepest = max(self.deepest, self.depth_of.get(argument, 0))
        elif opcode == "DUP":
            self.deepest += 1
        self.last = opcode
        return self.deepest


def _is_torch_type(name: str) -> bool:
    """Whether a pickle's name is a data type of torch, or a storage of one."""
    module, _, own = name.partition(" ")
    return module == "torch" and (own.endswith("Storage") or isinstance(getattr(torch, own, None), torch.dtype))


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError("M003", f"{path} is damaged or not a weights file: {why}")
