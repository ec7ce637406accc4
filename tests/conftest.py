"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared test images; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("IMGCLS_SHARED_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"shared data not found at {folder} (set IMGCLS_SHARED_DATA)")
    return folder
