"""From a `ModelSpec` to a `Classifier`, with fresh, local or pretrained weights. No network unless asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ConfigError, ModelError
from .backbones import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ModelSpec,
    check_image_size,
    head_keys,
    make_backbone,
    resolve_args,
    weightless,
)
from .classifier import Classifier, LoadReport
from .names import list_models, resolve_arch
from .outline import outline_of
from .placement import attention_to_train, insert_attention
from .published import fetch_published, pretrained_available, published_weights
from .weights import load_weights, matching_classes, read_state

__all__ = [
    "Classifier",
    "LoadReport",
    "ModelSpec",
    "attention_to_train",
    "build_model",
    "list_models",
    "load_weights",
    "matching_classes",
    "outline_of",
    "pretrained_available",
    "pretrained_pixels",
    "published_weights",
    "read_state",
    "resolve_arch",
    "resolve_args",
    "sketch_model",
]

# torchvision's files of these were trained on inputs scaled to -1..1; its `transform_input` converts from
# ImageNet's mean and deviation to that. We leave the conversion off and normalise that way directly.
_MINUS_ONE_TO_ONE = ("torchvision/googlenet", "torchvision/inception_v3")


def build_model(
    spec: ModelSpec,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    allow_download: bool = False,
    head_rows: Sequence[int] | None = None,
) -> Classifier:
    """Build a model. Nothing is frozen; it is in training mode, on the CPU.

    Args:
        spec: `spec.arch` must be a name that `resolve_arch` returns.
        weights: a local file (`load_weights`).
        pretrained: take the weights that the library publishes for `spec.arch`, from the local caches.
        allow_download: with `pretrained`, fetch them when they are not in a cache.
        head_rows: see `load_weights`.

    Returns:
        The model; `model.report` lists which tensors were loaded (None: all are fresh).

    Raises:
        ModelError: M001 unknown architecture, M002 and M003 see `load_weights`, M007 pretrained weights are
            not on this machine (or do not exist, or cannot be downloaded); M003 also when they are damaged.
        ConfigError: C003 or C004, see `placement.insert_attention`; C004, the architecture refuses the image
            size or an argument, or both kinds of weights were asked for.
    """
    if weights is not None and pretrained:
        raise ConfigError("C004", f"weights={weights} and pretrained=True were both asked for")
    if resolve_arch(spec.arch) != spec.arch:
        raise ModelError("M001", f"{spec.arch!r} is not a full name", try_=f"--model {resolve_arch(spec.arch)}")
    check_image_size(spec)
    path = fetch_published(spec.arch, allow_download) if pretrained else weights
    backbone = make_backbone(spec)
    head = head_keys(spec, backbone)
    insert_attention(backbone, spec)
    model = Classifier(spec, backbone, head)
    if path is not None:
        model.report = load_weights(model, path, ignore_extra=pretrained, head_rows=head_rows)
    return model


def sketch_model(spec: ModelSpec) -> Classifier:
    """The model that `build_model` makes, without memory for its weights: for counting and checking.

    Raises:
        ConfigError, ModelError: as `build_model`.
    """
    check_image_size(spec)
    backbone = weightless(spec)
    head = head_keys(spec, backbone)
    with torch.random.fork_rng(devices=[]):
        insert_attention(backbone, spec)
    return Classifier(spec, backbone, head)


def pretrained_pixels(arch: str) -> dict[str, Any]:
    """How the published weights of a resolved name want their pixels; from the libraries' tables, no network.

    Returns:
        mean, std: per channel, of pixels in 0..1; size: side in pixels; interpolation: "bilinear" or "bicubic"
        (the library's word); crop_pct: side of the centre crop as a share of the resized image's short side.
        An architecture without published weights gives ImageNet's numbers at 224.
    """
    library, _, name = arch.rpartition("/")
    if library == "torchvision":
        return _torchvision_pixels(arch, name)
    pixels: dict[str, Any] = {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "size": 224,
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }
    if library == "timm":
        import timm

        cfg = timm.models.get_pretrained_cfg(name)
        if cfg is not None:
            pixels = {key: getattr(cfg, key) for key in ("mean", "std", "interpolation", "crop_pct")}
            pixels = {**pixels, "size": cfg.input_size[-1]}
    return pixels


def _torchvision_pixels(arch: str, name: str) -> dict[str, Any]:
    from torchvision.models import get_model_weights

    recipe: Any = get_model_weights(name).DEFAULT.transforms()
    scaled = arch in _MINUS_ONE_TO_ONE
    return {
        "mean": (0.5, 0.5, 0.5) if scaled else tuple(recipe.mean),
        "std": (0.5, 0.5, 0.5) if scaled else tuple(recipe.std),
        "size": recipe.crop_size[0],
        "interpolation": recipe.interpolation.value,
        "crop_pct": recipe.crop_size[0] / recipe.resize_size[0],
    }
