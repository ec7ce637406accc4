"""kill -9, in earnest; `benchmarks/kill_test.py --kills 30` is the longer version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_test.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_were_killed_at_random_instants_end_in_the_same_bits() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--kills", "6", "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") >= 3  # a header and a line for each loader
