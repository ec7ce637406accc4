"""How many threads are worth starting, and how much of the cores other processes leave.

A container is often given a share of a large machine: the affinity mask then names every core, and only the quota of its
control group tells the truth. Batch systems give their share as OMP_NUM_THREADS.

Standard library only. Every place that is read can be another one, so that a test brings its own.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path

BUSY = 0.4  # cores in use by others from which on a machine counts as busy
_LOOK_S = 0.3  # how long the cores are watched
PROC = Path("/proc")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Cpus:
    """What bounds the number of threads.

    Args:
        affinity: cores that this process may run on.
        machine: cores of the machine.
        quota: cores' worth of time that the control group may use; None without a limit.
        asked: OMP_NUM_THREADS; None where it is not set.
    """

    affinity: int
    machine: int
    quota: float | None = None
    asked: int | None = None

    @property
    def cores(self) -> int:
        """Cores that this process can keep busy: of the affinity mask, within the quota, which is rounded up."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, ceil(self.quota)))

    @property
    def threads(self) -> int:
        """Threads for any one piece of work: `cores`, or fewer where OMP_NUM_THREADS asks for fewer."""
        return self.cores if self.asked is None else min(self.cores, self.asked)

    @property
    def reason(self) -> str:
        """Why it is that many, in one line."""
        if self.asked is not None and self.asked < self.cores:
            return f"OMP_NUM_THREADS={self.asked}; {_cores(self.cores)} {'is' if self.cores == 1 else 'are'} usable"
        if self.quota is not None and ceil(self.quota) < self.affinity:
            rounded = "" if self.quota == self.cores else ", rounded up"
            return f"the CPU quota of the container: {self.quota:.3g} of {_cores(self.affinity)}{rounded}"
        if self.affinity < self.machine:
            return f"the affinity mask: {self.affinity} of {_cores(self.machine)}"
        return "all usable cores"


def count_cpus(asked: str | None = None, proc: Path = PROC, root: Path = Path("/")) -> Cpus:
    """What bounds the number of threads of this process.

    Args:
        asked: the value of OMP_NUM_THREADS, "4" or "4,2" (of the outer and the inner loops).
        proc: folder in which the kernel lists processes.
        root: folder that the mount points of `proc` are in.
    """
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cpus(affinity, max(machine, affinity), cpu_quota(proc, root), _positive(asked))


def _positive(asked: str | None) -> int | None:
    """The first number of OMP_NUM_THREADS; None for what libgomp passes over, too."""
    first = (asked or "").split(",")[0].strip().removeprefix("+")
    return int(first) or None if first.isascii() and first.isdigit() else None


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count != 1)}"


# ---------------------------------------------------------------- quota


def cpu_quota(proc: Path = PROC, root: Path = Path("/")) -> float | None:
    """Cores' worth of CPU time that this process's control groups allow: the least of every level; None without a limit.

    Version 2 keeps it in cpu.max, version 1 in cpu.cfs_quota_us and cpu.cfs_period_us. A group is limited by each group that
    it lies in, so all of them are read, as far up as they are mounted.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst.
    """
    found = []
    for version, mounted_root, place in _mounts(proc):
        own = _group(proc, version)
        if own is None:
            continue
        top = root / place.lstrip("/")
        # inside a container the mount shows a part of the tree, and the group may be given from the top of all
        inside = own[len(mounted_root.rstrip("/")) :] if _within(own, mounted_root) else "/"
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:  # a group outside of what this process can see
            parts = []
        levels = [top.joinpath(*parts[:k]) for k in range(len(parts) + 1)]
        found += [quota for folder in levels if (quota := _limit(folder, version)) is not None]
    return min(found, default=None)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mounts(proc: Path) -> list[tuple[int, str, str]]:
    """(version, folder of the hierarchy that is mounted, mount point) of each hierarchy that may limit CPU time."""
    out = []
    for line in _lines(proc / "self" / "mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or not kind:
            continue
        mounted_root, place = (_OCTAL.sub(lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
        if kind[0] == "cgroup2":
            out.append((2, mounted_root, place))
        elif kind[0] == "cgroup" and "cpu" in kind[-1].split(","):
            out.append((1, mounted_root, place))
    return out


def _group(proc: Path, version: int) -> str | None:
    """This process's group in the hierarchy that counts CPU time."""
    for line in _lines(proc / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if (number == "0" and not controllers) if version == 2 else "cpu" in controllers.split(","):
            return group
    return None


def _limit(folder: Path, version: int) -> float | None:
    if version == 2:
        words = " ".join(_lines(folder / "cpu.max")).split()
    else:
        words = [" ".join(_lines(folder / f"cpu.cfs_{name}_us")).strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):  # "max", -1, or no such file
        return None
    quota, period = map(int, words)
    return quota / period if quota and period else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []


# ---------------------------------------------------------------- load


def idle_s(proc: Path = PROC) -> float | None:
    """Seconds that the cores of this process's affinity mask have stood idle since the machine started, all together.

    None where the system does not tell.
    """
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    ticks, seen = 0, 0
    for line in _lines(proc / "stat"):
        name, *values = line.split()
        if not name.startswith("cpu") or name == "cpu" or len(values) < 5:
            continue
        if mine is None or int(name[3:]) in mine:
            ticks, seen = ticks + int(values[3]) + int(values[4]), seen + 1  # idle, and waiting for a disk
    return ticks / os.sysconf("SC_CLK_TCK") if seen else None


def queued_s(proc: Path = PROC) -> float | None:
    """Seconds that this thread was ready to run and waited for a core, since it began; None where the system does not tell."""
    words = " ".join(_lines(proc / "thread-self" / "schedstat")).split()
    return int(words[1]) / 1e9 if len(words) == 3 else None


def spent_s(pid: int, proc: Path = PROC) -> float:
    """CPU seconds of another process; 0 where it has ended."""
    words = " ".join(_lines(proc / str(pid) / "stat")).rpartition(")")[2].split()  # its name may hold anything
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK") if len(words) > 12 else 0.0


def free_cores(over_s: float = _LOOK_S) -> float | None:
    """How many cores stand idle while this process does nothing; None where the system does not tell."""
    begin, before = time.monotonic(), idle_s()
    if before is None:
        return None
    time.sleep(over_s)
    after = idle_s()
    return None if after is None else max(0.0, (after - before) / (time.monotonic() - begin))
