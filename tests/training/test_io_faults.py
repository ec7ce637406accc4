"""A system call on the run folder that fails once, as on a network file system; `benchmarks/io_faults.py` tries each place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "io_faults.py"


@pytest.mark.slow
def test_a_run_whose_folder_failed_once_ends_or_is_resumed_to_the_same_bits() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--places", "4"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: 0" in done.stdout
