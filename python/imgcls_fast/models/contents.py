"""Find the weights in what other tools save: training checkpoints, wrappers around names, averaged weights beside the trained ones."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.text import quoted, some

State = dict[str, Tensor]

# Under these keys training checkpoints keep the trained weights; the first that is there is taken.
_TRAINED = ("state_dict", "model_state_dict", "model", "model_state", "module", "net", "network", "backbone", "weights", "params")
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)|shadow", re.IGNORECASE)
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|config|hparam|hyper", re.IGNORECASE)
_DEEPEST = 8  # dictionaries within dictionaries that are looked into: one in a file may hold itself


@dataclass(frozen=True)
class Contents:
    """The tensors of a weights file by name, and the names of averaged weights that lie beside them."""

    state: State
    averages: tuple[str, ...] = field(default=())


def split_part(source: Path) -> tuple[Path, str]:
    """("FILE", "PART") of "FILE#PART"; a file that has such a name itself is meant as it is."""
    name, mark, part = source.name.rpartition("#")
    whole = source.with_name(name) if mark and name else source
    return (whole, part) if mark and part and not os.path.exists(source) and os.path.isfile(whole) else (source, "")


def find_state(content: Any, source: str, part: str = "") -> Contents:
    """The weights in what a file holds.

    Args:
        content: tensors by name, or a training checkpoint that has them under one of its keys.
        source: the file, for messages.
        part: key (or beginning of names) of the weights that are meant; "": the trained ones.

    Raises:
        ModelError: M003, there are none, several, or something else than tensors between them.
    """
    if part:
        return Contents(_part(content, source, part))
    averages: list[str] = []
    for depth in range(_DEEPEST + 1):
        if not isinstance(content, Mapping) or not (inner := _inside(content, source)):
            break
        if depth == _DEEPEST:
            raise ModelError("M003", f"{source} holds no weights in the first {_DEEPEST} of its dictionaries within dictionaries")
        averages += [key for key, value in content.items() if _AVERAGE.search(str(key)) and _is_state(value)]
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise ModelError("M003", f"{source} holds no tensors by name, but a {type(content).__name__}")
    if unnamed := next((type(key).__name__ for key in content if not isinstance(key, str)), None):
        raise ModelError("M003", f"{source} holds no tensors by name: a key is a {unnamed}")
    if strangers := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ModelError("M003", f"{source} holds entries that are not tensors: {some(strangers)}")
    return Contents(dict(content), tuple(averages))


def _is_state(value: Any) -> bool:
    """Whether it is tensors by name, or has them some levels deeper."""
    level = [value] if isinstance(value, Mapping) else []
    for _ in range(_DEEPEST):
        if any(one and all(isinstance(key, str) and isinstance(t, Tensor) for key, t in one.items()) for one in level):
            return True
        inner = [one[key] for one in level for key in _TRAINED if isinstance(one.get(key), Mapping)]
        level = list({id(one): one for one in inner}.values())  # each once: ten keys may hold the same
    return False


def _inside(content: Mapping[Any, Any], source: str) -> str:
    """The key of a checkpoint that holds the trained weights; "" when `content` is the weights themselves."""
    for key in _TRAINED:
        if isinstance(content.get(key), Mapping):
            return key
    found = [key for key, value in content.items() if isinstance(key, str) and _is_state(value)]
    trained = [key for key in found if not _AVERAGE.search(key) and not _NO_WEIGHTS.search(key)]
    if len(trained) > 1:
        raise ModelError(
            "M003", f"{source} holds several sets of weights: {some(trained)}", try_=f"--init {quoted(f'{source}#{trained[0]}')}"
        )
    return (trained or [key for key in found if _AVERAGE.search(key)] or [""])[0]


def _part(content: Any, source: str, part: str) -> State:
    keys = [str(key) for key, value in content.items() if _is_state(value)] if isinstance(content, Mapping) else []
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            break
        if _is_state(content.get(part)):
            return find_state(content[part], f"{source}#{part}").state
        inner = next((key for key in _TRAINED if isinstance(content.get(key), Mapping)), "")
        begun = {key: value for key, value in content.items() if str(key).startswith(f"{part}.")}
        if begun:
            return find_state(begun, f"{source}#{part}").state
        content = content.get(inner)
    there = f"; it has them under {some(keys, 8)}" if keys else ""
    raise ModelError("M003", f"{source} has no weights under {part!r}{there}")


def without_prefix(state: State, own: Mapping[str, Tensor]) -> tuple[State, State]:
    """Take one common prefix ("model.", "net.backbone.") off the names, where the network's own names lie behind it.

    Returns:
        The tensors behind the prefix, renamed; those beside it, as they were. Without such a prefix: `state`, nothing.
    """
    found = Counter(prefix for key in state if key not in own for prefix in _prefixes(key, own))
    trained = {prefix: count for prefix, count in found.items() if not _AVERAGE.search(prefix)} or found
    prefix = max(trained, key=lambda name: trained[name], default="")
    if not prefix or trained[prefix] <= sum(key in own for key in state) or 2 * trained[prefix] < len(own):
        return state, {}
    behind = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return behind, {key: value for key, value in state.items() if not key.startswith(prefix)}


def _prefixes(key: str, own: Mapping[str, Tensor]) -> Iterable[str]:
    """Every beginning of a name that ends with a dot and leaves a name of the network."""
    for dot in re.finditer(r"\.", key):
        if key[dot.end() :] in own:
            yield key[: dot.end()]


def averages_beside(names: Iterable[str]) -> tuple[str, ...]:
    """The first words of such names as averaged weights have ("ema_model" of "ema_model.fc.bias")."""
    return tuple(dict.fromkeys(word for name in names if _AVERAGE.search(word := name.split(".")[0])))


def check_finite(state: State, own: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are NaN or infinite where the network's own are not.

    Raises:
        ModelError: M003.
    """
    for key, value in state.items():
        if key in own and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            wrong = int(value.numel() - value.isfinite().sum())
            if wrong and bool(own[key].isfinite().all()):
                raise ModelError(
                    "M003",
                    f"{source} holds NaN or infinity: {wrong:,} of {value.numel():,} values of {key}",
                    why="the training that wrote it diverged, or the file is damaged; no learning rate mends that",
                    try_="an earlier checkpoint of that training   (or --init pretrained, or --init scratch)",
                )
