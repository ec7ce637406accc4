"""What torch.compile and AOTInductor need is looked for before anything is done for nothing."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core import compilers, env
from imgcls_fast.core.compilers import compiler_lack, compiler_name
from imgcls_fast.core.errors import HardwareError

Programs = Callable[..., None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """A PATH of these programs alone, and a system whose package managers are those named."""

    def arrange(*names: str, managers: tuple[str, ...] = ("apt-get",)) -> None:
        for folder, programs in (("bin", names), ("system", managers)):
            (tmp_path / folder).mkdir(exist_ok=True)
            for name in programs:
                (tmp_path / folder / name).write_text("#!/bin/sh\n")
                (tmp_path / folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setattr(compilers, "_SYSTEM", str(tmp_path / "system"))
        monkeypatch.setattr(compilers, "find_spec", lambda name: object())
        for variable in ("CC", "CXX"):
            monkeypatch.delenv(variable, raising=False)

    return arrange


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    return tmp_path / "include"


@pytest.mark.parametrize(
    ("device", "package", "here", "variables", "what"),
    [
        ("cpu", False, ("g++",), {}, None),
        ("cpu", False, ("gcc", "clang"), {}, "no C++ compiler was found (g++)"),
        ("cpu", False, ("clang++",), {"CXX": "clang++"}, None),
        ("cpu", False, ("ccache", "g++"), {"CXX": "ccache g++"}, None),
        ("cpu", False, ("g++",), {"CXX": "g++-14"}, "no C++ compiler was found ($CXX is g++-14)"),
        ("cuda:0", False, ("gcc",), {}, None),
        ("cuda", False, ("clang",), {}, None),
        ("cuda", False, (), {}, "no C compiler was found (gcc or clang)"),
        ("cuda", True, ("gcc",), {}, "no C++ compiler was found (g++)"),
        ("cuda", True, ("gcc", "g++"), {}, None),
        ("cpu", True, (), {}, "no C++ compiler was found (g++)"),
    ],
)
def test_each_device_needs_its_own_compiler(
    device: str, package: bool, here: tuple[str, ...], variables: dict[str, str], what: str | None,
    programs: Programs, headers: Path,
) -> None:  # fmt: skip
    programs(*here)
    lack = compiler_lack(device, variables, package=package, headers=headers)
    assert (lack and lack.what) == what


def test_pythons_headers_count_and_triton_on_a_gpu(
    programs: Programs, headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs("g++", "gcc")
    lack = compiler_lack("cpu", {}, headers=tmp_path)
    assert lack and lack.what.startswith("Python's headers are missing (no Python.h in ") and "-dev" in lack.remedy
    assert compiler_lack("cpu", {}, headers=tmp_path, package=True) is None
    monkeypatch.setattr(compilers, "find_spec", lambda name: None)
    lack = compiler_lack("cuda", {}, headers=headers)
    assert lack and (lack.what, lack.remedy) == ("Triton is not installed", "pip install triton")


@pytest.mark.parametrize(
    ("manager", "remedy"),
    [("apt-get", "apt-get install g++"), ("dnf", "dnf install gcc-c++"), ("apk", "apk add g++"), ("other", "install g++")],
)
def test_the_remedy_is_a_line_of_this_systems_package_manager(manager: str, remedy: str, programs: Programs) -> None:
    programs(managers=(manager,))
    lack = compiler_lack("cpu", {})
    assert lack and lack.remedy == remedy


def test_what_is_asked_for_is_h004_with_the_line_and_the_way_around(programs: Programs) -> None:
    programs()
    assert env.cxx_compiler() is None
    with pytest.raises(HardwareError) as refused:
        env.require_compiler("cpu", "export --aoti", "--onnx", package=True)
    assert (refused.value.code, refused.value.try_) == ("H004", "apt-get install g++   (or --onnx)")


def test_exports_and_engines_that_compile_are_refused_before_they_begin(
    programs: Programs, bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    from imgcls_fast.core.exports import way_of
    from imgcls_fast.engines.runtimes import open_engine
    from imgcls_fast.exporting.programs import write_program

    bundle = bundle_of()
    programs()
    with pytest.raises(HardwareError, match="the runtime compile needs it"):
        open_engine(bundle, "compile")
    with pytest.raises(HardwareError, match="export --aoti needs it"):
        write_program(bundle, tmp_path / "exports", iter(()), way_of("aoti"))


def test_torch_finds_what_is_found_here() -> None:
    """Torch's own search, where this machine has a compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    own = compiler_name({})
    if own is None or not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("no C++ compiler or no Python.h here")
    assert subprocess.run([own, "--version"], capture_output=True, check=False).returncode == 0
    assert Path(own).name == Path(get_cpp_compiler()).name
