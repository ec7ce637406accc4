"""The scan on real sets: a messy folder, pre-split photos, tables, and 288 odd and malformed files."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from imgcls_fast.core.manifest import FLAG_PILLOW, SPLITS
from imgcls_fast.data.decode import decode_pixels
from imgcls_fast.data.findings import DataProblems, ScanOptions
from imgcls_fast.data.scan import inspect, scan


def manifest_rows(shared: Path, name: str) -> list[dict[str, str]]:
    with open(shared / name / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_messy_folder_each_file_ends_where_it_should(shared_data, tmp_path):
    expected = {k: set() for k in ("ok", "error", "skip")}
    rows = manifest_rows(shared_data, "photos_messy")
    for row in rows:
        expected[row["expect"]].add(row["path"])
    result = scan(shared_data / "photos_messy" / "messy.tar", ScanOptions(cache=tmp_path))
    m = result.manifest
    assert set(m.paths) == expected["ok"]
    assert {b.path for b in result.quarantine} == expected["error"]
    assert all(b.reason and b.found == "scan" for b in result.quarantine)
    sizes = {r["path"]: (int(r["width"]), int(r["height"])) for r in rows if r["expect"] == "ok"}
    assert {p: (w, h) for p, w, h in zip(m.paths, m.width.tolist(), m.height.tolist(), strict=True)} == sizes
    assert m.labels.classes == ("daisy", "roses", "tulips")
    assert any("empty_class" in n and "empty" in n for n in result.notices)
    assert any("same_as_daisy_dup.jpg (roses)" in n for n in result.notices)


def test_empty_files_are_quarantined_and_never_deleted(shared_data, tmp_path):
    """Regressions 13 and 14: 0-byte files were deleted, cut JPEGs passed, and archives could not be reached."""
    source = shared_data / "photos_messy" / "messy.tar"
    result = scan(source, ScanOptions(cache=tmp_path))
    reasons = {b.path: b.reason for b in result.quarantine}
    assert reasons["daisy/zero.jpg"] == "empty file"
    assert reasons["daisy/cut_60.jpg"].startswith("truncated: ")
    assert reasons["daisy/404.jpg"] == "HTML, not an image"
    assert (result.manifest.root / "daisy" / "zero.jpg").exists()


def test_photos_in_split_folders(shared_data):
    rows = {r["path"]: r for r in manifest_rows(shared_data, "photos")}
    result = scan(shared_data / "photos")
    m = result.manifest
    assert list(m.paths) == sorted(rows) and not result.quarantine
    assert m.labels.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    for i, path in enumerate(m.paths):
        row = rows[path]
        assert (m.labels.classes[m.label[i]], SPLITS[m.split[i]]) == (row["label"], row["split"])
        assert (m.width[i], m.height[i]) == (int(row["width"]), int(row["height"]))
        assert m.orientation[i] == int(row["exif_orientation"] or 1)
        assert m.digest[i].tobytes().hex() == row["sha256"][:32]
    assert not m.flags.any(), "every variant here is one that DALI decodes equally"


def test_a_table_gives_the_same_manifest_as_its_folders(shared_data):
    by_folder, by_table = scan(shared_data / "photos").manifest, scan(shared_data / "photos" / "MANIFEST.csv").manifest
    assert by_folder.fingerprint == by_table.fingerprint


def test_solar_cells_from_their_table(shared_data):
    rows = manifest_rows(shared_data, "solar_cells")
    m = scan(shared_data / "solar_cells" / "MANIFEST.csv").manifest
    assert len(m) == len(rows) == 286
    got = Counter((m.labels.classes[k], SPLITS[s]) for k, s in zip(m.label, m.split, strict=True))
    assert got == Counter((r["label"], r["split"]) for r in rows)


def test_a_flat_folder_points_to_its_table(shared_data):
    with pytest.raises(DataProblems) as caught:
        scan(shared_data / "solar_cells")
    assert caught.value.code == "D003" and caught.value.try_.endswith("solar_cells/MANIFEST.csv")


@pytest.mark.parametrize("verify", ["suspect", "full"])
def test_odd_images_neither_crash_nor_stop_the_scan(shared_data, verify):
    rows = {r["path"]: r for r in manifest_rows(shared_data, "odd_images")}
    result = inspect(shared_data / "odd_images", ScanOptions(verify=verify, max_bad=1000, purpose="predict"))
    good, bad = set(result.manifest.paths), {b.path: b.reason for b in result.quarantine}
    readable = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF"}
    for path, row in rows.items():
        if row["expect"] == "refuse" or row["label"] == "not-an-image":
            assert path not in good, path
        if row["expect"] == "decode" and row["format"] in readable and row["mode"] not in ("F", "LAB"):
            assert path in good or row["label"] == "truncated", f"{path}: {bad.get(path)}"
    assert bad["files/constructed/bomb_24000x24000_1bit.png"].startswith("too large: 24,000 x 24,000 = 576.0 mega")
    assert bad["files/constructed/bomb_12000x12000_rgb.png"].startswith("too large: ")
    for path in ("cut_10pct.jpg", "cut_50pct.jpg", "cut_90pct.jpg", "no_eoi.jpg"):
        assert bad[f"files/constructed/{path}"].startswith("truncated: "), path
    if verify == "full":  # what is left decodes, to the size that the manifest says
        m = result.manifest
        width, height = m.turned_size()
        for i in range(len(m)):
            assert decode_pixels(m.path(i)).shape == (height[i], width[i], 3), m.paths[i]


@pytest.mark.slow
def test_files_without_the_pillow_flag_decode_equally_in_dali(shared_data):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decoder():
        raw = fn.external_source(name="raw", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(raw, device="cpu", output_type=types.RGB)

    pipe = decoder()
    pipe.build()
    compared = 0
    for source in ("odd_images", "photos"):
        options = ScanOptions(verify="full", max_bad=1000, purpose="predict")
        m = inspect(shared_data / source, options).manifest
        for i in np.flatnonzero((m.flags & FLAG_PILLOW) == 0)[:: 1 if source == "odd_images" else 7]:
            pipe.feed_input("raw", [np.fromfile(m.path(i), np.uint8)])
            theirs = np.asarray(pipe.run()[0][0]).astype(int)
            ours = decode_pixels(m.path(i))
            assert theirs.shape == ours.shape, m.paths[i]
            assert np.abs(theirs - ours).max() <= 2, m.paths[i]
            compared += 1
    assert compared > 200
