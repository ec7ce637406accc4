"""A whole run where shared memory is small, and the file system has neither locks nor syncs folders: it ends as anywhere, and says so."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest

from imgcls_fast.loading import handover
from imgcls_fast.training import session


@pytest.mark.usefixtures("no_judging")
def test_a_run_on_a_bare_machine_ends_in_the_same_bits_and_its_log_says_what_was_missing(
    configure: Callable[..., Any], same_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = session.start(configure({"train.epochs": 1}))
    fsync = os.fsync

    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(os, "fsync", files_only)
    monkeypatch.setattr(handover, "free_bytes", lambda: 4096)
    run = session.start(configure({"train.epochs": 1, "train.workers": 1}))
    same_result(usual, run)
    log = (run.directory / "log.txt").read_text()
    assert log.count("has no locks (Function not implemented)") == 1
    assert log.count("batches go through pipes") == 1
    reasons = {name: reason for name, _, reason in run.read_json("plan.json")["plan"]}
    assert "batches through pipes: /dev/shm has 0 MB free" in reasons["train.workers"]
