"""Evaluation pixels of each loader backend against torchvision's Resize and CenterCrop, in levels (0..255).

    python benchmarks/parity.py [FOLDER] [--size 224] [--crop-pct 0.875] [--interpolation bilinear]

FOLDER holds image files (default: jpeg_full of the shared test data). The limits that a release must keep are max 2 and
mean 0.25; the exit code is 1 where a backend exceeds them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from bench_loader import default_folder, manifest_of
from PIL import Image, ImageOps
from torchvision.transforms import v2

from imgcls_fast.core.pixels import Pixels
from imgcls_fast.loading.loader import dali_missing, open_loader
from imgcls_fast.loading.sampler import Sampler

MAX_LEVELS, MEAN_LEVELS = 2, 0.25


def references(files: list[Path], pixels: Pixels) -> list[np.ndarray]:
    """What torchvision makes of each file."""
    view = v2.Compose(
        [
            v2.Resize(pixels.resize_to, v2.InterpolationMode(pixels.interpolation)),
            v2.CenterCrop(pixels.size),
        ]
    )
    found = []
    for path in files:
        with Image.open(path) as image:
            found.append(np.asarray(view(ImageOps.exif_transpose(image).convert("RGB"))))
    return found


def differences(files: list[Path], pixels: Pixels, backend: str, wanted: list[np.ndarray]) -> np.ndarray:
    """(n, 2): the greatest and the mean difference of each image."""
    sampler = Sampler(manifest_of(files), np.arange(len(files)), pixels, 32)
    loader = open_loader(sampler, backend, workers=2, once=True)  # type: ignore[arg-type]
    found = np.full((len(files), 2), np.nan)
    for batch in loader.epoch(0):
        for row, image in zip(batch.rows.tolist(), batch.pixels.numpy(), strict=True):
            if row >= 0:
                difference = np.abs(image.astype(int) - wanted[row])
                found[row] = difference.max(), difference.mean()
    loader.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--crop-pct", type=float, default=0.875)
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"no such folder: {args.folder}")
    files = sorted(path for path in args.folder.iterdir() if path.is_file())
    pixels = Pixels(args.size, args.crop_pct, args.interpolation, "rgb", "apply", (0.5,) * 3, (0.5,) * 3)
    wanted = references(files, pixels)
    good = True
    print(f"{'backend':10} {'images':>7} {'max':>5} {'mean':>8} {'worst image':>12}   (levels against torchvision)")
    for backend in ("torch",) if dali_missing() else ("torch", "dali-cpu"):
        found = differences(files, pixels, backend, wanted)
        seen = ~np.isnan(found[:, 0])
        greatest, mean, worst = found[seen, 0].max(), found[seen, 1].mean(), found[seen, 1].max()
        print(f"{backend:10} {seen.sum():7} {greatest:5.0f} {mean:8.4f} {worst:12.4f}")
        good &= bool(seen.all() and greatest <= MAX_LEVELS and mean <= MEAN_LEVELS)
    return 0 if good else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
