"""Exports that hold native code are opened only where this user made them, or vouches for them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.cli.app import main
from imgcls_fast.core import env
from imgcls_fast.core.errors import ExportError
from imgcls_fast.core.exports import (
    META,
    Export,
    choose,
    export_key,
    find_export,
    find_key,
    finish,
    new_export,
    read_export,
)
from imgcls_fast.core.files import read_sealed, write_sealed
from imgcls_fast.core.trust import KEY, is_own, signed
from imgcls_fast.engines import runtimes
from imgcls_fast.measuring.contenders import contenders_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration folder of a user who has exported nothing yet."""
    monkeypatch.setenv("IMGCLS_CONFIG", str(tmp_path / "config" / "imgcls-fast"))
    return tmp_path / "config" / "imgcls-fast"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was opened, instead of opening it."""
    found: list[str] = []

    def opener(export: Export, *_: Any) -> Any:
        found.append(export.folder.name)
        raise ExportError("E005", "opened")

    for name in ("aoti", "trt"):
        monkeypatch.setitem(runtimes.OPENERS, name, opener)
    return found


def export_of(bundle: Any, target: str = "aoti", content: bytes = b"native") -> Export:
    with new_export(bundle.directory.parent / "exports", target, "fp32", export_key(bundle, target=target)) as folder:
        (folder / "model.bin").write_bytes(content)
        export = finish(folder, bundle, target, "fp32", "model.bin", {"host": {"a": 1.5}, "shape": (1, 2)})
    choose(export)
    return export


def exchange(export: Export) -> None:
    """What a stranger does: other code, and the digest of it in meta.json."""
    export.path.write_bytes(b"evil")
    meta = read_sealed(export.folder / META)
    meta["sha256"] = hashlib.sha256(b"evil").hexdigest()
    write_sealed(export.folder / META, meta)


def test_the_key_is_made_by_the_first_export_and_nobody_else_can_read_it(home: Path, bundle_of: Any) -> None:
    assert not home.exists()
    export = export_of(bundle_of())
    assert stat.S_IMODE((home / KEY).stat().st_mode) == 0o600 and len((home / KEY).read_bytes()) == 32
    assert sorted(path.name for path in home.iterdir()) == [KEY]
    key = (home / KEY).read_bytes()
    assert is_own(read_export(export.folder).meta)
    export_of(bundle_of())
    assert (home / KEY).read_bytes() == key


@pytest.mark.parametrize("change", ["bundle", "sha256", "host", "target", "signature", "more"])
def test_a_signature_covers_everything_that_meta_says(home: Path, change: str) -> None:
    meta = signed({"bundle": "b", "sha256": "s", "host": {"torch": "2"}, "target": "aoti", "x": (1, 2.5, None)})
    assert is_own(json.loads(json.dumps(meta)))
    assert not is_own(meta | {change: "other"})


@pytest.mark.parametrize("target", ["aoti", "trt"])
def test_own_native_code_is_opened_and_a_strangers_is_not(
    target: str, home: Path, bundle_of: Any, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of()
    export = export_of(bundle, target)
    with pytest.raises(ExportError, match="opened"):
        runtimes.open_engine(bundle, target)
    assert opened == [export.folder.name]
    monkeypatch.setenv("IMGCLS_CONFIG", str(tmp_path / "another user"))
    with pytest.raises(ExportError, match="native code") as refused:
        runtimes.open_engine(bundle, target)
    assert refused.value.code == "E006" and len(opened) == 1
    with pytest.raises(ExportError, match="opened"), pytest.warns(UserWarning, match="unknown origin"):
        runtimes.open_engine(bundle, target, trust=True)


def test_an_exchanged_package_with_its_digest_rewritten_is_not_opened(
    home: Path, bundle_of: Any, opened: list[str]
) -> None:
    bundle = bundle_of()
    export = export_of(bundle)
    exchange(export)
    find_export(export.folder.parent, bundle, "aoti")  # whole, says meta.json
    with pytest.raises(ExportError) as refused:
        runtimes.open_engine(bundle, "aoti")
    assert refused.value.code == "E006"
    with pytest.raises(ExportError) as refused:
        runtimes.open_export(bundle, read_export(export.folder), "aoti")
    assert refused.value.code == "E006"
    assert runtimes.open_engine(bundle, "auto").runtime == "torch"
    ready, absent = contenders_of(bundle, export.folder.parent, run="RUN")
    assert [c.runtime for c in ready] == ["torch"] and any("native code" in entry.reason for entry in absent)
    ready, _ = contenders_of(bundle, export.folder.parent, run="RUN", trust=True)  # trusted, but not named
    assert [c.runtime for c in ready] == ["torch"]
    ready, _ = contenders_of(bundle, export.folder.parent, run="RUN", runtimes=("aoti",), trust=True)
    assert [c.runtime for c in ready] == ["torch", "aoti"] and ready[1].from_task(ready[1].to_task()).trust
    assert opened == []


def test_own_code_that_was_exchanged_alone_is_damaged(home: Path, bundle_of: Any, opened: list[str]) -> None:
    bundle = bundle_of()
    export = export_of(bundle)
    export.path.write_bytes(b"evil")
    with pytest.raises(ExportError) as refused:
        runtimes.open_export(bundle, export, "aoti")
    assert refused.value.code == "E001" and opened == []


@pytest.mark.parametrize("target", ["onnx", "aoti", "trt", "pt2", "torchscript", "triton"])
def test_what_a_stranger_made_is_not_handed_over_as_an_export_of_ours(target: str, home: Path, bundle_of: Any) -> None:
    bundle = bundle_of()
    export = export_of(bundle, target)
    key = export_key(bundle, target=target)
    assert find_key(export.folder.parent, bundle, target, "fp32", key) is not None
    exchange(export)
    assert find_key(export.folder.parent, bundle, target, "fp32", key) is None


def test_a_key_that_others_can_read_signs_nothing(home: Path, bundle_of: Any) -> None:
    export = export_of(bundle_of())
    (home / KEY).chmod(0o644)
    assert not is_own(export.meta)
    with pytest.warns(UserWarning, match="no private key"):
        assert "signature" not in export_of(bundle_of()).meta


@pytest.mark.parametrize("planted", ["link", "folder", "short"])
def test_a_planted_key_is_no_key(planted: str, home: Path, tmp_path: Path) -> None:
    home.mkdir(parents=True)
    (tmp_path / "known").write_bytes(b"k" * 32)
    (tmp_path / "known").chmod(0o600)
    if planted == "link":
        (home / KEY).symlink_to(tmp_path / "known")
    elif planted == "folder":
        (home / KEY).mkdir()
    else:
        (home / KEY).write_bytes(b"k" * 31)
        (home / KEY).chmod(0o600)
    assert "signature" not in signed({"target": "onnx"})


def test_where_no_key_can_be_kept_exports_are_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle_of: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMGCLS_CONFIG", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="no private key"):
        assert "signature" not in export_of(bundle_of()).meta


def test_the_configuration_folder_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("IMGCLS_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert env.config_dir() == tmp_path / ".config" / "imgcls-fast"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # the standard says: ignore it
    assert env.config_dir() == tmp_path / ".config" / "imgcls-fast"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "x"))
    assert env.config_dir() == tmp_path / "x" / "imgcls-fast"


@pytest.mark.parametrize(
    "words",
    [
        "eval RUN --trust",
        "predict RUN x.png --trust",
        "predict x.png --runtime auto --trust",
        "verify --trust",
        "bench --trust",
    ],
)
def test_trust_goes_with_something_that_is_named(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "RUN").mkdir()
    for name in ("config.yaml", "manifest.npz"):
        (tmp_path / "RUN" / name).write_bytes(b"")
    assert main(words.split()) == 2
    assert "--trust goes with" in capsys.readouterr().err
    assert os.listdir(tmp_path / "RUN")
