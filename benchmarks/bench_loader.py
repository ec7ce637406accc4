"""CPU time and rate of the loaders beside torchvision's PIL pipeline in a DataLoader, in one run.

    python benchmarks/bench_loader.py [FOLDER] [--workers 2] [--repeats 7] [--copies 3] [--out FILE]

Everybody makes random-resized-crop 224 with a flip in batches of 64. The rival is the pipeline of torchvision's training
references: Pillow, crop, flip, float32, normalised. Ours hands over uint8, because the model normalises; so the rival
stands in the table a second time without its last step, which is the stricter comparison, of decoding alone. CPU time
is that of this process and its children, which holds on a busy machine where images per second do not. The contenders
take turns; one ratio is formed per turn, so a machine that slows down for a while slows down all. Start-up (imports,
workers, pipeline) is not counted: each contender has delivered a first epoch before the clock starts, and stays alive.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from imgcls_fast.core import env
from imgcls_fast.core.manifest import LabelSpace, Manifest, PathList
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.data.augment import Augment
from imgcls_fast.data.loader import dali_missing, open_loader
from imgcls_fast.data.sampler import Sampler
from imgcls_fast.data.scan import pillow_flags, probe

SIZE, BATCH = 224, 64
PIXELS = Pixels(SIZE, 0.875, "bilinear", "rgb", "apply", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RIVAL = "torchvision PIL"
STRICT = "torchvision PIL, uint8"
GOAL = 0.55  # of the rival's CPU time, for dali-cpu


def default_folder() -> Path:
    """jpeg_full of the shared test data."""
    shared = os.environ.get("IMGCLS_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(shared) / "jpeg_full" / "images"


def manifest_of(files: list[Path]) -> Manifest:
    """A manifest of files that are known to be good."""
    head = probe([os.fsencode(path) for path in files], 2)
    n = len(files)
    return Manifest(
        root=Path("/"),
        paths=PathList.of(str(path.resolve()) for path in files),
        labels=LabelSpace.single(["image"]),
        label=np.zeros(n, np.int32),
        split=np.zeros(n, np.uint8),
        group=np.full(n, -1, np.int32),
        width=np.asarray(head["width"], np.int32),
        height=np.asarray(head["height"], np.int32),
        orientation=np.asarray(head["orientation"], np.uint8),
        digest=np.zeros((n, 16), np.uint8),
        flags=pillow_flags(head),
    )


class _Files(Dataset):  # type: ignore[type-arg]
    """What torchvision's references do: open, convert, crop, flip; then float32 and normalised, or left as uint8."""

    def __init__(self, files: list[Path], normalised: bool) -> None:
        self.files = files
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(PIXELS.mean, PIXELS.std)] if normalised else []
        self.transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor(), *last])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def rival(files: list[Path], workers: int, *, normalised: bool) -> Callable[[int], Iterator[int]]:
    """torchvision's PIL pipeline in a DataLoader with persistent workers."""
    loader = DataLoader(
        _Files(files, normalised),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def epoch(number: int) -> Iterator[int]:
        for batch in loader:
            yield len(batch)

    return epoch


def ours(files: list[Path], backend: str, workers: int) -> Callable[[int], Iterator[int]]:
    """One of our loaders."""
    augment = Augment((0.08, 1.0))
    sampler = Sampler(manifest_of(files), np.arange(len(files)), PIXELS, BATCH, seed=0, augment=augment)
    loader = open_loader(sampler, backend, workers=workers)

    def epoch(number: int) -> Iterator[int]:
        for batch in loader.epoch(number):
            yield len(batch)

    return epoch


def cpu_s() -> float:
    """CPU seconds of this process, of its children that ended, and of those that live."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in own) + sum(_live_child_cpu_s())


def _live_child_cpu_s() -> Iterator[float]:
    # getrusage counts children when they have ended; persistent workers go on living
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread or child that has ended meanwhile
            for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                yield (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(epoch: Callable[[int], Iterator[int]], number: int) -> dict[str, float]:
    """CPU milliseconds per image and images per second of one epoch."""
    cpu, wall = cpu_s(), time.perf_counter()
    images = sum(epoch(number))
    return {"cpu_ms": (cpu_s() - cpu) / images * 1e3, "images_per_s": images / (time.perf_counter() - wall)}


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    name = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    if not dali_missing():
        from nvidia import dali

        versions["dali"] = dali.__version__
    return {
        "cpu": name or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        **versions,
    }


def run(files: list[Path], workers: int, repeats: int) -> dict[str, Any]:
    """Measure all contenders in turns; ratios are to the rival of the same turn."""
    contenders = {name: rival(files, workers, normalised=name == RIVAL) for name in (RIVAL, STRICT)}
    for backend in ("torch",) if dali_missing() else ("dali-cpu", "torch"):
        contenders[backend] = ours(files, backend, workers)
    for epoch in contenders.values():
        measure(epoch, 0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, epoch in contenders.items():
            found[name].append(measure(epoch, turn + 1))
    result: dict[str, Any] = {}
    for name, turns in found.items():
        cpu = [turn["cpu_ms"] for turn in turns]
        ratios = [mine / theirs["cpu_ms"] for mine, theirs in zip(cpu, found[RIVAL], strict=True)]
        rates = [turn["images_per_s"] for turn in turns]
        result[name] = {"cpu_ms_per_image": spread(cpu), "images_per_s": spread(rates), "cpu_ratio": spread(ratios)}
    return result


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'loader':22} {'CPU ms/image':>24} {'images/s':>22} {'CPU time / rival':>24}"]
    for name, row in result.items():
        cells = [
            f"{row[key]['median']:.{digits}f} ({row[key]['min']:.{digits}f}-{row[key]['max']:.{digits}f})"
            for key, digits in (("cpu_ms_per_image", 2), ("images_per_s", 0), ("cpu_ratio", 3))
        ]
        lines.append(f"{name:22} {cells[0]:>24} {cells[1]:>22} {cells[2]:>24}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    parser.add_argument("--workers", type=int, default=2, help="processes of a DataLoader, threads of DALI")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--copies", type=int, default=3, help="times that an epoch holds each file")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<machine>/loader.json)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"no such folder: {args.folder}")
    torch.set_num_threads(1)
    files = sorted(path for path in args.folder.iterdir() if path.is_file()) * args.copies
    facts = machine() | {"images": len(files), "workers": args.workers, "repeats": args.repeats, "batch": BATCH}
    result = run(files, args.workers, args.repeats)
    print(f"{facts['cpu']}, {facts['cores']} cores; random-resized-crop {SIZE} + flip, {len(files)} images an epoch, "
          f"{args.workers} workers; median (least-greatest) of {args.repeats} turns")  # fmt: skip
    print(table(result))
    out = args.out or Path(__file__).parent / "results" / env.machine_slug() / "loader.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, "result": result}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}")
    if "dali-cpu" in result:
        ratio = result["dali-cpu"]["cpu_ratio"]["median"]
        print(f"dali-cpu needs {ratio:.3f} of the CPU time of {RIVAL} (goal: at most {GOAL})")
        return 0 if ratio <= GOAL else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
