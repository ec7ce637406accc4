"""Where attention modules go: the texts of `--attention`, a table of families, and the insertion into a network.

A module is attached by a forward hook and owned by one container, ``attention``, beside the network's own children: no
key of the backbone changes its name, and containers that run whatever they hold (a sequence, a dense block) are not
disturbed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, near
from .attention import MODULES
from .names import SMALL_CNN
from .stages import STAGES

if TYPE_CHECKING:
    from .backbones import ModelSpec

ALIASES: dict[str, str] = {
    "a2": "double",
    "double-attention": "double",
    "doubleattention": "double",
    "coordinate": "coord",
    "coordatt": "coord",
    "global-context": "gc",
    "selective-kernel": "sk",
    "squeeze-excitation": "se",
    "triplet-attention": "triplet",
    "tripletattention": "triplet",
}

CONTAINER = "attention"  # the child of a network that owns its attention modules
EVERY_BLOCK = "every-block"
PLACES = (*(f"stage{k}" for k in range(1, STAGES + 1)), EVERY_BLOCK)

_TEXT = re.compile(r"(?P<name>[\w-]+)\s*(?:\((?P<args>[^()]*)\))?\s*@\s*(?P<place>[\w-]+)")
_TRY = "--attention cbam@stage4"


@dataclass(frozen=True)
class Placed:
    """One text of `--attention`: `name(args)@place`. `args` are complete, `place` is one of `PLACES`."""

    name: str
    args: dict[str, int | float]
    place: str

    def __str__(self) -> str:
        args = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        return f"{self.name}{f'({args})' if args else ''}@{self.place}"

    @property
    def key(self) -> str:
        """The name in the container. It holds module and place, so that weights never meet another module's."""
        return f"{self.name}_{self.place.replace('-', '_')}"


@dataclass(frozen=True)
class Family:
    """Where a family's stages end and what its blocks are.

    Args:
        name: name of the family.
        library: "torchvision", "timm" or "" for ours.
        module: the library's module, without the package.
        branches: class of a block -> the child whose output is the residual branch before the add (the first that
            the block has); none: after the block, which in a family without an add is its repeating unit.
        stages: the modules that end the stages 1 to 4; none: the last block of each of the four smallest map sizes.
        within: start of the names of all blocks.
        only: part of the architecture's name, where a module of the library holds several families.
    """

    name: str
    library: str
    module: str
    branches: Mapping[str, tuple[str, ...]]
    stages: tuple[str, ...] = ()
    within: str = ""
    only: str = ""


def _numbered(pattern: str, first: int = 1, step: int = 1) -> tuple[str, ...]:
    return tuple(pattern.format(first + step * k) for k in range(STAGES))


_RESNET = {"BasicBlock": ("se", "bn2"), "Bottleneck": ("se", "bn3")}
_INVERTED = {
    "DepthwiseSeparableConv": ("bn2",),
    "InvertedResidual": ("bn3",),
    "CondConvResidual": ("bn3",),
    "EdgeResidual": ("bn2",),
}

FAMILIES: tuple[Family, ...] = (
    Family("small-cnn", "", SMALL_CNN, {"ResidualBlock": ("second",)}, _numbered("stages.{}", 0)),
    Family("ResNet and ResNeXt", "torchvision", "resnet", _RESNET, _numbered("layer{}")),
    Family("ResNet and ResNeXt", "timm", "resnet", _RESNET, _numbered("layer{}")),
    Family("RegNet", "torchvision", "regnet", {"ResBottleneckBlock": ("f",)}, _numbered("trunk_output.block{}")),
    Family("RegNet", "timm", "regnet", {"Bottleneck": ("conv3",), "PreBottleneck": ("conv3",)}, _numbered("s{}")),
    Family("DenseNet", "torchvision", "densenet", {"_DenseLayer": ()}, _numbered("features.denseblock{}")),
    Family("DenseNet", "timm", "densenet", {"DenseLayer": ()}, _numbered("features.denseblock{}")),
    Family("EfficientNet", "torchvision", "efficientnet", {"MBConv": ("block",), "FusedMBConv": ("block",)}),
    Family("EfficientNet", "timm", "efficientnet", {**_INVERTED, "ConvBnAct": ("bn1",)}, (), "blocks.", "efficientnet"),
    Family("MobileNetV2", "torchvision", "mobilenetv2", {"InvertedResidual": ("conv",)}),
    Family("MobileNetV2", "timm", "efficientnet", _INVERTED, (), "blocks.", "mobilenetv2"),
    Family("MobileNetV3", "torchvision", "mobilenetv3", {"InvertedResidual": ("block",)}),
    Family("MobileNetV3", "timm", "mobilenetv3", _INVERTED, (), "blocks.", "mobilenetv3"),
    Family("ConvNeXt", "torchvision", "convnext", {"CNBlock": ("block",)}, _numbered("features.{}", 1, 2)),
    Family("ConvNeXt", "timm", "convnext", {"ConvNeXtBlock": ("mlp",)}, _numbered("stages.{}", 0)),
    Family("VGG", "torchvision", "vgg", {"ReLU": ()}, (), "features."),
    Family("VGG", "timm", "vgg", {"ReLU": ()}, (), "features."),
    Family(
        "ShuffleNetV2",
        "torchvision",
        "shufflenetv2",
        {"InvertedResidual": ()},
        ("maxpool", "stage2", "stage3", "stage4"),
    ),
)


def parse_attention(text: str) -> Placed:
    """Read ``NAME@PLACE`` or ``NAME(key=value, ...)@PLACE``.

    Args:
        text: NAME is a key of `attention.MODULES` or of its aliases, in any case; PLACE is one of `PLACES`, or K for
            "stageK".

    Raises:
        ConfigError: C003, not of that form, or a name, place, parameter or value that does not exist.
    """
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        raise _refuse(f"model.attention must be NAME@PLACE or NAME(key=value)@PLACE, got {text!r}")
    asked = found["name"].lower().replace("_", "-")
    name = ALIASES.get(asked, asked)
    if name not in MODULES:
        guess = near(asked, (*MODULES, *ALIASES))
        meant = f", did you mean {ALIASES.get(guess, guess)!r}?" if guess else ""
        raise _refuse(f"unknown attention module {found['name']!r}{meant}", why=f"there are {', '.join(MODULES)}")
    place = found["place"].lower()
    place = f"stage{place}" if place.isdigit() else place
    if place not in PLACES:
        raise _refuse(
            f"unknown place {found['place']!r} of attention module {name}, expected one of {', '.join(PLACES)}",
            try_=f"--attention {name}@{near(place, PLACES) or PLACES[-2]}",
        )
    return Placed(name, _arguments(name, found["args"] or ""), place)


def _arguments(name: str, text: str) -> dict[str, int | float]:
    """All parameters of a module: the given ones, and the defaults of the others."""
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(MODULES[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    arguments = dict(defaults)
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in defaults:
            known = ", ".join(f"{k}={v!r}" for k, v in defaults.items()) or "none"
            guess = near(key, tuple(defaults))
            meant = f", did you mean {guess!r}?" if guess else ""
            raise _refuse(f"attention module {name} has no parameter {key!r}{meant}", why=f"its parameters: {known}")
        kind = type(defaults[key])
        try:
            arguments[key] = kind(value)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise _refuse(f"{key} of attention module {name} must be {wanted}, got {value!r}") from error
    with torch.device("meta"):  # a value out of range is refused here, without a draw from any generator
        _build(name, STAGES, arguments)
    return arguments


def _build(name: str, channels: int, arguments: dict[str, Any]) -> nn.Module:
    try:
        return MODULES[name](channels, **arguments)
    except ValueError as error:
        raise _refuse(f"attention module {name}: {error}") from error


def _refuse(message: str, *, why: str = "", try_: str = _TRY) -> ConfigError:
    return ConfigError("C003", message, why=why, try_=try_)


def resolve_attention(arch: str, texts: Iterable[str]) -> tuple[str, ...]:
    """The texts with every parameter written out, so that a stored model outlives a change of defaults.

    Args:
        arch: a resolved name.
        texts: as `parse_attention` takes them.

    Raises:
        ConfigError: C003, see `parse_attention`; C004, the architecture is of no family of the table, or one module is
            given twice for one place.
    """
    placed = _parse_all(texts)
    if placed:
        family_of(arch)
    return tuple(str(one) for one in placed)


def attention_to_train(
    arch: str, asked: Iterable[str], start: Mapping[str, Any] | None, *, frozen: bool
) -> tuple[str, ...]:
    """The modules of a model that is to be trained, as `resolve_attention` gives them.

    Args:
        arch: a resolved name.
        asked: by the user; none: those of the model that it starts from.
        start: the stored description of that model (`ModelSpec.to_dict`), or None.
        frozen: the backbone, to which the modules belong, will not learn.

    Raises:
        ConfigError: C003 or C004, see `resolve_attention`; C004, new modules would be frozen.
    """
    own = tuple(start.get("attention", ())) if start and start["arch"] == arch else ()
    texts = resolve_attention(arch, tuple(asked) or own)
    fresh = [text for text in texts if text not in own]
    if fresh and frozen:
        raise ConfigError(
            "C004", f"model.freeze backbone would keep {fresh[0]} at its random start", try_="--freeze none"
        )
    return texts


def _parse_all(texts: Iterable[str]) -> list[Placed]:
    placed = [parse_attention(text) for text in texts]
    keys = [one.key for one in placed]
    for one in placed:
        if keys.count(one.key) > 1:
            raise ConfigError("C004", f"attention module {one.name} is given twice for {one.place}", try_=_TRY)
    return placed


def family_of(arch: str) -> Family:
    """The family of a resolved name.

    Raises:
        ConfigError: C004, none of the table.
    """
    library, _, name = arch.rpartition("/")
    module = _module_of(library, name)
    for family in FAMILIES:
        if (family.library, family.module) == (library, module) and family.only in name:
            return family
    raise ConfigError(
        "C004",
        f"{arch} takes no attention modules",
        why=f"there are places for {', '.join(dict.fromkeys(family.name for family in FAMILIES))}",
        try_="--model resnet50 --attention cbam@stage4",
    )


def _module_of(library: str, name: str) -> str:
    if library == "torchvision":
        from torchvision.models import get_model_builder

        return get_model_builder(name).__module__.rpartition(".")[2]
    if library == "timm":
        import timm

        return timm.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]
    return name


def is_attention(key: str) -> bool:
    """Whether a tensor or module of a network belongs to an attention module that was inserted."""
    return key.split(".")[0] == CONTAINER


class Attend:
    """A forward hook that passes a module's output through an attention module.

    Args:
        attention: registered in the network elsewhere; copies of the network get a copy of both.
        channels_last: the output is (N, H, W, C) instead of (N, C, H, W).
    """

    def __init__(self, attention: nn.Module, channels_last: bool) -> None:
        self.attention = attention
        self.channels_last = channels_last

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.channels_last:
            return self.attention(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.attention(output)


def insert_attention(network: nn.Module, spec: ModelSpec) -> None:
    """Put the attention modules of `spec` into its network, freshly drawn from torch's global generator.

    Modules for one place act in the order in which they are given.

    Args:
        network: as `backbones.make_backbone` made it. Its own tensors keep their names and values.

    Raises:
        ConfigError: C003 or C004, see `resolve_attention`; C004, the network has no such stage or no blocks.
    """
    placed = _parse_all(spec.attention)
    if not placed:
        return
    family = family_of(spec.arch)
    blocks = _blocks(network, family)
    known = dict(network.named_modules())
    targets = [*family.stages, *blocks, *(branch for branch, _ in blocks.values())]
    shapes = _output_shapes(network, spec, [name for name in targets if name in known])
    container = nn.ModuleDict()
    for one in placed:
        group = nn.ModuleDict()
        for name, channels_last in _targets(one, family, spec.arch, blocks, shapes):
            channels = shapes[name][3 if channels_last else 1]
            group[name.replace(".", "_")] = module = _build(one.name, channels, one.args)
            known[name].register_forward_hook(Attend(module, channels_last))
        container[one.key] = group
    network.add_module(CONTAINER, container)


def _blocks(network: nn.Module, family: Family) -> dict[str, tuple[str, bool]]:
    """Name of each block, in order of execution -> (module whose output is the branch, is it (N, H, W, C))."""
    found = {}
    for name, block in network.named_modules():
        children = family.branches.get(type(block).__name__)
        if children is None or not name.startswith(family.within):
            continue
        child = next((c for c in children if getattr(block, c, None) is not None), "")
        # timm's ConvNeXt computes its perceptron on (N, H, W, C), before the layer scale
        found[name] = (f"{name}.{child}" if child else name, child == "mlp" and not block.use_conv_mlp)
    return found


def _targets(
    one: Placed, family: Family, arch: str, blocks: dict[str, tuple[str, bool]], shapes: dict[str, torch.Size]
) -> list[tuple[str, bool]]:
    if one.place == EVERY_BLOCK:
        if not blocks:
            raise ConfigError("C004", f"{arch} has no blocks for {one}", try_=f"--attention {one.name}@stage4")
        return list(blocks.values())
    stage = int(one.place.removeprefix("stage"))
    ends = family.stages or _ends_by_size(list(blocks), shapes)
    ends = [name for name in ends if name in shapes]
    if stage > len(ends):
        raise ConfigError("C004", f"{arch} with these arguments has {len(ends)} stages, and {one} needs stage {stage}")
    return [(ends[stage - 1], False)]


def _ends_by_size(blocks: list[str], shapes: dict[str, torch.Size]) -> list[str]:
    """The last block of each of the four smallest map sizes, the largest first."""
    last = {shapes[name][2:]: name for name in blocks}
    return list(last.values())[-STAGES:]


def _output_shapes(network: nn.Module, spec: ModelSpec, names: list[str]) -> dict[str, torch.Size]:
    """The shape of what each module gives for an image of the architecture's own size; nothing is computed."""
    from .backbones import own_image_size

    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: shapes.update({name: output.shape})

    size, training = own_image_size(spec.arch), network.training
    hooks = [network.get_submodule(name).register_forward_hook(note(name)) for name in dict.fromkeys(names)]
    weights = {n: t.to("meta") for n, t in (*network.named_parameters(), *network.named_buffers())}
    try:
        network.eval()
        with torch.no_grad():
            pixels = torch.empty(1, spec.channels, size, size, device="meta")
            torch.func.functional_call(network, weights, (pixels,))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return shapes
