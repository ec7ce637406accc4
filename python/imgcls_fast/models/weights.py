"""Reading weights from files that others made, and putting them into a `Classifier`. Nothing is unpickled."""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.files import lack_of, plain_path
from ..core.hints import worded
from ..core.text import quoted, some
from .backbones import input_keys, is_auxiliary
from .classifier import Classifier, LoadReport
from .contents import (
    Contents,
    averages_beside,
    check_finite,
    find_state,
    split_part,
    without_prefix,
)
from .placement import is_attention
from .weight_files import DAMAGE, check_safetensors, check_tensors, check_torch

State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt.tar", ".pth.tar", ".ckpt.tar")

# Names that torchvision has changed since it published some of its files.
_RENAMED = (
    (re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$"), r"\1\2"),  # DenseNet before 0.3
    (re.compile(r"^(.*\.mlp)\.linear_1\.(weight|bias)$"), r"\1.0.\2"),  # ViT before pytorch/vision#6053
    (re.compile(r"^(.*\.mlp)\.linear_2\.(weight|bias)$"), r"\1.3.\2"),
)

# Wrappers (data parallel, torch.compile, ours) put these before every name.
_PREFIXES = ("module.", "_orig_mod.", "backbone.")

# Counters, not weights: torch before 0.4.1 did not save the first, averaged models add the second.
_COUNTERS = ("num_batches_tracked", "n_averaged")

_LISTED = 8  # names of each kind in the error about weights that do not fit


def read_state(path: Path) -> State:
    """The tensors of a weights file, by name.

    Args:
        path: a .safetensors file, or a .pt, .pth, .bin, .ckpt or .pth.tar that `torch.load(weights_only=True)` takes: a bare
            state dict or a training checkpoint; "FILE#KEY" for the weights under one of its keys.

    Raises:
        ModelError: M003, no such file, unknown suffix, damaged, it holds more than tensors, or asks for more memory than
            its own size.
    """
    return _read(path).state


def is_weights_name(path: Path) -> bool:
    """Whether a file is called as files of weights are."""
    return path.name.lower().endswith(SUFFIXES)


def _read(source: Path) -> Contents:
    path, part = split_part(source)
    if not os.path.isfile(path):
        lack = lack_of(path)
        raise ModelError("M003", f"no such weights file: {path}" if lack in ("", "does not exist") else f"{path} {lack}")
    if not is_weights_name(path):
        raise ModelError("M003", f"{path.name} is not a weights file; expected one of {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)
    found = find_state(content, str(path), part)
    check_tensors(path, found.state)
    return found


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(plain_path(path))
    except (SafetensorError, *DAMAGE) as error:
        raise ModelError("M003", f"{path} is damaged or not a safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    check_torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *DAMAGE) as error:
        raise ModelError("M003", f"{path} is damaged or not a weights file: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    """The line of torch's long advice that names the refused object, or else the first."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "GLOBAL" in line), lines[0].strip())


def load_weights(
    model: Classifier,
    source: Path | str | Mapping[str, Tensor],
    *,
    ignore_extra: bool = False,
    head_rows: Sequence[int] | None = None,
) -> LoadReport:
    """Copy weights into a model, all or none.

    Names may carry "module.", "_orig_mod." and "backbone." in front, and one other common prefix ("model.", "net."); what
    stands beside that prefix is ignored, with a warning. Averaged weights beside them are named in a warning. Tensors of
    the head may have another shape (another number of classes) or be absent: they are left as they are. The first
    convolution is adapted when the file was made for another number of channels (summed for 1, repeated for 4);
    position embeddings are resampled for another image size. Tensors of auxiliary heads may be absent on either side;
    those of attention modules may be absent from the file, and are then left as they are.

    Args:
        model: receives the weights.
        source: a file (`read_state`) or tensors by name.
        ignore_extra: ignore tensors that the model does not have, instead of refusing.
        head_rows: per output of the model, the output of the file that means the same class, -1 for none (see
            `matching_classes`); None: nothing is known of the classes, and a head of equal shape is taken as it is.

    Raises:
        ModelError: M002, the tensors do not fit the architecture; M003, see `read_state`, or some are NaN or infinite.
    """
    name = str(source) if isinstance(source, Path | str) else "a dictionary of tensors"
    contents = _read(Path(source)) if isinstance(source, Path | str) else find_state(source, name)
    own = model.backbone.state_dict()
    state, beside = without_prefix(_own_names(contents.state, own), own)
    state = _own_names(state, own) if beside else state
    _warn_of_the_rest(name, [*contents.averages, *averages_beside(beside)], beside)
    shapes = {key: value.shape for key, value in state.items()}
    state = _fitted(model, state, own)
    if head_rows is not None:
        state = _with_head(model, state, own, list(head_rows))
    fresh, ignored = _check(model, state, own, name, ignore_extra)
    check_finite(state, own, name)
    with torch.no_grad():
        for key in own.keys() - set(fresh):
            own[key].copy_(state[key])
    loaded = tuple(key for key in own if key not in fresh)
    adapted = tuple(key for key in loaded if key in shapes and shapes[key] != state[key].shape)
    return LoadReport(loaded=loaded, fresh=fresh, ignored=(*ignored, *beside), adapted=adapted)


def _warn_of_the_rest(name: str, averages: Sequence[str], beside: State) -> None:
    if averages:
        warnings.warn(
            f"{name} also holds averaged weights ({', '.join(averages)}), which are often the better ones: "
            + worded(f"--init {quoted(f'{name}#{averages[0]}')} takes them"),
            stacklevel=3,
        )
    rest = [key for key in beside if key.split(".")[0] not in averages and not key.endswith(_COUNTERS)]
    if rest:
        warnings.warn(f"{name}: {len(rest)} tensors beside the model's were left out: {some(rest)}", stacklevel=3)


def matching_classes(own: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """For each of our classes its place among theirs, -1 where they do not have it."""
    place = {name: k for k, name in enumerate(theirs)}
    return [place.get(name, -1) for name in own]


def _with_head(model: Classifier, state: State, own: State, rows: list[int]) -> State:
    """The head's tensors in the order of our classes; where theirs do not fit or none is known, the model keeps its own."""
    known = [k for k, row in enumerate(rows) if row >= 0]
    taken = [rows[k] for k in known]
    state = dict(state)
    for key in model.head_keys & state.keys():
        mine, value = own[key], state.pop(key)
        fits = mine.dim() > 0 and mine.shape[0] == len(rows) and value.shape[1:] == mine.shape[1:]
        if fits and known and max(taken) < value.shape[0]:
            state[key] = mine.clone()
            state[key][known] = value[taken].to(mine.dtype)
    return state


def _own_names(state: State, own: State) -> State:
    result = {}
    for key, value in state.items():
        stripped = True
        while key not in own and stripped:
            stripped = False
            for prefix in _PREFIXES:
                if key.startswith(prefix):
                    key, stripped = key.removeprefix(prefix), True
        for pattern, replacement in _RENAMED:
            key = key if key in own else pattern.sub(replacement, key)
        result[key] = value
    return result


def _misfits(model: Classifier, state: State, own: State) -> list[str]:
    """Keys, outside of the head, that are only on one side or have two shapes."""
    one_sided = state.keys() ^ own.keys()
    unequal = {key for key in state.keys() & own.keys() if state[key].shape != own[key].shape}
    left = model.head_keys | {key for key in own.keys() - state.keys() if is_attention(key)}
    return sorted(key for key in (one_sided | unequal) - left if not key.endswith(_COUNTERS))


def _fitted(model: Classifier, state: State, own: State) -> State:
    """Bring position embeddings and the first convolution into the model's shape, where that is defined."""
    if _misfits(model, state, own):
        inserted = {key: value for key, value in state.items() if is_attention(key)}
        state = _library_fit(model, {k: v for k, v in state.items() if k not in inserted}) | inserted
    unequal = [k for k in _misfits(model, state, own) if k in own and k in state]
    if any(own[k].dim() == 4 == state[k].dim() and own[k].shape[1] != state[k].shape[1] for k in unequal):
        for key in set(unequal) & input_keys(model.spec, model.backbone):
            state = {**state, key: _adapt_input(state[key], own[key])}
    return state


def _adapt_input(weight: Tensor, own: Tensor) -> Tensor:
    from timm.models import adapt_input_conv

    have, want = weight.shape[1], own.shape[1]
    if weight.dim() != 4 or {have, want} - {1, 3, 4}:
        return weight
    return adapt_input_conv(want, weight, base_chans=have)


def _library_fit(model: Classifier, state: State) -> State:
    """The conversion that the library itself applies to its published files (position embeddings, old names)."""
    if model.spec.arch.startswith("torchvision/vit_"):
        return _resample_vit(model, state)
    if not model.spec.arch.startswith("timm/"):
        return state
    module = sys.modules[type(model.backbone).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), model.backbone))
    except (KeyError, AttributeError, IndexError, RuntimeError, TypeError, ValueError, AssertionError):
        return state  # A file of another architecture: the comparison that follows lists what differs.


def _resample_vit(model: Classifier, state: State) -> State:
    from torchvision.models.vision_transformer import interpolate_embeddings

    key = "encoder.pos_embedding"
    own = model.backbone.state_dict()[key]
    if key not in state or state[key].dim() != 3 or state[key].shape[2] != own.shape[2]:
        return state
    vit: Any = model.backbone
    try:
        return dict(interpolate_embeddings(vit.image_size, vit.patch_size, dict(state)))
    except ValueError:
        return state


def _check(
    model: Classifier, state: State, own: State, name: str, ignore_extra: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(fresh, ignored), or M002."""
    unequal = [k for k in own if k in state and own[k].shape != state[k].shape]
    absent = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    fresh = [k for k in unequal if k in model.head_keys]
    fresh += [k for k in absent if k in model.head_keys or _may_be_absent(k)]
    ignored = [k for k in extra if ignore_extra or is_auxiliary(k) or k.endswith(_COUNTERS)]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in unequal if k not in fresh]
    problems = (
        ("missing", [k for k in absent if k not in fresh]),
        ("unexpected", [k for k in extra if k not in ignored]),
        ("of another shape", shapes),
    )
    if any(keys for _, keys in problems):
        told = "; ".join(f"{len(keys)} {kind}: {some(keys, _LISTED)}" for kind, keys in problems if keys)
        both = len(own.keys() & state.keys())
        raise ModelError(
            "M002",
            f"{name} does not fit {model.spec.arch} ({len(own)} tensors, {len(state)} in the file): {told}",
            why=f"{both} of {len(own)} names are in the file" + ("" if both else f", which begins with {some(state)}"),
            try_="--model NAME with the architecture that the file was made for   (imgcls-fast models list lists them)",
        )
    return tuple(fresh), tuple(ignored)


def _may_be_absent(key: str) -> bool:
    return is_auxiliary(key) or is_attention(key) or key.endswith(_COUNTERS)
