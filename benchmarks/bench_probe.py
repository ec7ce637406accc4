"""Headers per second of the probe, beside Pillow's ``Image.open`` + ``getexif`` over the same files in the same run.

    python benchmarks/bench_probe.py FOLDER [--threads 2] [--repeats 7] [--copies 4] [--json FILE]

Files are read once before the first clock starts, so the figures are for a warm page cache. The contenders take turns,
and one ratio is formed per turn: a machine that slows down for a while slows down both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import PIL
from PIL import Image

from imgcls_fast import _C

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def ask_pillow(paths: list[Path]) -> list[tuple[int, int, int]]:
    """(width, height, orientation) of each file by Pillow."""
    answers = []
    for path in paths:
        with Image.open(path) as image:
            orientation = image.getexif().get(274, 1)
            answers.append((*image.size, orientation if orientation in range(1, 9) else 1))
    return answers


def ask_probe(paths: list[Path], threads: int) -> list[tuple[int, int, int]]:
    """(width, height, orientation) of each file by the probe."""
    rows = _C.probe([os.fsencode(path) for path in paths], threads)
    return list(zip(rows["width"].tolist(), rows["height"].tolist(), rows["orientation"].tolist(), strict=True))


def headers_per_s(ask: Callable[[], object], count: int) -> float:
    """Rate of one call that answers for `count` files."""
    start = time.perf_counter()
    ask()
    return count / (time.perf_counter() - start)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def readable_by_pillow(folder: Path) -> list[Path]:
    """The image files of a folder, without those at which Pillow raises."""
    good = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        try:
            ask_pillow([path])
        except (OSError, SyntaxError, ValueError):
            continue
        good.append(path)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--copies", type=int, default=4, help="times that the probe's list holds each file")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    paths = readable_by_pillow(args.folder)
    if not paths:
        print(f"no readable images in {args.folder}", file=sys.stderr)
        return 2
    differ = sum(a != b for a, b in zip(ask_pillow(paths), ask_probe(paths, args.threads), strict=True))
    many = paths * args.copies
    rates: dict[str, list[float]] = {"pillow": [], "probe_1_thread": [], "probe": []}
    for _ in range(args.repeats):
        rates["pillow"].append(headers_per_s(lambda: ask_pillow(paths), len(paths)))
        rates["probe_1_thread"].append(headers_per_s(lambda: ask_probe(many, 1), len(many)))
        rates["probe"].append(headers_per_s(lambda: ask_probe(many, args.threads), len(many)))

    result: dict[str, object] = {
        "files": len(paths),
        "different_answers": differ,
        "threads": args.threads,
        "repeats": args.repeats,
        "headers_per_s": {name: spread(values) for name, values in rates.items()},
        "probe_over_pillow": spread([a / b for a, b in zip(rates["probe"], rates["pillow"], strict=True)]),
        "machine": {"cpus": os.cpu_count(), "cpu": platform.processor() or platform.machine()},
        "versions": {"python": platform.python_version(), "pillow": PIL.__version__, "build": _C.build_info()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
