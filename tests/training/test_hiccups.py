"""Image folders out of reach for seconds; `benchmarks/hiccup_test.py --hiccups 30` is the longer version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "hiccup_test.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_data_out_of_reach_for_seconds_costs_no_row_and_no_bit() -> None:
    words = [sys.executable, str(SCRIPT), "--hiccups", "4", "--longest", "8", "--seed", "3"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") >= 3  # a header and a line for each loader
