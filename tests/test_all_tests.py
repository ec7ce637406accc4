"""scripts/all_tests.py: both parts run, and neither a failure nor a crash of one is lost in the total."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "all_tests.py"
SETTINGS = '[pytest]\naddopts = -m "not slow"\nmarkers = slow\n'
QUICK = "import pytest\n\ndef test_right(): pass\n\n@pytest.mark.skip\ndef test_left_out(): pass\n\n@pytest.mark.slow\n"


@pytest.mark.parametrize(
    ("slow", "code", "total"),
    [
        ("assert True", 0, "2 passed, 0 failed, 1 skipped"),
        ("assert False", 1, "1 passed, 1 failed, 1 skipped"),
        ("import os; os.abort()", 1, "1 passed, 1 failed, 1 skipped"),
    ],
    ids=["passes", "fails", "dies"],
)
def test_the_total_counts_both_parts_and_a_failure_of_the_second_is_the_exit_code(
    tmp_path: Path, slow: str, code: int, total: str
) -> None:
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "test_few.py").write_text(f"{QUICK}def test_long():\n    {slow}\n")
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, total), done.stdout + done.stderr
    assert "GiB of memory" in done.stdout
