"""Compile the probe with AddressSanitizer and UndefinedBehaviorSanitizer, and feed it mutated headers.

    python benchmarks/fuzz_probe/run.py --count 10000000

The seeds are small files of the six formats in the variants of `mutate_images.py`, with EXIF, XMP, profiles, text and
several pages. Exits with 1 on the first crash, finding of a sanitizer, or answer without sense.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
sys.path.insert(0, str(HERE.parent))


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def compile_driver(out: Path, optimise: str = "-O2") -> Path:
    """Build the driver with both sanitizers; raises CalledProcessError when that fails."""
    sources = [HERE / "fuzz_probe.cpp", CSRC / "probe.cpp", *sorted((CSRC / "probe").glob("*.cpp"))]
    flags = ["-std=c++17", optimise, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    subprocess.run(
        [str(compiler()), *flags, "-o", str(out), *map(str, sources)], check=True, capture_output=True, text=True
    )
    return out


def write_seeds(folder: Path) -> list[Path]:
    """The files whose headers are mutated."""
    from mutate_images import SUFFIX, variants

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, (kind, content) in enumerate(variants(1)):
        paths.append(folder / f"{k:02}.{SUFFIX[kind]}")
        paths[-1].write_bytes(content)
    return paths


def fuzz(driver: Path, seeds: list[Path], count: int, seed: int) -> dict[str, Any]:
    """One run of the driver: its figures, and the finding if there was one."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        [str(driver), str(count), str(seed), *map(str, seeds)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        return {"inputs": 0, "crash": {"seed": seed, "exit": done.returncode, "text": done.stderr[-4000:]}}
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> int:
    from imgcls_fast.core import env

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000_000, help="mutated headers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file (default: results/MACHINE/fuzz_probe.json)")
    options = parser.parse_args()
    pieces, began = 10, time.monotonic()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        driver, seeds = compile_driver(Path(place) / "fuzz_probe"), write_seeds(Path(place) / "seeds")
        for k in range(pieces):
            runs.append(fuzz(driver, seeds, -(-options.count // pieces), options.seed + k))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    crashes = [run["crash"] for run in runs if "crash" in run]
    inputs, seconds = sum(run["inputs"] for run in runs), sum(run.get("seconds", 0.0) for run in runs)
    totals = {
        name: sum(run.get(name, 0) for run in runs) for name in ("ok", "empty", "foreign", "damaged", "sound_jpegs")
    }
    formats = [sum(column) for column in zip(*(run["formats"] for run in runs if "formats" in run), strict=True)]
    out = options.out or HERE.parent / "results" / env.machine_slug() / "fuzz_probe.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "inputs": inputs, "crashes": crashes, "seed": options.seed, "sanitizers": ["address", "undefined"], **totals,
        "formats": dict(zip(("none", "JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"), formats, strict=False)),
        "inputs_per_second": round(inputs / seconds) if seconds else 0, "wall_s": round(time.monotonic() - began, 1),
    }  # fmt: skip
    out.write_text(json.dumps({"machine": env.machine_facts(), **figures}, indent=1) + "\n", "utf-8")
    print(f"{inputs:,} headers, {len(crashes)} crashes, {figures['inputs_per_second']:,} a second: {out}")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
