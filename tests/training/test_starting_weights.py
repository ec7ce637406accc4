"""Where the weights of a run begin, when what lies on the machine is damaged or comes from another tool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from imgcls_fast.core.errors import ModelError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.settings import build_config
from imgcls_fast.training.defaults import Notes
from imgcls_fast.training.plan_model import Start, choose_model

LABELS = LabelSpace.single(("cat", "dog"))


@pytest.fixture
def cut_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interrupted download of ResNet-18 in an otherwise empty cache."""
    import huggingface_hub.constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return path


def _chosen(**changes: str) -> tuple[str, Start, str]:
    notes = Notes(build_config({f"model.{name}": value for name, value in changes.items()}))
    arch, start = choose_model(notes, "cpu", LABELS)
    return arch, start, next(reason for name, _, reason in notes.rows if name == "model.init")


@pytest.mark.parametrize("asked", [{}, {"arch": "resnet18"}], ids=["any model", "this model"])
def test_auto_passes_over_a_damaged_download_with_a_notice(cut_download: Path, asked: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match=r"is damaged and was passed over: 14\.9 of 44\.7 MiB are there.*delete it") as told:
        arch, start, reason = _chosen(**asked)
    assert str(cut_download) in str(told[0].message)
    assert (arch, start.kind) == ("torchvision/resnet18" if asked else "small-cnn", "scratch")
    if asked:
        assert "resnet18-f37072fd.pth is damaged: 14.9 of 44.7 MiB" in reason


def test_weights_that_are_asked_for_and_damaged_end_the_plan_with_the_cure(cut_download: Path) -> None:
    with pytest.raises(ModelError) as caught:
        _chosen(init="pretrained", arch="resnet18")
    error = caught.value
    assert error.code == "M003" and str(cut_download) in error.message and "interrupted download" in error.why
    assert error.try_.startswith(f"rm {cut_download}") and "--init scratch" in error.try_


def test_a_part_of_a_checkpoint_can_be_the_start(tmp_path: Path) -> None:
    torch.save({"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}, tmp_path / "both.pth.tar")
    _, start, _ = _chosen(init=f"{tmp_path / 'both.pth.tar'}#teacher", arch="resnet18")
    assert start.kind == "file" and str(start.path).endswith("both.pth.tar#teacher")
    with pytest.raises(ModelError, match="no such weights file"):
        _chosen(init=str(tmp_path / "absent.pth.tar"), arch="resnet18")
