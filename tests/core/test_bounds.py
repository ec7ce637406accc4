"""The table of bounds: what the documentation shows is what the code holds."""

from __future__ import annotations

from pathlib import Path

from imgcls_fast.core.bounds import BOUNDS, markdown
from imgcls_fast.core.errors import CODES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_on_security_shows_the_bounds_that_the_code_holds() -> None:
    page = (DOCS / "security.md").read_text("utf-8")
    assert "## Bounds" in page
    assert markdown() in page


def test_the_page_shows_the_bounds_of_images() -> None:
    from imgcls_fast.core import image_bounds as bounds

    page = (DOCS / "security.md").read_text("utf-8")
    for value, unit in (
        (f"{bounds.MAX_JPEG_SCANS}", "scans"),
        (f"{bounds.MAX_JPEG_SEGMENTS:,}", "segments"),
        (f"{bounds.MAX_JPEG_HEAD_BYTES >> 20} MiB", "before its first scan"),
        (f"{bounds.MAX_PNG_CHUNKS:,}", "chunks"),
        (f"{bounds.MAX_PNG_TEXT_BYTES >> 20} MiB", "of expanded text and colour profile"),
        (f"{bounds.MAX_GIF_HEAD_BYTES >> 20} MiB", "before its first frame"),
        (f"{bounds.MAX_TIFF_TAGS:,}", "tags"),
    ):
        assert f"{value} {unit}" in page


def test_each_bound_is_positive_and_names_errors_that_exist() -> None:
    for bound in BOUNDS:
        assert bound.limit > 0
        assert set(bound.code.split(", ")) <= set(CODES), bound
