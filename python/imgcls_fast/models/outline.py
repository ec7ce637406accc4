"""What can be known of a network before it has weights: its norms, its dropout, and what it cannot stand."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backbones import ModelSpec, is_auxiliary, weightless
from .placement import insert_attention

# oneDNN's AVX-512 kernel copies vectors of 16 floats; what it writes for fewer channels goes past its buffer.
_SAFE_CHANNELS = 16


@dataclass(frozen=True)
class Outline:
    """A network without memory for its weights.

    Args:
        drop_rate: dropout that the library gives the architecture by itself.
        drop_path: stochastic depth of the deepest block, likewise.
        batch_norm: it takes statistics over the images of a batch.
        token_like: a transformer or a network built like one (ConvNeXt): trained with AdamW by its authors.
        breaks_channels_last: name of a convolution whose backward pass on a CPU overwrites memory in the layout
            channels-last; "" when there is none.
        convolves: it has a 2-D convolution beside its patch embedding.
    """

    drop_rate: float
    drop_path: float
    batch_norm: bool
    token_like: bool
    breaks_channels_last: str
    convolves: bool


def outline_of(spec: ModelSpec) -> Outline:
    """The outline of a model; its own `drop_rate` and `drop_path` are not looked at.

    Raises:
        ConfigError: as `backbones.make_backbone` and `placement.insert_attention`.
    """
    bare = replace(spec, drop_rate=None, drop_path=None)
    network = weightless(bare)
    rate, path, token_like = _own_rate(network), _own_path(network), _token_like(network)
    with torch.random.fork_rng(devices=[]):
        insert_attention(network, bare)
    return Outline(
        rate,
        path,
        any(isinstance(module, _BatchNorm) for module in network.modules()),
        token_like,
        breaks_channels_last(network),
        any(isinstance(module, nn.Conv2d) and not _cuts_patches(module) for module in network.modules()),
    )


def _cuts_patches(layer: nn.Conv2d) -> bool:
    """Whether a convolution of all channels reads each pixel once, as the first layer of a transformer does."""
    kernel = tuple(layer.kernel_size)
    return kernel == tuple(layer.stride) and min(kernel) > 1 and layer.groups == 1


def breaks_channels_last(network: nn.Module) -> str:
    """The first convolution that must not run backwards on a CPU in the layout channels-last, or "".

    It has a 1x1 kernel, a stride above 1, and fewer than 16 input channels: torch 2.14.1 (oneDNN, AVX-512) then
    overwrites the heap, seen from 80 pixels on, with any number of outputs. Without a stride, with 16 to 104
    channels, or in the usual layout nothing of the kind was found.
    """
    for name, module in network.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and tuple(module.kernel_size) == (1, 1)
            and max(module.stride) > 1
            and module.in_channels // module.groups < _SAFE_CHANNELS
        ):
            return name
    return ""


def _own_rate(network: nn.Module) -> float:
    found = getattr(network, "drop_rate", None)
    if not isinstance(found, float) and type(network).__module__.startswith("timm."):
        parameter = inspect.signature(type(network)).parameters.get("drop_rate")
        found = parameter.default if parameter is not None else 0.0
    elif not isinstance(found, float):  # torchvision's have no such attribute: their dropouts share one rate
        found = max(
            (m.p for n, m in network.named_modules() if isinstance(m, nn.Dropout) and not is_auxiliary(n)), default=0.0
        )
    return float(found) if isinstance(found, int | float) else 0.0


def _own_path(network: nn.Module) -> float:
    """Of timm's DropPath and torchvision's StochasticDepth."""
    rates = [0.0]
    for module in network.modules():
        if type(module).__name__ in ("DropPath", "StochasticDepth"):
            rates.append(float(getattr(module, "drop_prob", getattr(module, "p", 0.0)) or 0.0))
    return float(f"{max(rates):.6g}")


def _token_like(network: nn.Module) -> bool:
    """Whether it normalises per token, attends, or scales its layers, as no plain convolutional network does."""
    names = {kind.__name__ for module in network.modules() for kind in type(module).__mro__}
    return any(word in name for name in names for word in ("LayerNorm", "Attention", "LayerScale", "RmsNorm"))
