"""Names, specs, the promises of `Classifier` that hold for any network inside, and pretrained files."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from imgcls_fast.core.errors import ConfigError, ModelError
from imgcls_fast.models import (
    Classifier,
    ModelSpec,
    build_model,
    list_models,
    pretrained_available,
    pretrained_pixels,
    published,
    resolve_arch,
)
from imgcls_fast.models.backbones import IMAGENET_MEAN, IMAGENET_STD


def _small(**changes: Any) -> ModelSpec:
    return ModelSpec("small-cnn", **{"num_outputs": 5, "arch_args": {"width": 8}, **changes})


def _pixels(count: int = 2, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("small-cnn", "small-cnn"),
        ("resnet50", "torchvision/resnet50"),  # in both libraries
        ("tv/resnet50", "torchvision/resnet50"),
        ("torchvision/vit_b_16", "torchvision/vit_b_16"),
        ("timm/resnet50", "timm/resnet50"),
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("convnext_atto", "timm/convnext_atto"),
    ],
)
def test_names_become_full_names(name: str, full: str) -> None:
    assert resolve_arch(name) == full == resolve_arch(full)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ResNet50", "resnet50"),
        ("convnext-tiny", "convnext_tiny"),
        ("small_cnn", "small-cnn"),
        ("timm/ConvNeXt-Atto", "timm/convnext_atto"),
        ("tv/efficientnet_b99", "torchvision/efficientnet_b"),
        ("timm/resnet50.a1_in1", "timm/resnet50.a1_in1k"),
        ("vit_tiny", "vit_tiny_patch16"),
        ("timm/vit_tiny", "timm/vit_tiny_patch16"),
        ("EfficientNetB0", "efficientnet_b0"),
        ("mobilenetv3", "mobilenetv3"),
        ("dinov2", "vit_"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(name: str, meant: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_arch(name)
    assert caught.value.code == "M001"
    assert f"did you mean '{meant}" in caught.value.message


@pytest.mark.parametrize(
    "name",
    ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "r3d_18", "quantized_resnet18", "hub/resnet50", ""],
)
def test_only_classifiers_have_names(name: str) -> None:
    with pytest.raises(ModelError, match="unknown model"):
        resolve_arch(name)


def test_lists_full_names_by_full_or_bare_pattern() -> None:
    names = list_models()
    assert names[0] == "small-cnn" and len(names) == len(set(names))
    assert sum(n.startswith("torchvision/") for n in names) >= 80
    assert sum(n.startswith("timm/") for n in names) >= 1000
    assert set(list_models("vgg1?")) >= {"torchvision/vgg11", "timm/vgg16"}
    assert all(n.startswith("timm/resnet") for n in list_models("timm/resnet*"))
    assert list_models("nothing*") == []


def test_a_spec_survives_json() -> None:
    spec = _small(channels=1, mean=(0.4,), std=(0.2,), drop_rate=0.1, image_size=96)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "changes",
    [
        {"num_outputs": 0},
        {"channels": 2},
        {"channels": 1},  # with three means
        {"std": (0.2, 0.0, 0.2)},
        {"drop_rate": 1.0},
        {"image_size": 0},
    ],
    ids=str,
)
def test_an_impossible_spec_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        _small(**changes)
    assert caught.value.code == "C003"


def test_an_unknown_key_of_a_stored_spec_is_refused() -> None:
    with pytest.raises(ConfigError, match="colour"):
        ModelSpec.from_dict({**_small().to_dict(), "colour": 1})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_normalises_as_the_formula_and_as_torchvision(channels: int) -> None:
    mean, std = (0.485, 0.456, 0.406, 0.5)[:channels], (0.229, 0.224, 0.225, 0.25)[:channels]
    model = build_model(_small(channels=channels, mean=mean, std=std))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, channels)
    got = model.normalise(pixels)
    units = pixels.permute(0, 3, 1, 2).double() / 255
    exact = (units - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(got, normalize(units.float(), list(mean), list(std)), atol=1e-6, rtol=0)


def test_normalisation_is_not_part_of_the_weights() -> None:
    assert all(key.startswith("backbone.") for key in build_model(_small()).state_dict())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_maps_stay_channels_last_through_the_network(channels: int) -> None:
    model = build_model(_small(channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)).eval()
    layouts: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    model(_pixels(channels=channels))
    assert layouts and all(layouts)


def test_fresh_weights_depend_on_torchs_generator_alone() -> None:
    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build_model(_small()).state_dict()

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_questions_about_a_model_draw_no_random_numbers() -> None:
    model = build_model(_small())
    before = torch.get_rng_state()
    model.stages()
    model.freeze(2)
    model.eval().features(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), before)


def test_small_cnn_has_the_size_that_it_states() -> None:
    counts = [
        sum(p.numel() for p in build_model(ModelSpec("small-cnn", num_outputs=10, arch_args=args)).parameters())
        for args in ({}, {"width": 16, "depths": [1, 1, 2]})
    ]
    assert 1_000_000 <= counts[0] <= 1_400_000
    assert counts[1] < counts[0]


def test_bf16_autocast_gives_bf16_logits_near_the_float32_ones() -> None:
    model, pixels = build_model(_small()).eval(), _pixels(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(pixels)
    with torch.no_grad():
        full = model(pixels)
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    torch.testing.assert_close(low.float(), full, atol=0.02 * full.abs().max().item(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiles_into_one_graph(training: bool) -> None:
    model = build_model(_small(drop_rate=0.0)).train(training)
    pixels = _pixels(2)
    expected = copy.deepcopy(model)(pixels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels), expected)


def test_exports_with_any_batch_size() -> None:
    model = build_model(_small()).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (_pixels(2),), dynamic_shapes=({0: batch},))
    for count in (1, 3):
        pixels = _pixels(count)
        torch.testing.assert_close(program.module()(pixels), model(pixels))


def test_a_copy_is_independent_and_equal() -> None:
    model = build_model(_small())
    model.freeze(1)
    twin = copy.deepcopy(model).eval()
    pixels = _pixels()
    torch.testing.assert_close(twin(pixels), model.eval()(pixels))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("arch", ["small-cnn", "torchvision/resnet18", "timm/resnet10t"])
def test_a_frozen_backbone_keeps_weights_and_statistics_while_the_head_learns(arch: str) -> None:
    model = build_model(ModelSpec(arch, num_outputs=3))
    assert model.freeze("backbone") == len(list(model.backbone_parameters()))
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    nn.functional.cross_entropy(model(_pixels(4)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    changed = {key for key, value in model.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == model.head_keys

    assert model.freeze(0) == 0
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_freezing_stages_takes_the_first_ones_with_their_norms() -> None:
    model = build_model(ModelSpec("torchvision/resnet18", num_outputs=3))
    model.freeze(2)
    frozen = {name.split(".")[0] for name, p in model.backbone.named_parameters() if not p.requires_grad}
    learning = {name.split(".")[0] for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"} and learning == {"layer3", "layer4", "fc"}
    still = {n.split(".")[0] for n, m in model.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)
             and not m.training}  # fmt: skip
    assert still == {"bn1", "layer1", "layer2"}


@pytest.mark.parametrize("what", ["head", 5, -1, True])
def test_other_words_for_freezing_are_refused(what: Any) -> None:
    with pytest.raises(ConfigError, match="freeze must be"):
        build_model(_small()).freeze(what)


@pytest.mark.parametrize("arch", ["small-cnn", "torchvision/resnet18", "torchvision/alexnet", "timm/resnet10t"])
def test_dropout_acts_in_training_only(arch: str) -> None:
    model = build_model(ModelSpec(arch, num_outputs=3, drop_rate=0.5, image_size=64))
    for parameter in model.head_parameters():
        nn.init.normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    pixels = _pixels(2, 64)
    assert not torch.equal(model.train()(pixels), model(pixels))
    assert torch.equal(model.eval()(pixels), model(pixels))


def test_no_dropout_rate_means_the_architectures_own() -> None:
    def rates(drop_rate: float | None) -> set[float]:
        model = build_model(ModelSpec("torchvision/alexnet", num_outputs=3, drop_rate=drop_rate))
        return {m.p for m in model.modules() if isinstance(m, nn.Dropout)}

    assert rates(None) == {0.5} and rates(0.0) == {0.0} and rates(0.3) == {0.3}


@pytest.mark.parametrize("arch", ["torchvision/efficientnet_b0", "timm/convnext_atto"])
def test_drop_path_is_the_rate_of_the_deepest_block(arch: str) -> None:
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    model = build_model(ModelSpec(arch, num_outputs=3, drop_path=0.3))
    rates = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
    rates += [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert max(rates) == rates[-1] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("small-cnn", {"drop_path": 0.1}),
        ("torchvision/resnet18", {"drop_path": 0.1}),
        ("torchvision/resnet18", {"arch_args": {"depth": 3}}),
        ("timm/resnet10t", {"arch_args": {"nonsense": 3}}),
        ("small-cnn", {"arch_args": {"depths": []}}),
        ("torchvision/vgg11", {"image_size": 8}),
        ("torchvision/maxvit_t", {"image_size": 100}),
    ],
    ids=str,
)
def test_what_an_architecture_cannot_do_is_refused_before_work_starts(arch: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(ModelSpec(arch, num_outputs=3, **changes))
    assert caught.value.code == "C004" and arch in caught.value.message


@pytest.mark.slow
def test_inception_leaves_its_auxiliary_head_out_for_images_too_small_for_it() -> None:
    model = build_model(ModelSpec("torchvision/inception_v3", num_outputs=3, image_size=96)).train()
    assert model.aux_weights == ()
    assert isinstance(model(_pixels(2, 96)), Tensor)
    unsized = build_model(ModelSpec("torchvision/inception_v3", num_outputs=3)).train()
    assert unsized.aux_weights == (0.4,)
    with pytest.raises(ConfigError, match="299"):
        unsized(_pixels(2, 96))


def test_a_short_name_in_a_spec_is_refused() -> None:
    with pytest.raises(ModelError, match="not a full name"):
        build_model(ModelSpec("resnet18", num_outputs=3))


def test_recommended_pixels_come_from_the_libraries_tables() -> None:
    assert pretrained_pixels("torchvision/resnet50") == {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "size": 224,
        "interpolation": "bilinear",
        "crop_pct": 224 / 232,
    }
    assert pretrained_pixels("timm/vit_tiny_patch16_224")["mean"] == (0.5, 0.5, 0.5)
    assert pretrained_pixels("timm/resnet10t")["size"] == 176
    assert pretrained_pixels("small-cnn")["size"] == 224


@pytest.mark.parametrize("arch", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_pixels_of_googles_networks_fold_torchvisions_conversion(arch: str) -> None:
    pixels = pretrained_pixels(arch)
    x = torch.rand(1, 3, 4, 4)
    ours = normalize(x, list(pixels["mean"]), list(pixels["std"]))
    theirs = normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD))
    model: Any = build_model(ModelSpec(arch, num_outputs=3, image_size=299)).backbone
    assert model.transform_input is False
    model.transform_input = True
    torch.testing.assert_close(ours, model._transform_input(theirs))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty caches under the returned folder, and any attempt to connect fails the test."""
    import huggingface_hub.constants

    def refuse(*args: Any) -> None:
        pytest.fail("tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


@pytest.mark.parametrize("arch", ["torchvision/resnet18", "timm/resnet10t", "timm/vit_tiny_patch16_224", "small-cnn"])
def test_pretrained_weights_are_not_downloaded_unasked(arch: str, no_network: Path) -> None:
    assert pretrained_available(arch) is None
    with pytest.raises(ModelError) as caught:
        build_model(ModelSpec(arch, num_outputs=3), pretrained=True)
    assert caught.value.code == "M007" and arch in caught.value.message


def _save(model: Classifier, path: Path) -> None:
    path.parent.mkdir(parents=True)
    torch.save(model.backbone.state_dict(), path)


def test_pretrained_weights_of_torchvision_are_found_in_torchs_cache(
    no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = build_model(ModelSpec("torchvision/squeezenet1_1", num_outputs=1000))
    path = no_network / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    _save(donor, path)
    monkeypatch.setattr(published, "sha256_file", lambda path: "b8a52dc0" + 56 * "0")
    assert pretrained_available("torchvision/squeezenet1_1") == path
    model = build_model(ModelSpec("torchvision/squeezenet1_1", num_outputs=3), pretrained=True)
    assert model.report is not None and set(model.report.fresh) == model.head_keys
    name = model.report.loaded[0]
    assert torch.equal(model.backbone.state_dict()[name], donor.backbone.state_dict()[name])


def test_pretrained_weights_of_timm_are_found_in_the_hugging_face_cache(no_network: Path) -> None:
    from safetensors.torch import save_file

    donor = build_model(ModelSpec("timm/resnet10t", num_outputs=1000))
    repository = no_network / "hf" / "models--timm--resnet10t.c3_in1k"
    path = repository / "snapshots" / "0123abcd" / "model.safetensors"
    path.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    save_file({k: v.contiguous() for k, v in donor.backbone.state_dict().items()}, path)
    for arch in ("timm/resnet10t", "timm/resnet10t.c3_in1k"):
        assert pretrained_available(arch) == path
    model = build_model(ModelSpec("timm/resnet10t", num_outputs=3), pretrained=True)
    assert model.report is not None and set(model.report.fresh) == model.head_keys


def _cached_squeezenet(folder: Path) -> Path:
    path = folder / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    _save(build_model(ModelSpec("torchvision/squeezenet1_1", num_outputs=1000)), path)
    return path


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_in_torchs_cache_counts_as_absent_and_is_told_when_asked_for(damage: str, no_network: Path) -> None:
    path = _cached_squeezenet(no_network)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert pretrained_available("torchvision/squeezenet1_1") is None
    with pytest.raises(ModelError) as caught:
        build_model(ModelSpec("torchvision/squeezenet1_1", num_outputs=3), pretrained=True, allow_download=True)
    error = caught.value
    assert error.code == "M003" and str(path) in error.message
    assert ("of 4.7 MiB are there" if damage == "cut" else "its name states b8a52dc0") in error.why
    assert f"rm {path}" in error.try_ and "--init scratch" in error.try_


def test_a_cut_file_in_the_hugging_face_cache_counts_as_absent(no_network: Path) -> None:
    repository = no_network / "hf" / "models--timm--resnet10t.c3_in1k"
    (repository / "snapshots" / "0123abcd").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    blob = repository / "blobs" / hashlib.sha256(b"whole").hexdigest()
    blob.write_bytes(b"who")
    (repository / "snapshots" / "0123abcd" / "model.safetensors").symlink_to(blob)
    assert published.published_weights("timm/resnet10t").path is not None
    assert pretrained_available("timm/resnet10t") is None
    blob.write_bytes(b"whole!")  # exchanged within the process
    os.utime(blob, ns=(1, 1))
    assert pretrained_available("timm/resnet10t") is None
    blob.write_bytes(b"whole")
    os.utime(blob, ns=(2, 2))
    assert pretrained_available("timm/resnet10t") is not None


@pytest.mark.parametrize("arch", ["torchvision/resnet18", "timm/resnet10t"])
def test_absent_weights_are_named_with_place_address_and_licence(arch: str, no_network: Path) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(ModelSpec(arch, num_outputs=3), pretrained=True)
    found, error = published.published_weights(arch), caught.value
    assert error.code == "M007" and error.where.startswith(str(no_network))
    assert found.address in error.why and found.licence in error.why and "--init FILE" in error.try_
    if arch == "torchvision/resnet18":
        assert str(no_network / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in error.try_


def test_two_sources_of_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both"):
        build_model(_small(), weights=tmp_path / "a.pt", pretrained=True)
