"""Processes that this package starts: none is left behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core import child
from imgcls_fast.core.pixels import Pixels

PIXELS = Pixels(8, 1.0, "bilinear", "rgb", "apply", (0.5,) * 3, (0.5,) * 3)


def race(folder: Path) -> None:
    from imgcls_fast.core.bundle import Bundle
    from imgcls_fast.measuring.race import ratios

    bundle = Bundle.__new__(Bundle)
    object.__setattr__(bundle, "directory", folder)
    ratios([], bundle, "cpu", 1)


def trial(folder: Path) -> None:
    from imgcls_fast.engines.trial import demand_survivable

    (folder / "model.onnx").write_bytes(b"x")
    demand_survivable(folder / "model.onnx", "0" * 64, "onnx", PIXELS)


@pytest.mark.parametrize("work", [lambda folder: child.run("core.env"), race, trial], ids=["run", "race", "trial"])
def test_ctrl_c_leaves_no_child_alive(work: Callable[[Path], None], tmp_path: Path, monkeypatch: Any) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], *arguments: Any, **more: Any) -> None:
        process.send_signal(signal.SIGSTOP)  # it cannot end by itself
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path)
        assert [process.returncode for process in started] == [-signal.SIGKILL]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_what_a_module_wrote_is_returned() -> None:
    ended = child.run("data.quarantine", "50", "4096")
    assert (ended.returncode, ended.stdout.splitlines()[:1]) == (0, [b"ready"])


def test_a_child_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = child.start

    def remembered(*words: str, **more: Any) -> subprocess.Popen[bytes]:
        started.append(start(*words, **more))
        started[0].send_signal(signal.SIGSTOP)
        return started[0]

    monkeypatch.setattr(child, "start", remembered)
    with pytest.raises(subprocess.TimeoutExpired):
        child.run("data.quarantine", "50", "4096", timeout=0.2)
    assert started[0].returncode == -signal.SIGKILL
