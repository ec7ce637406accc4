"""The folder of exports: whole folders, a lock that tells the dead from the living, an index that can be trusted."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.errors import ExportError, HardwareError
from imgcls_fast.core.exports import (
    choose,
    export_key,
    find_export,
    find_key,
    finish,
    list_exports,
    new_export,
    remove_stale,
)
from imgcls_fast.core.files import read_sealed


@pytest.fixture
def bundle(bundle_of: Callable[..., Any]) -> Any:
    return bundle_of()


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    return tmp_path / "exports"


def make(exports: Path, bundle: Any, precision: str = "fp32", key: str = "0a1b2c3d", content: bytes = b"graph") -> Any:
    with new_export(exports, "onnx", precision, key) as folder:
        (folder / "model.onnx").write_bytes(content)
        return finish(folder, bundle, "onnx", precision, "model.onnx", {"opset": 20})


def test_an_export_is_found_by_target_and_by_precision(exports: Path, bundle: Any) -> None:
    first, second = make(exports, bundle), make(exports, bundle, "fp16")
    choose(first)
    choose(second)
    assert find_export(exports, bundle, "onnx").path == second.path
    assert find_export(exports, bundle, "onnx", "fp32").path == first.path
    assert [export.folder.name for export in list_exports(exports)] == ["onnx-fp16-0a1b2c3d", "onnx-fp32-0a1b2c3d"]
    assert second.path.read_bytes() == b"graph"
    assert {"classes", "pixels", "bundle", "temperature", "sha256", "bytes"} <= set(second.meta)
    assert second.gate is None


def test_a_made_export_that_was_not_chosen_is_not_used(exports: Path, bundle: Any) -> None:
    make(exports, bundle)
    with pytest.raises(ExportError) as missing:
        find_export(exports, bundle, "onnx", "fp32")
    assert missing.value.code == "E001"
    assert missing.value.try_.endswith("--onnx --precision fp32")


@pytest.mark.parametrize("how", ["one bit", "gone", "other model", "other temperature", "index"])
def test_what_is_not_exactly_this_model_is_refused(exports: Path, bundle: Any, how: str) -> None:
    made = make(exports, bundle)
    choose(made)
    if how == "one bit":
        made.path.write_bytes(b"grapi")
    elif how == "gone":
        made.path.unlink()
    elif how == "other model":
        bundle = replace(bundle, digests={"weights.safetensors": "0"})
    elif how == "other temperature":
        bundle = replace(bundle, temperatures=(9.0,))
    else:
        (exports / "index.json").write_text("[1")
    with pytest.raises(ExportError) as refused:
        find_export(exports, bundle, "onnx")
    assert refused.value.code == "E001"
    assert "--onnx" in refused.value.try_
    if how != "index":
        assert (find_key(exports, bundle, "onnx", "fp32", "0a1b2c3d") is None) is (how != "other temperature")


def test_a_folder_that_was_begun_and_not_finished_leaves_nothing(exports: Path, bundle: Any) -> None:
    with pytest.raises(KeyboardInterrupt), new_export(exports, "onnx", "fp32", "k") as folder:
        (folder / "model.onnx").write_bytes(b"half")
        assert list_exports(exports) == []
        raise KeyboardInterrupt
    assert list(exports.iterdir()) == []


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(exports: Path, bundle: Any) -> None:
    with pytest.raises(HardwareError) as full, new_export(exports, "onnx", "fp32", "k") as folder:
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.onnx"))
    assert full.value.code == "H003"
    assert "No space left on device" in full.value.message
    assert list(exports.iterdir()) == []


def test_the_same_key_replaces_the_folder_and_keeps_no_other_copy(exports: Path, bundle: Any) -> None:
    make(exports, bundle, content=b"old")
    made = make(exports, bundle, content=b"new")
    assert made.path.read_bytes() == b"new"
    assert [path.name for path in exports.iterdir()] == ["onnx-fp32-0a1b2c3d"]
    assert stat.S_IMODE(made.folder.stat().st_mode) & 0o055 == 0o055 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_MAKER = """
import sys
from pathlib import Path
from imgcls_fast.core.exports import new_export
with new_export(Path(sys.argv[1]), "onnx", "int8", "k") as folder:
    (folder / "half").write_bytes(b"half")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def test_only_what_a_killed_process_left_is_removed(exports: Path, bundle: Any) -> None:
    words = [sys.executable, "-c", _MAKER, str(exports)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        name = maker.stdout.readline().strip()
        assert remove_stale(exports) == []
        make(exports, bundle)  # a new export tidies up as well, and must leave this one
        assert (exports / name / "half").exists()
        maker.send_signal(signal.SIGKILL)
        maker.wait()
    assert (exports / name).exists()
    make(exports, bundle, key="another0")
    assert not (exports / name).exists()


def test_threads_that_choose_at_once_lose_no_entry(exports: Path, bundle: Any) -> None:
    made = [make(exports, bundle, precision) for precision in ("fp32", "fp16", "bf16", "int8")] * 5
    threads = [threading.Thread(target=choose, args=(export,)) for export in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = read_sealed(exports / "index.json")
    assert set(index) == {"onnx", "onnx-fp32", "onnx-fp16", "onnx-bf16", "onnx-int8"}


def test_the_key_changes_with_everything_that_shapes_the_file(bundle: Any) -> None:
    keys = [
        export_key(bundle, opset=20),
        export_key(bundle, opset=21),
        export_key(replace(bundle, temperatures=(2.0,)), opset=20),
        export_key(replace(bundle, digests={"weights.safetensors": "0"}), opset=20),
    ]
    assert len(set(keys)) == 4
    assert all(len(key) == 8 for key in keys)
    assert export_key(bundle, opset=20) == keys[0]
