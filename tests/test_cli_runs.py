"""`runs list`, `runs diff` and `runs rm`: read on a narrow terminal, compared, and deleted only when it is meant."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from imgcls_fast.cli.app import main
from imgcls_fast.core.diary import append_event
from imgcls_fast.core.run import Run
from imgcls_fast.core.runs import mark_begun, mark_last
from imgcls_fast.core.settings import build_config
from imgcls_fast.tracking import console as consoles

Capture = pytest.CaptureFixture[str]
USUAL = "flowers-small-cnn-20261123-101500"
LONG = "flowers102-convnext_tiny.in12k_ft_in1k-20261124-093000"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    """Makes a run folder with the files that these verbs read."""

    def made(name: str, accuracy: float = 0.9, *, arch: str = "small-cnn", images: int = 90, **settings: Any) -> Run:
        run = Run(tmp_path / "runs" / name)
        run.directory.mkdir(parents=True)
        run.save_config(build_config(settings))
        run.manifest_path.write_bytes(b"")
        run.write_json("data.json", {"source": str(tmp_path / "some" / "where" / "flowers"), "images": images, "splits": {"test": 9}})
        run.write_json("plan.json", {"spec": {"arch": arch}, "parameters": 12})
        run.write_json("run.json", {"created": 1.7e9, "parent": None, "work": []})
        run.write_json("env.json", {"cpu": "same", "libraries": {"torch": "2.9"}, "command": [name]})
        run.evaluation("test").mkdir(parents=True)
        run.write_json("eval/test/metrics.json", {"n": 9, "accuracy": accuracy})
        run.bundle_path.mkdir()
        run.write_json("bundle/bundle.json", {"temperature": 1.5})
        return run

    return made


def on_terminal(words: list[str], width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a terminal of this width shows."""
    stream = io.StringIO()
    shown = Console(file=stream, force_terminal=True, width=width, no_color=True, markup=False, highlight=False)
    monkeypatch.setattr(consoles, "make_console", lambda _: shown)
    assert main(words) == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    return [line for line in plain.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_list_fits_the_terminal_with_a_date_and_whole_names(
    width: int, make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(USUAL)
    make("digits-small-cnn-20261124-093000", arch="timm/convnext_tiny.in12k_ft_in1k")
    lines = on_terminal(["runs", "list"], width, monkeypatch)
    assert max(map(len, lines)) <= width
    assert len(lines) == 4  # no cell is folded
    assert all(word in lines[0] for word in ("name", "created", "model", "accuracy", "state"))
    line = next(line for line in lines if USUAL in line)
    assert all(word in line for word in ("2023-11-1", "0.900", "finished"))
    assert ("flowers " in line) == (width >= 100)


def test_a_very_long_name_of_a_run_is_never_cut(make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    make(LONG)
    for width in (70, 100):
        assert LONG in "".join(on_terminal(["runs", "list"], width, monkeypatch))


def test_in_a_pipe_the_list_has_one_line_a_run_with_all_columns(make: Callable[..., Run], capsys: Capture) -> None:
    make(USUAL)
    (make("cut").bundle_path / "bundle.json").unlink()
    assert main(["runs", "list"]) == 0
    heads, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert heads == ["name", "created", "data", "model", "epochs", "accuracy", "split", "state"]
    assert {row[0]: row[-1] for row in rows} == {USUAL: "finished", "cut": "stopped"}


def test_the_state_of_a_run_tells_who_writes_and_how_it_ended(make: Callable[..., Run]) -> None:
    run = make("one")
    assert run.state == "finished"
    (run.bundle_path / "bundle.json").unlink()
    assert run.state == "stopped"
    append_event(run.directory, {"event": "failed", "message": "x"})
    assert run.state == "failed"
    writer = Run(run.directory)
    writer.lock()
    assert run.state == "running"
    writer.unlock()
    assert run.state == "failed"


def test_a_diff_holds_what_differs_and_nothing_else(make: Callable[..., Run], capsys: Capture) -> None:
    make("a", 0.9, **{"optim.lr": 0.1, "out": "x"})
    make("b", 0.8, images=80, **{"optim.lr": 0.2, "out": "y"})
    assert main(["runs", "diff", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == [{"name": "optim.lr", "a": 0.1, "b": 0.2}]
    assert found["data"] == [{"name": "images", "a": 90, "b": 80}]
    assert found["figures"] == [{"name": "test accuracy", "a": 0.9, "b": 0.8}]
    assert (found["environment"], found["test"]) == ([], None)
    assert main(["runs", "diff", "a", "a"]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main(["runs", "diff", "a", "b"]) == 0
    assert "optim.lr\t0.1\t0.2" in capsys.readouterr().out
    assert main(["runs", "diff", "a"]) == 2


def test_quiet_prints_what_was_asked_for(make: Callable[..., Run], capsys: Capture) -> None:
    make("a", **{"optim.lr": 0.1})
    make("b", **{"optim.lr": 0.2})
    for words, wanted in ((["list"], "a\nb\n"), (["show", "a"], "accuracy"), (["diff", "a", "b"], "optim.lr\t0.1\t0.2")):
        assert main(["runs", *words, "-q"]) == 0
        assert wanted in capsys.readouterr().out


def test_without_a_name_the_last_finished_run_is_shown_and_a_later_one_is_named(
    make: Callable[..., Run], capsys: Capture
) -> None:
    good, failed = make("good"), make("failed")
    mark_begun(good)
    mark_last(good)
    os.utime(good.bundle_path / "bundle.json", (1e9, 1e9))
    (failed.bundle_path / "bundle.json").unlink()
    mark_begun(failed)
    assert main(["runs", "show", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "good"
    assert "failed, begun later, is not finished" in found["warnings"][0]
    assert main(["runs", "show", "good"]) == 0
    assert "begun later" not in capsys.readouterr().err


def test_the_name_of_a_run_is_not_taken_for_data(make: Callable[..., Run], capsys: Capture) -> None:
    make("mine")
    assert main(["train", "mine"]) == 2
    err = capsys.readouterr().err
    assert "mine is a run, not data" in err
    assert "imgcls-fast train mine --resume" in err


def answers(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", stdin)


def test_a_run_is_deleted_only_after_a_yes(
    make: Callable[..., Run], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make("one"), make("two")]
    for answer in ("n\n", "\n", ""):
        answers(monkeypatch, answer)
        assert main(["runs", "rm", "one", "two"]) == 130
        assert "delete these 2 runs for good? [y/N]" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # a pipe
    assert main(["runs", "rm", "one"]) == 2
    assert "imgcls-fast runs rm one --yes" in capsys.readouterr().err
    assert main(["runs", "rm", "one", "nothing", "--yes"]) == 2
    assert all(run.directory.exists() for run in runs)
    answers(monkeypatch, "y\n")
    assert main(["runs", "rm", "one", "one"]) == 0
    assert main(["runs", "rm", str(runs[1].directory), "--yes", "--json"]) == 0
    assert not any(run.directory.exists() for run in runs)


def test_neither_a_running_run_nor_one_around_a_bundle_is_deleted(make: Callable[..., Run], capsys: Capture) -> None:
    run, other = make("one"), make("other")
    (run.bundle_path / "bundle.json").unlink()
    run.lock()
    assert main(["runs", "rm", "other", "one", "--yes"]) == 4
    assert "being written" in capsys.readouterr().err
    run.unlock()
    assert main(["runs", "rm", str(other.bundle_path), "--yes"]) == 2
    assert main(["runs", "rm", "last", "--yes"]) == 2
    assert other.directory.exists()
    os.symlink(other.directory, "link")
    assert main(["runs", "rm", "link", "--yes"]) == 2
    assert "is a link" in capsys.readouterr().err
    assert other.directory.exists()
    assert run.directory.exists()


def test_what_was_deleted_before_another_run_cannot_be_is_told(
    make: Callable[..., Run], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make(name) for name in ("one", "two", "three")]

    def stuck(path: Any, *arguments: Any, **more: Any) -> None:
        if Path(path).parent.name == "two":
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, *arguments, **more)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", stuck)
    assert main(["runs", "rm", "one", "two", "three", "--yes"]) == 4
    shown = capsys.readouterr().err
    assert f"removed {runs[0].directory}" in shown
    assert "cannot delete" in shown and "--out" not in shown
    assert [run.directory.exists() for run in runs] == [False, True, True]
