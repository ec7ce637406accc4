"""A new user's hour: real commands on photos, solar cells, blood cells and three images per class, and what each must print.

    python benchmarks/new_user.py                   all steps of new_user.toml; needs the shared images (IMGCLS_SHARED_DATA)
    python benchmarks/new_user.py --short           the steps that are marked `short`, on small images drawn here
    python benchmarks/new_user.py --only 1.8,P22    the steps of these points

Writes transcript.md into --out: each command, what it printed (with the machine's paths replaced), and a table of points. The
exit code is 1 if a line that must be there is missing, or one that must not is there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
STEPS = HERE / "new_user.toml"
LIMIT_S = 900  # of one command, on a machine that does other things as well
NEVER = (  # in what no command prints
    r"Traceback \(most recent call last\)",
    r"this is a mistake in imgcls-fast",
    r"pip install '?imgcls-fast",  # the name is not registered: whoever registers it would be installed
    r"^.*\w*Warning: ",
)


@dataclass(frozen=True)
class Step:
    """A command and what is right.

    Args:
        point: of the list of faults; "": prepares what later steps need.
        promise: what must be true, in a sentence.
        run: lines for bash. `$PHOTOS`, `$SOLAR`, `$BLOOD` and `$THREE` are the data, `$QUICK` settings for a short training.
        right: regular expressions that must be found in the output, in any line.
        wrong: that must not be found, beside NEVER.
        code: exit code; None: any.
        short: also a step of the short form.
    """

    point: str
    promise: str
    run: str
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    code: int | None = None
    short: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a step printed, and which expectations it broke."""

    step: Step
    output: str
    code: int
    seconds: float
    broken: tuple[str, ...]


def read_steps(path: Path = STEPS) -> list[Step]:
    """All steps, in the order in which they run."""
    known = set(Step.__dataclass_fields__)
    steps = []
    for number, entry in enumerate(tomllib.loads(path.read_text("utf-8"))["step"], 1):
        if unknown := set(entry) - known:
            raise ValueError(f"step {number} of {path}: unknown {', '.join(sorted(unknown))}")
        steps.append(Step(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}))
    return steps


def judged(step: Step, output: str, code: int) -> tuple[str, ...]:
    """Expectations that do not hold, in words."""
    broken = [f"missing: {line}" for line in step.right if not re.search(line, output, re.MULTILINE)]
    broken += [f"must not be there: {line}" for line in (*step.wrong, *NEVER) if re.search(line, output, re.MULTILINE)]
    if step.code is not None and code != step.code:
        broken.append(f"exit code {code} instead of {step.code}")
    return tuple(broken)


# --- the data ---------------------------------------------------------------------------------------------------------


def shared_data(work: Path) -> dict[str, str]:
    """The four data sets: three of the shared images, and three photos per class."""
    root = Path(os.environ.get("IMGCLS_SHARED_DATA", HERE.parents[1] / "shared" / "data")).resolve()
    if not (root / "photos").is_dir():
        sys.exit(f"{root} holds no photos: set IMGCLS_SHARED_DATA, or use --short")
    three = work / "three"
    for folder in sorted((root / "photos" / "train").iterdir()):
        (three / folder.name).mkdir(parents=True)
        for photo in sorted(folder.iterdir())[:3]:
            shutil.copy(photo, three / folder.name)
    tables = {name.upper().split("_")[0]: str(root / name / "MANIFEST.csv") for name in ("solar_cells", "blood_cells")}
    return {"PHOTOS": str(root / "photos"), "THREE": str(three), **tables}


def drawn_data(work: Path) -> dict[str, str]:
    """The same four forms, small: five classes by colour in two splits, uneven gray tables, and labels joined by a bar."""
    for split, count in (("train", 24), ("test", 8)):
        for k, name in enumerate(("daisy", "dandelion", "roses", "sunflowers", "tulips")):
            for n in range(count):
                _draw(work / "photos" / split / name / f"{name}_{n}.png", k, (k, n, count))
                if split == "train" and n < 3:
                    _draw(work / "three" / name / f"{n}.png", k, (k, n, 99))
    solar, blood = ["path,label,split"], ["path,label,split"]
    for n in range(60):
        split = "train" if n < 40 else "test"
        kind = 3 if n % 20 == 0 else n % 2
        _draw(work / "solar" / f"{n}.png", kind, (7, n), gray=True)
        solar.append(f"{n}.png,{('functional', 'defective', '', 'probably')[kind]},{split}")
        _draw(work / "blood" / f"{n}.jpg", n % 4, (8, n))
        blood.append(f"{n}.jpg,{('RBC', 'RBC|WBC', 'Platelets|RBC', 'Platelets|RBC|WBC')[n % 4]},{split}")
    for name, lines in (("solar", solar), ("blood", blood)):
        (work / name / "MANIFEST.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return {"PHOTOS": str(work / "photos"), "THREE": str(work / "three"),
            "SOLAR": str(work / "solar" / "MANIFEST.csv"), "BLOOD": str(work / "blood" / "MANIFEST.csv")}  # fmt: skip


def _draw(path: Path, kind: int, seed: Sequence[int], gray: bool = False) -> None:
    """An image of noise around the colour of its class; no two are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(seed)).normal(0, 40, (40, 40) if gray else (40, 40, 3))
    colours = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200))
    base = 60 + 50 * kind if gray else np.array(colours[kind])
    Image.fromarray(np.clip(noise + base, 0, 255).astype(np.uint8)).save(path)


# --- running ----------------------------------------------------------------------------------------------------------


def run_steps(steps: Iterable[Step], work: Path, data: Mapping[str, str], *, limit_s: float = LIMIT_S) -> list[Outcome]:
    """Run each step as a process of its own in `work`, one after the other, whatever the others did."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("IMGCLS_", "OMP_", "COLUMNS"))},
        **data,
        "IMGCLS_RUNS": str(work / "runs"),
        "IMGCLS_CACHE": str(work / "cache"),
        "TORCH_HOME": str(work / "torch"),
        "HOME": str(work),
        "QUICK": "--img-size 32 --set train.threads=1 --workers 1",
        "NO_COLOR": "1",
        "WORK": str(work),
    }
    found = []
    for step in steps:
        began = time.monotonic()
        script = f"exec 2>&1\n{step.run}"
        command = ["timeout", "-k", "5", str(limit_s), "bash", "-c", script]
        done = subprocess.run(command, cwd=work, env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        output = done.stdout.decode("utf-8", "backslashreplace").replace("\r", "\n")
        outcome = Outcome(
            step, output, done.returncode, time.monotonic() - began, judged(step, output, done.returncode)
        )
        found.append(outcome)
        told = "ok" if not outcome.broken else "; ".join(outcome.broken)
        print(f"{step.point or 'prepare':8} {outcome.seconds:6.1f} s  {step.promise}: {told}", flush=True)
    return found


def transcript(outcomes: Sequence[Outcome], places: Mapping[str, str]) -> str:
    """Markdown: every command with what it printed, then the table of points; paths of this machine become names."""
    parts = [
        "# A new user's hour: transcript",
        "",
        "Made by `python benchmarks/new_user.py`; `>` marks a line that must be there.",
        "",
    ]
    for number, outcome in enumerate(outcomes, 1):
        step = outcome.step
        parts += [f"## {number}. {step.point or 'preparation'}: {step.promise}", "", "```text"]
        parts += [f"$ {line}" for line in step.run.strip().splitlines()]
        parts += [_marked(line, step) for line in outcome.output.rstrip().splitlines()]
        parts += [f"[exit code {outcome.code}]", "```", ""]
        parts += [f"**Not as promised**: {text}\n" for text in outcome.broken]
    return _without_paths("\n".join([*parts, table(outcomes), ""]), places)


def _marked(line: str, step: Step) -> str:
    return ("> " if any(re.search(right, line) for right in step.right) else "  ") + line


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per step with a point."""
    lines = ["| point | promise | as promised |", "| --- | --- | --- |"]
    for outcome in outcomes:
        if outcome.step.point:
            told = "yes" if not outcome.broken else "**no**: " + "; ".join(outcome.broken).replace("|", "\\|")
            lines.append(f"| {outcome.step.point} | {outcome.step.promise} | {told} |")
    return "\n".join(lines)


def _without_paths(text: str, places: Mapping[str, str]) -> str:
    for path in sorted(places, key=len, reverse=True):
        text = text.replace(path, places[path])
    return text


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="only the short steps, on images drawn here")
    parser.add_argument("--only", metavar="POINTS", help="points to run, e.g. 1.8,P22, after what prepares them")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="empty folder to work in; without it one that goes afterwards"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for transcript.md; without it none is written")
    args = parser.parse_args(words)
    steps = [step for step in read_steps() if step.short or not args.short]
    if args.only:
        steps = [step for step in steps if not step.point or step.point in args.only.split(",")]
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        data = drawn_data(work) if args.short else shared_data(work)
        began = time.monotonic()
        outcomes = run_steps(steps, work, data)
    points = [outcome for outcome in outcomes if outcome.step.point]
    broken = [outcome for outcome in outcomes if outcome.broken]
    print(f"\n{table(outcomes)}\n\n{len(points) - sum(bool(o.broken) for o in points)} of {len(points)} promises hold, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        places = {str(work): "WORK", str(HERE.parent): "CHECKOUT", sys.prefix: "VENV"}
        places |= {
            str(Path(value).parent.parent if value.endswith(".csv") else Path(value).parent): "DATA"
            for value in data.values()
        }
        (args.out / "transcript.md").write_text(transcript(outcomes, places | {str(work): "WORK"}), "utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
