"""What settings and machine alone show to be wrong is refused before the scan, which may take minutes; by a dry run, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.errors import ImgclsError
from imgcls_fast.training import estimate, session
from imgcls_fast.training.defaults import Machine

WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "device": ({"train.device": "cuda"}, "H001", "train.device is cuda"),
    "precision": ({"train.precision": "fp16"}, "C004", "fp16 needs a GPU"),
    "loader on a GPU": ({"train.loader": "dali-gpu"}, "C004", "dali-gpu needs train.device cuda"),
    "loader and channels": ({"train.loader": "dali-cpu", "pixels.color": "rgba"}, "C004", "1 or 3 channels"),
    "attention module": ({"model.attention": ["sse@stage4"]}, "C003", "unknown attention module 'sse'"),
    "attention place": ({"model.attention": ["se@stage9"]}, "C003", "unknown place 'stage9'"),
    "attention of a network": (
        {"model.arch": "alexnet", "model.args": {}, "model.attention": ["se@stage1"]},
        "C004",
        "takes no attention",
    ),
    "argument of a network": ({"model.args": {"widht": 3}}, "C004", "does not accept {'widht': 3}"),
    "model": ({"model.arch": "resnet19"}, "M001", "resnet19"),
    "weights file": ({"model.init": "none.safetensors"}, "M003", "none.safetensors"),
    "run to begin with": ({"model.init": "no-run"}, "U003", "no-run"),
}


@pytest.fixture(params=[session.start, estimate.dry_run], ids=["train", "dry-run"])
def verb(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Training and its dry run, on a machine without a GPU, where nothing may be scanned."""
    for module in (session, estimate):
        monkeypatch.setattr(module, "look_at_machine", lambda: Machine(dali=True))
        monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("scanned"))
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_refused_before_the_scan(
    case: str, verb: Callable[..., Any], configure: Callable[..., Any]
) -> None:
    changes, code, said = WRONG[case]
    if case == "loader and channels":
        pytest.importorskip("nvidia.dali")
    with pytest.raises(ImgclsError) as refused:
        verb(configure(changes))
    assert refused.value.code == code
    assert said in str(refused.value)


def test_a_loader_that_is_not_installed_is_refused_before_the_scan(
    verb: Callable[..., Any], configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgcls_fast.loading.loader.dali_missing", lambda: "nvidia-dali is not installed")
    with pytest.raises(ImgclsError, match="nvidia-dali is not installed") as refused:
        verb(configure({"train.loader": "dali-cpu"}))
    assert refused.value.code == "H004"


def test_a_tracker_that_is_not_installed_is_refused_before_the_scan(
    verb: Callable[..., Any], configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImgclsError, match="--track tensorboard needs it") as refused:
        verb(configure({"train.track": ("tensorboard",)}))
    assert refused.value.code == "H004"


def _a_run(out: Path) -> None:
    for name in ("config.yaml", "manifest.npz"):
        (out / name).write_text("")


def _somebodys(out: Path) -> None:
    (out / "report.html").write_text("mine")


@pytest.mark.parametrize("taken", [_a_run, _somebodys])
def test_an_output_that_is_taken_is_refused_before_the_scan(
    taken: Callable[[Path], None], verb: Callable[..., Any], configure: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    taken(out)
    before = sorted(out.iterdir())
    with pytest.raises(ImgclsError) as refused:
        verb(configure({"out": str(out)}))
    assert refused.value.code == "U002"
    assert sorted(out.iterdir()) == before


def test_an_output_below_a_file_is_refused_before_the_scan(
    verb: Callable[..., Any], configure: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ImgclsError) as refused:
        verb(configure({"out": str(tmp_path / "file" / "deep" / "run")}))
    assert refused.value.code == "H003"


@pytest.mark.parametrize("named", [True, False], ids=["--out", "folder of runs"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_scan_and_nothing_is_left(
    named: bool,
    verb: Callable[..., Any],
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, *more, **named: Path(path) != closed and access(path, *more, **named)
    )
    monkeypatch.setenv("IMGCLS_RUNS", str(closed / "runs"))
    config = configure({"out": str(closed / "deep" / "run") if named else None})
    with pytest.raises(ImgclsError, match="closed") as refused:
        verb(config)
    assert refused.value.code == "H003"
    assert not list(closed.iterdir())


def test_a_dry_run_estimates_an_epoch_and_the_whole_and_tells_what_is_left_out(configure: Callable[..., Any]) -> None:
    found = estimate.dry_run(configure({"train.epochs": 7}))
    assert 0 < found["seconds_per_epoch"] < 60
    assert found["seconds"] == pytest.approx(7 * found["seconds_per_epoch"], abs=0.1)
    assert found["left_out"] == "scan, baseline, compiling, final evaluation and report"
    assert not list(Path(configure().out).parent.glob("run*"))


def test_training_of_two_epochs_is_estimated_with_its_reading(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_measure_step", lambda plan, model: (0.5, 0.25, 100.0))
    monkeypatch.setattr(estimate, "_measure_reading", lambda plan, manifest: 0.125)
    found = estimate.dry_run(configure())  # 42 images to train, 14 to validate
    assert found["seconds_per_epoch"] == pytest.approx(42 * 0.5 + 14 * 0.25 + 56 * 0.125)
    assert found["seconds"] == 2 * found["seconds_per_epoch"]
