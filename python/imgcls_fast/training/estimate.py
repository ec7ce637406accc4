"""Estimates what a run would do: its plan, with measured estimates of time and memory."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import numpy as np
import torch

from ..core.config import RunConfig
from ..core.manifest import Manifest
from ..core.phases import phase
from ..data.prepare import prepare, require_splits
from ..engines.as_found import as_found
from ..loading.loader import open_loader
from ..loading.sampler import Sampler
from ..models.build import Classifier, ModelSpec, build_model
from ..models.kernels import use_kernels
from .early import refuse_early
from .plan import Plan, look_at_machine, make_plan
from .progress import memory_mb

_READ_S = 2.0  # of reading images for the estimate, after the first batch
LEFT_OUT = "scan, baseline, compiling, final evaluation and report"


@as_found()
def dry_run(config: RunConfig) -> dict[str, Any]:
    """Return what `session.start` would do, with measured estimates, without writing anything but the data cache.

    Returns:
        rows, parameters, memory_mb, seconds_per_epoch (training and validation), seconds (all epochs), left_out (of these
        times), epochs, device, data, config.
    """
    machine = look_at_machine()
    refuse_early(config, machine)
    prepared = prepare(config)
    require_splits(prepared)
    plan = make_plan(config, prepared.manifest, machine)
    with phase("timing a step of training"):
        model = build_model(ModelSpec.from_dict(plan.spec))
        use_kernels(model, plan.config.model.kernels)
        model.lay_out(str(plan.config.train.memory_format))
        step, judged, memory = _measure_step(plan, model)
    with phase("timing the reading of images"):
        read = _measure_reading(plan, prepared.manifest)
    train, val = (len(prepared.manifest.rows(name)) for name in ("train", "val"))
    # images are read while others are learned from, but on a CPU both want the same cores
    busy = train * step + val * judged
    reading = (train + val) * read
    epoch = max(busy, reading) if plan.config.train.device != "cpu" else busy + reading
    return {
        "rows": [list(row) for row in plan.rows],
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory_mb": memory,
        "seconds_per_epoch": round(epoch, 2),
        "seconds": round(epoch * int(plan.config.train.epochs), 1),
        "left_out": LEFT_OUT,
        "epochs": plan.config.train.epochs,
        "device": plan.config.train.device,
        "data": prepared.facts(),
        "config": plan.config.model_dump(mode="json"),
    }


def _measure_step(plan: Plan, model: Classifier) -> tuple[float, float, float]:
    """Measure (seconds per image in training, seconds per image in validation, MB), on random pixels, without compiling."""
    train, size = plan.config.train, plan.pixels.size
    device = torch.device(train.device)
    if device.type == "cpu":
        torch.set_num_threads(int(train.threads))
    model = model.to(device).train()
    micro = int(train.micro_batch)
    pixels = torch.randint(0, 256, (micro, size, size, plan.pixels.channels), dtype=torch.uint8, device=device)
    forward, both = [], []
    for _ in range(2):
        begin = time.perf_counter()
        outputs = model(pixels)
        _wait(device)
        forward.append(time.perf_counter() - begin)
        (outputs[0] if isinstance(outputs, tuple) else outputs).float().sum().backward()
        _wait(device)
        both.append(time.perf_counter() - begin)
    return min(both) / micro, min(forward) / micro, memory_mb(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_reading(plan: Plan, manifest: Manifest) -> float:
    """Measure the seconds per image that the loader of the plan takes, after its first batch; 0 where there is no second."""
    train = plan.config.train
    sampler = Sampler(manifest, manifest.rows("train"), plan.pixels, int(train.batch_size), seed=train.seed, augment=plan.augment)
    loader = open_loader(sampler, str(train.loader), workers=int(train.workers), device=str(train.device), once=True)
    images, begin = 0, 0.0
    with closing(loader):
        for batch in loader.epoch(0):
            if not begin:  # the first one waits for processes and threads to start
                begin = time.perf_counter()
                continue
            images += int((np.asarray(batch.weight) > 0).sum())
            if time.perf_counter() - begin > _READ_S:
                break
        return (time.perf_counter() - begin) / images if images else 0.0
