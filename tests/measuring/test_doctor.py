"""What `imgcls-fast doctor` tells of cores, compilers and places."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from imgcls_fast.core import cpus, env
from imgcls_fast.core.compilers import Lack
from imgcls_fast.measuring import doctor

Rows = dict[str, doctor.Row]


def rows(found: list[doctor.Row]) -> Rows:
    return {row[0]: row for row in found}


@pytest.mark.parametrize(
    ("counted", "free", "threads", "quota", "omp", "calm"),
    [
        (cpus.Cpus(8, 8), 7.8, "8: all usable cores", "none", "not set", True),
        (cpus.Cpus(8, 64, 1.5), 7.0, "2: the CPU quota of the container: 1.5 of 8 cores, rounded up", "1.5 cores' worth of time",
         "not set", True),
        (cpus.Cpus(8, 8, None, 4), 2.5, "4: OMP_NUM_THREADS=4; 8 cores are usable", "none", "4", False),
        (cpus.Cpus(1, 1), 0.0, "1: all usable cores", "none", "not set", True),
    ],
)  # fmt: skip
def test_cores_are_shown_as_they_are_counted_with_the_load(
    counted: cpus.Cpus, free: float, threads: str, quota: str, omp: str, calm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "cpus", lambda: counted)
    monkeypatch.setattr(cpus, "free_cores", lambda: free)
    found = rows(doctor._cores())
    assert found["threads"][1] == threads
    assert (found["CPU quota"][1], found["OMP_NUM_THREADS"][1]) == (quota, omp)
    assert found["affinity mask"][1] == f"{counted.affinity} of {counted.machine} cores"
    assert found["load"][1] == f"other processes leave {free:.1f} of {counted.affinity} cores idle"
    assert found["load"][2] is (calm or None) and ("train.threads=1" in found["load"][3]) is not calm


def test_a_missing_compiler_is_shown_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lack = Lack("no C++ compiler was found (g++)", "apt-get install g++")
    monkeypatch.setattr(env, "lacks_compiler", lambda device, package=False: lack)
    for row in doctor._compilers():
        assert row[1:] == (lack.what, False if "GPU" in row[0] else None, lack.remedy)
    monkeypatch.setattr(env, "lacks_compiler", lambda device, package=False: None)
    assert all(row[2] and not row[3] for row in doctor._compilers())


@pytest.mark.parametrize("gpu", [True, False])
def test_kernels_that_were_not_compiled_are_missed_where_a_gpu_could_run_them(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "build_info", lambda: {"version": "1", "cuda": False, "why_no_cuda": "IMGCLS_CUDA=off at build time"})
    monkeypatch.setattr(doctor, "_has_gpu", lambda: gpu)
    assert rows(doctor._extension())["CUDA half"][1:3] == ("not built: IMGCLS_CUDA=off at build time", False if gpu else None)


def test_places_that_cannot_be_written_are_shown_with_the_variable_that_moves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "new" / "runs"))
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: tmp_path == place and False)
    found = rows(doctor._places())
    assert found["cache"][1:] == (
        f"{tmp_path}/file/cache: {tmp_path}/file is a file",
        False,
        "name another folder: IMGCLS_CACHE=FOLDER",
    )
    assert found["runs"][1:] == (
        f"{tmp_path}/new/runs: {tmp_path} cannot be written",
        False,
        "name another folder: IMGCLS_RUNS=FOLDER",
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")
@pytest.mark.parametrize(
    ("free", "fine", "shown"), [(64e6, False, "64 MB of 2.0 GB free"), (1.5e9, True, "1.5 GB of 2.0 GB free")]
)
def test_shared_memory_is_shown_with_its_size(
    free: float, fine: bool, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=free, total=2e9))
    row = rows(doctor._places())["/dev/shm"]
    assert row[1:3] == (shown, fine) and ("--shm-size" in row[3]) is not fine
