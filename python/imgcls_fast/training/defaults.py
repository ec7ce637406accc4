"""Holds the numbers behind "auto": one recipe per way to begin, each with its source; and what decisions are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.compilers import Lack
from ..core.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    """Holds the defaults of one way to begin.

    Args:
        size: side of the input in pixels.
        crop_pct: evaluation crop.
        images: training images to see in all; with the size of the data it gives the epochs.
        epochs: least and most epochs.
        batch: images per step, on each device.
        lr: optimizer -> (peak learning rate, batch size that it is for).
        weight_decay: one per optimizer.
        warmup: epochs.
        drop_rate: before the head; None: the architecture's own.
    """

    size: int
    crop_pct: float
    images: int
    epochs: tuple[int, int]
    batch: dict[str, int]
    opt: str
    lr: dict[str, tuple[float, int]]
    weight_decay: dict[str, float]
    sched: str
    warmup: float
    smoothing: float
    ema: float
    augment: str
    drop_rate: float | None = None


RECIPES = {
    # chosen on validation rows (4 folds over train and val, 750 images) of 975 flower photos; more in docs/training.md
    "small-cnn": Recipe(
        size=96,
        crop_pct=0.875,
        images=48_750,
        epochs=(8, 75),
        batch={"cpu": 32, "cuda": 128},
        opt="adamw",
        lr={"adamw": (2e-3, 32), "sgd": (0.05, 32)},
        weight_decay={"adamw": 0.05, "sgd": 5e-4},
        sched="cosine",
        warmup=11.25,
        smoothing=0.1,
        ema=0.0,
        augment="medium",
        drop_rate=0.2,
    ),
    # timm's RSB A3 (Wightman et al. 2021) without mixup, at a batch that one GPU holds
    "scratch": Recipe(
        size=224,
        crop_pct=0.95,
        images=10_000_000,
        epochs=(20, 100),
        batch={"cpu": 32, "cuda": 256},
        opt="sgd",
        lr={"adamw": (1e-3, 256), "sgd": (0.1, 256)},
        weight_decay={"adamw": 0.05, "sgd": 5e-5},
        sched="cosine",
        warmup=5.0,
        smoothing=0.1,
        ema=0.9998,
        augment="medium",
    ),
    # transformers and ConvNeXt: DeiT (Touvron et al. 2021, table 9) and ConvNeXt (Liu et al. 2022, table 5), 0.001 at
    # batch 1024, without mixup; SGD as above for who asks for it
    "scratch-adamw": Recipe(
        size=224,
        crop_pct=0.95,
        images=10_000_000,
        epochs=(20, 100),
        batch={"cpu": 32, "cuda": 256},
        opt="adamw",
        lr={"adamw": (1e-3, 1024), "sgd": (0.1, 256)},
        weight_decay={"adamw": 0.05, "sgd": 5e-5},
        sched="cosine",
        warmup=5.0,
        smoothing=0.1,
        ema=0.9998,
        augment="medium",
    ),
    # fine-tuning of published weights: short, gentle, all layers
    "finetune": Recipe(
        size=224,
        crop_pct=0.875,
        images=60_000,
        epochs=(5, 30),
        batch={"cpu": 16, "cuda": 64},
        opt="adamw",
        lr={"adamw": (3e-4, 64), "sgd": (0.01, 64)},
        weight_decay={"adamw": 0.05, "sgd": 1e-4},
        sched="cosine",
        warmup=1.0,
        smoothing=0.1,
        ema=0.998,
        augment="medium",
    ),
}


_TRITON_FROM = (7, 0)  # compute capability


@dataclass(frozen=True)
class Machine:
    """Holds what the plan may count on; made by `look_at_machine`, or by a test."""

    cpus: int = 2  # threads for any one piece of work
    why_cpus: str = "all usable cores"  # why that many
    gpu: str | None = None  # name of the GPU, None without one
    bf16: bool = False  # the GPU multiplies bf16 in hardware
    dali: bool = False
    lacks: dict[str, Lack] = field(default_factory=dict)  # device -> what torch.compile would miss
    measures: bool = False  # the plan may time a few steps of the network


def look_at_machine() -> Machine:
    """Ask the system and torch, without starting CUDA where there is no GPU."""
    import torch

    from ..core import env
    from ..loading.loader import dali_missing

    cuda, counted = torch.cuda.is_available(), env.cpus()
    return Machine(
        cpus=counted.threads,
        why_cpus=counted.reason,
        gpu=torch.cuda.get_device_name() if cuda else None,
        bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        dali=dali_missing() is None,
        lacks={device: lack for device in ("cpu", "cuda")[: 1 + cuda] if (lack := _lack(device))},
        measures=True,
    )


def _lack(device: str) -> Lack | None:
    import torch

    from ..core import env

    if device == "cuda" and (found := torch.cuda.get_device_capability()) < _TRITON_FROM:
        name, needed = torch.cuda.get_device_name(), ".".join(map(str, _TRITON_FROM))
        return Lack(f"{name} has compute capability {found[0]}.{found[1]}, and Triton needs {needed}", "")
    return env.lacks_compiler(device)


@dataclass
class Notes:
    """Collects decisions: dotted setting -> value, with the reason."""

    config: RunConfig
    changes: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # what the user should know beside the rows

    def value(self, name: str) -> Any:
        if name in self.changes:
            return self.changes[name]
        section, _, key = name.partition(".")
        return getattr(getattr(self.config, section), key)

    def decide(self, name: str, value: Any, reason: str) -> Any:
        """Replace "auto" by `value`; what the user set stays, and is shown as such."""
        asked = self.value(name)
        if asked != "auto":
            self.rows.append((name, text(asked), "as asked"))
            return asked
        self.changes[name] = value
        self.rows.append((name, text(value), reason))
        return value

    def shorten(self, name: str, value: Any, reason: str) -> None:
        """Put another value in place of the one just decided, which cannot be."""
        self.changes[name] = value
        self.rows[-1] = (name, text(value), reason)


def text(value: Any) -> str:
    """Write a value as the table of decisions shows it."""
    if isinstance(value, list | tuple):
        return ", ".join(text(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
