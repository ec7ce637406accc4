"""The GPU check: what it writes, kills and reads, without a GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check as module

    yield module


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]


def driver_of(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]) -> Any:
    """A driver whose parts are these programs."""
    options = argparse.Namespace(out=folder, budget=60.0, rehearse=False, go_on=False)
    driver = module.Driver(options)

    def start(part: Any, limit: float | None = None) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", programs[part.name]], start_new_session=True)

    monkeypatch.setattr(driver, "start", start)
    return driver


def test_a_part_that_hangs_or_crashes_costs_only_itself(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {"hangs": "import time; time.sleep(60)", "crashes": "import os; os.abort()", "ends": ""}
    driver = driver_of(gpu_check, tmp_path, monkeypatch, programs)
    limits = {"hangs": 0.5, "crashes": 30.0, "ends": 30.0}
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.0)
    assert driver.run([gpu_check.Part(name, "", limit, 1) for name, limit in limits.items()]) == 0
    assert driver.unfinished == ["hangs", "crashes"]
    assert [(row["part"], row["holds"]) for row in rows_of(tmp_path)] == [("hangs", False), ("crashes", False)]


def test_wrong_kernels_leave_out_the_rest(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    programs = {"right": "raise SystemExit(3)", "speed": f"open({str(marker)!r}, 'w')"}
    driver = driver_of(gpu_check, tmp_path, monkeypatch, programs)
    assert driver.run([gpu_check.Part(name, "", 30.0, 1) for name in programs]) == gpu_check.WRONG
    assert not marker.exists()


def test_a_background_part_is_ended_before_the_part_that_must_be_alone(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {"compile": "import time; time.sleep(60)", "times": ""}
    driver = driver_of(
        gpu_check, tmp_path, monkeypatch, programs
    )  # 60 s are left, and more is kept for the parts to come
    parts = [
        gpu_check.Part("compile", "", 50.0, 1, background=True),
        gpu_check.Part("times", "", 30.0, 1, after=("compile",)),
    ]
    assert driver.run(parts) == 0
    assert driver.unfinished == ["compile"] and not driver.running


def test_every_part_is_a_function_of_its_module(gpu_check: ModuleType) -> None:
    for part in gpu_check.PARTS:
        text = (BENCHMARKS / f"{part.module}.py").read_text("utf-8")
        assert f"def {part.name.removeprefix('compile_')}(journal: Journal)" in text
        assert set(part.after) <= set(gpu_check.NAMES)


def test_counters_are_read_from_the_csv_of_nsight_compute(gpu_check: ModuleType) -> None:
    from gpu_tools import counters_of

    columns = {
        "ID": ("", "0"),
        "Kernel Name": ("", "small_forward(Plan)"),
        "gpu__time_duration.sum": ("ns", "90,100"),
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "61.5"),
        "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "1.25"),
    }
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    text = "\n".join(["==PROF== Connected", *(",".join(f'"{cell}"' for cell in line) for line in lines)])
    (row,) = counters_of(text)
    assert row["kernel"] == "small_forward"
    assert row["values"] == {"time us": 90.1, "DRAM %": 61.5}
    assert row["stalls"] == {"barrier": 1.25}
