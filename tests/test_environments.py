"""Machines that are not a developer's laptop: containers, network file systems, users without a home."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgcls_fast.core import env, files, homes, locks, trust
from imgcls_fast.core.diary import append_event, last_end
from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.exports import remove_stale
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.data.prepare import prepare

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS)


def refusing(
    number: int, original: Callable[..., Any], when: Callable[..., bool] = lambda *_: True
) -> Callable[..., Any]:
    """`original`, but for calls that answer with an error number."""

    def call(*arguments: Any, **more: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return original(*arguments, **more)

    return call


def is_folder(handle: int) -> bool:
    return stat.S_ISDIR(os.fstat(handle).st_mode)


# ---------------------------------------------------------------- file systems that cannot do everything


@pytest.mark.parametrize("number", NO_FOLDER_SYNC, ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_synced_is_no_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number, os.fsync, is_folder))
    files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_a_folder_that_cannot_be_opened_for_reading_is_no_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", refusing(errno.EACCES, os.open, lambda path, *_: Path(path).is_dir()))
    files.write_text(tmp_path / "a.txt", "text")


@pytest.mark.parametrize("where", [is_folder, lambda handle: not is_folder(handle)], ids=["folder", "file"])
def test_a_disk_that_fails_to_sync_is_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Callable[[int], bool]
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO, os.fsync, where))
    with pytest.raises(HardwareError) as caught:
        files.write_text(tmp_path / "a.txt", "text")
    assert caught.value.code == "H003"
    assert "space" not in caught.value.try_


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_not_another_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number, fcntl.flock))
    run = Run.create(tmp_path / "run")
    assert "has no locks" in run.caution
    with pytest.raises(
        HardwareError, match=f"pid {os.getpid()}"
    ) as refused:  # found by the file that the first one wrote
        Run(run.directory).lock()
    assert refused.value.code == "H005"
    run.unlock()
    Run(run.directory).lock()


def claim(folder: Path, text: str) -> Path:
    (folder / ".lock").write_text(text)
    return folder / ".lock"


def test_without_locks_a_dead_writer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS, fcntl.flock))
    host = os.uname().nodename
    for text in (
        f"pid {os.getpid()} on {host}\nbegan 1\n",
        f"pid 4194305 on {host}\nbegan 5\n",
        "pid x",
        "",
        "pid 4194305",
    ):
        locks.take(claim(tmp_path, text)).release()  # the first: this number belongs to another process by now


def test_without_locks_a_writer_on_another_host_is_known_by_what_it_wrote_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK, fcntl.flock))
    path = claim(tmp_path, "pid 7 on elsewhere\nbegan 5\n")
    with pytest.raises(locks.Taken, match="pid 7 on elsewhere, which wrote"):
        locks.take(path)
    old = time.time() - 3600
    os.utime(path, (old, old))
    locks.take(path).release()


def test_without_locks_a_number_of_an_earlier_version_that_has_long_been_silent_is_no_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK, fcntl.flock))
    path = claim(tmp_path, "pid 1")  # of a container, where each command is number 1; here it is always alive
    with pytest.raises(locks.Taken, match="pid 1, which wrote"):
        locks.take(path)
    old = time.time() - 3600
    os.utime(path, (old, old))
    locks.take(path).release()


def test_without_locks_only_an_old_half_made_export_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EOPNOTSUPP, fcntl.flock))
    young, old = (tmp_path / f".onnx-fp32-0a1b2c3d.{n}2345678" for n in "12")
    for folder in (young, old):
        folder.mkdir()
    os.utime(old, (1e9, 1e9))
    assert remove_stale(tmp_path) == [old.name]
    assert young.is_dir()


def test_a_folder_that_cannot_be_renamed_is_copied_whole_and_then_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "lower"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a").write_text("1")
    monkeypatch.setattr(os, "rename", refusing(errno.EXDEV, os.rename, lambda a, b: a == source))
    files.move_folder(source, tmp_path / "target")
    assert (tmp_path / "target" / "inner" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["target"]


# ---------------------------------------------------------------- users without a home


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No HOME and no entry in the list of users; gives TMPDIR."""
    import pwd

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "IMGCLS_CACHE", "IMGCLS_CONFIG", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    known = (homes.is_writable, env._warn_of_home)
    for function in known:
        function.cache_clear()
    yield tmp_path
    for function in known:
        function.cache_clear()
    env._lent.clear()


def test_without_a_home_the_cache_lies_in_a_private_folder_and_that_is_said_once(homeless: Path) -> None:
    with pytest.warns(UserWarning, match="has no home folder.*IMGCLS_CACHE") as told:
        places = {env.cache_dir() for _ in range(3)}
    own = homeless / f"imgcls-fast-{os.geteuid()}"
    assert len(told) == 1 and places == {own / ".cache" / "imgcls-fast"}
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert env.config_dir() == own / ".config" / "imgcls-fast"


def test_a_home_that_cannot_be_written_is_left_for_one_below_the_temporary_folder(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc")
    with pytest.warns(UserWarning, match="/proc/.cache cannot be written"):
        assert homeless in env.cache_dir().parents
    assert homeless in (env.config_dir() or Path()).parents


def test_a_home_that_cannot_be_entered_is_left_for_one_below_the_temporary_folder(
    homeless: Path, close: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = homeless / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(close(home)))
    assert env.config_dir() == homeless / f"imgcls-fast-{os.geteuid()}" / ".config" / "imgcls-fast"
    assert trust.is_own({}) is False
    with pytest.warns(UserWarning, match="cannot be written"):
        assert homeless in env.cache_dir().parents


def test_a_home_that_cannot_be_entered_holds_no_weights_and_is_a_row_of_doctor(
    tmp_path: Path, close: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcls_fast.measuring import doctor
    from imgcls_fast.models.published import Published

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(Published, "place", close(home) / "weights.pth")
    assert Published("torchvision/resnet18").path is None
    _, value, fine, hint = doctor._place("cache", home / ".cache" / "imgcls-fast", "name another folder")
    assert (fine, hint) == (False, "name another folder") and f"{home} cannot be written" in value


def test_a_temporary_folder_that_cannot_be_entered_or_is_everybodys_is_passed_over(
    homeless: Path, close: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (homeless / "closed").mkdir()
    monkeypatch.setattr(homes, "_USUAL", (str(homeless / "usual"),))
    (homeless / "usual").mkdir()
    own = homeless / "usual" / f"imgcls-fast-{os.geteuid()}"
    assert homes.below_temporary({"TMPDIR": str(close(homeless / "closed") / "inner")}) == own
    (homeless / "open").mkdir()
    (homeless / "open").chmod(0o777)  # whoever may write there can put another folder in the place of ours
    assert homes.below_temporary({"TMPDIR": str(homeless / "open")}) == own
    (homeless / "open").chmod(0o1777)
    assert homeless / "open" in homes.below_temporary({"TMPDIR": str(homeless / "open")}).parents


def test_a_folder_of_images_needs_no_cache(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "is_writable", lambda folder: False)
    for name in ("a", "b"):
        for k in range(4):
            place = homeless / "data" / name / f"{k}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (40 * k, 255 * (name == "a"), 90)).save(place)
    assert len(prepare(build_config({"data.source": str(homeless / "data")})).manifest) == 8
    for source in (None, str(homeless / "data.zip")):
        with pytest.raises(HardwareError, match="no folder for cached files"):
            prepare(build_config({"data.source": source}))


def test_libraries_get_a_home_where_there_is_none_and_keep_the_one_that_is_there(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HOME", "")  # so that it is put back
    env.lend_home()
    assert os.environ["HOME"] == str(homeless / f"imgcls-fast-{os.geteuid()}")
    with pytest.warns(UserWarning, match="has no home folder"):
        assert homeless in env.cache_dir().parents
    monkeypatch.setenv("HOME", "/proc")  # not writable, but weights may lie there
    env.lend_home()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    env.lend_matplotlib_home()
    assert os.environ["HOME"] == "/proc"
    assert os.environ["MPLCONFIGDIR"].startswith(str(homeless))


@pytest.mark.parametrize("trap", ["link", "open", "file"])
def test_a_temporary_folder_that_others_prepared_is_not_used(homeless: Path, trap: str) -> None:
    place = homeless / f"imgcls-fast-{os.geteuid()}"
    if trap == "link":
        place.symlink_to(homeless)
    elif trap == "file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(HardwareError, match="not a folder of this user alone") as caught:
        env.cache_dir()
    assert "IMGCLS_CACHE" in caught.value.try_
    assert env.config_dir() is None


def test_without_any_place_the_error_names_the_variable(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "is_writable", lambda folder: False)
    with pytest.raises(HardwareError, match="no folder for cached files") as caught:
        env.cache_dir()
    assert caught.value.code == "H003" and "IMGCLS_CACHE" in caught.value.try_


def test_long_work_is_refused_at_its_start_where_its_result_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "touch", refusing(errno.EROFS, Path.touch))
    with pytest.raises(HardwareError, match="Read-only file system") as caught:
        files.demand_writable(tmp_path / "bench")
    assert caught.value.code == "H003" and "permission" in caught.value.try_


# ---------------------------------------------------------------- processes that were started with little


def light(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A shell line in which "$0" is the interpreter."""
    surroundings = {**os.environ, **variables}
    return subprocess.run(
        ["sh", "-c", script, sys.executable], capture_output=True, text=True, timeout=120, env=surroundings
    )


def test_closed_standard_streams_end_no_command_and_reach_no_file(tmp_path: Path) -> None:
    code = f"""
import os, sys
from imgcls_fast.cli.app import main
assert main(["--help"]) == 0 and main(["nonsense"]) == 2
with open({str(tmp_path / "mine")!r}, "w") as file:
    assert file.fileno() > 2
    os.write(1, b"of a library")
    os.write(2, b"of a library")
open({str(tmp_path / "done")!r}, "w")
"""
    done = light(f"exec \"$0\" -c '{code.replace(chr(39), chr(34))}' <&- >&- 2>&-")
    assert done.returncode == 0 and (tmp_path / "done").exists()
    assert (tmp_path / "mine").read_bytes() == b""


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}], ids=str
)
def test_an_ascii_locale_prints_names_of_any_script(tmp_path: Path, variables: dict[str, str]) -> None:
    place = tmp_path / "katzé-猫"
    done = light(f'"$0" -m imgcls_fast "{place}"', **variables)
    assert done.returncode == 2
    assert "unknown command" in done.stderr and "UnicodeEncodeError" not in done.stderr


def test_an_environment_without_variables_starts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imgcls_fast", "--version"], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_any_umask_makes_files_that_their_owner_reads(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run = Run.create(tmp_path / "run")
        run.write_json("data.json", {"a": 1})
        run.unlock()
    finally:
        os.umask(before)
    assert run.read_json("data.json") == {"a": 1}
    assert stat.S_IMODE((run.directory / "data.json").stat().st_mode) == 0o666 & ~mask


def test_without_proc_a_dead_writer_is_still_told_from_a_living_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS, fcntl.flock))
    monkeypatch.setattr(locks, "_began", lambda number: "")
    host = os.uname().nodename
    with pytest.raises(locks.Taken):
        locks.take(claim(tmp_path, f"pid {os.getppid()} on {host}\nbegan \n"))
    locks.take(claim(tmp_path, f"pid 4194305 on {host}\nbegan \n")).release()


@pytest.mark.parametrize("shift_s", [-3600, -1.7e9], ids=["an hour back", "1970"])
def test_a_clock_that_was_set_back_neither_hides_nor_locks_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: float
) -> None:
    run = Run.create(tmp_path / "run")
    append_event(run.directory, {"event": "plan"})
    run.unlock()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: max(0.0, now() + shift_s))
    run.lock()
    append_event(run.directory, {"event": "interrupted"})
    assert last_end(run.directory) is not None
    run.unlock()


def test_a_closed_or_missing_name_of_the_user_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import getpass

    monkeypatch.setattr(getpass, "getuser", refusing(errno.ENOENT, getpass.getuser))
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert env.cache_dir() and env.machine_facts()["python"]
    Run.create(tmp_path / "run").unlock()


@pytest.mark.parametrize(
    "error",
    [ImportError("libtorch.so: failed to map segment"), MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")],
    ids=["linker", "python", "system"],
)  # fmt: skip
def test_a_process_with_little_address_space_is_told_that_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    from imgcls_fast.cli import app

    def loading(*_: Any) -> None:
        raise error

    monkeypatch.setattr(app, "import_module", loading)
    assert app.main(["runs", "list"]) == 4
    assert "error[H002]" in (told := capsys.readouterr().err) and "ulimit -v" in told
