"""Runs every test in two parts, as CI does: what `pytest` runs, then what it leaves out because it takes more than five seconds.

Prints the twenty longest tests of each part, its minutes and the most memory that its processes held at once, and last the
totals of both. The exit code is 0 only if both parts passed. Arguments go to pytest, for example `tests/data -x`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

PARTS = {"quick": [], "slow": ["-m", "slow"]}  # addopts leave the slow ones out of a plain `pytest`
NO_TESTS = 5  # pytest's exit code when nothing was selected


@dataclass
class Part:
    """What one run of pytest came to; counts holds passed, failed and skipped."""

    code: int
    seconds: float
    memory_bytes: int
    counts: Counter[str]


def memory_of(pid: int) -> int:
    """Proportional memory of a process in bytes: pages shared with others count once in all. 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def family(root: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_bytes()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(b")")[2].split()[1])
    found, size = {root}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


class Memory(threading.Thread):
    """Looks every half second at what a process and its descendants hold; `peak` is the largest sum, in bytes."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.over = root, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            self.peak = max(self.peak, sum(memory_of(pid) for pid in family(self.root)))


def counted(report: Path) -> Counter[str]:
    """Passed, failed (with errors) and skipped tests of a JUnit file."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return Counter(passed=number["tests"] - failed - number["skipped"], failed=failed, skipped=number["skipped"])


def run_part(selection: list[str], arguments: list[str], report: Path) -> Part:
    """Runs pytest once; output goes where ours goes."""
    options = ["-p", "no:cacheprovider", "-q", "--durations=20", f"--junitxml={report}"]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-P", "-m", "pytest", *options, *selection, *arguments])
    memory = Memory(process.pid)
    memory.start()
    code = process.wait()
    memory.over.set()
    memory.join()
    counts = counted(report) if report.exists() else Counter(failed=1)  # it was killed, and so has failed
    return Part(0 if code == NO_TESTS and arguments else code, time.monotonic() - began, memory.peak, counts)


def main(arguments: list[str]) -> int:
    parts = {}
    with tempfile.TemporaryDirectory(prefix="imgcls-tests-") as folder:
        for name, selection in PARTS.items():
            print(f"\n-- {name} tests", flush=True)
            parts[name] = run_part(selection, arguments, Path(folder, f"{name}.xml"))
    print()
    for name, part in parts.items():
        figures = f"{part.seconds / 60:.1f} minutes, at most {part.memory_bytes / 2**30:.2f} GiB of memory"
        print(f"{name}: {part.counts.total()} tests, {figures}, exit code {part.code}")
    total = sum((part.counts for part in parts.values()), Counter())
    print(", ".join(f"{total[key]} {key}" for key in ("passed", "failed", "skipped")))
    return next((part.code if part.code > 0 else 1 for part in parts.values() if part.code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
