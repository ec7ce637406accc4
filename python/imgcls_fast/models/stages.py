"""Cut any network into four stages by the sizes of the maps that flow through it, without a table of families."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STAGES = 4

_PROBE = 3  # images of the traced batch: distinguishes tensors of images from tables such as position biases


def module_stages(
    network: nn.Module, channels: int, size: int, aside: Callable[[str], bool] = lambda name: False
) -> dict[str, int]:
    """The stage 1..4 of every module that runs, by name.

    The four smallest map sizes are the stages 4, 3, 2, 1; larger maps, and what comes before them, are stage 1.
    Networks with fewer sizes (plain transformers) are cut into quarters in the order of execution.

    Args:
        network: in eval mode, on any device; it runs on tensors without memory, its weights are not touched.
        channels: channels of the images.
        size: side of the images in pixels.
        aside: which modules, by name, do not show the size of the map (attention modules pool it); each
            belongs to what ran before it.

    Raises:
        RuntimeError, ValueError, AssertionError: as the network does for a size that it cannot take.
    """
    order, levels = _halvings(network, (_PROBE, channels, size, size), aside)
    distinct = sorted(set(levels))
    if len(distinct) < STAGES:
        return {name: 1 + position * STAGES // len(order) for position, name in enumerate(order)}
    place = {level: max(1, STAGES - depth) for depth, level in enumerate(reversed(distinct))}
    return {name: place[level] for name, level in zip(order, levels, strict=True)}


def stage_of(parameter: str, known: dict[str, int]) -> int:
    """The stage of a parameter: of its module, or of the nearest one around it whose call was seen."""
    owner = parameter.rpartition(".")[0]
    while owner and owner not in known:
        owner = owner.rpartition(".")[0]
    return known.get(owner, 1)


def _halvings(
    network: nn.Module, shape: tuple[int, int, int, int], aside: Callable[[str], bool]
) -> tuple[list[str], list[int]]:
    area = shape[-1] * shape[-2]
    seen: dict[str, float] = {}

    def enter(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any) -> None:
            seen.setdefault(name, math.inf)

        return note

    def leave(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            positions = _positions(module, output)
            if positions > 1:
                seen[name] = min(seen[name], round(math.log2(area / positions) / 2))

        return note

    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        if isinstance(module, nn.Conv2d | nn.Linear) and not aside(name):
            hooks.append(module.register_forward_hook(leave(name)))
    shapes = {n: t.to("meta") for n, t in (*network.named_parameters(), *network.named_buffers())}
    try:
        with torch.no_grad():  # on tensors without memory: only the shapes are computed
            torch.func.functional_call(network, shapes, (torch.empty(shape, device="meta"),))
    finally:
        for hook in hooks:
            hook.remove()
    names = list(seen)
    return names, _whole_blocks(names, _monotonic(list(seen.values())), [v < math.inf for v in seen.values()])


def _monotonic(seen: list[float]) -> list[int]:
    """Maps only shrink: a gate computed on a pooled map belongs where the maps after it are.

    What was not measured (a norm, a block around others) belongs to what ran before it.
    """
    smallest = max((v for v in seen if v < math.inf), default=0)
    levels = []
    for value in reversed(seen):
        smallest = min(smallest, value)
        levels.append(smallest if value < math.inf else -1)
    levels.reverse()
    current = next((v for v in levels if v >= 0), 0)
    for position, value in enumerate(levels):
        current = value if value >= 0 else current
        levels[position] = current
    return [int(v) for v in levels]


def _whole_blocks(names: list[str], levels: list[int], measured: list[bool]) -> list[int]:
    """A block that halves its map once inside belongs as a whole to the smaller size (a bottleneck's first 1x1)."""
    low: dict[str, int] = {}
    high: dict[str, int] = {}
    for name, level, sure in zip(names, levels, measured, strict=True):
        for block in _ancestors(name) if sure else ():
            low[block], high[block] = min(low.get(block, level), level), max(high.get(block, level), level)
    result = []
    for name, level in zip(names, levels, strict=True):
        whole = next((high[b] for b in _ancestors(name) if b in high and high[b] - low[b] <= 1), level)
        result.append(whole)
    return result


def _ancestors(name: str) -> list[str]:
    """The names of the modules around a module, from the outermost below the root to itself."""
    parts = name.split(".") if name else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _positions(module: nn.Module, output: Any) -> int:
    """Positions of a map or tokens of a sequence; 0 for anything that is not one row per image."""
    if not isinstance(output, Tensor) or output.dim() < 3 or output.shape[0] != _PROBE:
        return 0
    sides = output.shape[2:] if isinstance(module, nn.Conv2d) else output.shape[1:-1]
    return math.prod(sides)
