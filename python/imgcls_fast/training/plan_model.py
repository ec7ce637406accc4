"""Choose the network that a run trains, and the weights that it begins with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.bundle import bundle_around, read_bundle
from ..core.errors import ConfigError, ModelError
from ..core.labels import LabelSpace
from ..core.manifest import Manifest
from ..core.other_names import value_meant
from ..core.pixels import CHANNELS, Pixels
from ..core.settings import replace_settings
from ..core.text import some
from .defaults import Machine, Notes, Recipe, text

if TYPE_CHECKING:
    from ..models.build import Classifier
    from ..models.outline import Outline

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
_PUBLISHED_OUTPUTS = 1000  # ImageNet's classes


@dataclass(frozen=True)
class Start:
    """Names the weights that a run begins with.

    Args:
        kind: scratch, pretrained (published weights of the architecture) or file.
        path: the weights file; None from scratch.
        download: the user asked for published weights, which may be fetched.
        spec: `arch` of the bundle that is the start.
        pixels, labels: those of that bundle.
        parent: the run of that bundle: run (its name), directory, weights (their SHA-256).
        passed_over: why published weights that lie here are not taken.
        recorded: how plan.json names this start; empty for a new run.
    """

    kind: str
    path: Path | None = None
    download: bool = False
    spec: dict[str, Any] | None = None
    pixels: Pixels | None = None
    labels: LabelSpace | None = None
    parent: dict[str, Any] | None = None
    passed_over: str = ""
    recorded: str = field(default="", compare=False)

    def __str__(self) -> str:
        if self.recorded:
            return self.recorded
        if self.parent:
            return f"the weights of run {self.parent['run']}"
        return self.kind if self.path is None else f"{self.kind} {self.path.name}"


def starting_model(spec: dict[str, Any], start: Start, labels: LabelSpace) -> Classifier:
    """Build the model of a plan as it is before the first step, on the CPU.

    The head of a bundle goes by the names of its classes. They are read again from beside the weights, because a resumed
    run knows their path alone.

    Args:
        spec: `Plan.spec`.
        start: `Plan.start`, or `Start("scratch")` when a checkpoint will fill the weights.
        labels: those of the model.

    Raises:
        ModelError: as `models.build.build_model`.
    """
    from ..models.build import ModelSpec, build_model, matching_classes

    folder = bundle_around(start.path) if start.kind == "file" and start.path else None
    theirs = read_bundle(folder, verify=False).labels.classes if folder else None
    return build_model(
        ModelSpec.from_dict(spec),
        weights=start.path if start.kind == "file" else None,
        pretrained=start.kind == "pretrained",
        allow_download=start.download,
        head_rows=None if theirs is None else matching_classes(labels.classes, theirs),
    )


def choose_model(notes: Notes, device: str, labels: LabelSpace) -> tuple[str, Start]:
    """Choose the architecture and the starting weights."""
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
        start = _auto_start(arch)
    elif start.kind == "pretrained":
        start = _published(arch)
    if notes.config.model.init == "auto":
        notes.changes["model.init"] = start.kind
    notes.rows.append(
        (
            "model.init",
            str(start),
            _start_reason(start, labels),
        )
    )
    return arch, start


def _start(init: str) -> Start | None:
    """Return what `model.init` names, or None for "auto"."""
    if init == "auto":
        return None
    if init == "scratch":
        return Start("scratch")
    if init == "pretrained":
        return Start("pretrained", download=True)
    from ..models.weights import is_weights_name, split_part

    path = Path(init)
    whole, _ = split_part(path)  # FILE#KEY
    if os.path.isfile(whole) and bundle_around(whole) is None:
        return Start("file", path)
    if is_weights_name(whole) and not os.path.isfile(whole):
        raise ModelError("M003", f"no such weights file: {path}", try_="--init pretrained   (or scratch, or a run)")
    if value_meant(init, ("pretrained", "scratch")) and not os.path.exists(path):
        raise ConfigError(
            "C003",
            f"model.init {init!r} is neither auto, scratch or pretrained, nor a weights file, bundle or run",
            try_=f"--init {value_meant(init, ('pretrained', 'scratch'))}",
        )
    from ..core.runs import find_run

    folder = bundle_around(path) or (path if os.path.isfile(path / "bundle.json") else find_run(init).bundle_path)
    bundle = read_bundle(folder)
    parent = {
        "run": str(bundle.provenance.get("run") or folder.resolve().parent.name),
        "directory": str(folder.resolve().parent if folder.name == "bundle" else folder.resolve()),
        "epoch": bundle.provenance.get("epoch"),
        "weights": bundle.digests.get(bundle.weights.name),
    }
    return Start("file", bundle.weights, spec=bundle.arch, pixels=bundle.pixels, labels=bundle.labels, parent=parent)


def _arch_at_hand(notes: Notes, device: str, start: Start | None) -> str:
    if start is None or start.kind == "pretrained":
        for arch in _AT_HAND[device]:
            if _at_hand(arch)[0] is not None:
                return str(notes.decide("model.arch", arch, "its published weights are on this machine"))
    if start is not None and start.kind == "pretrained":
        return str(notes.decide("model.arch", _AT_HAND[device][0], f"a good first choice on {device}"))
    if device == "cpu":
        return str(notes.decide("model.arch", "small-cnn", "no published weights on this machine, and no GPU"))
    return str(notes.decide("model.arch", "torchvision/resnet50", "no published weights on this machine"))


def _auto_start(arch: str) -> Start:
    path, damage = _at_hand(arch)
    return Start("scratch", passed_over=damage) if path is None else Start("pretrained", path)


def _at_hand(arch: str) -> tuple[Path | None, str]:
    """Find published weights that are here and whole; else return None and why those that are here are passed over, with a warning."""
    from ..models.build import published_weights

    found = published_weights(arch)
    if not found.damage:
        return found.path, ""
    warnings.warn(f"{found.path} is damaged and was passed over: {found.damage}; delete it", stacklevel=2)
    return None, f"{found.path.name if found.path else arch} is damaged: {found.damage}"


def _published(arch: str) -> Start:
    from ..models.build import published_weights

    found = published_weights(arch)
    if found.damage:
        raise found.damaged_error()
    return Start("pretrained", found.path, download=True)


def _start_reason(start: Start, labels: LabelSpace) -> str:
    if start.kind == "scratch":
        return f"random weights ({start.passed_over or 'published ones: --init pretrained'})"
    if start.kind == "file":
        return f"as asked; {_head_reason(start, labels)}"
    reason = "as asked" if start.download else "published weights found on this machine"
    return reason + ("; a head of 1,000 outputs is taken in its order" if labels.size == _PUBLISHED_OUTPUTS else "")


def _head_reason(start: Start, labels: LabelSpace) -> str:
    """Explain what becomes of the head of a weights file."""
    if start.labels is None:
        return f"the file names no classes: a head of {labels.size} outputs is taken as it is"
    both = [name for name in labels.classes if name in start.labels.classes]
    if len(both) == labels.size:
        same = start.labels.classes == labels.classes
        return "the head with it" if same else f"the head by name, for all {labels.size} classes"
    new = [name for name in labels.classes if name not in both]
    kept = f"the head keeps {len(both)} of {labels.size} classes" if both else "its head has none of these classes"
    return f"{kept}; begun anew: {some(new)}"


def outline_model(notes: Notes, manifest: Manifest, arch: str, start: Start) -> Outline:
    """Return what is known of the network before its weights are made."""
    from ..models.build import ModelSpec, outline_of

    color = notes.config.pixels.color
    theirs = start.pixels.color if start.pixels else "rgb"
    channels = CHANNELS[theirs if color == "auto" else color]
    middle = (0.5,) * channels
    spec = ModelSpec(
        arch,
        num_outputs=manifest.labels.size,
        channels=channels,
        mean=middle,
        std=middle,
        arch_args=_arch_args(notes, arch, start),
        attention=tuple(notes.value("model.attention")),
    )
    return outline_of(spec)


def _arch_args(notes: Notes, arch: str, start: Start) -> dict[str, Any]:
    own = start.spec["arch_args"] if start.spec and start.spec["arch"] == arch else {}
    args = notes.config.model.args or own
    if args != notes.config.model.args:
        notes.changes["model.args"] = dict(args)
    return dict(args)


def choose_recipe(arch: str, start: Start, outline: Outline) -> str:
    """Return the key of `RECIPES`."""
    if start.kind != "scratch":
        return "finetune"
    if arch == "small-cnn":
        return arch
    return "scratch-adamw" if outline.token_like else "scratch"


def images_needed(notes: Notes, outline: Outline) -> int:
    """Return the fewest images of a forward pass in training: 2 where statistics are taken over them."""
    return 2 if outline.batch_norm and notes.config.model.freeze != "backbone" else 1


def describe_model(
    notes: Notes, manifest: Manifest, arch: str, start: Start, pixels: Pixels, recipe: Recipe, outline: Outline
) -> dict[str, Any]:
    """Return the `ModelSpec.to_dict()` of a plan."""
    from ..models.build import ModelSpec, resolve_args

    if recipe.drop_rate is None:
        rate = notes.decide("model.drop_rate", outline.drop_rate, "the architecture's own")
    else:
        rate = notes.decide("model.drop_rate", recipe.drop_rate, "recipe")
    path = notes.decide("model.drop_path", outline.drop_path, "the architecture's own")
    return ModelSpec(
        arch,
        num_outputs=manifest.labels.size,
        channels=pixels.channels,
        mean=pixels.mean,
        std=pixels.std,
        drop_rate=rate,
        drop_path=path,
        image_size=pixels.size,
        arch_args=resolve_args(
            arch, _arch_args(notes, arch, start)
        ),  # defaults too: a bundle outlives a change of them
        attention=tuple(notes.value("model.attention")),
    ).to_dict()


def choose_memory_format(
    notes: Notes, machine: Machine, device: str, spec: dict[str, Any], outline: Outline, notice: Callable[[str], None]
) -> None:
    """Choose channels-last on a GPU, on a CPU what is faster, and never what crashes."""
    name, broken = "train.memory_format", outline.breaks_channels_last
    if device != "cpu":
        notes.decide(name, "channels-last", "the order in which tensor cores read")
    elif broken:
        if notes.config.train.memory_format == "channels-last":
            raise ConfigError(
                "C004",
                f"train.memory_format channels-last cannot train {spec['arch']} on a CPU",
                why=f"the backward pass of its layer {broken} (1x1, with a stride, few channels) overwrites memory",
                try_="--set train.memory_format=contiguous",
            )
        notes.decide(name, "contiguous", f"channels-last overwrites memory in {broken} on a CPU")
    elif spec["attention"]:
        notes.decide(name, "channels-last", "what our attention kernels read")
    elif spec["arch"] == "small-cnn":
        notes.decide(name, "channels-last", "0.8 of the other's time, as measured")
    elif not outline.convolves:
        notes.decide(name, "channels-last", "usual; without convolutions the order makes no difference")
    elif notes.config.train.memory_format != "auto" or not machine.measures:
        notes.decide(name, "channels-last", "usual; not measured")
    else:
        from .layout import faster_format

        resolved = replace_settings(notes.config, notes.changes)
        notes.decide(name, *faster_format(spec, resolved, int(notes.value("train.micro_batch")), notice))


def choose_attention(notes: Notes, arch: str, start: Start) -> None:
    """Choose the attention modules of the settings, else of the starting weights."""
    from ..models.build import attention_to_train

    model = notes.config.model
    texts = attention_to_train(arch, model.attention, start.spec, frozen=model.freeze == "backbone")
    if texts:
        reason = "as asked" if model.attention else "of the starting weights"
        notes.changes["model.attention"] = list(texts)
        notes.rows.append(("model.attention", text(texts), reason))
