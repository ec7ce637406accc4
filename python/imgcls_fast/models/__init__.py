"""Networks of torchvision, timm and our own behind one class that takes uint8 pixels."""

from .build import (
    Classifier,
    LoadReport,
    ModelSpec,
    build_model,
    list_models,
    load_weights,
    pretrained_available,
    pretrained_pixels,
    read_state,
    resolve_arch,
)

__all__ = [
    "Classifier",
    "LoadReport",
    "ModelSpec",
    "build_model",
    "list_models",
    "load_weights",
    "pretrained_available",
    "pretrained_pixels",
    "read_state",
    "resolve_arch",
]
