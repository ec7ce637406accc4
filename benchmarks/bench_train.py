"""One training step beside timm's: forward, loss, backward, optimizer.

Ours is the step that `imgcls-fast train` makes (`training/step.py`): uint8 NHWC images in, normalised inside the model,
channels-last, fused optimizer. The rivals train the very same backbone as timm's `train.py` does: float32 images that its
loader has normalised, timm's optimizer factory and loss; once as it comes (NCHW), once with `--channels-last`; and, where
the architecture has attention that our kernels replace, ours without them. All begin with the same weights and must have the
same loss after each of three steps. On a GPU both sides run bf16 autocast and `torch.compile`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duels import Contender, Contest, Disagree, Pair, Setup
from torch import nn

from imgcls_fast.core.batch import Batch
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.data.digits import write_digits
from imgcls_fast.data.prepare import prepare as prepare_data
from imgcls_fast.training.fit import Fit
from imgcls_fast.training.plan import look_at_machine, make_plan

LR, DECAY = 1e-4, 0.05
STEPS, APART = 3, 1e-4  # losses that are compared, and how far they may be apart, relatively
ROUNDED = 3e-2  # the same in bf16, and for another memory order
OURS, SAME_ORDER, OTHER_ORDER = "imgcls-fast", "timm step, channels-last", "timm step"


def _contest(arch: str, size: int, batch: int, **more: Any) -> Contest:
    attention = more.pop("attention", "")
    name = f"{arch.partition('/')[2] or arch}{attention and f' + {attention}'}, {size}x{size}, batch {batch}"
    params = {"name": name, "arch": arch, "size": size, "batch": batch, "attention": attention}
    return Contest("train", name, "steps", params, **more)


CPU: dict[str, Any] = {"devices": ("cpu",)}
GPU: dict[str, Any] = {"devices": ("cuda",)}
CONTESTS = [
    _contest("small-cnn", 32, 16, **CPU),
    _contest("torchvision/resnet50", 64, 2, **CPU),
    _contest("timm/vit_tiny_patch16_224", 96, 2, **CPU),
    _contest("torchvision/resnet18", 64, 8, **CPU, full=True),
    _contest("torchvision/resnet50", 224, 1, **CPU, full=True),
    _contest("timm/vit_tiny_patch16_224", 224, 1, **CPU, full=True),
    _contest("timm/swin_tiny_patch4_window7_224", 224, 1, **CPU, full=True),
    _contest("torchvision/resnet50", 224, 8, **CPU, full=True),
    _contest("torchvision/resnet50", 224, 4, attention="cbam@every-block", **CPU, full=True),
    _contest("small-cnn", 32, 8, **CPU, small=True),
    *(
        _contest(arch, 224, batch, **GPU)
        for arch in ("torchvision/resnet50", "timm/vit_tiny_patch16_224")
        for batch in (64, 256)
    ),
    _contest("timm/swin_tiny_patch4_window7_224", 224, 128, **GPU),
    _contest("torchvision/resnet50", 224, 128, attention="cbam@every-block", **GPU),
]


@pytest.mark.parametrize("contest", CONTESTS, ids=str)
def bench_train(duel: Callable[[Contest], list[dict[str, Any]]], contest: Contest) -> None:
    first = duel(contest)[0]
    assert first["cases"] or first["slow"], first["absent"]


def steps(
    work: Path, name: str, arch: str, size: int, batch: int, attention: str, device: str, full: bool = False
) -> Setup:
    """The same network in our step and in timm's."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (batch, size, size, 3), np.uint8)
    labels = draw.integers(0, 10, batch)
    kinds = {OURS: "auto"} | ({"imgcls-fast, kernels off": "off"} if "swin" in arch or attention else {})
    build = partial(_fit, work, arch, size, batch, attention, device)

    def ours(kernels: str) -> Contender:
        fit = build(kernels)
        given = _batch(pixels, labels, device)
        losses = []
        for _ in range(STEPS):
            before = float(fit.step.loss_sum)
            fit.step.take(given, 0)
            losses.append((float(fit.step.loss_sum) - before) / batch)
        return Contender({name: partial(fit.step.take, given, 0)}, losses, _precision(device), {"kernels": kernels})

    def timm(channels_last: bool) -> Contender:
        step = _timm_step(build("off"), pixels, labels, device, channels_last, _optimizer(arch))
        losses = [float(step()) for _ in range(STEPS)]
        return Contender({name: step}, losses, _precision(device))

    openers = {kind: partial(ours, kernels) for kind, kernels in kinds.items()}
    openers |= {OTHER_ORDER: partial(timm, False), SAME_ORDER: partial(timm, True)}
    return Setup(
        openers,
        [Pair(OURS, rival) for rival in openers if rival != OURS],
        partial(check, allowed=APART if device == "cpu" else ROUNDED),
        clock="wall" if device == "cpu" else "gpu",
        images={name: batch},
    )


def check(name: str, outputs: Mapping[str, Any], allowed: float) -> dict[str, Any]:
    """Losses of three steps against those of timm's step in the same memory order.

    In the other order sums are rounded in another way, and networks with batch normalisation that know nothing yet make much of
    that: the losses of timm's own two steps are that far apart.
    """
    apart = max(abs(a / b - 1) for a, b in zip(outputs[name], outputs[SAME_ORDER], strict=True))
    if not apart <= (ROUNDED if name == OTHER_ORDER else allowed):
        raise Disagree(f"the losses {outputs[name]} and {outputs[SAME_ORDER]} differ by {apart:.1e}")
    return {"loss_apart": float(f"{apart:.2e}"), "loss": round(outputs[name][-1], 5)}


def _fit(work: Path, arch: str, size: int, batch: int, attention: str, device: str, kernels: str) -> Fit:
    """A run as `train` begins it, up to its first step. The seed makes the weights equal."""
    gpu = device == "cuda"
    changes: dict[str, Any] = {
        "data.source": str(write_digits(work)), "model.arch": arch, "model.init": "scratch", "model.kernels": kernels,
        "pixels.size": size, "model.drop_rate": 0.0, "train.batch_size": batch, "train.micro_batch": batch, "train.epochs": 1,
        "train.device": device, "train.precision": "bf16" if gpu else "fp32", "train.compile": gpu, "train.loader": "torch",
        "train.workers": 0, "train.log_every": 1e6, "optim.opt": _optimizer(arch), "optim.lr": LR, "optim.weight_decay": DECAY,
        "optim.sched": "none", "optim.warmup": 0, "optim.ema": 0, "loss.label_smoothing": 0, "train.baseline": False,
        "pixels.mean": [0.485, 0.456, 0.406], "pixels.std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    if attention:
        changes["model.attention"] = [attention]
    prepared = prepare_data(build_config(changes), work)
    plan = make_plan(build_config(changes), prepared.manifest, look_at_machine())
    run = Run.create(Path(tempfile.mkdtemp(prefix="run-", dir=work)) / "run")
    fit = Fit(plan, prepared.manifest, run, lambda event: None)
    fit.step.model.train()
    return fit


def _batch(pixels: np.ndarray, labels: np.ndarray, device: str) -> Batch:
    n = len(labels)
    arrays = pixels, np.eye(10, dtype=np.float32)[labels], np.ones(n, np.float32), np.arange(n)
    tensors = [torch.from_numpy(array) for array in arrays]
    return Batch(*([tensor.to(device) for tensor in tensors] if device == "cuda" else tensors))


def _timm_step(
    fit: Fit, pixels: np.ndarray, labels: np.ndarray, device: str, channels_last: bool, optimizer_name: str
) -> Callable[[], Any]:
    from timm.optim import create_optimizer_v2

    layout = torch.channels_last if channels_last else torch.contiguous_format
    model: nn.Module = copy.deepcopy(fit.step.model.backbone).to(device).to(memory_format=layout).train()
    optimizer = create_optimizer_v2(model, opt=optimizer_name, lr=LR, weight_decay=DECAY)
    with torch.no_grad():
        x = fit.step.model.normalise(torch.from_numpy(pixels).to(device)).float().contiguous(memory_format=layout)
    y = torch.from_numpy(labels).to(device)
    gpu = device == "cuda"
    forward: Any = torch.compile(model) if gpu else model
    loss_of = nn.CrossEntropyLoss()

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            output = forward(x)
            loss = loss_of(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _optimizer(arch: str) -> str:
    """Nesterov's SGD for ResNets, AdamW for the others: what their recipes use."""
    return "sgd" if "resnet" in arch else "adamw"


def _precision(device: str) -> str:
    return "fp32" if device == "cpu" else "bf16"
