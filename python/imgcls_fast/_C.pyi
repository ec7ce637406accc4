"""The compiled half: image-header probe, and what was built. Sources in csrc/."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

class Headers(TypedDict):
    """One row a file, in the order of the paths; every column has shape (N,)."""

    format: npt.NDArray[np.uint8]  # 0 unknown, 1 JPEG (and MPO), 2 PNG, 3 WebP, 4 BMP, 5 TIFF, 6 GIF; from the content
    status: npt.NDArray[np.uint8]  # 0 ok, 1 unreadable, 2 empty, 3 none of the six formats, 4 no usable header
    width: npt.NDArray[np.int32]  # as stored, before rotation; meaningful for status 0
    height: npt.NDArray[np.int32]  # as stored, before rotation; meaningful for status 0
    channels: npt.NDArray[np.uint8]  # as stored: a palette image has one
    bit_depth: npt.NDArray[np.uint8]  # bits of one sample, or of one palette index
    orientation: npt.NDArray[np.uint8]  # EXIF or XMP, 1..8; 1 where none is told
    animated: npt.NDArray[np.uint8]  # 1: more than one frame or page
    truncated: npt.NDArray[np.uint8]  # 1: end marker or promised bytes are missing; a full decode decides
    detail: npt.NDArray[np.uint8]  # 1 odd JPEG frame, 2 palette, 4 alpha, 8 CMYK, 16 odd BMP, 32 interlaced/progressive
    size_bytes: npt.NDArray[np.int64]

class BuildInfo(TypedDict):
    """Facts about this build; asking starts nothing."""

    version: str
    compiler: str
    cuda: bool
    cuda_archs: str  # "80 90"; empty without CUDA
    cuda_version: str  # of the runtime that is linked in: "13.0"; empty without CUDA
    why_no_cuda: str  # empty with CUDA
    isa: str  # of the CPU kernels on this machine: "avx512", "avx2" or "base"

class CudaStatus(TypedDict):
    """What the CUDA runtime says about this machine."""

    devices: int  # 0 without a driver or a GPU
    driver_version: int  # newest CUDA that the driver supports, 1000 * major + 10 * minor; 0 without a driver
    error: str  # why there is no device; empty when there is one

def probe(paths: Sequence[bytes], threads: int = 1) -> Headers:
    """Read the headers of image files, decoding nothing and without the GIL.

    Args:
        paths: file names as `os.fsencode` gives them; any number.
        threads: at most so many at once, at least 1.

    Returns:
        Columns over the N paths. A bad file is a row with a status, never an exception.

    Raises:
        ValueError: `threads` < 1.
        TypeError: a path that is not bytes.
    """

def prove(content: bytes) -> tuple[int, int, int, int, int, bool, bool, int]:
    """Read the header of one image in memory and, of a JPEG, walk every byte, without the GIL.

    Returns:
        format, status, width, height, orientation as in `Headers`; of a JPEG whether it is well-formed to its end,
        whether nothing follows that end, and the number of its scans (the last three are false and 0 for others).
    """

def build_info() -> BuildInfo:
    """Version, compiler and CUDA of this build."""

def cuda_status() -> CudaStatus:
    """Count the GPUs. Starts the CUDA driver, so only `doctor` and its like call it."""

def cbam(
    *,
    x: int,
    w1: int,
    w2: int,
    conv: int,
    affine: int,
    residual: int,
    out: int,
    channel: int,
    hidden_sums: int,
    spatial: int,
    scratch: int,
    sizes: tuple[int, ...],
    relu: bool,
    dtype: int,
    steps: int,
    on_cuda: bool,
    stream: int,
    threads: int,
) -> None:
    """Run struct Cbam of csrc/cbam.h, without the GIL. Tensors are addresses, 0 is null; nothing is checked.

    Args:
        sizes: batch, channels, height, width, hidden, kernel.
        dtype: enum DType.
        steps: enum CbamSteps.
        stream: of CUDA; unused on the CPU.
        threads: at most so many on the CPU.

    Raises:
        RuntimeError: the CUDA runtime refuses a launch.
    """

def cbam_grad(
    *,
    x: int,
    w1: int,
    w2: int,
    conv: int,
    affine: int,
    out: int,
    channel: int,
    hidden_sums: int,
    spatial: int,
    grad: int,
    masked: int,
    dx: int,
    dw1: int,
    dw2: int,
    dconv: int,
    daffine: int,
    dlogits: int,
    ties: int,
    scratch: int,
    sizes: tuple[int, ...],
    relu: bool,
    dtype: int,
    steps: int,
    on_cuda: bool,
    stream: int,
    threads: int,
) -> None:
    """Run struct CbamGrad of csrc/cbam.h; as `cbam`."""

def cbam_scratch(*, sizes: tuple[int, ...], dtype: int, gradient: bool) -> int:
    """Floats of `scratch` that the CUDA half needs."""

def isa() -> str:
    """The instruction set of the CPU kernels in this process: "avx512", "avx2" or "base"."""

def set_isa(name: str) -> None:
    """Choose another one, for tests and benchmarks; "" is the best of this machine.

    Raises:
        ValueError: unknown, or not of this machine.
    """

def window_attention(
    *, qkv: int, bias: int, head_scale: int, out: int, lse: int, sizes: tuple[int, ...], grid: bool, scale: float,
    mask_value: float, dtype: int, on_cuda: bool, stream: int, threads: int,
) -> None:  # fmt: skip
    """Run struct WindowAttention of csrc/kernels.h, without the GIL. Tensors are addresses, 0 is null; nothing is checked.

    Args:
        sizes: batch, height, width, heads, head_dim, window_h, window_w, shift_h, shift_w.
        dtype: 0 float32, 1 float16, 2 bfloat16.
        stream: of CUDA, as an address; the current device is the caller's to set.
        threads: at most, on the CPU.

    Raises:
        RuntimeError: what the CUDA runtime says.
    """

def window_attention_grad(
    *, qkv: int, bias: int, head_scale: int, lse: int, grad: int, dqkv: int, dbias: int, dhead_scale: int, scratch: int,
    sizes: tuple[int, ...], grid: bool, scale: float, mask_value: float, dtype: int, on_cuda: bool, stream: int, threads: int,
) -> None:  # fmt: skip
    """Run struct WindowAttentionGrad of csrc/kernels.h; as `window_attention`."""

def window_attention_scratch(*, sizes: tuple[int, ...], has_bias: bool, cosine: bool, grid: bool, dtype: int) -> int:
    """Floats of scratch that the gradient needs on the current CUDA device."""

def window_attention_refusal(
    *, sizes: tuple[int, ...], has_bias: bool, cosine: bool, grid: bool, dtype: int, gradient: bool
) -> str:
    """Why the CUDA kernels do not take these sizes; empty when they do."""
