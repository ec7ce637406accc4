"""Classes that a model does not know: how many images have them, and which of its own may be meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.errors import near
from ..core.text import some
from .listing import Problem

_SHOWN = 10


def about_unknown(unknown: Mapping[str, int], known: Sequence[str], *, ignored: bool = False) -> str:
    """How many images have classes that a model does not know, and which; empty where there are none.

    Args:
        unknown: class -> images.
        known: classes of the model.
        ignored: only these labels were left out, and not the images.
    """
    if not unknown:
        return ""
    images, kinds = sum(unknown.values()), len(unknown)
    if ignored:
        what = f"{kinds:,} label{'s' * (kinds != 1)} that the model does not know {'were' if kinds != 1 else 'was'} left out"
        return f"{what}: {_listed(unknown, known)}; an image in which the model's may be meant is not judged on that one"
    what = f"{images:,} image{'s' * (images != 1)} of {kinds:,} class{'es' * (kinds != 1)} that the model does not know"
    return f"{what} {'were' if images != 1 else 'was'} left out: {_listed(unknown, known)}"


def _listed(unknown: Mapping[str, int], known: Sequence[str]) -> str:
    """Classes with their number of images, and the class of the model that may be meant."""
    names = sorted(unknown, key=lambda name: -unknown[name])
    parts = []
    meant = meant_by(names, known)
    for name in names[:_SHOWN]:
        parts.append(f"{name} {unknown[name]:,}" + (f" (perhaps the model's {meant[name]})" if name in meant else ""))
    return ", ".join(parts) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def meant_by(names: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The classes of the model that the first few names may mean; comparing all with all would take minutes."""
    same = {other.casefold(): other for other in reversed(known)}
    found = {name: same.get(name.casefold()) or near(name, list(known)) for name in names[:_SHOWN]}
    return {name: other for name, other in found.items() if other}


def no_known_class(unknown: Mapping[str, int], known: Sequence[str], source: str) -> Problem:
    """None of the images has a class of the model: both sides are named, and what is spelled almost alike."""
    several = len(unknown) != 1
    theirs = f"none of the {len(unknown):,} classes" if several else "the only class"
    ours = some(known, _SHOWN, " and {:,} more")
    pairs = meant_by(sorted(unknown, key=lambda name: -unknown[name]), known)
    renamed = ", ".join(f"{name} to {meant}" for name, meant in pairs.items())
    return Problem(
        "D014",
        "classes of another model",
        f"{theirs} of {source} is {'a class of the model' if several else 'no class of the model'}: {_listed(unknown, known)}",
        why=f"the model knows {ours}",
        try_=f"rename {renamed}" if renamed else "name the folders, or the labels of the table, as the model's classes",
    )
