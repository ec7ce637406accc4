"""The default recipe on a folder of photos, from scratch on the CPU: test accuracy and wall time over seeds and loaders.

    python benchmarks/train_photos.py [FOLDER] [--seeds 0 1 2] [--loaders dali-cpu torch] [--out FILE]

FOLDER holds train/val/test (default: photos of the shared test data). Each run is a process of its own, `imgcls-fast train
FOLDER --seed S --loader L` and nothing else, so everything is what `auto` chooses; wall time includes the start of Python,
the scan, the baseline and the report. Exit code 1 where a loader's mean accuracy is below 0.70 or a run takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from imgcls_fast.core import env

GOAL, LIMIT_S = 0.70, 600.0


def default_folder() -> Path:
    shared = os.environ.get("IMGCLS_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(shared) / "photos"


def train(folder: Path, seed: int, loader: str, place: Path) -> dict[str, Any]:
    """One run of the command line, and what it reached on the test rows."""
    words = [sys.executable, "-m", "imgcls_fast", "train", str(folder), "--seed", str(seed), "--loader", loader]
    begin = time.monotonic()
    done = subprocess.run([*words, "-o", str(place), "--json"], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    test = json.loads(done.stdout)["test"]
    return {
        "loader": loader, "seed": seed, "accuracy": test["accuracy"], "ci": test["accuracy_ci"], "macro_f1": test["macro_f1"],
        "ece": test["ece"], "images": test["n"], "wall_s": round(seconds, 1), "load_after": os.getloadavg()[0],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--loaders", nargs="+", default=["dali-cpu", "torch"])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<machine>/train_photos.json)")
    options = parser.parse_args()
    facts = env.machine_facts()
    out = options.out or Path(__file__).parent / "results" / env.machine_slug() / "train_photos.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="train-photos-") as work:
        for seed in options.seeds:
            for loader in options.loaders:
                runs.append(train(options.folder, seed, loader, Path(work) / f"{loader}-{seed}"))
                last = runs[-1]
                print(
                    f"{loader:<9} seed {seed}  test accuracy {last['accuracy']:.3f}  {last['wall_s']:.0f} s", flush=True
                )
                out.write_text(json.dumps({"machine": facts, "runs": runs}, indent=2) + "\n", encoding="utf-8")
    fine = True
    for loader in options.loaders:
        mine = [run for run in runs if run["loader"] == loader]
        accuracy = [run["accuracy"] for run in mine]
        slowest = max(run["wall_s"] for run in mine)
        print(f"{loader:<9} mean {statistics.mean(accuracy):.3f} (least {min(accuracy):.3f}), slowest {slowest:.0f} s")
        fine &= statistics.mean(accuracy) >= GOAL and slowest < LIMIT_S
    print(f"written to {out}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
