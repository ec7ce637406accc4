"""List the classifiers that can be trained."""

from __future__ import annotations

from typing import Any


def list_models(pattern: str = "*") -> list[dict[str, Any]]:
    """The classifiers of torchvision and timm, and small-cnn, whose name matches; builds none and needs no network.

    Args:
        pattern: a shell pattern for the full name ("timm/vit_*") or the bare one ("vit_*"); a name; or a part of a name.

    Returns:
        For each: name, parameters (with 1,000 classes), image_size (pixels), weights (path of the published file on this
        machine, or None), damaged (why that file is not taken), place (path that a fetched file belongs at), url, licence.

    Raises:
        ModelError: M001 when nothing matches.
    """
    from ..models.catalogue import catalogue

    return catalogue(pattern)
