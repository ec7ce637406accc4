"""What torch.compile and AOTInductor need of the system: they write C or C++, and call the compiler that is found by name.

Without one they fail after minutes, in the middle of the first step. Here it is asked for beforehand; nothing is started.
Standard library only.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_SYSTEM = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin"  # where package managers lie, whatever PATH names
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
# package manager -> what it calls a C++ compiler, a C compiler, and Python's headers
_PACKAGES = {
    "apt-get install": ("g++", "gcc libc6-dev", f"{_PYTHON}-dev"),
    "dnf install": ("gcc-c++", "gcc", "python3-devel"),
    "yum install": ("gcc-c++", "gcc", "python3-devel"),
    "apk add": ("g++", "gcc musl-dev", "python3-dev"),
    "zypper install": ("gcc-c++", "gcc", "python3-devel"),
    "pacman -S": ("gcc", "gcc", "python"),
    "conda install -c conda-forge": ("gxx", "gcc", "python"),
}
_CXX, _CC, _HEADERS = range(3)


@dataclass(frozen=True)
class Lack:
    """What is not here.

    Args:
        what: "no C++ compiler was found (g++)".
        remedy: the command that installs it.
    """

    what: str
    remedy: str


def compiler_lack(
    device: str, variables: Mapping[str, str], *, package: bool = False, headers: Path | None = None
) -> Lack | None:
    """What is missing for compiling a network, or None.

    For a CPU Inductor writes C++ and asks $CXX, else g++; for a GPU it writes Triton kernels, whose launchers are C and go to
    $CC, else gcc or clang. Both include Python.h; a package of AOTInductor has no Python in it, and is C++ on any device.

    Args:
        device: "cpu" or "cuda[:n]".
        variables: CC and CXX, where they are set.
        package: whether AOTInductor builds a package.
        headers: folder of Python.h; None: this interpreter's.

    Source: `get_cpp_compiler` in torch/_inductor/cpp_builder.py, `_find_compiler` in triton/runtime/build.py.
    """
    gpu = device.startswith("cuda")
    if gpu and find_spec("triton") is None:
        return Lack("Triton is not installed", "pip install triton")
    if not gpu or package:
        default = "clang++" if sys.platform == "darwin" else "g++"
        if lack := _missing("C++", "CXX", variables, (default,), _CXX):
            return lack
    if gpu and (lack := _missing("C", "CC", variables, ("gcc", "clang"), _CC)):
        return lack
    folder = headers or Path(sysconfig.get_path("include"))
    if not package and not (folder / "Python.h").is_file():
        return Lack(f"Python's headers are missing (no Python.h in {folder})", _install(_HEADERS))
    return None


def compiler_name(variables: Mapping[str, str]) -> str | None:
    """Path of the C++ compiler that Inductor would call; None without one."""
    return _found(variables.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _missing(
    language: str, variable: str, variables: Mapping[str, str], names: tuple[str, ...], package: int
) -> Lack | None:
    own = variables.get(variable)
    if any(_found(name) for name in ((own,) if own else names)):
        return None
    shown = f"${variable} is {own}" if own else " or ".join(names)
    return Lack(f"no {language} compiler was found ({shown})", _install(package))


def _found(command: str) -> str | None:
    """The program of a command; "ccache g++" is one."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    return shutil.which(words[0]) if words else None


def _install(package: int) -> str:
    for command, names in _PACKAGES.items():
        program = command.split()[0]
        if shutil.which(program, path=_SYSTEM) or shutil.which(program):
            return f"{command} {names[package]}"
    return f"install {_PACKAGES['apt-get install'][package]}"
