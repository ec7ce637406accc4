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

def build_info() -> BuildInfo:
    """Version, compiler and CUDA of this build."""

def cuda_status() -> CudaStatus:
    """Count the GPUs. Starts the CUDA driver, so only `doctor` and its like call it."""
