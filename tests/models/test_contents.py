"""Weights files of other tools: what they wrap around tensors is taken off, what they keep beside them is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgcls_fast.core.errors import ModelError
from imgcls_fast.models import Classifier, ModelSpec, build_model, load_weights, read_state

State = dict[str, Tensor]


def _small() -> Classifier:
    return build_model(ModelSpec("small-cnn", num_outputs=3, arch_args={"width": 8}))


def _equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.fixture
def donor() -> Classifier:
    return _small()


def _named(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["model.", "net.", "network.", "encoder.", "model.net.", "module.model._orig_mod.", "model.backbone."])
def test_one_common_prefix_is_taken_off(prefix: str, donor: Classifier) -> None:
    model = _small()
    report = load_weights(model, _named(donor.backbone.state_dict(), prefix))
    assert _equal(donor, model) and not report.fresh and not report.ignored


def test_what_lies_beside_the_prefix_is_left_out_with_a_warning(donor: Classifier) -> None:
    model = _small()
    state = {**_named(donor.backbone.state_dict(), "model."), "criterion.weight": torch.ones(3), "val_acc.total": torch.ones(1)}
    with pytest.warns(UserWarning, match=r"2 tensors beside the model's were left out: criterion.weight, val_acc.total"):
        report = load_weights(model, state)
    assert _equal(donor, model) and report.ignored == ("criterion.weight", "val_acc.total")


@pytest.mark.parametrize("name", ["best.pth.tar", "last.PTH", "epoch=3.ckpt"])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "weights", "my_network"])
def test_a_training_checkpoint_is_found_under_its_key(name: str, key: str, donor: Classifier, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(donor.parameters(), 0.1, momentum=0.9).state_dict()
    torch.save({"epoch": 3, key: donor.backbone.state_dict(), "optimizer": optimizer, "best_acc1": torch.tensor(71.5)}, tmp_path / name)
    model = _small()
    load_weights(model, tmp_path / name)
    assert _equal(donor, model)


def test_an_unusual_key_is_found_when_it_is_the_only_one(donor: Classifier, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "my_network": donor.backbone.state_dict(), "optimizer_state": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    assert read_state(tmp_path / "a.pt").keys() == donor.backbone.state_dict().keys()


def test_several_sets_of_weights_are_refused_with_the_way_to_choose(donor: Classifier, tmp_path: Path) -> None:
    other = _small()
    torch.save({"student": donor.backbone.state_dict(), "teacher": other.backbone.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="several sets of weights: student, teacher") as caught:
        read_state(tmp_path / "a.pt")
    assert caught.value.try_ == f"--init '{tmp_path / 'a.pt'}#student'"
    model = _small()
    load_weights(model, tmp_path / "a.pt#teacher")
    assert _equal(other, model)
    with pytest.raises(ModelError, match="has no weights under 'ema'; it has them under student, teacher"):
        read_state(tmp_path / "a.pt#ema")


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "ema_state_dict"])
def test_averaged_weights_beside_are_named_and_can_be_taken(key: str, donor: Classifier, tmp_path: Path) -> None:
    averaged, model, path = _small(), _small(), tmp_path / "a.pth"
    inner: Any = averaged.backbone.state_dict()
    torch.save({"state_dict": donor.backbone.state_dict(), key: {"module": inner} if key == "ema" else inner}, path)
    with pytest.warns(UserWarning, match=rf"also holds averaged weights \({key}\).*init='\S*#{key}'"):
        load_weights(model, path)
    assert _equal(donor, model)
    load_weights(model, Path(f"{path}#{key}"))
    assert _equal(averaged, model)


def test_averaged_weights_in_one_list_with_the_others_are_named_and_can_be_taken(donor: Classifier, tmp_path: Path) -> None:
    averaged, model, path = _small(), _small(), tmp_path / "a.ckpt"
    names = {**_named(donor.backbone.state_dict(), "model."), **_named(averaged.backbone.state_dict(), "ema_model.module.")}
    torch.save({"state_dict": names}, path)
    with pytest.warns(UserWarning, match=r"averaged weights \(ema_model\)"):
        load_weights(model, path)
    assert _equal(donor, model)
    load_weights(model, Path(f"{path}#ema_model"))
    assert _equal(averaged, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_in_the_file_is_told_at_once_and_nothing_is_changed(value: float, donor: Classifier, tmp_path: Path) -> None:
    state = {key: one.clone() for key, one in donor.backbone.state_dict().items()}
    state["stem.0.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "a.pth")
    model = _small()
    before = {key: one.clone() for key, one in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"NaN or infinity: 1 of 216 values of stem\.0\.weight") as caught:
        load_weights(model, tmp_path / "a.pth")
    assert caught.value.code == "M003" and "no learning rate mends that" in caught.value.why
    assert all(torch.equal(before[key], one) for key, one in model.state_dict().items())


@pytest.mark.parametrize("rename", [lambda key: f"other.{key}.x", lambda key: key.replace("stem", "foot")])
def test_names_that_did_not_match_are_listed_with_how_many_did(rename: Callable[[str], str], donor: Classifier) -> None:
    with pytest.raises(ModelError) as caught:
        load_weights(_small(), {rename(key): value for key, value in donor.backbone.state_dict().items()})
    error = caught.value
    assert error.code == "M002" and "missing: stem.0.weight" in error.message and "unexpected: " in error.message
    own = donor.backbone.state_dict()
    matched = sum(rename(key) in own for key in own)
    assert f"{matched} of {len(own)} names are in the file" in error.why and "--model" in error.try_
    assert matched or "which begins with other.stem.0.weight.x" in error.why


def test_a_file_whose_name_has_a_hash_sign_is_taken_as_it_is(donor: Classifier, tmp_path: Path) -> None:
    torch.save(donor.backbone.state_dict(), tmp_path / "a#b.pth")
    assert read_state(tmp_path / "a#b.pth").keys() == donor.backbone.state_dict().keys()
    with pytest.raises(ModelError, match="no such weights file"):
        read_state(tmp_path / "absent#b.pth")


@pytest.mark.parametrize("part", ["", "#ema"])
@pytest.mark.parametrize("keys", [["model"], ["state_dict", "model", "module", "net", "weights", "params", "x", "y"]])
def test_a_dictionary_that_holds_itself_is_refused_and_ends(keys: list[str], part: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.zeros(2)}
    content |= dict.fromkeys(keys, content)
    torch.save(content, tmp_path / "round.pt")
    with pytest.raises(ModelError) as refused:
        read_state(tmp_path / f"round.pt{part}")
    assert refused.value.code == "M003"


def test_weights_some_dictionaries_deep_are_found(donor: Classifier, tmp_path: Path) -> None:
    torch.save({"model": {"module": {"net": {"weights": donor.state_dict()}}}}, tmp_path / "deep.pt")
    assert set(read_state(tmp_path / "deep.pt")) == set(donor.state_dict())
