"""What a model is (`ModelSpec`) and how the network inside it is made, for every library alike.

Nothing here knows a family by its name, except for the arguments that one library spells differently.
Questions such as "which tensors are the head?" are answered by building the network a second time with
another number of outputs, without memory for its weights, and comparing shapes.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.errors import ConfigError
from .names import SMALL_CNN

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHANNELS = (1, 3, 4)

# A side of 299 gives the 17x17 map on which Inception v3's auxiliary head ends in exactly one position
# (Szegedy et al. 2016, figure 8); on a smaller one its 5x5 convolution has nothing to stand on.
INCEPTION_AUX_SIDE = 299


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build a model again, except its weights.

    Args:
        arch: a resolved name (`resolve_arch`): "small-cnn", "torchvision/resnet50", "timm/convnext_tiny".
        num_outputs: columns K of the logits.
        channels: channels of the images, 1 (gray), 3 (RGB) or 4 (RGBA).
        mean: per channel, of pixels scaled to 0..1.
        std: per channel, of pixels scaled to 0..1.
        drop_rate: dropout probability; None keeps the architecture's own. It is the library's own
            dropout where the architecture has one, and one on the head's input elsewhere.
        drop_path: stochastic-depth probability of the deepest block; None keeps the architecture's own.
        image_size: side in pixels; needed by architectures that are built for one size; None is their own.
        arch_args: further arguments of the architecture's constructor, plain JSON values.
        attention: modules to insert, as `placement.parse_attention` takes them.

    Raises:
        ConfigError: C003, a number outside its range, or `mean` and `std` without one number per channel.
    """

    arch: str
    _: KW_ONLY
    num_outputs: int
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    drop_rate: float | None = None
    drop_path: float | None = None
    image_size: int | None = None
    arch_args: dict[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        object.__setattr__(self, "attention", tuple(self.attention))
        _require(self.num_outputs >= 1, f"num_outputs must be at least 1, got {self.num_outputs}")
        _require(self.channels in CHANNELS, f"channels must be one of {CHANNELS}, got {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            _require(
                len(values) == self.channels,
                f"{name} must have one number per channel ({self.channels}), got {values}",
            )
        _require(min(self.std) > 0, f"std must be above 0, got {self.std}")
        for name, rate in (("drop_rate", self.drop_rate), ("drop_path", self.drop_path)):
            _require(rate is None or 0 <= rate < 1, f"{name} must be in 0 <= p < 1, got {rate}")
        _require(
            self.image_size is None or self.image_size >= 1, f"image_size must be at least 1, got {self.image_size}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "attention": list(self.attention)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`; keys that an older version did not write have their defaults.

        Raises:
            ConfigError: C001 for an unknown key, C003 as the constructor.
        """
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError("C001", f"unknown keys in a model's description: {', '.join(unknown)}")
        return cls(**values)


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ConfigError("C003", message)


def make_backbone(spec: ModelSpec) -> nn.Module:
    """The network of `spec` without attention modules, with fresh weights from torch's global CPU generator only.

    Returns:
        A module from (N, channels, H, W) normalised floats to (N, num_outputs) logits; torchvision's
        GoogLeNet and Inception v3 return a tuple (logits, auxiliary logits, ...) in training mode.

    Raises:
        ConfigError: C004, the architecture refuses an argument of the spec.
    """
    library, _, name = spec.arch.rpartition("/")
    makers = {"": _make_small_cnn, "torchvision": _make_torchvision, "timm": _make_timm}
    try:
        return makers[library](spec, name)
    except (TypeError, ValueError, AssertionError) as error:
        asked = {"drop_rate": spec.drop_rate, "drop_path": spec.drop_path, "image_size": spec.image_size}
        asked = {k: v for k, v in asked.items() if v is not None} | spec.arch_args
        raise ConfigError("C004", f"{spec.arch} does not accept {asked}: {error}") from error


def resolve_args(arch: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` with the defaults of our own architecture written out, so that a stored model outlives a change of them.

    Arguments of torchvision's and timm's architectures stay as they are: their names fix their shapes.
    """
    if arch != SMALL_CNN:
        return dict(args)
    from .small_cnn import SmallCNN

    parameters = inspect.signature(SmallCNN).parameters
    return {"width": parameters["width"].default, "depths": list(parameters["depths"].default), **args}


def _make_small_cnn(spec: ModelSpec, name: str) -> nn.Module:
    from .small_cnn import SmallCNN

    if spec.drop_path:
        raise ValueError(f"{SMALL_CNN} has no stochastic depth")
    return SmallCNN(spec.num_outputs, spec.channels, drop_rate=spec.drop_rate or 0.0, **spec.arch_args)


def _make_timm(spec: ModelSpec, name: str) -> nn.Module:
    import timm

    size, cfg = spec.image_size, timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.fixed_input_size or size == cfg.input_size[-1]:
        size = None  # Convolutional networks take any size and know no such argument.
    path = spec.drop_path or None  # families without stochastic depth do not know the argument, not even as 0
    options = {"drop_rate": spec.drop_rate, "drop_path_rate": path, "img_size": size}
    arguments: dict[str, Any] = {k: v for k, v in options.items() if v is not None} | spec.arch_args
    network = timm.create_model(name, num_classes=spec.num_outputs, in_chans=spec.channels, **arguments)
    if spec.drop_path == 0:
        for module in network.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0
    return network


def _make_torchvision(spec: ModelSpec, name: str) -> nn.Module:
    from torchvision import models

    size = spec.image_size
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if name == "inception_v3":
        options["aux_logits"] = size is None or size >= INCEPTION_AUX_SIDE
    if size is not None and name.startswith("vit_"):
        options["image_size"] = size
    if size is not None and name.startswith("maxvit"):
        options["input_size"] = (size, size)
    network = models.get_model(name, weights=None, num_classes=spec.num_outputs, **options | spec.arch_args)
    if spec.channels != 3:
        _replace_first_conv(network, spec.channels)
    if spec.drop_rate is not None:
        _set_dropout(network, spec)
    if spec.drop_path is not None:
        _set_stochastic_depth(network, spec.drop_path)
    return network


def _replace_first_conv(network: nn.Module, channels: int) -> None:
    """Another number of input channels; the scale keeps the variance that the family's own draw gives."""
    name, old = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        new.weight.normal_().mul_(old.weight.std() * math.sqrt(old.in_channels / channels))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    network.set_submodule(name, new)


class HeadDropout:
    """A forward pre-hook that drops the head's inputs, for architectures without a dropout of their own."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (nn.functional.dropout(inputs[0], self.rate, module.training), *inputs[1:])


def _set_dropout(network: nn.Module, spec: ModelSpec) -> None:
    rate = spec.drop_rate or 0.0
    own = [m for name, m in network.named_modules() if isinstance(m, nn.Dropout) and not is_auxiliary(name)]
    for module in own:
        module.p = rate
    if not own and rate:
        for name in head_modules(head_keys(replace(spec, drop_rate=None, drop_path=None), network)):
            network.get_submodule(name).register_forward_pre_hook(HeadDropout(rate))


def _set_stochastic_depth(network: nn.Module, rate: float) -> None:
    from torchvision.ops import StochasticDepth

    blocks = [m for m in network.modules() if isinstance(m, StochasticDepth)]
    deepest = max((m.p for m in blocks), default=0.0)
    if rate and not deepest:
        raise ValueError("this architecture has no stochastic depth")
    for module in blocks:
        module.p *= rate / deepest if deepest else 0.0


class _WeightlessMode(TorchFunctionMode):
    """Inside, `torch.empty` gives tensors without memory.

    All layers make their weights with it. Tables and rates that constructors compute and read back
    (RegNet's widths) stay real, which is why `torch.device("meta")` does not do.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def weightless(spec: ModelSpec) -> nn.Module:
    """The network of `spec` on the meta device: shapes without memory, no draw from any generator."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _WeightlessMode():
                network = make_backbone(spec)
        except RuntimeError:  # A constructor that mixes weights with tables of its own (timm's ViTamin).
            with torch.device("meta"):
                network = make_backbone(spec)
        return network.to("meta")


def _differing(network: nn.Module, twin: nn.Module) -> frozenset[str]:
    shapes = {key: value.shape for key, value in twin.state_dict().items()}
    own = network.state_dict()
    return frozenset(key for key in own.keys() & shapes.keys() if own[key].shape != shapes[key])


def head_keys(spec: ModelSpec, network: nn.Module) -> frozenset[str]:
    """The tensors of `network` whose shape depends on the number of outputs, auxiliary heads included."""
    return _differing(network, weightless(replace(spec, num_outputs=spec.num_outputs + 1)))


def input_keys(spec: ModelSpec, network: nn.Module) -> frozenset[str]:
    """The tensors of `network` whose shape depends on the number of image channels."""
    other = 1 if spec.channels == 3 else 3
    return _differing(network, weightless(replace(spec, channels=other, mean=(0.5,) * other, std=(0.5,) * other)))


def head_modules(keys: Iterable[str]) -> list[str]:
    """Names of the modules that own the head's weight matrices, without auxiliary heads of torchvision."""
    names = {key.rpartition(".")[0] for key in keys if key.endswith(".weight")}
    return sorted(n for n in names if not is_auxiliary(n))


def is_auxiliary(key: str) -> bool:
    """Whether a tensor or module belongs to an auxiliary classifier of GoogLeNet or Inception v3."""
    return key.split(".")[0] in ("aux1", "aux2", "AuxLogits")


def own_image_size(arch: str) -> int:
    """The side in pixels for which an architecture was designed; 224 where the library has no entry."""
    library, _, name = arch.rpartition("/")
    if library == "torchvision":
        return INCEPTION_AUX_SIDE if name == "inception_v3" else 224
    if library == "timm":
        import timm

        cfg = timm.models.get_pretrained_cfg(name)
        return int(cfg.input_size[-1]) if cfg is not None else 224
    return 224


def check_image_size(spec: ModelSpec) -> None:
    """Refuse an image size that the architecture cannot take, before any work is done.

    Raises:
        ConfigError: C004, with the sentence of the library.
    """
    if spec.image_size is None:
        return
    network = weightless(spec).eval()
    pixels = torch.empty(2, spec.channels, spec.image_size, spec.image_size, device="meta")
    try:
        with torch.no_grad():
            network(pixels)
    except NotImplementedError:
        return  # an operator without a shape rule: only the real network shows it
    except (RuntimeError, ValueError, AssertionError) as error:
        size, own = spec.image_size, own_image_size(spec.arch)
        raise ConfigError(
            "C004",
            f"{spec.arch} cannot take images of {size} x {size} pixels: {str(error).splitlines()[0]}",
            try_=f"an image size of {own}",
        ) from error
