"""Does the alarm ring when it should, and only then? The small set against itself, and with every contender slowed by a fifth.

    python benchmarks/alarm.py [--runs 10] [--delay 0.2] [--keep FOLDER] [--out FILE]

Runs the small set once as the past, then in turns as it is and delayed. Each undelayed run is compared with the past: no row may
be flagged. Each row of each delayed run is put alone among the undelayed rows of its turn and compared: the row must be flagged
in nine of ten. No run gets a second chance here, as `--against` gives it. About three minutes a turn; quieten the machine.
Exit code 1 when the alarm fails either way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from imgcls_fast.core import env
from imgcls_fast.measuring.results import Area, compare, read_results

ROOT = Path(__file__).resolve().parents[1]
Key = tuple[str, str, str, str]


def run_small(folder: Path, work: Path, delay: float) -> dict[str, Area]:
    """One run of the small set."""
    if not folder.exists():
        words = [
            "--small",
            "--results",
            str(folder),
            "--work",
            str(work),
            "--delay",
            str(delay),
            "-q",
            "-p",
            "no:cacheprovider",
        ]
        subprocess.run(
            [sys.executable, "-m", "pytest", "benchmarks", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
    (machine,) = folder.iterdir()
    return read_results(machine)


def with_row(run: dict[str, Area], delayed: dict[str, Area], key: Key) -> dict[str, Area]:
    """An undelayed run in which one row is that of the delayed one."""
    area = run[key[0]]
    rows = {row.key: row for row in delayed[key[0]].rows}
    changed = [rows[row.key] if row.key == key[1:] else row for row in area.rows]
    return run | {key[0]: area.model_copy(update={"rows": changed})}


def keys_of(run: dict[str, Area]) -> list[Key]:
    return [(name, *row.key) for name, area in run.items() for row in area.rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--keep", type=Path, help="folder that keeps the runs; those that are there are not run again")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<machine>/alarm.json)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imgcls-alarm-") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        work = folder / "work"
        past = run_small(folder / "past", work, 0.0)
        alarms: list[list[Key]] = []
        found: Counter[Key] = Counter()
        for k in range(options.runs):
            run, delayed = (
                run_small(folder / f"same-{k}", work, 0.0),
                run_small(folder / f"slow-{k}", work, options.delay),
            )
            alarms.append([change.key for change in compare(past, run).flagged])
            for key in keys_of(delayed):
                flagged = compare(past, with_row(run, delayed, key)).flagged
                found[key] += key in [change.key for change in flagged]
            told = f"{sum(found.values())} of {(k + 1) * len(keys_of(past))} delays found"
            print(f"turn {k + 1}: {len(alarms[-1])} false alarms, {told}", flush=True)
    for key in keys_of(past):
        print(f"{found[key]:3} of {options.runs}  {', '.join(key)}")
    missed = [key for key in keys_of(past) if found[key] < 0.9 * options.runs]
    result = {
        "machine": env.machine_facts(), "runs": options.runs, "delay": options.delay, "false_alarms": alarms,
        "found": [[*key, found[key]] for key in keys_of(past)],
    }  # fmt: skip
    out = options.out or ROOT / "benchmarks" / "results" / env.machine_slug() / "alarm.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(
        f"{sum(map(bool, alarms))} of {options.runs} runs raised a false alarm; {len(missed)} rows missed too often; {out}"
    )
    return 1 if missed or any(alarms) else 0


if __name__ == "__main__":
    sys.exit(main())
