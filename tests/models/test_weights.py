"""Weights from files: what is taken, what is adapted, what is refused."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imgcls_fast.core.errors import ModelError
from imgcls_fast.models import Classifier, ModelSpec, build_model, load_weights, read_state
from imgcls_fast.models.weights import matching_classes


def _small(channels: int = 3, outputs: int = 3, **changes: Any) -> Classifier:
    spec = {"mean": (0.5,) * channels, "std": (0.25,) * channels, "arch_args": {"width": 8}, **changes}
    return build_model(ModelSpec("small-cnn", num_outputs=outputs, channels=channels, **spec))


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in state.items()}


def _write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(_contiguous(state), path)
    else:
        torch.save(state, path)
    return path


def _equal(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_every_kind_of_file_makes_an_equal_model(suffix: str, tmp_path: Path) -> None:
    donor, model = _small(), _small()
    path = _write(donor.state_dict(), tmp_path / f"weights{suffix}")
    report = load_weights(model, path)
    assert _equal(donor, model)
    assert not (report.fresh or report.ignored or report.adapted) and len(report.loaded) == len(donor.state_dict())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("under", ["", "state_dict", "model"])
def test_wrappers_around_names_and_states_are_taken_off(prefix: str, under: str, tmp_path: Path) -> None:
    donor, model = _small(), _small()
    state: Any = {prefix + key: value for key, value in donor.backbone.state_dict().items()}
    torch.save({under: state, "epoch": 3} if under else state, tmp_path / "a.pt")
    load_weights(model, tmp_path / "a.pt")
    assert _equal(donor, model)


def test_averaged_and_compiled_models_can_be_loaded() -> None:
    donor, model = _small(), _small()
    averaged = torch.optim.swa_utils.AveragedModel(donor)
    report = load_weights(model, averaged.state_dict())
    assert _equal(donor, model) and report.ignored == ("n_averaged",)


def test_building_takes_a_local_file(tmp_path: Path) -> None:
    donor = _small(outputs=7)
    path = _write(donor.state_dict(), tmp_path / "seven.safetensors")
    model = build_model(ModelSpec("small-cnn", num_outputs=3, arch_args={"width": 8}), weights=path)
    assert model.report is not None and set(model.report.fresh) == {"head.weight", "head.bias"}


def test_a_file_without_head_leaves_the_head_fresh() -> None:
    donor, model = _small(), _small()
    state = {k: v for k, v in donor.backbone.state_dict().items() if k not in donor.head_keys}
    assert set(load_weights(model, state).fresh) == model.head_keys


@pytest.mark.parametrize("arch", ["small-cnn", "torchvision/squeezenet1_1", "timm/mobilenetv3_small_050"])
def test_the_first_convolution_is_adapted_to_gray_and_rgba(arch: str) -> None:
    donor = build_model(ModelSpec(arch, num_outputs=3))
    first = next(name for name, m in donor.backbone.named_modules() if isinstance(m, nn.Conv2d)) + ".weight"
    source = donor.backbone.state_dict()[first]
    expected = {1: source.sum(1, keepdim=True), 4: torch.cat([source, source[:, :1]], 1) * 0.75}
    for channels, weight in expected.items():
        spec = ModelSpec(arch, num_outputs=3, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
        model = build_model(spec)
        report = load_weights(model, donor.backbone.state_dict())
        assert report.adapted == (first,) and not report.fresh
        torch.testing.assert_close(model.backbone.state_dict()[first], weight)


def test_gray_weights_give_equal_logits_for_a_gray_picture_in_colour() -> None:
    gray = _small(channels=1).eval()
    colour = _small(channels=3).eval()
    load_weights(colour, gray.state_dict())
    pixels = torch.randint(0, 256, (2, 32, 32, 1), dtype=torch.uint8)
    torch.testing.assert_close(colour(pixels.expand(-1, -1, -1, 3)), gray(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arch", "key"),
    [("torchvision/vit_b_32", "encoder.pos_embedding"), ("timm/vit_tiny_patch16_224", "pos_embed")],
)
def test_position_embeddings_are_resampled_for_another_image_size(arch: str, key: str) -> None:
    donor = build_model(ModelSpec(arch, num_outputs=3, image_size=64))
    model = build_model(ModelSpec(arch, num_outputs=3, image_size=96))
    nn.init.ones_(donor.backbone.state_dict()[key])
    report = load_weights(model, donor.backbone.state_dict())
    assert report.adapted == (key,)
    torch.testing.assert_close(model.backbone.state_dict()[key], torch.ones_like(model.backbone.state_dict()[key]))


def test_names_that_torchvision_published_earlier_are_understood() -> None:
    donor = build_model(ModelSpec("torchvision/densenet121", num_outputs=3))
    model = build_model(ModelSpec("torchvision/densenet121", num_outputs=3))
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v for k, v in donor.backbone.state_dict().items()
    }
    assert old.keys() != donor.backbone.state_dict().keys()
    load_weights(model, {k: v for k, v in old.items() if not k.endswith("num_batches_tracked")})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), donor.parameters(), strict=True))


def test_auxiliary_heads_may_be_absent_on_either_side() -> None:
    small, large = (
        build_model(ModelSpec("torchvision/inception_v3", num_outputs=3, image_size=size)) for size in (96, 299)
    )
    to_small = load_weights(small, large.state_dict())
    assert to_small.ignored and all(key.startswith("AuxLogits") for key in to_small.ignored)
    to_large = load_weights(large, small.state_dict())
    assert to_large.fresh == to_small.ignored


def test_weights_of_another_architecture_are_refused_and_nothing_is_changed() -> None:
    model = build_model(ModelSpec("torchvision/resnet18", num_outputs=3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = build_model(ModelSpec("torchvision/resnet34", num_outputs=3))
    with pytest.raises(ModelError) as caught:
        load_weights(model, other.state_dict())
    assert caught.value.code == "M002"
    assert (
        "torchvision/resnet18" in caught.value.message and "unexpected: layer1.2.conv1.weight" in caught.value.message
    )
    with pytest.raises(ModelError, match="missing") as caught:
        load_weights(other, model.state_dict())
    assert caught.value.code == "M002"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_another_shape_outside_of_the_head_is_refused_with_both_shapes() -> None:
    model = _small()
    with pytest.raises(ModelError, match=r"stem.0.weight \(4, 3, 3, 3\) instead of \(8, 3, 3, 3\)") as caught:
        load_weights(model, {**model.state_dict(), "backbone.stem.0.weight": torch.zeros(4, 3, 3, 3)})
    assert caught.value.code == "M002"


def test_extra_tensors_are_refused_unless_ignored_on_purpose() -> None:
    model = _small()
    state = {**model.state_dict(), "teacher.weight": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"1 unexpected: teacher.weight"):
        load_weights(model, state)
    assert load_weights(model, state, ignore_extra=True).ignored == ("teacher.weight",)


class _Attack:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "model.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"weight": _Attack(victim)}))
    else:
        torch.save({"weight": _Attack(victim)}, path)
    with pytest.raises(ModelError) as caught:
        read_state(path)
    assert caught.value.code == "M003" and "safetensors" in caught.value.try_
    assert not victim.exists()


def test_a_whole_pickled_model_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ModelError, match="more than tensors") as caught:
        read_state(tmp_path / "model.pt")
    assert caught.value.code == "M003" and "Linear" in caught.value.why


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_files_are_refused(damage: str, suffix: str, tmp_path: Path) -> None:
    path = _write(_small().state_dict(), tmp_path / f"a{suffix}")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello, this is not a model", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ModelError) as caught:
        read_state(path)
    assert caught.value.code == "M003" and str(path) in caught.value.message


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"state_dict": {"a": "text"}}], ids=str)
def test_files_without_tensors_by_name_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError) as caught:
        read_state(tmp_path / "a.pt")
    assert caught.value.code == "M003"


@pytest.mark.parametrize("name", ["absent.pt", "model.onnx", "."])
def test_absent_and_foreign_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ModelError) as caught:
        load_weights(_small(), tmp_path / name)
    assert caught.value.code == "M003"


# ---------------------------------------------------------------- heads by class name


@pytest.mark.parametrize("arch", ["small-cnn", "torchvision/squeezenet1_1", "timm/deit_tiny_distilled_patch16_224"])
def test_a_head_goes_by_the_names_of_its_classes(arch: str) -> None:
    theirs, ours = ["ant", "bee", "cat"], ["bee", "dog", "ant"]
    donor, model = build_model(ModelSpec(arch, num_outputs=3)), build_model(ModelSpec(arch, num_outputs=3))
    for parameter in donor.head_parameters():
        nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    report = load_weights(model, donor.state_dict(), head_rows=matching_classes(ours, theirs))
    old, new = donor.backbone.state_dict(), model.backbone.state_dict()
    assert not report.fresh
    for key in old:
        if key in model.head_keys:
            assert torch.equal(new[key], torch.stack([old[key][1], before[key][1], old[key][0]]))
        else:
            assert torch.equal(new[key], old[key])


@pytest.mark.parametrize(
    ("theirs", "ours", "rows"),
    [("abc", "abcde", [0, 1, 2, -1, -1]), ("abcde", "ca", [2, 0]), ("ab", "cd", [-1, -1]), ("ab", "ba", [1, 0])],
)
def test_classes_are_matched_whatever_their_number(theirs: str, ours: str, rows: list[int]) -> None:
    assert matching_classes(ours, theirs) == rows
    donor, model = _small(outputs=len(theirs)), _small(outputs=len(ours))
    before = model.backbone.state_dict()["head.weight"].clone()
    report = load_weights(model, donor.state_dict(), head_rows=rows)
    assert set(report.fresh) == (set() if max(rows) >= 0 else model.head_keys)
    for k, row in enumerate(rows):
        expected = donor.backbone.state_dict()["head.weight"][row] if row >= 0 else before[k]
        assert torch.equal(model.backbone.state_dict()["head.weight"][k], expected)


def test_a_head_that_the_file_does_not_have_is_left_fresh_by_name_too() -> None:
    donor, model = _small(), _small()
    state = {k: v for k, v in donor.backbone.state_dict().items() if k not in donor.head_keys}
    assert set(load_weights(model, state, head_rows=[0, 1, 2]).fresh) == model.head_keys
