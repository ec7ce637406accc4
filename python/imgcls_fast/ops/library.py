"""What every kernel family needs: the op library, element types, the check of an argument, the choice of a device half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EXTENSION: Any  # the compiled half, or None where the package was not built
try:
    from .. import _C as EXTENSION
except ImportError:
    EXTENSION = None

LIBRARY = torch.library.Library("imgcls", "DEF")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType in csrc/kernels.h


def cuda_missing() -> str | None:
    """Why the compiled half holds no CUDA code; None when it does."""
    if EXTENSION is None:
        return "imgcls_fast._C is not built (pip install . builds it)"
    info = EXTENSION.build_info()
    return None if info["cuda"] else f"this build has no CUDA: {info['why_no_cuda']}"


def stream_of(tensor: Tensor) -> int:
    """The current stream of a CUDA tensor's device, as an address. Read on every launch: a stored one breaks CUDA graphs."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.device.index))


def where_to_run(tensor: Tensor) -> dict[str, Any]:
    """The arguments of a launcher that say which half runs, and how: on_cuda, stream, threads."""
    on_cuda = tensor.device.type == "cuda"
    return {"on_cuda": on_cuda, "stream": stream_of(tensor) if on_cuda else 0, "threads": torch.get_num_threads()}


def on_device_of(tensor: Tensor) -> Any:
    """A context in which the tensor's GPU is the current one; nothing for a tensor of the CPU."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def require(fine: bool, message: str) -> None:
    """Refuse an argument.

    Raises:
        ValueError: with `message`, when not `fine`.
    """
    if not fine:
        raise ValueError(message)


def describe(tensor: Tensor) -> str:
    """A tensor in an error message."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast turns float32 into on the tensor's device; None outside of autocast (and where there is none: meta)."""
    kind = tensor.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
