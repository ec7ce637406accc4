"""kill -9 at random instants of an INT8 export: is a process left, or half an artefact?

    python benchmarks/kill_export.py --kills 30

Trains a tiny network, exports it once undisturbed with `imgcls-fast export RUN --onnx --precision int8`, then again and again
with SIGKILL to the command, to its quantisation process, or to both. After each kill nothing of it may run, what index.json names
must be whole, the bundle must be the same; the next export must remove what was left. Prints a table; exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

VICTIMS = ("parent", "child", "both")
SETTINGS = {
    "model.arch": "small-cnn", "model.args": '{"width": 16}', "pixels.size": "32", "train.epochs": "2", "train.batch_size": "16",
    "train.threads": "1", "train.workers": "1", "train.baseline": "false", "train.precision": "fp32", "train.device": "cpu",
    "evaluate.bootstrap": "20",
}  # fmt: skip
LINGER_S = 3.0  # within this time a process must have ended


@dataclass
class Outcome:
    """What happened to the exports whose victim was the same."""

    victim: str
    kills: int = 0
    ended_before: int = 0
    places: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def write_images(folder: Path) -> Path:
    """Three classes of noisy 40 x 32 JPEGs: 96 for training, 48 for validation."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 48)):
        for k in range(count):
            image = draw.integers(0, 120, (32, 40, 3))
            image[..., k % 3] += 90
            place = folder / split / "abc"[k % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype("uint8")).save(place / f"{k:03}.jpg", quality=90)
    return folder


def command(*words: str) -> subprocess.Popen[str]:
    """One `imgcls-fast ...` with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    whole = [sys.executable, "-m", "imgcls_fast", *words]
    return subprocess.Popen(whole, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def export(run: Path, quantizer: str) -> subprocess.Popen[str]:
    """An export to INT8 that the gate lets pass whatever the accuracy is."""
    return command("export", str(run), "--onnx", "--precision", "int8", "--max-drop", "100", "--search", "0",
                   "--set", f"export.quantizer={quantizer}")  # fmt: skip


def processes_of(run: Path) -> list[int]:
    """Living processes whose command line names the run: the export, and the process that quantises for it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if str(run).encode() in (entry / "cmdline").read_bytes() and state != "Z":
                found.append(int(entry.name))
    return found


def kill_once(process: subprocess.Popen[str], run: Path, victim: str, delay_s: float, further_s: float) -> str | None:
    """SIGKILL after a while; where that was, or None when there was nobody to kill any more.

    Args:
        delay_s: since the start; the child, if it is a victim, is waited for.
        further_s: since the child was first seen.
    """
    deadline = time.monotonic() + delay_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    while process.poll() is None and victim != "parent" and not children_of(process, run):
        time.sleep(0.01)
    if victim != "parent":
        time.sleep(further_s)
    children = children_of(process, run)
    victims = [*([process.pid] if victim != "child" else []), *(children if victim != "parent" else [])]
    if process.poll() is not None or not victims:
        return None
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return "while quantising" if children else "before or after quantising"


def children_of(process: subprocess.Popen[str], run: Path) -> list[int]:
    """Processes that work for an export."""
    return [pid for pid in processes_of(run) if pid != process.pid]


def faults_of(run: Path, process: subprocess.Popen[str], victim: str, bundle: dict[str, str]) -> list[str]:
    """Everything that is wrong after a kill."""
    _, errors = process.communicate(timeout=120)
    found = []
    if victim == "child" and process.returncode not in (0, 1):
        found.append(f"the export ended with {process.returncode}: {errors[-300:]}")
    if victim == "child" and process.returncode == 1 and "E003" not in errors:
        found.append(f"the error is not E003: {errors[-300:]}")
    end = time.monotonic() + LINGER_S
    while processes_of(run) and time.monotonic() < end:
        time.sleep(0.01)
    found += [f"process {pid} is still running" for pid in processes_of(run)]
    if digests(run / "bundle") != bundle:
        found.append("the bundle has changed")
    return found + half_made(run / "exports")


def half_made(exports: Path) -> list[str]:
    """Visible exports that are not whole, and names in index.json without one."""
    from imgcls_fast.core.exports import list_exports
    from imgcls_fast.core.files import read_sealed, sha256_file

    found = [f"{e.folder.name} is damaged" for e in list_exports(exports) if sha256_file(e.path) != e.meta["sha256"]]
    visible = {folder.name for folder in exports.glob("[!.]*/")} if exports.is_dir() else set[str]()
    found += [f"{name} has no meta.json" for name in visible - {export.folder.name for export in list_exports(exports)}]
    index = exports / "index.json"
    named = set(read_sealed(index).values()) if index.exists() else set()
    return found + [f"index.json names {name}, which is not there" for name in named - visible]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    from imgcls_fast.core.files import sha256_file

    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def remove_visible(exports: Path) -> None:
    """Let the next export begin anew; hidden folders of killed ones stay, for it to remove."""
    import shutil

    for entry in list(exports.glob("[!.]*")):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def timed(process: subprocess.Popen[str], run: Path) -> tuple[float, float]:
    """Seconds of an undisturbed export, and of its child."""
    begun, seen = time.monotonic(), list[float]()
    while process.poll() is None:
        seen += [time.monotonic()] if children_of(process, run) else []
        time.sleep(0.02)
    _, errors = process.communicate()
    if process.returncode or not seen:
        raise SystemExit(f"the undisturbed export failed:\n{errors}")
    return time.monotonic() - begun, seen[-1] - seen[0]


def torture(run: Path, quantizer: str, kills: int, draw: random.Random) -> list[Outcome]:
    """Kill until `kills` kills have been made; the undisturbed exports before and after must succeed."""
    outcomes = {victim: Outcome(victim) for victim in VICTIMS}
    bundle = digests(run / "bundle")
    span_s, at_work_s = timed(export(run, quantizer), run)
    while (done := sum(outcome.kills for outcome in outcomes.values())) < kills:
        outcome = outcomes[VICTIMS[done % len(VICTIMS)]]
        remove_visible(run / "exports")
        process = export(run, quantizer)
        aimed = outcome.victim == "child" or done % 2 == 0  # these kills land while the child is at work
        if aimed:
            while process.poll() is None and not children_of(process, run):
                time.sleep(0.01)
        child_s = draw.uniform(0, at_work_s)
        place = kill_once(
            process, run, outcome.victim, child_s if aimed else draw.uniform(0, span_s), 0 if aimed else child_s
        )
        outcome.faults += faults_of(run, process, outcome.victim, bundle)
        outcome.kills += place is not None
        outcome.ended_before += place is None
        outcome.places.update([place] if place else [])
    last = export(run, quantizer)
    _, errors = last.communicate()
    left = [path.name for path in (run / "exports").glob(".*")]
    if last.returncode or left:
        outcomes["both"].faults.append(f"the last export ended with {last.returncode}, left {left}: {errors[-500:]}")
    return list(outcomes.values())


def main() -> int:
    """Run the test and print the table; 0 when nothing was left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--quantizer", choices=("modelopt", "onnxruntime"), default="modelopt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-export-") as name:
        work = Path(name)
        settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        trained = command("train", str(write_images(work / "data")), "--out", str(work / "run"), *settings)
        _, errors = trained.communicate()
        if trained.returncode:
            raise SystemExit(f"training failed:\n{errors}")
        outcomes = torture(work / "run", options.quantizer, options.kills, random.Random(options.seed))
    print(f"{'victim':<8} {'kills':>5} {'ended before':>12} {'faults':>6}  where")
    for o in outcomes:
        places = ", ".join(f"{n} {place}" for place, n in o.places.most_common())
        print(f"{o.victim:<8} {o.kills:>5} {o.ended_before:>12} {len(o.faults):>6}  {places}")
        for text in o.faults:
            print(f"  {text}")
    return int(any(o.faults for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
