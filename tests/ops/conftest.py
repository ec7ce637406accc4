"""The CUDA emulator: compiles the source of kernels as C++ (tests/cuda_emulator)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

EMULATOR = Path(__file__).resolve().parents[1] / "cuda_emulator"
FLAGS = (
    "-std=c++17 -O2 -fno-strict-aliasing -fPIC -shared -U_FORTIFY_SOURCE -DIMGCLS_CUDA_EMULATOR -Wno-attributes "
    "-Wl,-Bsymbolic"  # our few runtime functions, not those of the libcudart that torch may have loaded
)


def cuda_headers() -> Path | None:
    """The include folder of the CUDA toolkit that nvcc belongs to, or of the usual places."""
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
        tops = [line.partition("=")[2] for line in said.splitlines() if line.startswith("#$ TOP=")]
        places += [Path(top) for top in tops] + [Path(nvcc).resolve().parents[1]]
    places.append(Path("/usr/local/cuda"))
    return next((top / "include" for top in places if (top / "include" / "cuda_bf16.h").is_file()), None)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Compiles a file of tests/cuda_emulator for the emulator; functions return None or a sentence."""
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("the CUDA emulator needs g++ on x86-64")
    if headers is None:
        pytest.skip("the CUDA emulator needs the headers of a CUDA toolkit (set CUDA_HOME)")

    def build(name: str) -> ctypes.CDLL:
        target = tmp_path_factory.mktemp("emulator") / f"{name}.so"
        command = [compiler, *FLAGS.split(), f"-I{EMULATOR}", f"-isystem{headers}"]
        subprocess.run([*command, str(EMULATOR / f"{name}.cpp"), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))

    return build
