"""A stranger's run holds links into somebody's files: nothing is written, emptied or removed there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.exports import new_export, remove_stale
from imgcls_fast.core.files import write_text
from imgcls_fast.core.places import RUN_NAMES, clear_leftovers
from imgcls_fast.core.run import Run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Somebody's home, with everything that a name pattern could take for ours."""
    home = tmp_path / "home"
    for name in (
        ".ssh",
        ".config",
        ".oh-my.zsh",
        ".old-things.d",
        ".new.car",
        ".best.of",
        ".a.tmp",
        ".old.last.summer",
    ):
        (home / name).mkdir(parents=True)
        (home / name / "precious").write_text("precious")
    for name in (".bashrc", ".notes.tmp", "index.json"):
        (home / name).write_text("precious")
    return home


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "" for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", [*RUN_NAMES, "eval/test", "checkpoints/best"])
def test_a_run_with_a_link_in_it_is_not_written(name: str, home: Path, tmp_path: Path) -> None:
    before = everything(home)
    place = tmp_path / "run" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(home if "." not in name[1:] and name != ".lock" else home / ".bashrc")
    run = Run(tmp_path / "run")
    for act in (run.demand_own_places, run.lock):
        with pytest.raises(HardwareError, match="is a link") as error:
            act()
        assert error.value.code == "H003" and name in error.value.message
    assert everything(home) == before


def test_what_is_tidied_away_is_ours_alone(home: Path, tmp_path: Path) -> None:
    from imgcls_fast.training.checkpoint import _sweep

    before = everything(home)
    remove_stale(home)
    _sweep(home)
    clear_leftovers(home)
    assert everything(home) == before
    left = [
        home / ".onnx-fp32-0a1b2c3d.0a1b2c3d",
        home / ".old-trt-int8-0a1b2c3d.0a1b2c3d",
        home / ".new.12",
        home / ".best.12",
    ]
    for folder in left:
        folder.mkdir()
    (home / ".x.json.12.tmp").touch()
    remove_stale(home)
    _sweep(home)
    clear_leftovers(home)
    assert everything(home) == before


def test_a_new_export_leaves_strange_folders_alone(home: Path) -> None:
    before = everything(home)
    with new_export(home, "onnx", "fp32", "0a1b2c3d"):
        pass
    assert everything(home) == before


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(home: Path, tmp_path: Path) -> None:
    (tmp_path / f".x.json.{os.getpid()}.tmp").symlink_to(home / ".bashrc")
    write_text(tmp_path / "x.json", "ours")
    assert (home / ".bashrc").read_text() == "precious" and (tmp_path / "x.json").read_text() == "ours"
