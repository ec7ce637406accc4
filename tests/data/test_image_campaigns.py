"""The short forms of two campaigns: mutated files through everything, and mutated headers under sanitizers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def campaign(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_mutated_files_end_nothing_and_scan_loaders_and_predict_agree(tmp_path):
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "mutate_images.py"),
        "--count",
        "216",
        "--seed",
        "77",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    figures = json.loads(out.read_text())
    assert figures["deaths"] == [] and figures["disagreements"] == [], done.stderr[-2000:]
    assert figures["files"] == 216 and 60 < figures["bad"] < 200
    assert all(found["files"] and found["bad"] for found in figures["by_format"].values())


def test_a_batch_of_mutated_files_is_a_function_of_its_seed():
    mutate = campaign("mutate_images", BENCHMARKS / "mutate_images.py")
    assert mutate.mutated(5, 60) == mutate.mutated(5, 60) != mutate.mutated(6, 60)


@pytest.mark.slow
def test_mutated_headers_find_nothing_in_the_probe_under_sanitizers(tmp_path):
    fuzz = campaign("fuzz_probe", BENCHMARKS / "fuzz_probe" / "run.py")
    if fuzz.compiler() is None:
        pytest.skip("there is no C++ compiler")
    try:
        driver = fuzz.compile_driver(tmp_path / "fuzz_probe", "-O0")
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "asan" in error.stderr:
            pytest.skip("this compiler has no sanitizers")
        pytest.fail(error.stderr[-2000:])
    found = fuzz.fuzz(driver, fuzz.write_seeds(tmp_path / "seeds"), 50_000, 1)
    assert "crash" not in found, found["crash"]["text"]
    assert found["inputs"] == 50_000 and found["ok"] > 10_000 and found["sound_jpegs"] > 100
    assert all(count > 1000 for count in found["formats"][1:])
