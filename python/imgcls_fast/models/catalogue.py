"""List the classifiers: parameters, usual image size, where their published weights are. Builds none that is in the table."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from ..core.errors import ModelError
from ..core.text import command
from .backbones import ModelSpec, weightless
from .build import pretrained_pixels
from .names import SMALL_CNN, list_models, nearest_model, resolve_arch
from .published import published_weights

OUTPUTS = 1000  # parameters are counted with a head of so many classes, as the libraries state them
_MOST_COUNTED = 20  # networks newer than the table that are sketched for one listing; each takes up to a second


def catalogue(pattern: str = "*") -> list[dict[str, Any]]:
    """The classifiers whose name matches.

    Args:
        pattern: a shell pattern for the full name ("timm/vit_*") or the bare one ("vit_*"); a name, with or without the tag of
            its weights; or a part of a name.

    Returns:
        For each: name; parameters (with 1,000 classes; None when not known); image_size (pixels; None: any); weights (path of
        the published file here, or None); damaged (why that file is not taken, or ""); place (path that a fetched file is
        put at, or the folder in Hugging Face's cache), url and licence of the published file ("" where there is none).

    Raises:
        ModelError: M001 when nothing matches.
    """
    found = list_models(pattern) or _by_name(pattern)
    if not found:
        guess = nearest_model(pattern.strip("*?"))
        raise ModelError(
            "M001",
            f"no model matches {pattern!r}" + (f", did you mean {guess!r}?" if guess else ""),
            try_=command("models", "list", guess or "resnet"),
        )
    counts = _counts()
    unknown = [arch for arch in found if arch.partition(".")[0] not in counts]
    counted = {arch: count_parameters(arch) for arch in unknown} if len(unknown) <= _MOST_COUNTED else {}
    return [_entry(arch, counts.get(arch.partition(".")[0], counted.get(arch))) for arch in found]


def _by_name(name: str) -> list[str]:
    """One name with a tag or another prefix ("tv/resnet18"), or all names that have it in them."""
    if set(name) & set("*?["):
        return []
    try:
        return [resolve_arch(name)]
    except ModelError:
        return list_models(f"*{name}*")


def _entry(arch: str, parameters: int | None) -> dict[str, Any]:
    weights = published_weights(arch)
    place = weights.place if weights.address == weights.url else weights.hub_folder
    return {
        "name": arch,
        "parameters": parameters,
        "image_size": None if arch == SMALL_CNN else int(pretrained_pixels(arch)["size"]),
        "weights": str(weights.path) if weights.path else None,
        "damaged": weights.damage,
        "place": str(place) if place else "",
        "url": weights.address,
        "licence": weights.licence if weights.exists else "",
    }


def count_parameters(arch: str) -> int:
    """Parameters of an architecture with 1,000 classes, without memory for them."""
    return sum(parameter.numel() for parameter in weightless(ModelSpec(arch, num_outputs=OUTPUTS)).parameters())


@cache
def _counts() -> dict[str, int]:
    """The table that scripts/count_parameters.py writes."""
    lines = files("imgcls_fast.models").joinpath("parameters.txt").read_text("utf-8").splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines if not line.startswith("#"))}
