"""kill -9 at random instants: does the resumed run end in the very bits of the uninterrupted one?

    python benchmarks/kill_test.py --kills 30

Trains a tiny network with each CPU loader, once undisturbed, then again and again with SIGKILL at random instants while
every step writes a checkpoint, so that kills land inside epochs, inside saves, in validation and in the judgement. Prints
a table; exits with 1 when a final weight differs, a checkpoint was unreadable, or a file of a killed process is left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOADERS = ("torch", "dali-cpu")
SETTINGS = {
    "model.arch": "small-cnn", "model.args": '{"width": 8}', "model.drop_rate": "0.2", "pixels.size": "32", "train.epochs": "8",
    "train.batch_size": "8", "train.threads": "1", "train.workers": "1", "train.save_every": "0", "train.baseline": "false",
    "train.precision": "fp32", "train.device": "cpu", "evaluate.bootstrap": "20", "optim.sched": "onecycle", "optim.ema": "0.9",
}  # fmt: skip
STATE = "checkpoints/last/tensors.safetensors", "checkpoints/best/tensors.safetensors", "bundle/weights.safetensors"


@dataclass
class Outcome:
    """What happened to the runs of one loader."""

    loader: str
    kills: int = 0
    runs: int = 0
    differing: int = 0
    unreadable: int = 0
    litter: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost."""
        return not (self.differing or self.unreadable or self.litter or self.failures)


def write_images(folder: Path) -> Path:
    """Three classes of noisy 40 x 32 JPEGs: 64 for training, 24 for validation, 12 to test."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 24), ("test", 12)):
        for k in range(count):
            kind = k % 3
            image = draw.integers(0, 120, (32, 40, 3))
            image[..., kind] += 90
            place = folder / split / "abc"[kind]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype("uint8")).save(place / f"{k:03}.jpg", quality=90)
    return folder


def start(run: Path, data: Path | None, loader: str) -> subprocess.Popen[bytes]:
    """A training process: a new run on `data`, or (None) the continuation of `run`."""
    words = [sys.executable, "-m", "imgcls_fast", "train"]
    if data is None:
        words += [str(run), "--resume"]
    else:
        words += [str(data), "--out", str(run), "--set", f"train.loader={loader}"]
        for name, value in SETTINGS.items():
            words += ["--set", f"{name}={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IMGCLS_RUNS": str(run.parent), "MPLBACKEND": "Agg"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def events(run: Path) -> list[str]:
    """Names of the events that a run has logged so far."""
    try:
        lines = (run / "events.jsonl").read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line)["event"])
        except ValueError:
            continue  # the last line of a killed process
    return found


def kill_once(process: subprocess.Popen[bytes], run: Path, span_s: float, draw: random.Random) -> str | None:
    """SIGKILL a process at a random instant of its training; where that was, or None when it had ended before."""
    before = events(run).count("start")
    while process.poll() is None and events(run).count("start") == before:
        time.sleep(0.01)
    deadline = time.monotonic() + draw.uniform(0, span_s)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    if any(run.glob("checkpoints/.new*")):
        return "in a save"
    if (run / "bundle").exists():
        return "after the bundle"
    return "between saves"


def unreadable(run: Path) -> int:
    """Checkpoints that are there and not intact, or 1 when there have been some and none is left."""
    from imgcls_fast.core.errors import ModelError
    from imgcls_fast.training.checkpoint import read_checkpoint

    folder, bad, good = run / "checkpoints", 0, 0
    for name in ("last", "previous", "best"):
        if (folder / name).exists():
            try:
                read_checkpoint(folder / name)
                good += 1
            except ModelError:
                bad += 1
    return bad + (not good and "checkpoint" in events(run))


def fingerprints(run: Path) -> list[str]:
    """SHA-256 of the tensors of the last and best checkpoint, and of the bundle's weights."""
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in STATE]


def litter(run: Path) -> list[str]:
    """Hidden files that a finished run should not have."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*") if path.name != ".lock")


def torture(loader: str, kills: int, data: Path, work: Path, draw: random.Random) -> Outcome:
    """Kill runs of one loader until `kills` processes have died, and finish each run."""
    outcome = Outcome(loader)
    reference = work / f"{loader}-reference"
    process = start(reference, data, loader)
    while process.poll() is None and "start" not in events(reference):
        time.sleep(0.01)
    begin = time.monotonic()
    while process.poll() is None and not (reference / "bundle").exists():
        time.sleep(0.01)
    span_s = time.monotonic() - begin
    if process.wait():
        assert process.stderr
        raise SystemExit(f"the undisturbed run failed:\n{process.stderr.read().decode()}")
    expected = fingerprints(reference)
    while outcome.kills < kills:
        run = work / f"{loader}-{outcome.runs}"
        outcome.runs += 1
        finish(run, data, kills, outcome, span_s, draw)
        if not outcome.failures:
            wrong = [name for name, a, b in zip(STATE, fingerprints(run), expected, strict=True) if a != b]
            outcome.differing += bool(wrong)
            outcome.places.update(f"run {run.name}: other {name}" for name in wrong)
            outcome.litter += litter(run)
        if outcome.failures:
            break
    return outcome


def finish(run: Path, data: Path, kills: int, outcome: Outcome, span_s: float, draw: random.Random) -> None:
    """One run: killed four to eight times (while kills are left), each time continued, then left to end."""
    planned = draw.randint(4, 8)
    while True:
        process = start(run, None if (run / "manifest.npz").exists() else data, outcome.loader)
        if planned and outcome.kills < kills:
            planned -= 1
            place = kill_once(process, run, 1.1 * span_s / 4, draw)
            if place is not None:
                outcome.kills += 1
                outcome.places[place] += 1
                outcome.unreadable += unreadable(run)
                continue
        _, errors = process.communicate()
        if process.returncode:
            outcome.failures.append(errors.decode(errors="replace")[-2000:])
        return


def save_figures(name: str, outcomes: Sequence[Any], **settings: Any) -> None:
    """Write one outcome per loader to results/<machine>/<name>.json, beside what a reader needs to judge it."""
    from imgcls_fast.core import env

    path = Path(__file__).parent / "results" / env.machine_slug() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {**env.machine_facts(), **settings, "rows": [vars(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Run the test and print the table; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=30, help="number of kills over all loaders")
    parser.add_argument("--seed", type=int, default=0, help="seed for the instants")
    parser.add_argument("--loaders", default=",".join(LOADERS))
    parser.add_argument("--keep", type=Path, help="folder for the runs; a temporary one if not given")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    loaders, draw = options.loaders.split(","), random.Random(options.seed)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="kill-test-") as name:
        work = options.keep or Path(name)
        data = write_images(work / "data")
        for k, loader in enumerate(loaders):
            share = options.kills // len(loaders) + (k < options.kills % len(loaders))
            outcomes.append(torture(loader, share, data, work, draw))
    print(f"{'loader':<10} {'kills':>5} {'runs':>5} {'differing':>9} {'unreadable':>10} {'litter':>6}  where")
    for o in outcomes:
        places = ", ".join(f"{n} {place}" for place, n in o.places.most_common())
        print(
            f"{o.loader:<10} {o.kills:>5} {o.runs:>5} {o.differing:>9} {o.unreadable:>10} {len(o.litter):>6}  {places}"
        )
        for text in (*o.litter, *o.failures):
            print(f"  {text}")
    if options.save:
        save_figures("kills", outcomes, seed=options.seed)
    return 0 if all(o.ok for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
