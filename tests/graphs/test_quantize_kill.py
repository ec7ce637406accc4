"""kill -9 of the process that quantises, of its parent, and of both: no process and no half-written file is left.

`benchmarks/kill_export.py --kills 30` does the same to `imgcls-fast export`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import ExportError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from imgcls_fast.core.exports import remove_stale
from imgcls_fast.graphs import quantize
from imgcls_fast.graphs.lint import lint

PARENT = """
import sys
from pathlib import Path
import numpy as np
from imgcls_fast.core.exports import new_export
from imgcls_fast.graphs.quantize import quantize
source, exports, images = (Path(word) for word in sys.argv[1:4])
with new_export(exports, "onnx", "int8", "0a1b2c3d") as folder:
    quantize(source, folder / "model.onnx", np.load(images, allow_pickle=False), quantizer="onnxruntime")
    (folder / "model.onnx").rename(exports / "model.onnx")
"""


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, state = (
                    (entry / "cmdline").read_bytes(),
                    (entry / "stat").read_text().rpartition(")")[2].split()[0],
                )
            except OSError:
                continue
            if str(folder).encode() in command and state != "Z" and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def children(folder: Path) -> list[int]:
    return [pid for pid in processes_of(folder) if b"quantize_child" in command_of(pid)]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("did not happen in time")


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def work(trained: Any, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Source, exports and images; enough of them for the work to take much longer than a killed process may linger."""
    np.save(tmp_path / "images.npy", np.concatenate([trained.calibration] * 64))
    np.save(tmp_path / "few.npy", trained.calibration)
    return trained.plain, tmp_path / "exports", tmp_path / "images.npy"


@pytest.mark.parametrize("victim", ["parent", "child", "both"])
def test_kill_at_random_instants_leaves_no_process_and_no_half_file(victim: str, work: tuple[Path, Path, Path]) -> None:
    source, exports, images = work
    draw = random.Random(victim)
    for few in (False, False, True):  # with few images the kill may come after the end
        chosen = images.with_name("few.npy") if few else images
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(source), str(exports), str(chosen)], stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        victims = {"parent": [parent.pid], "child": [], "both": [parent.pid]}[victim]
        started = wait_for(lambda: children(exports))
        time.sleep(draw.uniform(0, 1.0))
        for pid in victims + (started if victim != "parent" else []):
            kill(pid)
        _, errors = parent.communicate(timeout=60)
        wait_for(lambda: not processes_of(exports), 2)
        if victim == "child" and parent.returncode:
            assert "E003" in errors and "killed by SIGKILL" in errors
        whole = exports / "model.onnx"
        assert not whole.exists() or lint(whole, "int8") == []
        whole.unlink(missing_ok=True)
        assert [path.name for path in exports.iterdir() if not path.name.startswith(".")] == []
        remove_stale(exports)
        assert list(exports.iterdir()) == []


def start(work: tuple[Path, Path, Path], out: Path, **options: Any) -> tuple[threading.Thread, list[BaseException]]:
    """`quantize` in a thread of this process, and the errors that it ends with."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            quantize.quantize(work[0], out, np.load(work[2], allow_pickle=False), quantizer="onnxruntime", **options)
        except ExportError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_a_child_that_the_system_kills_is_one_error_that_names_the_signal(
    work: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    before = sorted(tmp_path.iterdir())
    thread, errors = start(work, out)
    (child,) = wait_for(lambda: children(tmp_path))
    kill(child)
    thread.join()
    (error,) = errors
    assert isinstance(error, ExportError) and error.code == "E003"
    assert "SIGKILL" in error.message and "memory" in error.why
    assert sorted(tmp_path.iterdir()) == before


def test_work_that_takes_too_long_is_ended(work: tuple[Path, Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    thread, errors = start(work, tmp_path / "model.onnx", timeout_s=0.3)
    thread.join()
    assert "not finished" in str(errors[0])
    assert processes_of(tmp_path) == [] and sorted(tmp_path.iterdir()) == before


def test_ctrl_c_ends_the_child_as_well(work: tuple[Path, Path, Path]) -> None:
    source, exports, images = work
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(source), str(exports), str(images)], stderr=subprocess.DEVNULL
    )
    wait_for(lambda: children(exports))
    parent.send_signal(signal.SIGINT)
    parent.wait(60)
    assert parent.returncode != 0
    wait_for(lambda: not processes_of(exports), 2)
    assert list(exports.iterdir()) == []


def test_a_child_whose_parent_has_gone_before_it_looked_ends_by_itself(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "imgcls_fast.graphs.quantize_child",
        str(tmp_path),
        "1",
    ]  # this process is not number 1
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.wait(30) == -signal.SIGKILL


def test_a_child_ends_when_the_pipe_of_its_parent_is_closed(work: tuple[Path, Path, Path], tmp_path: Path) -> None:
    code = "import os,sys,time; from imgcls_fast.graphs.quantize_child import die_with; die_with(int(sys.argv[1])); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(os.getpid())], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    time.sleep(0.5)
    assert child.poll() is None
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(10) == -signal.SIGKILL
