"""Bad images become lines with reasons; whatever a decoder does, the run lives."""

from __future__ import annotations

import csv
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core import child
from imgcls_fast.data import quarantine, reach
from imgcls_fast.data.quarantine import BadFile, examine, examine_isolated, read_quarantine, write_quarantine


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    made = {"good": tmp_path / "good.png", "empty": tmp_path / "empty.png", "missing": tmp_path / "missing.png"}
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(made["good"])
    made["empty"].write_bytes(b"")
    return made


def test_a_good_file_has_no_reason_and_its_size(files):
    verdict = examine(files["good"])
    assert (verdict.ok, verdict.reason, verdict.width, verdict.height, verdict.orientation) == (True, "", 4, 3, 1)


def test_whatever_a_decoder_raises_is_a_reason(files, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ReferenceError("not among the faults we know")

    monkeypatch.setattr(quarantine, "full_decode", broken)
    verdict = examine(files["good"])
    assert not verdict.ok and verdict.reason == "decoder failed: ReferenceError: not among the faults we know"


def test_isolated_verdicts_equal_those_of_this_process_in_order(files, monkeypatch):
    monkeypatch.setattr(reach, "WAITS_S", ())
    paths = [files["good"], files["empty"], files["good"], files["missing"]]
    for workers in (1, 3):
        assert examine_isolated(paths, workers=workers) == [examine(p) for p in paths]
    assert examine_isolated([]) == []


def child_that(tmp_path: Path, body: str) -> Path:
    """A program like the real child that does `body` at files called bad."""
    script = tmp_path / "child.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(Path(quarantine.__file__).parents[2])!r})
            from imgcls_fast.data import quarantine
            plain = quarantine.full_decode
            def full_decode(path, **options):
                if "bad" in path:
                    {body}
                return plain(path, **options)
            quarantine.full_decode = full_decode
            quarantine.serve_child(sys.argv[1:])
            """
        )
    )
    return script


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "decoder crashed (SIGSEGV)"),
        ("import os; os._exit(7)", "decoder crashed (exit code 7)"),
        ("import time; time.sleep(60)", "decoder hung: no answer in 1 s"),
        ("x = bytearray(8 << 30)", "decoder failed: MemoryError"),
    ],
    ids=["segfault", "exit", "hang", "memory"],
)
def test_a_crash_a_hang_or_a_memory_bomb_is_a_reason_and_the_others_go_on(files, tmp_path, monkeypatch, body, reason):
    fake = child_that(tmp_path, body)
    monkeypatch.setattr(child, "command", lambda module, *words, options=(): [sys.executable, str(fake), *words])
    bad = tmp_path / "bad.png"
    bad.write_bytes(files["good"].read_bytes())
    verdicts = examine_isolated([files["good"], bad, files["empty"], files["good"]], timeout_s=1, memory_mb=4096)
    assert [v.ok for v in verdicts] == [True, False, False, True]
    assert verdicts[1].reason.startswith(reason)
    assert verdicts[2].reason == "empty file"


def test_the_child_takes_no_memory_for_threads_that_it_does_not_need(files, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    told = 'import os; raise quarantine.Undecodable(path, os.environ["OPENBLAS_NUM_THREADS"] + " thread")'
    fake = child_that(tmp_path, told)
    monkeypatch.setattr(child, "command", lambda module, *words, options=(): [sys.executable, str(fake), *words])
    assert [v.reason for v in examine_isolated([tmp_path / "bad.png"])] == ["1 thread"]


def test_the_child_needs_no_help_from_the_environment(files, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert sys.executable
    assert examine_isolated([files["good"]])[0].ok


def test_the_list_comes_back_as_it_was_written(tmp_path):
    rows = [
        BadFile('a, b/"c".jpg', "empty file", "train", "a, b", 0),
        BadFile("new\nline\r.jpg", "truncated: 8,192 of 48,331 bytes decoded", "", "", 48331, "epoch 3"),
        BadFile(os.fsdecode(b"latin-\xe9.jpg"), "HTML, not an image"),
    ]
    write_quarantine(tmp_path / "quarantine.csv", rows)
    assert read_quarantine(tmp_path / "quarantine.csv") == rows
    with open(tmp_path / "quarantine.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert next(csv.reader(file)) == ["path", "reason", "split", "label", "size_bytes", "found"]


def test_no_list_means_no_bad_files(tmp_path):
    assert read_quarantine(tmp_path / "quarantine.csv") == []
