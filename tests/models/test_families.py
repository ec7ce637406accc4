"""The same promises for every family of architectures, small enough to run on one thread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from imgcls_fast.models import Classifier, ModelSpec, build_model, load_weights
from imgcls_fast.models.backbones import head_keys, head_modules, make_backbone, weightless

# The smallest image that each of them takes.
TORCHVISION = {
    "torchvision/resnet18": 32,
    "torchvision/convnext_tiny": 32,
    "torchvision/regnet_y_400mf": 32,
    "torchvision/maxvit_t": 224,
    "torchvision/squeezenet1_0": 32,
    "torchvision/mobilenet_v2": 32,
    "torchvision/mobilenet_v3_small": 32,
    "torchvision/efficientnet_b0": 32,
    "torchvision/densenet121": 32,
    "torchvision/vgg11": 32,
    "torchvision/googlenet": 64,
    "torchvision/inception_v3": 299,
    "torchvision/shufflenet_v2_x0_5": 32,
    "torchvision/mnasnet0_5": 32,
    "torchvision/swin_t": 32,
    "torchvision/vit_b_16": 32,
    "torchvision/alexnet": 64,
}
TIMM = {
    "timm/vit_tiny_patch16_224": 32,
    "timm/deit_tiny_distilled_patch16_224": 32,
    "timm/convnext_atto": 32,
    "timm/mobilenetv3_small_050": 32,
    "timm/efficientnet_lite0": 32,
    "timm/resnet10t": 32,
    "timm/regnetx_002": 32,
    "timm/ghostnet_050": 32,
    "timm/edgenext_xx_small": 64,
    "timm/levit_128s": 224,
    "timm/mixer_s32_224": 64,
    "timm/swin_s3_tiny_224": 224,
}
FAMILIES = {"small-cnn": 32, **TORCHVISION, **TIMM}
AUXILIARY = {"torchvision/googlenet": 2, "torchvision/inception_v3": 1}

SLOW = {"torchvision/inception_v3", "torchvision/maxvit_t", "torchvision/vgg11"}


def _cases() -> list[object]:
    return [pytest.param(n, s, id=n, marks=[pytest.mark.slow] if n in SLOW else []) for n, s in FAMILIES.items()]


def _spec(arch: str, size: int, channels: int = 3, outputs: int = 3) -> ModelSpec:
    return ModelSpec(
        arch,
        num_outputs=outputs,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        image_size=size,
        drop_rate=0.0,
    )


def _pixels(count: int, size: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8)


def _wake_heads(model: Classifier) -> None:
    """Some libraries start the head at zero, which hides everything behind it."""
    for parameter in model.head_parameters():
        nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(("arch", "size"), _cases())
def test_trains_everything_and_probes_what_its_head_sees(arch: str, size: int) -> None:
    model = build_model(_spec(arch, size))
    _wake_heads(model)
    assert all(p.requires_grad for p in model.parameters())

    out = model.train()(_pixels(2, size))
    logits, *aux = out if isinstance(out, tuple) else (out,)
    assert logits.shape == (2, 3) and logits.dtype == torch.float32
    assert len(aux) == len(model.aux_weights) == AUXILIARY.get(arch, 0)
    assert all(a.shape == (2, 3) for a in aux)

    (logits.square().sum() + sum(w * a.square().sum() for w, a in zip(model.aux_weights, aux, strict=True))).backward()
    first = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad is not None and first.weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head_parameters())

    model.eval()
    pixels = _pixels(2, size)
    with torch.no_grad():
        logits, features = model(pixels), model.features(pixels)
    assert isinstance(logits, Tensor) and logits.shape == (2, 3)
    assert features.shape[0] == 2 and features.dim() == 2
    _check_features_give_logits(model, features, logits)


def _check_features_give_logits(model: Classifier, features: Tensor, logits: Tensor) -> None:
    heads = [model.backbone.get_submodule(name) for name in head_modules(model.head_keys)]
    if not all(isinstance(head, nn.Linear) for head in heads):
        assert model.spec.arch == "torchvision/squeezenet1_0"  # ReLU and pooling come after its 1x1 head
        assert features.shape[1] == 512
        return
    with torch.no_grad():
        parts = features.split([head.in_features for head in heads], dim=1)
        expected = torch.stack([head(part) for head, part in zip(heads, parts, strict=True)]).mean(0)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("arch", "size"), _cases())
def test_takes_gray_and_rgba_images(arch: str, size: int, channels: int) -> None:
    spec = _spec(arch, size, channels)
    model = Classifier(spec, weightless(spec), frozenset()).to("meta").eval()
    with torch.no_grad():
        assert model(_pixels(2, size, channels).to("meta")).shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("arch", ["torchvision/resnet18", "torchvision/shufflenet_v2_x0_5"])
def test_fresh_gray_and_rgba_networks_start_as_lively_as_colour_ones(arch: str, channels: int) -> None:
    def spread(count: int) -> float:
        network = build_model(_spec(arch, 32, count)).backbone
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        return first(torch.randn(4, count, 32, 32)).std().item()

    assert spread(channels) == pytest.approx(spread(3), rel=0.35)


@pytest.mark.parametrize(("arch", "size"), _cases())
def test_weights_of_other_classes_load_everything_but_the_head(arch: str, size: int) -> None:
    spec = _spec(arch, size)
    network = make_backbone(spec)
    model = Classifier(spec, network, head_keys(spec, network))
    shapes = weightless(_spec(arch, size, outputs=7)).state_dict()
    donor = {k: torch.full(v.shape, 1 + i, dtype=v.dtype) for i, (k, v) in enumerate(shapes.items())}
    before = {name: network.state_dict()[name].clone() for name in model.head_keys}

    report = load_weights(model, donor)

    mine = network.state_dict()
    assert set(report.fresh) == model.head_keys
    assert set(report.loaded) == set(mine) - model.head_keys
    assert not report.ignored and not report.adapted
    assert all(torch.equal(mine[name], donor[name]) for name in report.loaded)
    assert all(torch.equal(mine[name], before[name]) for name in report.fresh)


@pytest.mark.parametrize(("arch", "size"), _cases())
def test_parameters_are_head_or_backbone_and_stages_cover_the_backbone(arch: str, size: int) -> None:
    spec = _spec(arch, size)
    network = weightless(spec)
    model = Classifier(spec, network, head_keys(spec, network))
    head, rest = list(model.head_parameters()), list(model.backbone_parameters())
    assert len(head) + len(rest) == len(list(model.parameters()))
    assert head and all(p.shape[0] == 3 for p in head)
    assert sum(p.numel() for p in head) < 0.1 * sum(p.numel() for p in rest)

    stages = model.stages()
    assert set(stages) == {name for name, _ in network.named_parameters()} - model.head_keys
    assert set(stages.values()) == {1, 2, 3, 4}
    first = next(n for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    assert stages[f"{first}.weight"] == 1
