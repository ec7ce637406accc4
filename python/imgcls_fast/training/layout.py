"""Measures once which memory format a network trains faster in on this machine's CPU, and remembers it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..core import env
from ..core.config import RunConfig
from ..core.errors import ImgclsError
from ..core.files import sha256_json, write_json
from ..engines.torch_runtime import AUTOCAST
from ..models.build import ModelSpec, build_model
from ..models.classifier import Classifier
from ..models.kernels import use_kernels

FORMATS = ("channels-last", "contiguous")
_MARGIN = 0.95  # contiguous must be this much faster: below it one cannot tell on a busy machine
_IMAGES = 8
_LONG_S = 5.0  # a network whose step takes longer is not asked again


def faster_format(
    spec: dict[str, Any], config: RunConfig, micro_batch: int, notice: Callable[[str], None] = lambda text: None
) -> tuple[str, str]:
    """Return the format, and the reason as the plan shows it; kept in the cache, so that a machine always answers the same.

    Args:
        spec: `Plan.spec`.
        config: with precision and threads resolved.
        micro_batch: images per forward pass; at most 8 of them are measured.
        notice: receives that a measurement begins.
    """
    train, kernels = config.train, config.model.kernels
    images = min(micro_batch, _IMAGES)
    key = sha256_json(
        [spec, images, str(train.precision), int(train.threads), kernels, env.cpu_name(), env.versions(("torch",))]
    )
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, ImgclsError):  # ImgclsError: there is no cache
        place = env.cache_dir() / "memory-format.json"
        read = json.loads(place.read_text("utf-8"))
        known = read if isinstance(read, dict) else {}
    found = known.get(key)
    if not (isinstance(found, dict) and all(isinstance(found.get(name), float) for name in FORMATS)):
        notice(f"timing two memory formats of {spec['arch']}, once on this machine")
        found = measure(spec, images, str(train.precision), int(train.threads), kernels)
        with suppress(OSError, ImgclsError):  # a cache that cannot be written costs a measurement the next time
            place = env.cache_dir() / "memory-format.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, {**known, key: found})
    chosen = "contiguous" if found["contiguous"] < _MARGIN * found["channels-last"] else "channels-last"
    figures = " against ".join(f"{1000 * found[name] / images:.3g}" for name in (chosen, *set(FORMATS) - {chosen}))
    return chosen, f"{figures} ms per image, measured on this machine"


def measure(spec: dict[str, Any], images: int, precision: str, threads: int, kernels: str) -> dict[str, float]:
    """Measure the seconds of a forward and backward pass in each format: the best of three, or the first where it takes long."""
    with built(spec, images, kernels) as (model, pixels):
        torch.set_num_threads(threads)
        first = {name: step_s(model, name, pixels, precision) for name in FORMATS}
        if max(first.values()) > _LONG_S:  # what a first step takes for memory and threads is little of it
            return first
        return {
            name: min(seconds)
            for name, *seconds in zip(
                FORMATS,
                *([step_s(model, name, pixels, precision) for name in FORMATS] for _ in range(3)),
                strict=True,
            )
        }


@contextmanager
def built(spec: dict[str, Any], images: int, kernels: str) -> Iterator[tuple[Classifier, torch.Tensor]]:
    """Build the network of a plan with random weights, ready for a training step, and pixels for it.

    Threads may be changed meanwhile; they and the random numbers are as before afterwards.
    """
    model_spec = ModelSpec.from_dict(spec)
    size = model_spec.image_size or 224
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            model = build_model(model_spec).train()
            use_kernels(model, kernels)  # as in training
            yield model, torch.randint(0, 256, (images, size, size, model_spec.channels), dtype=torch.uint8)
    finally:
        torch.set_num_threads(before)


def step_s(model: Classifier, name: str, pixels: torch.Tensor, precision: str) -> float:
    """Measure the seconds of one forward and backward pass in a memory format."""
    model.lay_out(name)
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    with torch.autocast("cpu", AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST):
        outputs = model(pixels)
    (outputs[0] if isinstance(outputs, tuple) else outputs).float().sum().backward()
    return time.perf_counter() - begin
