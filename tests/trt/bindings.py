"""NVIDIA's real Python bindings of TensorRT without TensorRT: the wheel from the index, and stub libraries for it to link with.

The bindings are one small extension module. Nine functions of NVIDIA's libraries are all that it needs to be imported; here they
give nothing, so that enumerations, classes and their conversions are the real ones, and every factory fails. Neither the wheel nor
anything made of it is kept in the repository: its licence forbids both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

DISTRIBUTION = "tensorrt_cu13_bindings"
LIBRARIES = {
    "nvinfer": """
        void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
        void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return 0; }
        void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }
        void *getBuilderPluginRegistry(int capability) { return 0; }
        void *getPluginRegistry(void) { return 0; }
    """,
    "nvonnxparser": """
        void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
        void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
        int getNvOnnxParserVersion(void) { return 0; }
    """,
    "nvinfer_plugin": "int initLibNvInferPlugins(void *logger, const char *space) { return 1; }",
}


class Unavailable(Exception):
    """The bindings cannot be had here; the text says why."""


def fetch(version: str, folder: Path, *, python: str | None = None) -> Path:
    """The wheel of one version, for this Python or for another.

    Raises:
        Unavailable: no wheel for that Python, or no index.
    """
    wanted = folder / f"{version}-{python or f'{sys.version_info.major}.{sys.version_info.minor}'}"
    known = sorted(wanted.glob("*.whl"))
    if known:
        return known[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--python-version", python] if python else []
    try:
        done = subprocess.run(
            [*command, "--dest", str(wanted), f"{DISTRIBUTION}=={version}"], capture_output=True, text=True, timeout=180
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the TensorRT {version} bindings could not be fetched: {error}") from error
    found = sorted(wanted.glob("*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        name = python or f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Unavailable(f"no wheel of the TensorRT {version} bindings for Python {name} on this system: {last}")
    return found[0]


def install(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpack the wheel, compile the stub libraries beside it, add the package `tensorrt`; environment for a child process.

    Raises:
        Unavailable: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("the stub libraries need a C compiler")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    inside = folder / "tensorrt_bindings"
    major = wheel.name.removeprefix(f"{DISTRIBUTION}-").split(".")[0]
    for name, text in LIBRARIES.items():
        source, library = folder / f"{name}.c", f"lib{name}.so.{major}"
        source.write_text(text)
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(inside / library), str(source)],
            check=True,
        )
    package = folder / "tensorrt" / "__init__.py"
    package.parent.mkdir()
    package.write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )  # as NVIDIA's own does
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return {**known, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(inside), "OMP_NUM_THREADS": "1"}
