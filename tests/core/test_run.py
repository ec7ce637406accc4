"""Run directories: one writer, files that appear whole, and how a run is found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imgcls_fast.core import locks
from imgcls_fast.core.diary import append_event, events_of
from imgcls_fast.core.errors import HardwareError, UsageError
from imgcls_fast.core.files import write_text
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.core.places import clear_leftovers
from imgcls_fast.core.run import Kept, Run
from imgcls_fast.core.runs import (
    find_run,
    is_run_folder,
    last_begun,
    left_unfinished,
    list_runs,
    mark_begun,
    mark_last,
    named_run,
    new_run_path,
    remove_run,
)
from imgcls_fast.core.settings import build_config


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def manifest() -> Manifest:
    one = np.ones(2, np.int32)
    return Manifest(
        Path("/data"), PathList.of(["a.jpg", "b.jpg"]), LabelSpace.single(("x", "y")), (np.arange(2, dtype=np.int32),),
        np.zeros(2, np.uint8), -one, one, one, np.ones(2, np.uint8), np.zeros((2, 16), np.uint8), np.zeros(2, np.uint8),
    )  # fmt: skip


@pytest.fixture
def make_run(runs: Path) -> Callable[[str], Run]:
    def make(name: str) -> Run:
        run = Run.create(runs / name)
        run.save_config(build_config())
        manifest().save(run.manifest_path)
        mark_begun(run)
        run.unlock()
        return run

    return make


HOLDER = """
import os, sys, time
from pathlib import Path
from imgcls_fast.core.run import Run
run = Run(Path(sys.argv[1]))
run.lock()
if sys.argv[2] == "fork" and os.fork() == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(make_run: Callable[[str], Run]) -> Callable[[str], tuple[Run, subprocess.Popen[str]]]:
    def start(how: str) -> tuple[Run, subprocess.Popen[str]]:
        run = make_run("held")
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(run.directory), how],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        return run, process

    return start


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_second_writer_is_refused_by_number_and_the_lock_is_free_at_once_after_kill_9(
    how: str, holder: Callable[[str], tuple[Run, subprocess.Popen[str]]]
) -> None:
    run, process = holder(how)
    try:
        with pytest.raises(HardwareError, match=f"pid {process.pid}") as refused:
            run.lock()
        assert refused.value.code == "H005"
        process.kill()  # its forked loader worker lives on
        process.wait()
        run.lock()
        run.unlock()
    finally:
        os.killpg(process.pid, signal.SIGKILL) if how == "fork" else process.kill()
        process.wait()


def test_a_second_run_object_in_this_process_is_refused_too(make_run: Callable[[str], Run]) -> None:
    run = make_run("one")
    run.lock()
    with pytest.raises(HardwareError):
        Run(run.directory).lock()
    run.unlock()
    Run(run.directory).lock()


def test_a_directory_that_holds_a_run_is_not_overwritten(make_run: Callable[[str], Run]) -> None:
    run = make_run("one")
    with pytest.raises(UsageError, match="already holds a run") as refused:
        Run.create(run.directory)
    assert refused.value.code == "U002"
    assert "--resume" in refused.value.try_


def test_a_run_that_was_killed_at_birth_can_be_begun_again(runs: Path) -> None:
    Run.create(runs / "stillborn").save_config(build_config())
    again = Run(runs / "stillborn")
    assert not is_run_folder(again.directory)
    # the first process is gone, and with it its lock: here, the object
    import gc

    gc.collect()
    Run.create(runs / "stillborn").unlock()


def test_a_run_is_found_by_path_name_bundle_and_as_the_last_one(
    runs: Path, make_run: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_run("flowers-one"), make_run("flowers-two")
    for name in (one.directory, str(one.directory), "flowers-one"):
        assert find_run(name).directory == one.directory
    for last in (None, "last", str(runs / "last")):
        assert find_run(last).directory == two.directory
    (one.directory / "bundle").mkdir()
    (one.directory / "bundle" / "bundle.json").write_text("{}")
    assert find_run(one.directory / "bundle").directory == one.directory
    assert [run.name for run in list_runs()] == ["flowers-one", "flowers-two"]


def test_an_unknown_run_is_u003_with_the_nearest_name(make_run: Callable[[str], Run]) -> None:
    make_run("flowers-one")
    with pytest.raises(UsageError) as refused:
        find_run("flowers-onr")
    assert refused.value.code == "U003"
    assert "flowers-one" in refused.value.try_
    make_run("flowers-two")
    with pytest.raises(UsageError, match="is not a run") as refused:
        find_run("flowers")  # the newest that begins so
    assert "flowers-two" in refused.value.try_


def test_a_last_run_that_is_gone_or_was_never_there_is_u003(runs: Path, make_run: Callable[[str], Run]) -> None:
    import shutil

    with pytest.raises(UsageError, match="no last run"):
        find_run(None)
    run = make_run("one")
    shutil.rmtree(run.directory)
    with pytest.raises(UsageError, match="not there any more"):
        find_run("last")


def finish(run: Run) -> None:
    run.bundle_path.mkdir()
    (run.bundle_path / "bundle.json").write_text("{}")
    mark_last(run)


def test_a_run_that_failed_or_goes_on_is_not_the_last_one_but_the_one_to_resume(
    runs: Path, make_run: Callable[[str], Run]
) -> None:
    finish(make_run("good"))
    os.utime(runs / "good" / "bundle" / "bundle.json", (1, 1))
    make_run("failed")
    assert find_run(None).name == find_run("last").name == find_run(runs / "last").name == "good"
    assert (runs / "last").resolve().name == "good"
    assert last_begun().name == "failed"
    left = left_unfinished(find_run(None))
    assert left is not None
    assert left.name == "failed"
    finish(left)
    assert find_run(None).name == last_begun().name == "failed"
    assert left_unfinished(find_run(None)) is None


def test_a_pointer_of_an_earlier_version_to_a_failed_run_means_the_newest_finished_one(
    runs: Path, make_run: Callable[[str], Run]
) -> None:
    for age, name in ((10, "new"), (20, "old")):
        finish(make_run(name))
        os.utime(runs / name / "bundle" / "bundle.json", (1e9 - age, 1e9 - age))
    make_run("failed")
    (runs / "begun.txt").unlink()
    (runs / "last.txt").write_text("failed\n# the last run; written by imgcls-fast\n")
    assert find_run(None).name == "new"
    assert last_begun().name == "failed"


def test_removing_a_run_removes_its_files_alone_and_moves_last_back(
    runs: Path, make_run: Callable[[str], Run], tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "photo.jpg").write_text("x")
    for name in ("one", "two"):
        finish(make_run(name))
    (runs / "two" / "plots").mkdir()
    (runs / "two" / "plots" / "away").symlink_to(tmp_path / "precious")
    (runs / "two" / ".metrics.csv.7.tmp").write_text("half")
    assert remove_run(find_run("two")) == []
    assert not (runs / "two").exists()
    assert (tmp_path / "precious" / "photo.jpg").exists()
    assert find_run(None).name == "one"
    (runs / "one" / "notes.txt").write_text("mine")
    assert remove_run(find_run("one")) == ["notes.txt"]
    assert [path.name for path in (runs / "one").iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="no last run"):
        find_run(None)


def test_only_a_run_that_nobody_writes_and_that_is_no_link_is_removed(
    runs: Path, make_run: Callable[[str], Run], tmp_path: Path
) -> None:
    run = make_run("one")
    (tmp_path / "link").symlink_to(run.directory)
    with pytest.raises(UsageError, match="is a link") as refused:
        remove_run(Run(tmp_path / "link"))
    assert str(run.directory) in refused.value.try_
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.yaml").write_text("mine")
    with pytest.raises(UsageError, match="is not a run"):
        remove_run(Run(tmp_path / "photos"))
    run.lock()
    with pytest.raises(HardwareError, match="being written"):
        remove_run(Run(run.directory))
    assert is_run_folder(run.directory)
    assert (tmp_path / "photos" / "config.yaml").exists()


def test_a_run_is_removed_from_inside_by_the_name_of_a_point(
    runs: Path, make_run: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_run("one").directory)
    assert remove_run(named_run(".")) == []
    assert not (runs / "one").exists()


def test_a_file_that_nfs_keeps_while_it_is_open_is_nobodys(
    runs: Path, make_run: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, unlink = make_run("one"), Path.unlink

    def on_nfs(path: Path, missing_ok: bool = False) -> None:
        if path.name == ".lock":
            (path.parent / ".nfs0001").touch()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", on_nfs)
    release = locks.Lock.release
    monkeypatch.setattr(locks.Lock, "release", lambda lock: (release(lock), unlink(run.directory / ".nfs0001")))
    assert remove_run(run) == []
    assert not run.directory.exists()


def test_a_run_with_links_in_it_is_removed_and_what_they_lead_to_stays(
    runs: Path, make_run: Callable[[str], Run], tmp_path: Path
) -> None:
    away = tmp_path / "away"
    for name in ("val", "plots"):
        (away / name).mkdir(parents=True)
        (away / name / ".x.json.7.tmp").write_text("precious")
    (away / "notes.txt").write_text("precious")
    directory = make_run("one").directory
    (directory / ".lock").unlink(missing_ok=True)
    for name, target in (("eval", away), ("plots", away / "plots"), (".lock", away / "notes.txt"), (".y.json.7.tmp", away)):
        (directory / name).symlink_to(target)
    assert remove_run(named_run("one")) == []
    assert not directory.exists()
    assert sorted(path.name for path in away.rglob("*")) == [".x.json.7.tmp"] * 2 + ["notes.txt", "plots", "val"]
    assert (away / "notes.txt").read_text() == "precious"


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_in_the_place_of_a_pointer_or_a_lock_is_not_waited_for(runs: Path, make_run: Callable[[str], Run]) -> None:
    run = make_run("one")
    for path in (runs / "last.txt", runs / "begun.txt", run.directory / ".lock"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    with pytest.raises(UsageError, match="no last run"):
        find_run(None)
    assert run.state in ("stopped", "running")


def test_last_is_a_link_that_follows_and_a_real_directory_of_that_name_stays(
    runs: Path, make_run: Callable[[str], Run]
) -> None:
    make_run("one")
    assert (runs / "last").resolve().name == "one"
    make_run("two")
    assert (runs / "last").resolve().name == "two"
    assert not [path for path in runs.iterdir() if path.name.startswith(".")]
    (runs / "last").unlink()
    (runs / "last").mkdir()  # somebody's own directory
    (runs / "last" / "precious.txt").write_text("x")
    make_run("three")
    assert (runs / "last" / "precious.txt").exists()
    assert find_run("last").name == "three"


def test_a_run_elsewhere_moves_last_of_the_runs_folder_and_touches_nothing_beside_itself(
    runs: Path, make_run: Callable[[str], Run], tmp_path: Path
) -> None:
    make_run("one")
    home = tmp_path / "home"
    home.mkdir()
    (home / "last.txt").write_text("my last will\n")
    run = Run.create(home / "myrun")
    run.save_config(build_config())
    manifest().save(run.manifest_path)
    assert mark_last(run) == ""
    assert (home / "last.txt").read_text() == "my last will\n"
    assert sorted(path.name for path in home.iterdir()) == ["last.txt", "myrun"]
    assert find_run("last").directory.resolve() == run.directory.resolve()
    assert (runs / "last").resolve() == run.directory.resolve()


def test_a_last_txt_that_we_have_not_written_stays(runs: Path, make_run: Callable[[str], Run]) -> None:
    for text in ("buy milk\n", "two\nlines\n", ""):
        (runs / "last.txt").parent.mkdir(exist_ok=True)
        (runs / "last.txt").write_text(text)
        run = Run.create(runs / f"run{len(text)}")
        assert "last.txt" in mark_last(run)
        assert (runs / "last.txt").read_text() == text
        with pytest.raises(UsageError, match="no last run"):
            find_run("last")


def test_the_pointer_of_an_earlier_version_is_read_and_moved(runs: Path, make_run: Callable[[str], Run]) -> None:
    make_run("one")
    make_run("two")
    (runs / "last.txt").write_text("one\n")
    assert find_run("last").name == "one"
    make_run("three")
    assert find_run("last").name == "three"


@pytest.mark.parametrize("name", ["config.yaml", "report.html", "plots", "split.csv", "log.txt"])
def test_a_run_never_begins_in_a_folder_whose_files_it_would_replace(name: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_text("mine")
    with pytest.raises(UsageError, match=name) as refused:
        Run.create(tmp_path / "home")
    assert refused.value.code == "U002"
    assert [path.name for path in (tmp_path / "home").iterdir()] == [name]
    assert (tmp_path / "home" / name).read_text() == "mine"


def test_a_folder_with_other_files_may_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("srun imgcls-fast train")
    Run.create(tmp_path).unlock()
    assert (tmp_path / "job.sh").exists()


@pytest.mark.parametrize(
    "source", ["/data/my photos (2024)", "/data/ünï cödé", "/data/...", "/", None, "/data/a.b.csv"]
)
def test_a_new_name_has_no_spaces_and_is_never_an_existing_directory(source: str | None, runs: Path) -> None:
    seen = set()
    for _ in range(3):
        path = new_run_path(source, "timm/resnet 18")
        assert path.parent == runs
        assert not set(path.name) & set(" /()'\"\t")
        assert not path.name.startswith((".", "-"))
        assert path not in seen
        seen.add(path)
        path.mkdir(parents=True)


def test_a_new_name_is_short_however_long_the_names_of_data_and_model_are(runs: Path) -> None:
    path = new_run_path("/data/" + "n" * 230, "timm/" + "m" * 100)
    assert len(path.name) < 120
    path.mkdir(parents=True)


def test_metrics_csv_holds_each_epoch_once_and_reads_back_as_it_was(make_run: Callable[[str], Run]) -> None:
    run = make_run("one")
    epochs = [{"epoch": 1, "val_loss": 0.1 + 0.2, "best": 1}, {"epoch": 2, "val_loss": 1e-9, "best": 0}]
    run.write_epochs(epochs[:1])
    run.write_epochs(epochs)
    assert run.epochs == epochs
    assert (run.directory / "metrics.csv").read_text().count("\n") == 3


def test_events_are_json_for_any_reader_also_where_a_figure_is_not_defined(make_run: Callable[[str], Run]) -> None:
    run = make_run("one")
    append_event(run.directory, {"event": "epoch", "val_macro_ap": float("nan"), "text": "NaN", "ended": {"best": float("inf")}})
    (event,) = events_of(run.directory)
    assert (event["val_macro_ap"], event["text"], event["ended"]) == (None, "NaN", {"best": None})


def test_leftovers_of_a_killed_writer_are_cleared_and_nothing_else(make_run: Callable[[str], Run]) -> None:
    run = make_run("one")
    (run.directory / ".metrics.csv.123.tmp").write_text("half")
    (run.directory / ".bundle.123.tmp").mkdir()
    (run.directory / ".bundle.123.tmp" / "weights.safetensors").write_text("half")
    kept = {path.name for path in run.directory.iterdir() if not path.name.endswith(".tmp")}
    clear_leftovers(run.directory)
    assert {path.name for path in run.directory.iterdir()} == kept


def test_no_directory_can_be_made_where_there_is_no_permission_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HardwareError) as refused:
        Run.create(tmp_path / "file" / "run")
    assert refused.value.code == "H003"


def test_what_a_run_keeps_is_read_once_and_again_when_its_file_has_changed(tmp_path: Path) -> None:
    read, path = [], tmp_path / "x"
    kept = Kept(lambda path: read.append(path) or path.read_text())
    path.write_text("a")
    assert [kept(path), kept(path)] == ["a", "a"]
    write_text(path, "b")
    assert [kept(path), kept(path), len(read)] == ["b", "b", 2]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        kept(path)
