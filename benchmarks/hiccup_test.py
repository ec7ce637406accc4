"""Data out of reach for seconds, at random moments: is a row ever lost?

    python benchmarks/hiccup_test.py --hiccups 30

Trains the tiny network of `kill_test.py` with each CPU loader, once undisturbed, then again and again while the image
folders are renamed away for 1 to 20 seconds and back. A run may wait, or stop with D015 and a checkpoint; it is then
resumed. Prints a table; exits with 1 when final weights differ from the undisturbed run's, when a row was quarantined,
when a run ended in another way than by finishing or D015, or when files are left behind.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under PYTHONSAFEPATH

from kill_test import LOADERS, STATE, events, fingerprints, litter, save_figures, start, write_images

UNREACHABLE = "D015"


@dataclass
class Outcome:
    """What happened to the runs of one loader."""

    loader: str
    hiccups: int = 0
    runs: int = 0
    waited: int = 0  # hiccups that the process survived
    stopped: int = 0  # hiccups that ended in D015 and a resumed run
    differing: int = 0
    quarantined: int = 0
    faults: list[str] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost."""
        return not (self.differing or self.quarantined or self.faults)


class Away:
    """Moves image folders out of the way and back."""

    def __init__(self, data: Path, splits: tuple[str, ...]) -> None:
        self._pairs = [(data / split, data.parent / f"{data.name}-{split}-away") for split in splits]

    def __enter__(self) -> None:
        for here, there in self._pairs:
            here.rename(there)

    def __exit__(self, *unused: object) -> None:
        for here, there in self._pairs:
            there.rename(here)


def place_of(run: Path) -> str:
    """Which part of its work a run has reached."""
    if (run / "bundle").exists():
        return "judging"
    seen = events(run)
    if "start" not in seen:
        return "before the first step"
    return "validation" if seen[-1] == "validate" else "training"


def disturb(process: subprocess.Popen[bytes], run: Path, data: Path, span_s: float, longest_s: float,
            outcome: Outcome, draw: random.Random) -> bool:  # fmt: skip
    """One hiccup at a random instant of a process; False when the process had ended before."""
    while process.poll() is None and not (run / "manifest.npz").exists():
        time.sleep(0.01)
    wait = draw.uniform(0, span_s)
    deadline = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is not None:
        return False
    splits = draw.choice((("train",), ("val",), ("train", "val", "test")))
    outcome.hiccups += 1
    outcome.places[place_of(run)] += 1
    with Away(data, splits):
        time.sleep(draw.uniform(1, longest_s))
    return True


def finish(run: Path, data: Path, hiccups: int, span_s: float, longest_s: float, outcome: Outcome,
           draw: random.Random) -> None:  # fmt: skip
    """One run: disturbed one to three times (while hiccups are left), resumed after each stop, then left to end."""
    planned = draw.randint(1, 3)
    while True:
        process = start(run, None if (run / "manifest.npz").exists() else data, outcome.loader)
        disturbed = 0
        while planned and outcome.hiccups < hiccups and disturb(process, run, data, span_s, longest_s, outcome, draw):
            planned, disturbed = planned - 1, disturbed + 1
        _, errors = process.communicate()
        text = errors.decode(errors="replace")
        if process.returncode == 0:
            outcome.waited += disturbed
            return
        if not disturbed or UNREACHABLE not in text:
            outcome.faults.append(f"{run.name}: exit code {process.returncode}: {text[-1500:]}")
            return
        outcome.waited += disturbed - 1
        outcome.stopped += 1


def lost_rows(run: Path) -> int:
    """Number of rows that a run has put aside, in its list or in its events."""
    listed = (run / "quarantine.csv").read_text("utf-8").splitlines()[1:]
    return len(listed) + events(run).count("quarantine")


def undisturbed(loader: str, data: Path, work: Path) -> tuple[list[str], float]:
    """(fingerprints, seconds from the first step to the end) of a run that is left alone."""
    run = work / f"{loader}-reference"
    process = start(run, data, loader)
    while process.poll() is None and not (run / "manifest.npz").exists():
        time.sleep(0.01)
    begin = time.monotonic()
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed:\n{errors.decode(errors='replace')}")
    return fingerprints(run), time.monotonic() - begin


def torture(loader: str, hiccups: int, longest_s: float, data: Path, work: Path, draw: random.Random) -> Outcome:
    """Disturb runs of one loader until `hiccups` have happened, and finish each run."""
    outcome = Outcome(loader)
    expected, span_s = undisturbed(loader, data, work)
    while outcome.hiccups < hiccups and not outcome.faults:
        run = work / f"{loader}-{outcome.runs}"
        outcome.runs += 1
        finish(run, data, hiccups, span_s / 2, longest_s, outcome, draw)
        if not outcome.faults:
            wrong = [name for name, a, b in zip(STATE, fingerprints(run), expected, strict=True) if a != b]
            outcome.differing += bool(wrong)
            outcome.quarantined += lost_rows(run)
            outcome.faults += [f"{run.name}: left behind {name}" for name in litter(run)]
    return outcome


def main() -> int:
    """Run the test and print the table; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hiccups", type=int, default=30, help="number of hiccups over all loaders")
    parser.add_argument("--longest", type=float, default=20.0, help="longest hiccup in seconds; the shortest is 1")
    parser.add_argument("--seed", type=int, default=0, help="seed for moments and lengths")
    parser.add_argument("--loaders", default=",".join(LOADERS))
    parser.add_argument("--keep", type=Path, help="folder for the runs; a temporary one if not given")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    loaders, draw, outcomes = options.loaders.split(","), random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="hiccup-test-") as name:
        work = options.keep or Path(name)
        data = write_images(work / "data")
        for k, loader in enumerate(loaders):
            share = options.hiccups // len(loaders) + (k < options.hiccups % len(loaders))
            outcomes.append(torture(loader, share, options.longest, data, work, draw))
    print(
        f"{'loader':<10} {'hiccups':>7} {'runs':>5} {'waited':>6} {'stopped':>7} {'differing':>9} {'lost rows':>9}  where"
    )
    for o in outcomes:
        places = ", ".join(f"{n} {place}" for place, n in o.places.most_common())
        print(
            f"{o.loader:<10} {o.hiccups:>7} {o.runs:>5} {o.waited:>6} {o.stopped:>7} {o.differing:>9} {o.quarantined:>9}  {places}"
        )
        for text in o.faults:
            print(f"  {text}")
    if options.save:
        save_figures("hiccups", outcomes, seed=options.seed, longest_s=options.longest)
    return 0 if all(o.ok for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
