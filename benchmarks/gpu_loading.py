"""The parts of `gpu_check.py` about loaders and TensorRT: what needs libraries that a bare GPU machine may lack."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_rows import Journal, sync
from PIL import Image

from imgcls_fast.core import env
from imgcls_fast.core.manifest import Manifest
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.core.settings import build_config
from imgcls_fast.data.prepare import prepare
from imgcls_fast.loading.augment import Augment
from imgcls_fast.loading.loader import dali_missing, open_loader
from imgcls_fast.loading.sampler import Sampler

ROOT = Path(__file__).resolve().parents[1]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photos() -> Path:
    """Real JPEGs in class folders: the shared data, those that were taken along, else pictures made here."""
    shared = Path(os.environ.get("IMGCLS_SHARED_DATA", "../shared/data")) / "photos"
    for folder in (shared, ROOT / ".carry" / "photos"):
        if folder.is_dir():
            return folder
    folder = Path(tempfile.mkdtemp(prefix="imgcls-gpu-check-"))
    rng = np.random.default_rng(0)
    for k in range(640):
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        small[..., k % 2] //= 3
        picture = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
        place = folder / ("red" if k % 2 else "green")
        place.mkdir(exist_ok=True)
        picture.save(place / f"{k:04}.jpg", quality=90, subsampling=k % 3)
    return folder


def manifest_of(folder: Path) -> Manifest:
    config = build_config({"data.source": str(folder)})
    return prepare(config, Path(tempfile.gettempdir()) / "imgcls-gpu-check").manifest


def fastest_loader(journal: Journal) -> str:
    """The one that is checked: DALI where it is installed, on the GPU where there is one, else torch's."""
    return "torch" if dali_missing() else "dali-cpu" if journal.small else "dali-gpu"


def batches(
    manifest: Manifest, loader: str, device: str, *, size: int = 224, augment: Augment | None = None, start: int = 0
) -> Iterator[Any]:
    pixels = Pixels(size, 0.875, "bilinear", "rgb", "apply", *IMAGENET)
    sampler = Sampler(manifest, manifest.rows("train"), pixels, 64, seed=3, augment=augment)
    source = open_loader(sampler, loader, workers=min(8, env.usable_cpus()), device=device, once=True)
    try:
        yield from source.epoch(0, start)
    finally:
        source.close()


def pixels_agree(journal: Journal) -> None:
    """Evaluation pixels of DALI's decoder against Pillow's; training crops against the CPU decoder's."""
    loader = fastest_loader(journal)
    if loader == "torch":
        journal.row("pixels", dali_missing(), "max 2, mean 0.25", None)
        return
    manifest = manifest_of(photos())
    for name, augment, promise in (
        ("evaluation", None, (2, 0.25)),
        ("training crops", Augment((0.08, 1.0)), (None, 1.0)),
    ):
        worst, means, rows_equal = 0, [], True
        pairs = zip(
            batches(manifest, loader, journal.device, augment=augment),
            batches(manifest, "torch", "cpu", augment=augment),
            strict=True,
        )
        for k, (ours, reference) in enumerate(pairs):
            difference = (ours.pixels.cpu().int() - reference.pixels.int()).abs()
            worst, rows_equal = max(worst, int(difference.max())), rows_equal and torch.equal(ours.rows, reference.rows)
            means.append(float(difference.float().mean()))
            if k == 4:
                break
        mean = statistics.mean(means)
        holds = rows_equal and mean <= promise[1] and (promise[0] is None or worst <= promise[0])
        text = f"max {worst}, mean {mean:.3f}, rows equal {rows_equal}"
        journal.row(f"{loader} against Pillow, {name}", text, f"max {promise[0]}, mean {promise[1]}", holds)


def restart_is_equal(journal: Journal) -> None:
    """A loader opened in the middle of an epoch delivers the same pixels."""
    loader = fastest_loader(journal)
    manifest, augment = manifest_of(photos()), Augment((0.08, 1.0), brightness=0.2, contrast=0.2, saturation=0.2)
    whole = [b.pixels.cpu() for b in batches(manifest, loader, journal.device, augment=augment)]
    first = min(4, len(whole) - 1)
    rest = [b.pixels.cpu() for b in batches(manifest, loader, journal.device, augment=augment, start=first)]
    equal = len(rest) == len(whole) - first and all(torch.equal(a, b) for a, b in zip(whole[first:], rest, strict=True))
    journal.row(f"loader {loader} restarted at batch {first}", f"pixels equal: {equal}", "bitwise", equal)


def loader_speed(journal: Journal) -> None:
    """Images per second of each loader, interleaved."""
    manifest, augment = manifest_of(photos()), Augment((0.08, 1.0))
    loader, rates = fastest_loader(journal), {}
    for _ in range(1 if journal.small else 5):
        for name in dict.fromkeys((loader, *(() if dali_missing() else ("dali-cpu",)), "torch")):
            device, began = journal.device if name == loader else "cpu", time.perf_counter()
            count = sum(len(b) for b in batches(manifest, name, device, augment=augment))
            sync(journal.device)
            rates.setdefault(name, []).append(count / (time.perf_counter() - began))
    for name, found in rates.items():
        text = f"{statistics.median(found):,.0f} img/s [{min(found):,.0f}, {max(found):,.0f}]"
        journal.row(f"loader {name}, 224 pixels, opening included", text)


def tensorrt(journal: Journal) -> None:
    """The tests that build and run real engines, where TensorRT is installed."""
    from imgcls_fast.exporting.trt_engine import trt_missing

    if missing := trt_missing():
        journal.row("TensorRT", missing, "tests pass", None)
        return
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(ROOT / "tests" / "exporting"),
             str(ROOT / "tests" / "engines")]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=max(5.0, journal.left() - 4), cwd=ROOT)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-160:]])[-1]
    journal.row("TensorRT", last.strip("= ")[:120], "tests pass", done.returncode == 0)
