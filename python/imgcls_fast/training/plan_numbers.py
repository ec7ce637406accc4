"""Chooses the numbers of a run: pixels, augmentation, lengths, rates and speed, each with its reason."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..core.choices import OPTIMIZERS, POLICIES
from ..core.config import RunConfig
from ..core.errors import ConfigError, HardwareError
from ..core.labels import LabelSpace
from ..core.manifest import Manifest
from ..core.pixels import CHANNELS, FULL_BITS, Pixels
from ..loading.augment import Augment
from ..loading.sampler import forward_passes
from .defaults import Machine, Notes, Recipe, text
from .plan_model import Start

if TYPE_CHECKING:
    from ..data.decode import Color

_FEW_TO_JUDGE = (
    1000  # below it the best of many epochs by accuracy is mostly the luckiest: one standard error is 0.01 or more
)
_PILLOW_SHARE = 0.05  # above it DALI would wait for Pillow


def note_labels(notes: Notes, labels: LabelSpace) -> None:
    """Show what kind each task is, where images have labels of another kind than one class; the setting stays as asked."""
    if not labels.is_single:
        kinds = [f"{task.name} {task.kind}" for task in labels.tasks] if len(labels.tasks) > 1 else [labels.tasks[0].kind]
        reason = "as the labels look" if notes.config.data.label_kind == "auto" else "as asked"
        notes.rows.append(("data.label_kind", ", ".join(kinds), reason))


def choose_device(notes: Notes, machine: Machine) -> str:
    """Choose "cuda" or "cpu"; H001 when a GPU is asked for and there is none."""
    if notes.config.train.device == "cuda" and machine.gpu is None:
        raise HardwareError("H001", "train.device is cuda, and no usable GPU was found", try_="imgcls-fast doctor")
    reason = f"{machine.gpu}" if machine.gpu else f"no GPU found; {machine.cpus} CPU core{'s' * (machine.cpus != 1)}"
    return str(notes.decide("train.device", "cuda" if machine.gpu else "cpu", reason))


def choose_pixels(notes: Notes, manifest: Manifest, arch: str, start: Start, recipe: Recipe) -> Pixels:
    """Choose size, crop, filter and normalisation of the input."""
    from ..models.build import pretrained_pixels

    own = start.pixels.to_dict() if start.pixels else pretrained_pixels(arch)
    if start.kind == "scratch":
        size, reason = _scratch_size(manifest, recipe)
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
    color = _color(notes, start)
    bits = _bits(notes, manifest, start)
    mean, std = _normalisation(notes, manifest, own, CHANNELS[color])
    limit = notes.config.data.max_megapixels
    return Pixels(size, crop_pct, interpolation, color, notes.config.pixels.exif, mean, std, limit, bits)


def _bits(notes: Notes, manifest: Manifest, start: Start) -> int:
    """Choose the bits that 16-bit gray images use."""
    from ..data.depth import used_bits

    value, reason = FULL_BITS, "there are no images of 16-bit gray"
    asked = notes.config.pixels.bits != "auto"
    used = None if asked else used_bits(manifest, notes.config.data.max_megapixels)
    if start.pixels is not None:
        value, reason = start.pixels.bits, "of the starting weights"
        if used is not None and used < value:  # right where that run saw such images, and wrong where it saw none of 16 bits
            told = f"16-bit training images use {used} bits and are read as {value}, as by the starting run: they are dark"
            notes.told.append(f"{told}   (spread over the range: --set pixels.bits={used})")
    elif used is not None:
        value, reason = used, f"16-bit training images use 0 to {(1 << used) - 1:,}"
    return int(notes.decide("pixels.bits", value, reason))


def _scratch_size(manifest: Manifest, recipe: Recipe) -> tuple[int, str]:
    """Choose a size that is large enough for what the images show: never far above their own size."""
    short = float(np.median(np.minimum(manifest.width, manifest.height)))
    if short >= 1.25 * recipe.size:
        return recipe.size, f"recipe; the median image has a short side of {short:.0f}"
    size = int(min(recipe.size, max(32, 16 * math.ceil(short / 16))))
    return size, f"the median image has a short side of {short:.0f}"


def _normalisation(
    notes: Notes, manifest: Manifest, own: dict[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    out = []
    measured: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    for index, name in enumerate(("mean", "std")):
        asked = getattr(notes.config.pixels, name)
        if asked == "data":
            from ..data.prepare import channel_statistics

            measured = measured or channel_statistics(
                manifest, notes.value("pixels.color"), notes.config.data.max_megapixels, notes.value("pixels.bits")
            )
            values, reason = measured[index], "measured on training images"
        elif asked == "auto":
            values, reason = _as_channels(own[name], channels), "of the weights, else ImageNet's"
        else:
            values, reason = tuple(asked), "as asked"
        if len(values) != channels:
            raise ConfigError(
                "C004",
                f"pixels.{name} has {len(values)} numbers, and pixels.color {notes.value('pixels.color')} has {channels} channels",
                try_=f"--{name} {','.join(['0.5'] * channels)}",
            )
        notes.changes[f"pixels.{name}"] = list(values)
        notes.rows.append((f"pixels.{name}", text([round(v, 3) for v in values]), reason))
        out.append(tuple(float(v) for v in values))
    return out[0], out[1]


def _color(notes: Notes, start: Start) -> Color:
    """Choose gray, RGB or RGBA: as the starting run saw its images, unless asked otherwise."""
    theirs = start.pixels.color if start.pixels else None
    color: Color = notes.decide("pixels.color", theirs or "rgb", "of the starting weights" if theirs else "usual")
    if theirs and theirs != color:
        reason = f"as asked; the starting weights were trained on {theirs}, so their first layer is converted"
        notes.rows[-1] = (*notes.rows[-1][:2], reason)
    return color


def _as_channels(values: Any, channels: int) -> tuple[float, ...]:
    """Turn statistics of one, three or four channels into another number: colour from gray, gray and alpha from the mean."""
    values = tuple(float(v) for v in values)
    if len(values) == channels:
        return values
    colors = values[:3] if len(values) >= 3 else values[:1] * 3
    middle = sum(colors) / 3
    return {1: (middle,), 3: colors, 4: (*colors, middle)}[channels]


def choose_augment(notes: Notes, recipe: Recipe, pixels: Pixels) -> Augment:
    """Choose the strengths of the augmentation."""
    asked = notes.config.augment.policy
    if notes.config.data.source is None:
        policy = notes.decide("augment.policy", "light", "a mirrored digit is another sign")
    else:
        policy = notes.decide("augment.policy", recipe.augment, "recipe")
    strengths = POLICIES[policy]._asdict()
    values: dict[str, Any] = {}
    for name, value in strengths.items():
        if pixels.color == "gray" and name in ("saturation", "hue"):
            value = 0.0
        before = len(notes.rows)
        values[name] = notes.decide(f"augment.{name}", value, f"policy {policy}")
        if notes.rows[before][2] != "as asked" and asked != "auto":
            notes.rows[before] = (*notes.rows[before][:2], f"policy {policy}")
    return Augment.from_dict(values)


def choose_lengths(notes: Notes, manifest: Manifest, recipe: Recipe, device: str, needed: int) -> None:
    """Choose batch, epochs, micro-batch, and the value that picks the best epoch.

    Args:
        needed: fewest images of a forward pass in training.

    Raises:
        ConfigError: C004 when a forward pass would get fewer.
    """
    n = len(manifest.rows("train"))
    train = notes.config.train
    fitting = min(recipe.batch[device], max(needed, n // 8))
    batch = notes.decide("train.batch_size", fitting, f"recipe; {n:,} training images")
    if batch > n:
        notes.changes["train.batch_size"] = batch = n
        notes.rows[-1] = (
            "train.batch_size",
            str(n),
            f"lowered from {train.batch_size}: there are {n:,} training images",
        )
    if batch < needed:
        _refuse_lone_image(notes, n, batch)
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
    micro = notes.value("train.micro_batch")
    largest = max(part.stop - part.start for part in forward_passes(batch, micro, needed))
    if largest > micro:
        notes.changes["train.micro_batch"] = largest
        why = f"raised from {micro}: batch norm needs {needed} images in every forward pass"
        notes.rows[-1] = ("train.micro_batch", str(largest), why)
    notes.changes["train.accum"] = None
    notes.decide("train.monitor", *_monitor(manifest))
    notes.decide("evaluate.batch_size", min(256, max(batch, 32)), "memory")


def _monitor(manifest: Manifest) -> tuple[str, str]:
    """Choose the figure that picks the best epoch, and give the reason."""
    judged = len(manifest.rows("val"))
    if manifest.labels.any_of.any():
        return "val/macro_ap", "any number of classes per image: how well each is ranked, whatever its threshold"
    if not manifest.labels.is_single:
        return "val/accuracy", f"mean over {len(manifest.labels.tasks)} tasks"
    if judged < _FEW_TO_JUDGE:
        return "val/loss", f"{judged:,} validation images: their accuracy changes by chance from epoch to epoch"
    return "val/accuracy", f"{judged:,} validation images: enough for accuracy"


def _refuse_lone_image(notes: Notes, images: int, batch: int) -> NoReturn:
    arch = notes.value("model.arch")
    why = f"{arch} has batch norm, which takes its statistics over the images of a forward pass; one image has none"
    if images == 1:
        raise ConfigError(
            "C004",
            f"there is 1 training image, and {arch} needs at least 2",
            why=why,
            try_="more images   (or --model convnext_tiny, which has no batch norm; or --freeze backbone)",
        )
    raise ConfigError(
        "C004",
        f"train.batch_size must be at least 2 for {arch}, got {batch}",
        why=why,
        try_="--batch-size 2   (or --model convnext_tiny, which has no batch norm; or --freeze backbone)",
    )


_FAR = 300  # a learning rate this many times above or below the usual one is most probably a slip


def choose_optimizer(notes: Notes, recipe: Recipe) -> None:
    """Choose optimizer, rates, schedule, smoothing and averaging."""
    opt = notes.decide("optim.opt", recipe.opt, "recipe")
    batch = notes.value("train.batch_size")
    like = OPTIMIZERS[opt].like
    base_lr, base_batch = recipe.lr[like]
    # linear for SGD (Goyal et al. 2017), square root for adaptive methods (Malladi et al. 2022)
    scale = (batch / base_batch) if like == "sgd" else math.sqrt(batch / base_batch)
    usual = float(f"{base_lr * scale:.3g}")
    asked_lr = notes.decide("optim.lr", usual, f"{base_lr:g} at batch {base_batch}, scaled to {batch}")
    if not usual / _FAR <= asked_lr <= usual * _FAR:
        far = f"{asked_lr / usual:,.0f} times" if asked_lr > usual else f"1/{usual / asked_lr:,.0f} of"
        end = "training will most likely diverge" if asked_lr > usual else "training will hardly move"
        notes.told.append(f"optim.lr {asked_lr:g} is {far} the usual {usual:g} of {opt} at batch {batch}: {end}   (--lr auto)")
    notes.decide("optim.weight_decay", recipe.weight_decay[like], "recipe")
    sched = notes.decide("optim.sched", recipe.sched, "recipe")
    epochs = notes.value("train.epochs")
    if sched == "onecycle":  # Smith and Topin 2017; a rise before this one would run the cycle twice
        warmup, why = round(0.3 * epochs, 2), "epochs; the rise of the cycle, 30 % of the run"
    else:
        warmup, why = round(min(recipe.warmup, 0.15 * epochs), 2), "epochs; at most 15 % of the run"
    asked = notes.decide("optim.warmup", warmup, why)
    if asked and asked >= epochs:  # the rate would never reach optim.lr, or only with the last step, and never fall
        shorter = warmup or round(0.15 * epochs, 2)
        notes.shorten("optim.warmup", shorter, f"shortened from {asked:g}: the run has {_epochs(epochs)}")
        told = f"optim.warmup {asked:g} is as long as the run of {_epochs(epochs)} or longer: it is shortened to {shorter:g}"
        notes.told.append(f"{told}   (another: --warmup)")
    notes.decide("loss.label_smoothing", recipe.smoothing, "recipe")
    notes.decide("optim.ema", recipe.ema, "recipe")


def look_at_waits(notes: Notes) -> None:
    """Report settings that count epochs and wait for longer than the run lasts: a rate that never falls, a stop that never comes."""
    epochs, optim, train = notes.value("train.epochs"), notes.config.optim, notes.config.train
    sched, so = notes.value("optim.sched"), f"the run has {_epochs(epochs)}"
    if sched == "step" and optim.step_epochs >= epochs:
        _never(notes, "optim.step_epochs", optim.step_epochs, f"the rate never drops: {so}")
    # the first epoch is the best so far; a drop after the last one changes nothing
    if sched == "plateau" and optim.plateau_patience + 3 > epochs:
        _never(notes, "optim.plateau_patience", optim.plateau_patience, f"the rate never drops: {so}")
    if train.patience is not None and train.patience + 2 > epochs:
        _never(notes, "train.patience", train.patience, f"training never stops early: {so}")


def _never(notes: Notes, name: str, value: int, why: str) -> None:
    notes.rows.append((name, str(value), why))
    notes.told.append(f"{name} is {value}, and {why}   (another: --set {name}=N)")


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def choose_class_weights(notes: Notes, manifest: Manifest) -> None:
    """Turn class weights into numbers; refuses wrong ones here rather than in the run."""
    from .objectives import class_weights

    asked = notes.config.loss.class_weights
    if asked == "none":
        return
    counts = manifest.counts("train"), manifest.known_counts("train")
    weights = class_weights(notes.config.loss, manifest.labels, *counts)  # refuses here, not in the run
    if not isinstance(asked, str):
        notes.rows.append(("loss.class_weights", str(asked), "as asked"))
        return
    assert weights is not None
    values = [float(f"{w:.6g}") for w in weights]
    notes.changes["loss.class_weights"] = values
    reason = {"auto": "inverse frequency", "effective": "effective number of images"}[asked]
    kinds = {task.kind: None for task in manifest.labels.tasks}
    scales = {"one_of": "mean 1 over the training images", "any_of": "of positive answers, negative ones weigh 1"}
    notes.rows.append(("loss.class_weights", text(values), "; ".join([reason, *(scales[kind] for kind in kinds)])))


def choose_speed(notes: Notes, manifest: Manifest, machine: Machine, device: str) -> None:
    """Choose precision, compiling, kernels and loader."""
    if device == "cuda":
        precision, reason = (
            ("bf16", "the GPU has bf16") if machine.bf16 else ("fp16", "the GPU has no bf16; losses are scaled")
        )
    else:
        precision, reason = "fp32", "CPU"
    require_device_for(notes.config, device)
    notes.decide("train.precision", precision, reason)
    _choose_compile(notes, machine, device)
    kernels = ("off", "ours are not measured on a GPU yet") if device == "cuda" else ("proven", "where measured faster")
    notes.decide("model.kernels", *kernels)
    loader = notes.decide("train.loader", *_loader(manifest, machine, device, notes.value("pixels.color")))
    workers = min(16, max(1, machine.cpus - 1)) if device == "cuda" else min(4, machine.cpus)
    why = "" if machine.why_cpus == Machine.why_cpus else f"; {machine.why_cpus}"
    if why and device == "cuda":  # which waits for them
        why += "; more with --workers"
    workers = notes.decide("train.workers", workers, "decoding " + ("processes" if loader == "torch" else "threads") + why)
    if loader == "torch":
        _note_way(notes, workers)


def _note_way(notes: Notes, workers: int) -> None:
    """Add to the reason for the workers how their batches come, where /dev/shm is too small for them."""
    from ..loading.handover import bytes_needed, choose_way

    sizes = notes.value("train.batch_size"), notes.value("pixels.size"), CHANNELS[notes.value("pixels.color")], workers
    way, reason = choose_way(*sizes)
    if reason:
        name, value, why = notes.rows[-1]
        instead = "batches through pipes" if way == "pipes" else "as threads"
        notes.rows[-1] = (name, value, f"{why}; {instead}: {reason} ({bytes_needed(*sizes) / 1e6:.1f} MB)")


def require_device_for(config: RunConfig, device: str) -> None:
    """Refuse a precision or a loader that needs a GPU, on a CPU; asked before the scan, too, which may take long.

    Raises:
        ConfigError: C004.
    """
    if device == "cuda":
        return
    if config.train.precision == "fp16":
        raise ConfigError("C004", "train.precision fp16 needs a GPU", try_="--precision bf16   (or fp32)")
    if config.train.loader == "dali-gpu":
        raise ConfigError("C004", "train.loader dali-gpu needs train.device cuda", try_="--loader dali-cpu")


def require_compiler(config: RunConfig, machine: Machine, *, resumed: bool = False) -> None:
    """Refuse `--compile` where nothing can compile; asked before the scan, which may take long.

    Args:
        resumed: the run was begun so, and cannot go on without.

    Raises:
        HardwareError: H004, with the line that installs what is missing.
    """
    device = config.train.device
    lack = machine.lacks.get("cuda" if device == "auto" and machine.gpu else "cpu" if device == "auto" else device)
    if config.train.compile is True and lack:
        if resumed:
            raise HardwareError("H004", f"{lack.what}, and this run compiles its network", try_=lack.remedy)
        raise HardwareError(
            "H004",
            f"{lack.what}, and --compile needs it",
            try_=f"{lack.remedy}   (or --no-compile)" if lack.remedy else "--no-compile",
        )


def _choose_compile(notes: Notes, machine: Machine, device: str) -> None:
    require_compiler(notes.config, machine)
    lack = machine.lacks.get(device)
    if device != "cuda":
        notes.decide("train.compile", False, "off: compiling costs more than a short CPU run")
    elif lack:
        notes.decide(
            "train.compile", False, f"off: {lack.what}" + (f"; for more speed: {lack.remedy}" if lack.remedy else "")
        )
    else:
        notes.decide("train.compile", True, "on for a GPU")


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
