"""Files appear whole or not at all, and a full disk is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.files import sha256_file, sha256_json, write_json, write_text, write_whole


class Stop(BaseException):
    """Like a second Ctrl-C: no Exception."""


def failing(error: BaseException):
    def write(file) -> None:
        file.write(b"half of it")
        raise error

    return write


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize(
    "error", [ValueError("no"), Stop(), OSError(errno.ENOSPC, "No space left on device")], ids=repr
)
def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path, there_before, error):
    path = tmp_path / "state.json"
    if there_before:
        path.write_bytes(b"old")
    with pytest.raises(HardwareError if isinstance(error, OSError) else type(error)):
        write_whole(path, failing(error))
    assert os.listdir(tmp_path) == (["state.json"] if there_before else [])
    assert not there_before or path.read_bytes() == b"old"


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write(file) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_whole(path, write)
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_content_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    write_text(tmp_path / "x", "text")
    assert done == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_place_that_cannot_be_written_gives_h003_with_its_name(tmp_path, folder):
    (tmp_path / "file").write_text("I am no folder")
    with pytest.raises(HardwareError) as caught:
        write_text(tmp_path / folder / "x.txt", "text")
    assert caught.value.code == "H003" and "x.txt" in caught.value.message and caught.value.try_
    assert caught.value.exit_code == 4


def test_a_full_disk_gives_h003_and_keeps_the_old_file(tmp_path):
    """A limit on the size of files is the full disk that a test can make."""
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    program = f"""
import resource
from pathlib import Path
from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.files import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_whole(Path({str(path)!r}), lambda file: [file.write(bytes(10_000)) for _ in range(100)] and None)
except HardwareError as error:
    print(error.code, error.message)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("H003 ") and "weights.bin: File too large" in answer.stdout
    assert os.listdir(tmp_path) == ["weights.bin"] and path.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_the_systems_own_words_are_kept(tmp_path, monkeypatch):
    def write(file) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(HardwareError, match="No space left on device"):
        write_whole(tmp_path / "x", write)


def test_json_is_read_back_and_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    value = {"ž": [1, 2.5, None], "name": os.fsdecode(b"caf\xe9")}
    write_json(tmp_path / "x.json", value)
    content = (tmp_path / "x.json").read_bytes()
    assert b"caf\\udce9" in content and "ž" in content.decode("utf-8") and content.endswith(b"\n")
    assert json.loads(content.decode("utf-8", "surrogateescape")) == value


def test_digests_are_sha256_and_those_of_json_ignore_the_order_of_keys(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1}) != sha256_json({"a": 1, "b": [3]})


def test_no_file_is_replaced_whose_name_the_user_has_not_typed(tmp_path, monkeypatch):
    import imgcls_fast as ic
    from imgcls_fast.core.errors import UsageError
    from imgcls_fast.core.outputs import JUDGED, JUDGED_NAMES, claim_folder

    monkeypatch.chdir(tmp_path)
    (tmp_path / "split.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"split\.csv"):
        ic.split_data()
    assert (tmp_path / "split.csv").read_text() == "mine"
    (tmp_path / "metrics.json").write_text("mine")
    with pytest.raises(UsageError, match=r"metrics\.json"):
        claim_folder(tmp_path, JUDGED_NAMES, JUDGED)
    (tmp_path / "predictions.json").write_text('{"labels": {}, "fingerprint": "", "has_targets": true}')
    claim_folder(tmp_path, JUDGED_NAMES, JUDGED)  # a former evaluation's folder may be used again
    claim_folder(tmp_path / "absent", ["x"], JUDGED)
