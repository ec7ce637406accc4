"""Every "auto" becomes a number here, once, before work starts; each with the reason that the console shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.config import RunConfig
from ..core.errors import ConfigError, HardwareError, ModelError
from ..core.manifest import Manifest
from ..core.pixels import CHANNELS, Pixels
from ..core.settings import replace_settings
from ..data.augment import Augment
from .recipes import POLICIES, RECIPES, Recipe

if TYPE_CHECKING:
    from ..models.build import Classifier

# tried in this order when the user names no model: published weights that already lie on this machine
_AT_HAND = {
    "cpu": (
        "torchvision/mobilenet_v3_large",
        "torchvision/resnet18",
        "torchvision/resnet50",
        "timm/mobilenetv3_large_100",
    ),
    "cuda": ("torchvision/convnext_tiny", "torchvision/resnet50", "timm/convnext_tiny"),
}
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_FEW_TO_JUDGE = (
    1000  # below it the best of many epochs by accuracy is mostly the luckiest: one standard error is 0.01 or more
)
_PILLOW_SHARE = 0.05  # above it DALI would wait for Pillow


@dataclass(frozen=True)
class Machine:
    """What the plan may count on; made by `look_at_machine`, or by a test."""

    cpus: int = 2
    gpu: str | None = None  # name of the GPU, None without one
    bf16: bool = False  # the GPU multiplies bf16 in hardware
    dali: bool = False


def look_at_machine() -> Machine:
    """Ask the system and torch, without starting CUDA where there is no GPU."""
    import torch

    from ..core.env import usable_cpus
    from ..data.loader import dali_missing

    cuda = torch.cuda.is_available()
    return Machine(
        cpus=usable_cpus(),
        gpu=torch.cuda.get_device_name() if cuda else None,
        bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        dali=dali_missing() is None,
    )


@dataclass(frozen=True)
class Start:
    """Where the weights begin.

    Args:
        kind: scratch, pretrained (published weights of the architecture) or file.
        path: of the weights; None from scratch.
        download: the user asked for published weights, which may be fetched.
        spec: the architecture of a bundle that is the start, as its `arch` says.
        pixels: of that bundle.
    """

    kind: str
    path: Path | None = None
    download: bool = False
    spec: dict[str, Any] | None = None
    pixels: Pixels | None = None


@dataclass
class _Notes:
    """Collects decisions: dotted setting -> value, with the reason."""

    config: RunConfig
    changes: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def value(self, name: str) -> Any:
        if name in self.changes:
            return self.changes[name]
        section, _, key = name.partition(".")
        return getattr(getattr(self.config, section), key)

    def decide(self, name: str, value: Any, reason: str) -> Any:
        """Replace "auto" by `value`; what the user set stays, and is shown as such."""
        asked = self.value(name)
        if asked != "auto":
            self.rows.append((name, _text(asked), "as asked"))
            return asked
        self.changes[name] = value
        self.rows.append((name, _text(value), reason))
        return value


@dataclass(frozen=True)
class Plan:
    """A run without "auto".

    Args:
        config: resolved configuration.
        rows: (setting, value, reason) of every decision.
        pixels, augment: resolved nouns.
        spec: the architecture, as `ModelSpec.to_dict()`.
        start: where its weights come from.
    """

    config: RunConfig
    rows: tuple[tuple[str, str, str], ...]
    pixels: Pixels
    augment: Augment
    spec: dict[str, Any]
    start: Start


def starting_model(spec: dict[str, Any], start: Start) -> Classifier:
    """The model of a plan as it is before the first step, on the CPU.

    Args:
        spec: `Plan.spec`.
        start: `Plan.start`, or `Start("scratch")` when a checkpoint will fill the weights.

    Raises:
        ModelError: as `models.build.build_model`.
    """
    from ..models.build import ModelSpec, build_model

    return build_model(
        ModelSpec.from_dict(spec),
        weights=start.path if start.kind == "file" else None,
        pretrained=start.kind == "pretrained",
        allow_download=start.download,
    )


def make_plan(config: RunConfig, manifest: Manifest, machine: Machine) -> Plan:
    """Resolve a configuration for this data on this machine.

    Raises:
        ConfigError: C003 or C004 for settings that contradict each other or the data.
        HardwareError: H001 when a GPU is asked for and there is none.
        ModelError: M001, M003, M004 for a model or weights that cannot be used.
    """
    notes = _Notes(config)
    device = _device(notes, machine)
    arch, start = _model(notes, device)
    _attention(notes, arch, start)
    recipe = RECIPES["finetune" if start.kind != "scratch" else "small-cnn" if arch == "small-cnn" else "scratch"]
    pixels = _pixels(notes, manifest, arch, start, recipe)
    augment = _augment(notes, recipe, pixels)
    _lengths(notes, manifest, recipe, device)
    _optimizer(notes, recipe)
    _class_weights(notes, manifest)
    _speed(notes, manifest, machine, device)
    spec = _spec(notes, manifest, arch, start, pixels, recipe)
    resolved = replace_settings(config, notes.changes)
    return Plan(resolved, tuple(notes.rows), pixels, augment, spec, start)


def _device(notes: _Notes, machine: Machine) -> str:
    if notes.config.train.device == "cuda" and machine.gpu is None:
        raise HardwareError("H001", "train.device is cuda, and no usable GPU was found", try_="imgcls-fast doctor")
    reason = f"{machine.gpu}" if machine.gpu else f"no GPU found; {machine.cpus} CPU cores"
    return str(notes.decide("train.device", "cuda" if machine.gpu else "cpu", reason))


def _model(notes: _Notes, device: str) -> tuple[str, Start]:
    from ..models.build import resolve_arch

    start = _start(notes.config.model.init)
    asked = notes.config.model.arch
    if asked != "auto":
        arch = resolve_arch(asked)
        notes.changes["model.arch"] = arch
        notes.rows.append(("model.arch", arch, "as asked"))
    elif start is not None and start.spec is not None:
        arch = notes.decide("model.arch", start.spec["arch"], "the architecture of the starting weights")
    elif start is not None and start.kind == "file":
        raise ConfigError(
            "C004",
            f"model.init is the weights file {start.path}, which does not say its architecture",
            try_="--model resnet50 --init FILE",
        )
    else:
        arch = _arch_at_hand(notes, device, start)
    if start is None:
        start = _auto_start(notes, arch)
    elif start.kind == "pretrained":
        start = _published(arch)
    if notes.config.model.init == "auto":
        notes.changes["model.init"] = start.kind
    notes.rows.append(
        ("model.init", start.kind if start.path is None else f"{start.kind} {start.path.name}", _start_reason(start))
    )
    return arch, start


def _start(init: str) -> Start | None:
    """What `model.init` names, or None for "auto"."""
    if init == "auto":
        return None
    if init == "scratch":
        return Start("scratch")
    if init == "pretrained":
        return Start("pretrained", download=True)
    path = Path(init)
    if path.is_file():
        return Start("file", path)
    if path.suffix in _WEIGHT_SUFFIXES:
        raise ModelError("M003", f"no such weights file: {path}", try_="--init pretrained   (or scratch, or a run)")
    from ..core.bundle import read_bundle
    from ..core.run import find_run

    folder = path if (path / "bundle.json").is_file() else find_run(init).bundle_path
    bundle = read_bundle(folder)
    return Start("file", bundle.weights, spec=bundle.arch, pixels=bundle.pixels)


def _arch_at_hand(notes: _Notes, device: str, start: Start | None) -> str:
    from ..models.build import pretrained_available

    if start is None or start.kind == "pretrained":
        for arch in _AT_HAND[device]:
            if pretrained_available(arch) is not None:
                return str(notes.decide("model.arch", arch, "its published weights are on this machine"))
    if start is not None and start.kind == "pretrained":
        return str(notes.decide("model.arch", _AT_HAND[device][0], f"a good first choice on {device}"))
    if device == "cpu":
        return str(notes.decide("model.arch", "small-cnn", "no published weights on this machine, and no GPU"))
    return str(notes.decide("model.arch", "torchvision/resnet50", "no published weights on this machine"))


def _auto_start(notes: _Notes, arch: str) -> Start:
    from ..models.build import pretrained_available

    path = None if arch == "small-cnn" else pretrained_available(arch)
    return Start("scratch") if path is None else Start("pretrained", path)


def _published(arch: str) -> Start:
    from ..models.build import pretrained_available

    return Start("pretrained", pretrained_available(arch), download=True)


def _start_reason(start: Start) -> str:
    if start.kind == "scratch":
        return "random weights (published ones: --init pretrained)"
    return "as asked" if start.download or start.kind == "file" else "published weights found on this machine"


def _pixels(notes: _Notes, manifest: Manifest, arch: str, start: Start, recipe: Recipe) -> Pixels:
    from ..models.build import pretrained_pixels

    own = start.pixels.to_dict() if start.pixels else pretrained_pixels(arch)
    if start.kind == "scratch":
        size, reason = _scratch_size(manifest, recipe, own["size"])
    else:
        size, reason = own["size"], "the size that the starting weights were trained at"
    size = notes.decide("pixels.size", size, reason)
    crop_pct = own["crop_pct"] if start.kind != "scratch" else recipe.crop_pct
    crop_pct = notes.decide(
        "pixels.crop_pct", round(crop_pct, 4), "with the starting weights" if start.kind != "scratch" else "recipe"
    )
    filter_ = own["interpolation"] if own["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    interpolation = notes.decide(
        "pixels.interpolation", filter_ if start.kind != "scratch" else "bilinear", "antialiased"
    )
    color = notes.config.pixels.color
    mean, std = _normalisation(notes, manifest, own, CHANNELS[color])
    return Pixels(
        size, crop_pct, interpolation, color, notes.config.pixels.exif, mean, std, notes.config.data.max_megapixels
    )


def _scratch_size(manifest: Manifest, recipe: Recipe, usual: int) -> tuple[int, str]:
    """Large enough for what the images show: never far above their own size."""
    short = float(np.median(np.minimum(manifest.width, manifest.height)))
    if short >= 1.25 * recipe.size:
        return recipe.size, f"recipe; the median image has a short side of {short:.0f}"
    size = int(min(recipe.size, max(32, 16 * math.ceil(short / 16))))
    return size, f"the median image has a short side of {short:.0f}"


def _normalisation(
    notes: _Notes, manifest: Manifest, own: dict[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    out = []
    measured: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    for index, name in enumerate(("mean", "std")):
        asked = getattr(notes.config.pixels, name)
        if asked == "data":
            from ..data.prepare import channel_statistics

            measured = measured or channel_statistics(
                manifest, notes.config.pixels.color, notes.config.data.max_megapixels
            )
            values, reason = measured[index], "measured on training images"
        elif asked == "auto":
            values, reason = _as_channels(own[name], channels), "of the weights, else ImageNet's"
        else:
            values, reason = tuple(asked), "as asked"
        if len(values) != channels:
            raise ConfigError(
                "C004", f"pixels.{name} has {len(values)} numbers, and pixels.color {notes.config.pixels.color} has {channels} channels",
                try_=f"--{name} {','.join(['0.5'] * channels)}",
            )  # fmt: skip
        notes.changes[f"pixels.{name}"] = list(values)
        notes.rows.append((f"pixels.{name}", _text([round(v, 3) for v in values]), reason))
        out.append(tuple(float(v) for v in values))
    return out[0], out[1]


def _as_channels(values: Any, channels: int) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    if len(values) == channels:
        return values
    middle = sum(values[:3]) / len(values[:3])
    return (middle,) * channels if channels == 1 else (*values, middle)


def _augment(notes: _Notes, recipe: Recipe, pixels: Pixels) -> Augment:
    asked = notes.config.augment.policy
    if notes.config.data.source is None:
        policy = notes.decide("augment.policy", "light", "a mirrored digit is another sign")
    else:
        policy = notes.decide("augment.policy", recipe.augment, "recipe")
    strengths = POLICIES[policy]
    values: dict[str, Any] = {}
    for name, value in strengths.items():
        if pixels.color == "gray" and name in ("saturation", "hue"):
            value = 0.0
        before = len(notes.rows)
        values[name] = notes.decide(f"augment.{name}", value, f"policy {policy}")
        if notes.rows[before][2] != "as asked" and asked != "auto":
            notes.rows[before] = (*notes.rows[before][:2], f"policy {policy}")
    return Augment.from_dict(values)


def _lengths(notes: _Notes, manifest: Manifest, recipe: Recipe, device: str) -> None:
    n = len(manifest.rows("train"))
    train = notes.config.train
    fitting = min(recipe.batch[device], max(1, n // 8))
    batch = notes.decide("train.batch_size", fitting, f"recipe; {n:,} training images")
    if batch > n:
        notes.changes["train.batch_size"] = batch = n
        notes.rows[-1] = (
            "train.batch_size",
            str(n),
            f"lowered from {train.batch_size}: there are {n:,} training images",
        )
    wanted = recipe.images if notes.config.data.source is not None else recipe.images // 2  # digits are easy
    epochs = int(np.clip(round(wanted / max(n, 1)), *recipe.epochs))
    notes.decide("train.epochs", epochs, f"about {epochs * n:,} images seen")
    micro = math.ceil(batch / train.accum) if train.accum else batch
    notes.decide(
        "train.micro_batch", micro, f"{train.accum} forward passes a step" if train.accum else "the whole batch at once"
    )
    if notes.value("train.micro_batch") > batch:
        notes.changes["train.micro_batch"] = batch
        notes.rows[-1] = ("train.micro_batch", str(batch), f"lowered from {train.micro_batch}: no more than a batch")
    notes.changes["train.accum"] = None
    judged = len(manifest.rows("val"))
    few = judged < _FEW_TO_JUDGE
    notes.decide(
        "train.monitor",
        "val/loss" if few else "val/accuracy",
        f"{judged:,} validation images: "
        + ("their accuracy changes by chance from epoch to epoch" if few else "enough for accuracy"),
    )
    notes.decide("evaluate.batch_size", min(256, max(batch, 32)), "memory")


def _optimizer(notes: _Notes, recipe: Recipe) -> None:
    opt = notes.decide("optim.opt", recipe.opt, "recipe")
    batch = notes.value("train.batch_size")
    base_lr, base_batch = recipe.lr[opt]
    # linear for SGD (Goyal et al. 2017), square root for adaptive methods (Malladi et al. 2022)
    scale = (batch / base_batch) if opt == "sgd" else math.sqrt(batch / base_batch)
    notes.decide("optim.lr", float(f"{base_lr * scale:.3g}"), f"{base_lr:g} at batch {base_batch}, scaled to {batch}")
    notes.decide("optim.weight_decay", recipe.weight_decay[opt], "recipe")
    notes.decide("optim.sched", recipe.sched, "recipe")
    epochs = notes.value("train.epochs")
    notes.decide("optim.warmup", round(min(recipe.warmup, 0.15 * epochs), 2), "epochs; at most 15 % of the run")
    notes.decide("loss.label_smoothing", recipe.smoothing, "recipe")
    notes.decide("optim.ema", recipe.ema, "recipe")


def _class_weights(notes: _Notes, manifest: Manifest) -> None:
    from .objectives import class_weights

    asked = notes.config.loss.class_weights
    if asked == "none":
        return
    weights = class_weights(
        notes.config.loss, manifest.labels.classes, manifest.counts("train")
    )  # refuses here, not in the run
    if not isinstance(asked, str):
        notes.rows.append(("loss.class_weights", str(asked), "as asked"))
        return
    assert weights is not None
    values = [float(f"{w:.6g}") for w in weights]
    notes.changes["loss.class_weights"] = values
    reason = {"auto": "inverse frequency", "effective": "effective number of images"}[asked]
    notes.rows.append(("loss.class_weights", _text(values), f"{reason}; mean 1 over the training images"))


def _speed(notes: _Notes, manifest: Manifest, machine: Machine, device: str) -> None:
    asked = notes.config.train.precision
    if device == "cuda":
        precision, reason = (
            ("bf16", "the GPU has bf16") if machine.bf16 else ("fp16", "the GPU has no bf16; losses are scaled")
        )
    else:
        precision, reason = "fp32", "CPU"
    if asked == "fp16" and device == "cpu":
        raise ConfigError("C004", "train.precision fp16 needs a GPU", try_="--precision bf16   (or fp32)")
    notes.decide("train.precision", precision, reason)
    notes.decide(
        "train.compile",
        device == "cuda",
        "on for a GPU" if device == "cuda" else "off: compiling costs more than a short CPU run",
    )
    notes.decide("train.threads", machine.cpus, "all usable cores")
    kernels = ("off", "ours are not measured on a GPU yet") if device == "cuda" else ("proven", "where measured faster")
    notes.decide("model.kernels", *kernels)
    loader = notes.decide("train.loader", *_loader(manifest, machine, device, notes.config.pixels.color))
    if loader == "dali-gpu" and device != "cuda":
        raise ConfigError("C004", "train.loader dali-gpu needs train.device cuda", try_="--loader dali-cpu")
    workers = min(16, max(1, machine.cpus - 1)) if device == "cuda" else min(4, machine.cpus)
    notes.decide("train.workers", workers, "decoding " + ("processes" if loader == "torch" else "threads"))


def _loader(manifest: Manifest, machine: Machine, device: str, color: str) -> tuple[str, str]:
    from ..core.manifest import FLAG_PILLOW

    odd = float(((manifest.flags & FLAG_PILLOW) != 0).mean()) if len(manifest) else 0.0
    if not machine.dali:
        return "torch", "DALI is not installed"
    if color == "rgba":
        return "torch", "DALI has no RGBA"
    if odd > _PILLOW_SHARE:
        return "torch", f"{odd:.0%} of the images are of kinds that only Pillow decodes"
    return ("dali-gpu", "JPEG decoding on the GPU") if device == "cuda" else ("dali-cpu", "half of Pillow's CPU time")


def _spec(notes: _Notes, manifest: Manifest, arch: str, start: Start, pixels: Pixels, recipe: Recipe) -> dict[str, Any]:
    from ..models.build import ModelSpec, resolve_args

    model = notes.config.model
    notes.decide("model.drop_rate", recipe.drop_rate, "recipe")
    own_args = start.spec["arch_args"] if start.spec and start.spec["arch"] == arch else {}
    args = model.args or own_args
    if args != model.args:
        notes.changes["model.args"] = dict(args)
    drop = notes.value("model.drop_rate")
    return ModelSpec(
        arch,
        num_outputs=manifest.labels.size,
        channels=pixels.channels,
        mean=pixels.mean,
        std=pixels.std,
        drop_rate=drop or None,
        drop_path=model.drop_path or None,
        image_size=pixels.size,
        arch_args=resolve_args(arch, args),  # defaults too: a bundle outlives a change of them
        attention=tuple(notes.value("model.attention")),
    ).to_dict()


def _attention(notes: _Notes, arch: str, start: Start) -> None:
    from ..models.build import attention_to_train

    model = notes.config.model
    texts = attention_to_train(arch, model.attention, start.spec, frozen=model.freeze == "backbone")
    if texts:
        reason = "as asked" if model.attention else "of the starting weights"
        notes.changes["model.attention"] = list(texts)
        notes.rows.append(("model.attention", _text(texts), reason))


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
