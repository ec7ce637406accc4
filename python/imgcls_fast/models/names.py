"""Names of architectures: `small-cnn`, `torchvision/NAME`, `timm/NAME` or `timm/NAME.TAG`.

torchvision and timm are imported inside the functions: a bare torchvision name is resolved without
paying for timm's 1,371 entries.
"""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..core.errors import ModelError
from ..core.text import command

SMALL_CNN = "small-cnn"

_LIBRARIES = {"torchvision": "torchvision", "tv": "torchvision", "timm": "timm"}


def torchvision_names() -> list[str]:
    """The image classifiers of torchvision; detection, segmentation, video, flow and quantized models are not."""
    from torchvision import models

    return models.list_models(module=models)


def timm_names() -> list[str]:
    """The architectures of timm, without tags of weights."""
    import timm

    return timm.list_models()


def list_models(pattern: str = "*") -> list[str]:
    """All resolved names that match a shell pattern.

    Args:
        pattern: matched against the resolved name ("timm/resnet*") and against the bare one ("resnet*").

    Returns:
        Resolved names: small-cnn, then torchvision's, then timm's.
    """
    names = [SMALL_CNN, *(f"torchvision/{n}" for n in torchvision_names()), *(f"timm/{n}" for n in timm_names())]
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition("/")[2], pattern)]


def resolve_arch(name: str) -> str:
    """The full name of an architecture.

    Args:
        name: "small-cnn", a bare name (torchvision wins when both libraries have it), "torchvision/NAME",
            "tv/NAME" or "timm/NAME"; timm names may carry the tag of their weights ("resnet50.a1_in1k").

    Returns:
        "small-cnn", "torchvision/NAME" or "timm/NAME[.TAG]".

    Raises:
        ModelError: M001, no such classifier; names the nearest one.
    """
    prefix, slash, bare = name.rpartition("/")
    library = _LIBRARIES.get(prefix, "")
    if name == SMALL_CNN:
        return SMALL_CNN
    if slash and not library:
        raise _unknown(name, bare, "")
    if library != "timm" and bare in torchvision_names():
        return f"torchvision/{bare}"
    if library != "torchvision" and _in_timm(bare):
        return f"timm/{bare}"
    raise _unknown(name, bare, library)


def _in_timm(name: str) -> bool:
    import timm

    base, dot, _ = name.partition(".")
    return timm.is_model(base) and (not dot or name in timm.list_pretrained(f"{base}.*"))


def nearest_model(name: str) -> str:
    """The known name that was most probably meant; "" when nothing is near."""
    prefix, _, bare = name.rpartition("/")
    return _nearest(bare, _LIBRARIES.get(prefix, ""))


def _unknown(name: str, bare: str, library: str) -> ModelError:
    guess = _nearest(bare, library)
    begun = sum(_plain(known).startswith(_plain(bare)) for known in (*torchvision_names(), *timm_names())) if bare else 0
    more = f"   (or one of the {begun} names that {command('models', 'list', f'{bare}*')} lists)" if begun > 1 else ""
    why = "" if "." in bare else "only classifiers of torchvision and timm are offered, and small-cnn"
    return ModelError(
        "M001",
        f"unknown model {name!r}" + (f", did you mean {guess!r}?" if guess else ""),
        why=why,
        try_=f"--model {guess or 'resnet50'}{more}",
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _nearest(bare: str, library: str) -> str:
    """The shortest known name that begins so, else the one that differs least or has it inside; "" if none is near.

    Case, - and _ are ignored.
    """
    choices: dict[str, str] = {}
    if library in ("", "timm"):
        base, dot, _ = bare.partition(".")
        choices |= {_plain(n): n for n in _with_tags(base) if dot} or {_plain(n): n for n in timm_names()}
    if library in ("", "torchvision"):
        choices |= {_plain(n): n for n in torchvision_names()}
    if not library:
        choices[_plain(SMALL_CNN)] = SMALL_CNN
    typed = _plain(bare)
    joined = typed.replace("_", "")  # EfficientNetB0, mobilenetv3
    begun = sorted((known for known in choices if joined and known.replace("_", "").startswith(joined)), key=len)
    within = sorted((known for known in choices if len(typed) > 3 and typed in known), key=len)  # dinov2
    found = begun[:1] or get_close_matches(typed, choices, n=1, cutoff=0.6) or within[:1]
    if not found:
        return ""
    return f"{library}/{choices[found[0]]}" if library else choices[found[0]]


def _with_tags(base: str) -> list[str]:
    import timm

    return timm.list_pretrained(f"{base}.*") if timm.is_model(base) else []
