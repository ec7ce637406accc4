"""Pip lines name what this installation was made from: the bare name is registered on no index, and anybody may take it."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from imgcls_fast.core import env

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
METADATA = """Metadata-Version: 2.2
Name: imgcls-fast
Version: 0.1.0
Requires-Dist: torch<2.16,>=2.11
Requires-Dist: nvidia-dali-cuda130<3,>=2.4; sys_platform == "linux" and platform_machine == "x86_64"
Provides-Extra: onnx
Requires-Dist: onnx<2,>=1.18; extra == "onnx"
Requires-Dist: onnxruntime<2,>=1.22; extra == "onnx"
Provides-Extra: trt
Requires-Dist: imgcls-fast[onnx]; extra == "trt"
Requires-Dist: tensorrt<12,>=10.13; extra == "trt"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that imgcls-fast was installed: `installed(direct_url, installer)`."""

    def pretend(origin: object = None, installer: str = "pip") -> None:
        folder = tmp_path / "imgcls_fast-0.1.0.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(METADATA)
        (folder / "INSTALLER").write_text(f"{installer}\n")
        if origin is not None:
            (folder / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.setattr(metadata, "distribution", lambda name: metadata.Distribution.at(folder))

    return pretend


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my checkout"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    return folder


def _words(line: str) -> list[str]:
    return shlex.split(line)


@pytest.mark.parametrize("editable", [True, False])
def test_an_installation_from_a_folder_is_extended_from_that_folder(tmp_path: Path, installed: Callable[..., None], editable: bool) -> None:
    folder = _folder(tmp_path)
    installed({"url": folder.as_uri(), "dir_info": {"editable": editable}})
    assert _words(env.install_hint("trt")) == ["pip", "install", *(["-e"] if editable else []), f"{folder}[trt]"]
    assert _words(env.reinstall_hint())[-1] == str(folder)


def test_an_installation_from_a_wheel_is_extended_from_that_wheel(tmp_path: Path, installed: Callable[..., None]) -> None:
    wheel = tmp_path / "imgcls_fast-0.1.0-cp311-cp311-linux_x86_64.whl"
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert _words(env.install_hint("onnx")) == ["pip", "install", f"{wheel}[onnx]"]


def test_an_installation_from_an_address_names_the_address(installed: Callable[..., None]) -> None:
    installed({"url": "https://example.com/imgcls_fast-0.1.0.tar.gz", "archive_info": {}})
    wanted = "imgcls-fast[onnx] @ https://example.com/imgcls_fast-0.1.0.tar.gz"
    assert _words(env.install_hint("onnx")) == ["pip", "install", wanted]
    installed({"url": "https://example.com/x.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}})
    wanted = "imgcls-fast[onnx] @ git+https://example.com/x.git@0a1b"
    assert _words(env.install_hint("onnx")) == ["pip", "install", wanted]


def test_an_installation_from_an_index_keeps_to_its_version(installed: Callable[..., None]) -> None:
    installed()
    assert _words(env.install_hint("onnx")) == ["pip", "install", "imgcls-fast[onnx]==0.1.0"]
    assert "pip" not in env.reinstall_hint() and "0.1.0 again from" in env.reinstall_hint()  # it would be fetched by its name
    installed(installer="uv")
    assert _words(env.install_hint("onnx")) == ["uv", "pip", "install", "imgcls-fast[onnx]==0.1.0"]


@pytest.mark.parametrize("origin", [{"dir_info": {}}, {"archive_info": {}}, None])
def test_where_the_origin_is_gone_the_libraries_themselves_are_named(
    tmp_path: Path, installed: Callable[..., None], origin: dict[str, object] | None
) -> None:
    installed(origin and {"url": (tmp_path / "gone").as_uri(), **origin}, installer="conda")
    wanted = ["onnx<2,>=1.18", "onnxruntime<2,>=1.22", "tensorrt<12,>=10.13"]
    assert _words(env.install_hint("trt")) == ["pip", "install", *wanted]
    assert _words(env.requirement_hint("nvidia-dali-cuda130")) == ["pip", "install", "nvidia-dali-cuda130<3,>=2.4"]


def test_a_checkout_that_was_never_installed_names_the_libraries_of_its_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setattr(env, "__file__", str(ROOT / "python" / "imgcls_fast" / "core" / "env.py"))
    assert _words(env.install_hint("onnx"))[2:] == EXTRAS["onnx"]
    assert _words(env.install_hint("trt"))[2:] == [*EXTRAS["onnx"], EXTRAS["trt"][-1]]
    assert "imgcls-fast" not in env.install_hint("bench")


def test_no_other_place_prints_a_pip_line_of_its_own() -> None:
    places = [p for top in ("python", "benchmarks", "scripts") for p in (ROOT / top).rglob("*.py")]
    found = [p.relative_to(ROOT).as_posix() for p in places if re.search(r"pip install '?(imgcls-fast|nvidia|onnx)", p.read_text("utf-8"))]
    assert not found
    pages = [p for top in ("python", "benchmarks", "scripts", "docs") for ending in ("py", "md") for p in (ROOT / top).rglob(f"*.{ending}")]
    texts = [p for p in [*pages, ROOT / "README.md"] if "results" not in p.parts]
    named = [p.relative_to(ROOT).as_posix() for p in texts if re.search(r"(?<!/)imgcls-fast\[", p.read_text("utf-8"))]
    assert not named


def test_every_extra_that_a_hint_names_exists() -> None:
    used = set()
    for path in (ROOT / "python").rglob("*.py"):
        used |= set(re.findall(r"""install_hint\(["'](\w+)["']\)""", path.read_text("utf-8")))
    assert used >= {"int8", "trt"} and used <= set(EXTRAS)


def test_a_copy_without_metadata_gets_no_empty_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_distribution", lambda: None)
    monkeypatch.setattr(env, "_origin", lambda extra: [])
    monkeypatch.setattr(env, "_checkout_requires", lambda extra: [])
    assert env.install_hint("trt") == "what the extra 'trt' of the project's pyproject.toml lists"
