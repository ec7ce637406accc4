"""How many threads are worth starting: affinity mask, quotas of nested control groups, OMP_NUM_THREADS."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from imgcls_fast.core import cpus, env
from imgcls_fast.core.cpus import Cpus, cpu_quota

Tree = dict[str, str]  # file of a control group -> content


def kernel(place: Path, mounts: list[str], groups: list[str], files: Tree) -> tuple[Path, Path]:
    """A /proc and a root folder: what a process in such a control group would read."""
    (place / "proc" / "self").mkdir(parents=True)
    (place / "proc" / "self" / "mountinfo").write_text("".join(line + "\n" for line in mounts))
    (place / "proc" / "self" / "cgroup").write_text("".join(line + "\n" for line in groups))
    for name, text in files.items():
        path = place / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return place / "proc", place / "root"


V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
DISK = "23 1 8:1 / / rw,relatime - ext4 /dev/sda rw"


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "quota"),
    [
        ([DISK, V2], ["0::/"], {}, None),  # no such file in the root of the tree
        ([DISK, V2], ["0::/job"], {"sys/fs/cgroup/job/cpu.max": "max 100000"}, None),
        ([V2], ["0::/job"], {"sys/fs/cgroup/job/cpu.max": "150000 100000"}, 1.5),
        # each group is bound by those around it, and the tightest counts wherever it stands
        ([V2], ["0::/a/b/c"], {"sys/fs/cgroup/a/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                               "sys/fs/cgroup/a/b/c/cpu.max": "800000 100000"}, 2.0),
        ([V2], ["0::/a/b"], {"sys/fs/cgroup/a/cpu.max": "400000 100000", "sys/fs/cgroup/a/b/cpu.max": "25000 50000"}, 0.5),
        # a container sees its own group as the root
        ([V2], ["0::/"], {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
        # or the group by its full name, though a part of the tree is mounted
        (["31 23 0:28 /docker/4f /sys/fs/cgroup rw - cgroup2 cgroup2 rw"], ["0::/docker/4f/inner"],
         {"sys/fs/cgroup/cpu.max": "400000 100000", "sys/fs/cgroup/inner/cpu.max": "100000 100000"}, 1.0),
        (["31 23 0:28 /docker/4f /sys/fs/cgroup rw - cgroup2 cgroup2 rw"], ["0::/elsewhere"],
         {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
        ([V2], ["0::/../outside"], {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1.0),
        # version 1: -1 is no limit
        ([V1, MEMORY], ["4:memory:/m", "1:cpu,cpuacct:/"],
         {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"}, None),
        ([V1, MEMORY], ["4:memory:/m", "1:cpu,cpuacct:/pod/box"],
         {"sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "250000", "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
          "sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_quota_us": "-1"}, 2.5),
        # both at once, as on hybrid systems: the hierarchy with the limit counts
        ([V1, HYBRID], ["1:cpu,cpuacct:/x", "0::/x"],
         {"sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "50000"}, 2.0),
        # a mount point with a space; and what no kernel writes
        (["31 23 0:28 / /my\\040groups rw - cgroup2 cgroup2 rw"], ["0::/"], {"my groups/cpu.max": "100000 100000"}, 1.0),
        ([V2], ["0::/"], {"sys/fs/cgroup/cpu.max": "garbled"}, None),
        ([V2], ["0::/"], {"sys/fs/cgroup/cpu.max": "100000 0"}, None),
        (["garbled", "- -"], ["garbled", "", "0::"], {}, None),
        ([], [], {}, None),
    ],
)  # fmt: skip
def test_the_tightest_quota_of_nested_groups_counts(
    mounts: list[str], groups: list[str], files: Tree, quota: float | None, tmp_path: Path
) -> None:
    assert cpu_quota(*kernel(tmp_path, mounts, groups, files)) == quota


def test_without_proc_there_is_no_quota_and_no_load(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None and cpus.idle_s(tmp_path) is None and cpus.queued_s(tmp_path) is None


@pytest.mark.parametrize(
    ("counted", "cores", "threads", "reason"),
    [
        (Cpus(2, 2), 2, 2, "all usable cores"),
        (Cpus(2, 8), 2, 2, "the affinity mask: 2 of 8 cores"),
        (Cpus(64, 64, 1.5), 2, 2, "the CPU quota of the container: 1.5 of 64 cores, rounded up"),
        (Cpus(64, 64, 4.0), 4, 4, "the CPU quota of the container: 4 of 64 cores"),
        (Cpus(8, 8, 0.1), 1, 1, "the CPU quota of the container: 0.1 of 8 cores, rounded up"),
        (Cpus(2, 2, 16.0), 2, 2, "all usable cores"),
        (Cpus(8, 8, None, 1), 8, 1, "OMP_NUM_THREADS=1; 8 cores are usable"),
        (Cpus(8, 8, 4.0, 2), 4, 2, "OMP_NUM_THREADS=2; 4 cores are usable"),
        (Cpus(8, 8, 2.0, 4), 2, 2, "the CPU quota of the container: 2 of 8 cores"),
        (Cpus(2, 2, None, 16), 2, 2, "all usable cores"),
    ],
)
def test_threads_are_the_least_of_mask_quota_and_omp_num_threads(
    counted: Cpus, cores: int, threads: int, reason: str
) -> None:
    assert (counted.cores, counted.threads, counted.reason) == (cores, threads, reason)


@pytest.mark.parametrize(
    ("asked", "number"),
    [("1", 1), ("4,2", 4), (" 3 ", 3), ("+2", 2), ("0", None), ("-1", None), ("two", None), ("", None), (None, None)],
)
def test_omp_num_threads_is_read_as_libgomp_reads_it(asked: str | None, number: int | None) -> None:
    assert cpus.count_cpus(asked).asked == number


def test_one_count_holds_for_loaders_engines_timing_and_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """`usable_cpus` is the only count: nothing else in the package asks the system for cores."""
    package = Path(cpus.__file__).parents[1]
    texts = {path.name: path.read_text("utf-8") for path in package.rglob("*.py")}
    assert [name for name, text in texts.items() if "cpu_count(" in text or "sched_getaffinity(" in text] == ["cpus.py"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert env.usable_cpus() == 1 and env.cpus().cores == env.cpus().affinity  # the machine's name stays the machine's


def test_libraries_that_count_by_themselves_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(env, "_lowered", {})
    told = []
    for counted, before in (
        (Cpus(8, 8, 1.5), None),
        (Cpus(8, 8, None, 64), "64"),
        (Cpus(8, 8), None),
        (Cpus(8, 8, None, 2), "2"),
    ):
        monkeypatch.setattr(
            env, "count_cpus", lambda asked, counted=counted: replace(counted, asked=asked and int(asked))
        )
        monkeypatch.setenv("OMP_NUM_THREADS", before) if before else monkeypatch.delenv("OMP_NUM_THREADS")
        env.calm_threads()
        told.append(os.environ.get("OMP_NUM_THREADS"))
        assert env.cpus() == counted  # what the user has set is remembered as it was
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert told == ["2", "8", None, "2"]
