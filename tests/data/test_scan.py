"""From folders, tables and archives to a manifest: what is taken, what is left out, and what is said about it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.errors import DataError, HardwareError
from imgcls_fast.core.manifest import FLAG_PILLOW, FLAG_SUSPECT, NO_SPLIT, SPLITS, Manifest
from imgcls_fast.data import reach
from imgcls_fast.data import scan as scan_module
from imgcls_fast.data.decode import decode_pixels
from imgcls_fast.data.examine import probe
from imgcls_fast.data.findings import DataProblems, ScanOptions
from imgcls_fast.data.proof import prove
from imgcls_fast.data.scan import scan


def picture(path: Path, seed: int, size: tuple[int, int] = (12, 9)) -> Path:
    """A picture of its own for each seed, in the format of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def folder(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        picture(root / name, seed=i)
    return root


def problems_of(source: Path, **options: object) -> DataProblems:
    with pytest.raises(DataProblems) as caught:
        scan(source, ScanOptions(**options))
    return caught.value


# ---------------------------------------------------------------- folders


def test_class_folders_in_plain_order_with_nested_files(tmp_path):
    folder(tmp_path, "b/2.png", "b/sub/deep/1.png", "a/10.png", "a/9.png", "10/x.bmp", "9/x.webp")
    result = scan(tmp_path)
    assert result.manifest.labels.classes == ("10", "9", "a", "b")
    assert list(result.manifest.paths) == ["10/x.bmp", "9/x.webp", "a/10.png", "a/9.png", "b/2.png", "b/sub/deep/1.png"]
    assert (result.manifest.split == NO_SPLIT).all() and (result.manifest.group == -1).all()
    assert result.summary() == "6 images, 4 classes, smallest 1, 0 quarantined"


@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev"])
def test_split_folders_by_any_of_their_names(tmp_path, val):
    names = [f"{s}/{c}/{i}.png" for s in ("Train", val, "test") for c in "ab" for i in range(2)]
    m = scan(folder(tmp_path, *names)).manifest
    assert [len(m.rows(s)) for s in SPLITS] == [4, 4, 4] and m.labels.classes == ("a", "b")


def test_a_class_may_be_called_train(tmp_path):
    m = scan(folder(tmp_path, "train/1.png", "bus/1.png", "tram/1.png")).manifest
    assert m.labels.classes == ("bus", "train", "tram") and (m.split == NO_SPLIT).all()


def test_what_systems_leave_behind_is_ignored_and_other_files_are_counted(tmp_path):
    folder(tmp_path, "a/1.png", "b/1.png", "a/.hidden.png", "a/._1.png", "__MACOSX/x/1.png", "lost+found/x/1.png", ".git/x/1.png")
    for name in ("a/Thumbs.db", "a/desktop.ini", "b/notes.txt", "b/labels.csv", "readme.md"):
        (tmp_path / name).write_text("x")
    result = scan(tmp_path)
    assert list(result.manifest.paths) == ["a/1.png", "b/1.png"]
    assert result.skipped == 3 and not result.quarantine
    assert {(file.path, file.reason) for file in result.skipped_files} == {
        (name, "text, not an image") for name in ("b/labels.csv", "b/notes.txt", "readme.md")
    }
    assert "3 files that are not images were skipped: readme.md, b/labels.csv, b/notes.txt" in result.notices


def test_content_decides_and_not_the_ending(tmp_path):
    folder(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "really_png.jpg")
    shutil.copy(picture(tmp_path / "x.png", 9), tmp_path / "b" / "no_ending")
    (tmp_path / "x.png").rename(tmp_path / "stray.png")
    result = scan(tmp_path)
    assert list(result.manifest.paths) == ["a/really_png.jpg", "b/1.png", "b/no_ending"]
    assert any("stray.png beside the class folders" in n for n in result.notices)
    assert [file.reason for file in result.skipped_files] == ["beside the class folders, so no class is known for it"]
    assert not any("not images" in n for n in result.notices)


def test_named_like_an_image_but_none_is_reported(tmp_path):
    folder(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(9)])
    bad = {"a/x.jpg": b"hello", "a/y.svg": b"<svg/>", "b/z.psd": b"8BPS\0\1", "b/e.gif": b""}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    result = scan(tmp_path)
    reasons = {b.path: b.reason for b in result.quarantine}
    assert reasons == {
        "a/x.jpg": "text, not an image",
        "a/y.svg": "format SVG is not supported: convert to PNG or JPEG",
        "b/z.psd": "format Photoshop (PSD) is not supported: convert to PNG or JPEG",
        "b/e.gif": "empty file",
    }
    assert {b.path: (b.label, b.size_bytes) for b in result.quarantine}["a/x.jpg"] == ("a", 5)


def test_links_are_followed_and_loops_are_not(tmp_path):
    real = picture(tmp_path / "elsewhere" / "pool" / "1.png", 1).parent
    root = folder(tmp_path / "data", "a/1.png", "b/1.png")
    (root / "a" / "linked.png").symlink_to(picture(tmp_path / "elsewhere" / "2.png", 2))
    (root / "c").symlink_to(real)
    (root / "b" / "loop").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b")
    (root / "b" / "broken.png").symlink_to(tmp_path / "nowhere")
    result = scan(root, ScanOptions(max_bad=5))
    assert {"a/1.png", "a/linked.png", "b/1.png", "c/1.png"} <= set(result.manifest.paths)
    assert len(result.manifest) < 12
    assert [(b.path, b.reason) for b in result.quarantine if b.path == "b/broken.png"] == [
        ("b/broken.png", "broken symbolic link")
    ]
    assert any("not followed again" in n for n in result.notices)


def test_pipes_are_never_opened(tmp_path):
    folder(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert len(scan(tmp_path).manifest) == 2


@pytest.mark.parametrize(
    "name",
    [b"with space.png", b"new\nline.png", "\U0001f33c é.png".encode(), b"latin-\xe9.png", b'a,"b";c.png', b"cr\r.png"],
)
def test_any_name_that_a_file_can_have_works_and_comes_back(tmp_path, name):
    folder(tmp_path, "a/1.png", "b/1.png")
    target = os.path.join(os.fsencode(tmp_path), b"a", name)
    os.rename(tmp_path / "a" / "1.png", target)
    result = scan(tmp_path)
    assert [os.fsencode(p) for p in result.manifest.paths] == [b"a/" + name, b"b/1.png"]
    result.manifest.save(tmp_path / "m.npz")
    assert decode_pixels(Manifest.load(tmp_path / "m.npz").path(0)).shape == (9, 12, 3)


def test_a_class_without_usable_images_is_no_class(tmp_path):
    folder(tmp_path, *[f"{c}/{i}.png" for c in "ac" for i in range(5)])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bad.png").write_bytes(b"")
    (tmp_path / "d").mkdir()
    result = scan(tmp_path)
    assert result.manifest.labels.classes == ("a", "c")
    assert sorted(set(result.manifest.label.tolist())) == [0, 1]
    assert any("no usable image in 1 of the classes, left out: b" in n for n in result.notices)


def test_classes_can_be_chosen_and_ordered(tmp_path):
    folder(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    m = scan(tmp_path, ScanOptions(classes=("c", "a"))).manifest
    assert m.labels.classes == ("c", "a") and list(m.paths) == ["a/1.png", "c/1.png"] and m.label.tolist() == [1, 0]
    assert problems_of(tmp_path, classes=("a", "zebra")).code == "D005"


def test_judging_needs_no_training_rows_and_predicting_needs_no_labels(tmp_path):
    folder(tmp_path, "test/a/1.png", "test/b/2.png", "loose.png")
    assert problems_of(tmp_path).code == "D005"
    assert len(scan(tmp_path, ScanOptions(purpose="judge")).manifest.rows("test")) == 2
    m = scan(tmp_path, ScanOptions(purpose="predict")).manifest
    assert len(m) == 3 and (m.label == -1).all()


# ---------------------------------------------------------------- tables


def table(path: Path, lines: list[list[str]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with open(path, "w", newline="", encoding=encoding, errors="surrogateescape") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_whatever_its_delimiter_and_encoding(tmp_path, delimiter, encoding):
    folder(tmp_path, "x/1, a.png", "x/é 2.png", "3.png")
    outside = picture(tmp_path.parent / f"{tmp_path.name}-outside.png", 7)
    head = ["Image_Path", "Category", "subset", "group"]
    rows = [
        ["x/1, a.png", " cat ", "train", "p1"],
        ["x/é 2.png", "dog", "valid", "p2"],
        ["./3.png", "dog", "train", ""],
    ]
    rows.append([str(outside), "cat", "TEST", "p3"])
    m = scan(table(tmp_path / "t.csv", [head, *rows], delimiter, encoding)).manifest
    assert list(m.paths) == sorted([str(outside), "3.png", "x/1, a.png", "x/é 2.png"])
    assert m.labels.classes == ("cat", "dog")
    assert {p: SPLITS[s] for p, s in zip(m.paths, m.split, strict=True)}["x/é 2.png"] == "val"
    assert m.group_names == ("p1", "p2", "p3") and sorted(m.group.tolist()) == [-1, 0, 1, 2]
    assert decode_pixels(m.path(list(m.paths).index(str(outside)))).shape == (9, 12, 3)


def test_json_lines_with_the_same_keys(tmp_path):
    folder(tmp_path, "1.png", "2.png")
    lines = [{"file": "1.png", "target": 3, "split": None}, {"file": "2.png", "target": "x"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    m = scan(tmp_path / "t.jsonl").manifest
    assert m.labels.classes == ("3", "x") and (m.split == NO_SPLIT).all()


def test_names_of_columns_can_be_given_or_switched_off(tmp_path):
    folder(tmp_path, "1.png", "2.png")
    source = table(
        tmp_path / "t.csv", [["p", "label", "kind", "split"], ["1.png", "z", "x", "?"], ["2.png", "z", "y", "?"]]
    )
    m = scan(source, ScanOptions(path_col="p", label_col="kind", split_col="")).manifest
    assert m.labels.classes == ("x", "y")
    with pytest.raises(DataError, match="its columns are: p, label, kind, split") as caught:
        scan(source, ScanOptions(path_col="p", label_col="kinds"))
    assert caught.value.code == "D004" and caught.value.try_ == "--label-col kind"
    with pytest.raises(DataError, match="no column for the path"):
        scan(source)


def test_all_problems_of_a_table_are_told_at_once(tmp_path):
    folder(tmp_path, "1.png", "2.png", "3.png")
    picture(tmp_path.parent / "up.png", 5)
    rows = [
        ["1.png", "a", "train"],
        ["2.png", "", "train"],
        ["gone.png", "b", "train"],
        ["../up.png", "b", "train"],
        ["3.png", "b", "trian"],
        ["1.png", "b", "train"],
        ["3.png", "b"],
        ["", "b", "train"],
    ]
    error = problems_of(table(tmp_path / "t.csv", [["path", "label", "split"], *rows]))
    kinds = {p.kind: p for p in error.problems}
    assert set(kinds) == {
        "empty label",
        "missing file",
        "path leaves the folder",
        "unknown split",
        "contradicting rows",
        "malformed row",
        "empty path",
    }
    assert kinds["missing file"].where == "t.csv, line 4" and "gone.png" in kinds["missing file"].message
    assert "did you mean 'train'" in kinds["unknown split"].message
    assert f"{len(error.problems)} problems in" in error.message and "1 x missing file" in error.message
    assert sum(line.startswith("    ") for line in str(error).splitlines()) == 5  # one line for each of the first kinds


def test_a_row_that_is_no_image_is_reported_whatever_it_is_called(tmp_path):
    folder(tmp_path, *[f"{i}.png" for i in range(9)])
    (tmp_path / "notes.txt").write_text("hello")
    rows = [["path", "label"], *[[f"{i}.png", "ab"[i % 2]] for i in range(9)], ["notes.txt", "a"]]
    result = scan(table(tmp_path / "t.csv", rows))
    assert [(b.path, b.reason) for b in result.quarantine] == [
        ("notes.txt", "text, not an image")
    ] and not result.skipped


def test_unreadable_tables_are_one_clear_error(tmp_path):
    for content in (b"", b"\n\n", b"path\0,label\n"):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(DataError) as caught:
            scan(tmp_path / "t.csv")
        assert caught.value.code == "D004"


def test_a_table_inside_an_archive_is_found(tmp_path):
    folder(tmp_path / "set", "images/1.png", "images/2.png")
    table(tmp_path / "set" / "labels.csv", [["path", "label"], ["images/1.png", "a"], ["images/2.png", "b"]])
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path, "set")
    result = scan(tmp_path / "set.zip", ScanOptions(cache=tmp_path / "cache"))
    assert result.manifest.labels.classes == ("a", "b") and any("labels.csv" in n for n in result.notices)


# ---------------------------------------------------------------- rules


def test_too_many_bad_images_or_none_allowed(tmp_path):
    folder(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(3)])
    for i in range(2):
        (tmp_path / "a" / f"bad{i}.png").write_bytes(b"")
    error = problems_of(tmp_path, bad_images="error")
    assert error.code == "D012" and error.message == "2 of 8 images cannot be decoded"
    assert error.where == "a/bad0.png (empty file), +1 more"
    assert error.why == "quarantine is off (--bad-images error)"
    assert error.try_ == f"imgcls-fast train {tmp_path} --bad-images quarantine"
    assert problems_of(tmp_path, max_bad=0.24).code == "D013"
    assert problems_of(tmp_path, max_bad=1).code == "D013"
    assert problems_of(tmp_path, max_bad=0).code == "D013"
    for allowed in (0.25, 2):
        assert len(scan(tmp_path, ScanOptions(max_bad=allowed)).quarantine) == 2


def test_duplicates_across_splits_leave_train_then_val_and_never_test(tmp_path):
    names = [f"{s}/{c}/{i}.png" for s in SPLITS for c in "ab" for i in range(4)]
    folder(tmp_path, *names)
    for source, copy in [
        ("test/a/0.png", "train/a/dup.png"),
        ("test/a/1.png", "val/a/dup.png"),
        ("val/b/0.png", "train/b/dup.png"),
        ("train/a/0.png", "train/a/twin.png"),
    ]:
        shutil.copy(tmp_path / source, tmp_path / copy)
    result = scan(tmp_path)
    assert set(result.manifest.paths) == {*names, "train/a/twin.png"} and result.dropped == 3
    assert any("3 duplicates across splits removed (2 from train, 1 from val)" in n for n in result.notices)
    assert "3 duplicates across splits removed" in result.summary()
    kept = scan(tmp_path, ScanOptions(duplicates="keep"))
    assert len(kept.manifest) == len(names) + 4 and not kept.dropped
    assert problems_of(tmp_path, duplicates="error").code == "D006"


def test_near_duplicates_join_groups_and_leave_train(tmp_path):
    def photo(path: Path, seed: int, **options: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8))
        small.resize((options.pop("size", 180), 150), Image.Resampling.BICUBIC).save(path, **options)

    for i in range(8):
        photo(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", i)
    photo(tmp_path / "train" / "a" / "0_again.jpg", 0, quality=60, size=190)
    photo(tmp_path / "test" / "a" / "t.png", 50)
    photo(tmp_path / "test" / "b" / "1_again.jpg", 1, quality=60)
    plain = scan(tmp_path)
    assert len(plain.manifest) == 11 and (plain.manifest.group == -1).all()
    result = scan(tmp_path, ScanOptions(near_duplicates=True))
    m = result.manifest
    assert set(plain.manifest.paths) - set(m.paths) == {"train/b/1.png"} and result.dropped == 1
    group = dict(zip(m.paths, m.group.tolist(), strict=True))
    assert group["train/a/0.png"] == group["train/a/0_again.jpg"] >= 0
    assert [g for p, g in group.items() if "0" not in p] == [-1] * 8


def test_groups_from_names_and_columns_may_not_cross_given_splits(tmp_path):
    names = [f"{s}/{c}/{p}_{i}.png" for s, p in (("train", "P1"), ("test", "P2")) for c in "ab" for i in range(2)]
    folder(tmp_path, *names)
    m = scan(tmp_path, ScanOptions(group_by=r"/(P\d+)_")).manifest
    assert m.group_names == ("P1", "P2") and len(set(m.group.tolist())) == 2
    assert scan(tmp_path, ScanOptions(group_by=r"P\d+")).manifest.group_names == ("P1", "P2")
    picture(tmp_path / "test" / "a" / "P1_9.png", 99)
    error = problems_of(tmp_path, group_by=r"/(P\d+)_")
    assert (
        error.code == "D006"
        and "1 of 2 groups (5 images)" in error.message
        and "'P1': train 4, test 1" in error.message
    )
    for pattern in ("patient", "(["):
        with pytest.raises(DataError) as caught:
            scan(tmp_path, ScanOptions(group_by=pattern))
        assert caught.value.code == "D008"
    notices = scan(tmp_path, ScanOptions(group_by=r"(P2)_0")).notices
    assert any("7 of 9 paths do not match" in n for n in notices)


def test_classes_that_cannot_be_learnt_are_problems(tmp_path):
    folder(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/2.png", "test/c/2.png", "val/d/3.png")
    error = problems_of(tmp_path)
    assert [p.code for p in error.problems] == ["D005", "D005"]
    assert "class 'c' has 0 val and 1 test images and no training images" in error.problems[0].message
    with pytest.raises(DataProblems) as caught:
        scan(folder(tmp_path / "one", "a/1.png"))
    assert caught.value.code == "D003"
    (tmp_path / "none").mkdir()
    with pytest.raises(DataProblems) as caught:
        scan(tmp_path / "none")
    assert caught.value.code == "D002"


# ---------------------------------------------------------------- files


def test_damaged_structure_is_decoded_before_it_is_trusted(tmp_path):
    folder(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(8)])
    content = bytearray((tmp_path / "a" / "0.png").read_bytes())
    content[content.index(b"IDAT") + 60] ^= 255  # bit rot in the pixels: the checksum tells
    (tmp_path / "a" / "0.png").write_bytes(content)
    jpeg = picture(tmp_path / "b" / "j.jpg", 77).read_bytes()
    (tmp_path / "b" / "j.jpg").write_bytes(jpeg[:20] + b"junk" + jpeg[20:])  # libjpeg forgives it, DALI does not
    result = scan(tmp_path)
    assert [b.path for b in result.quarantine] == ["a/0.png"]
    flags = dict(zip(result.manifest.paths, result.manifest.flags.tolist(), strict=True))
    assert flags.pop("b/j.jpg") == FLAG_PILLOW | FLAG_SUSPECT and not any(flags.values())
    assert prove(jpeg).sound and not prove(jpeg[:20] + b"junk" + jpeg[20:]).sound


@pytest.mark.parametrize("verify", ["suspect", "full"])
def test_the_scan_finds_what_the_header_of_a_webp_hides(tmp_path, verify):
    folder(tmp_path, *[f"{c}/{i}.bmp" for c in "ab" for i in range(8)])
    big = tmp_path / "a" / "x.webp"
    Image.open(picture(tmp_path / "x.bmp", 5, (200, 200))).save(big, lossless=True)
    content = big.read_bytes()
    big.write_bytes(content[:50] + b"\xff" * (len(content) - 50))  # the right length, the wrong bytes
    assert [b.path for b in scan(tmp_path, ScanOptions(verify=verify)).quarantine] == ["a/x.webp"]


def test_large_images_are_refused_from_the_header(tmp_path):
    folder(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(6)])
    picture(tmp_path / "a" / "large.png", 3, (40, 30))
    result = scan(tmp_path, ScanOptions(max_megapixels=0.001))
    assert [(b.path, b.reason) for b in result.quarantine] == [
        ("a/large.png", "too large: 40 x 30 = 0.0 megapixels, the limit is 0.001")
    ]


def test_a_file_without_permission_is_out_of_reach_and_not_a_bad_image(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    monkeypatch.setattr(reach, "WAITS_S", ())
    folder(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(6)])
    (tmp_path / "a" / "0.png").chmod(0)
    with pytest.raises(DataError) as caught:
        scan(tmp_path)
    assert caught.value.code == "D015" and "0.png cannot be reached: Permission denied" in caught.value.message


def test_the_result_does_not_depend_on_threads_or_place(tmp_path):
    folder(tmp_path / "x", *[f"{c}/{i}.png" for c in "abc" for i in range(5)])
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    prints = {scan(tmp_path / d, ScanOptions(threads=t)).manifest.fingerprint for d in "xy" for t in (1, 2, 5)}
    assert len(prints) == 1


def test_without_the_compiled_probe_the_error_says_so(tmp_path, monkeypatch):
    import sys

    import imgcls_fast

    monkeypatch.setitem(sys.modules, "imgcls_fast._C", None)
    monkeypatch.delattr(imgcls_fast, "_C", raising=False)
    with pytest.raises(HardwareError, match="_C") as caught:
        probe([b"x"], 1)
    assert caught.value.code == "H004"
    assert scan_module.__all__
