"""Archives: unpacked once and whole, and never outside of their folder."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from imgcls_fast.core.errors import DataError
from imgcls_fast.data.fetch import Limits, open_source


def make_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def make(path: Path, members: list[tuple[str, bytes]]) -> Path:
    modes = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2", ".tar": "w"}
    return make_zip(path, members) if path.suffix == ".zip" else make_tar(path, members, modes[path.suffix])


GOOD = [("cats/a.jpg", b"aaa"), ("dogs/b c.jpg", b"bbb"), ("dogs/é.jpg", b"")]


def refused(path: Path, cache: Path, **limits: object) -> str:
    """The message; and nothing was left behind, inside or outside of the cache."""
    outside = sorted(p for p in cache.parent.rglob("*") if cache not in p.parents and p != cache)
    with pytest.raises(DataError) as caught:
        open_source(path, cache, Limits(**limits))
    assert caught.value.code == "D007"
    assert not cache.exists() or os.listdir(cache) == []
    assert sorted(p for p in cache.parent.rglob("*") if cache not in p.parents and p != cache) == outside
    return caught.value.message


def test_a_folder_is_returned_as_it_is(tmp_path):
    assert open_source(tmp_path, tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["d.zip", "d.tar", "d.tar.gz", "d.tgz", "d.tar.xz", "d.tar.bz2", "D.ZIP"])
def test_every_kind_of_archive_is_unpacked_with_its_names(tmp_path, name):
    source = make(tmp_path / name.lower(), GOOD).rename(tmp_path / name)
    root = open_source(source, tmp_path / "cache")
    assert {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()} == dict(GOOD)
    assert root.parent == tmp_path / "cache" and len(root.name) == 16


def test_the_second_time_it_is_reused_and_other_bytes_are_another_folder(tmp_path):
    first = open_source(make(tmp_path / "d.zip", GOOD), tmp_path / "cache")
    (first / "mark").write_text("still here")
    assert open_source(tmp_path / "d.zip", tmp_path / "cache") == first and (first / "mark").exists()
    other = open_source(make(tmp_path / "d.zip", GOOD[:2]), tmp_path / "cache")
    assert other != first and not (other / "mark").exists()


def test_folders_that_only_wrap_are_entered_but_no_class_and_no_split(tmp_path):
    wrapped = open_source(
        make(tmp_path / "w.zip", [(f"set/inner/{n}", c) for n, c in GOOD] + [("__MACOSX/x", b"")]), tmp_path / "c"
    )
    assert sorted(p.name for p in wrapped.iterdir()) == ["cats", "dogs"]
    split = open_source(make(tmp_path / "s.zip", [(f"train/{n}", c) for n, c in GOOD]), tmp_path / "c")
    assert [p.name for p in split.iterdir()] == ["train"]
    one = open_source(make(tmp_path / "o.zip", [("cats/a.jpg", b"a")]), tmp_path / "c")
    assert [p.name for p in one.iterdir()] == ["cats"]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../evil.jpg", "climbs out"),
        ("a/../../evil.jpg", "climbs out"),
        ("/tmp/evil.jpg", "absolute"),
        ("C:/evil.jpg", "absolute"),
    ],
)
def test_names_that_lead_outside_are_refused(tmp_path, suffix, name, words):
    message = refused(make(tmp_path / f"d{suffix}", [*GOOD, (name, b"evil")]), tmp_path / "cache")
    assert words in message and name in message


def test_backslashes_in_a_zip_are_folders_and_are_checked_as_such(tmp_path):
    assert "climbs out" in refused(make(tmp_path / "d.zip", [("..\\..\\evil.jpg", b"x")]), tmp_path / "cache")
    root = open_source(make(tmp_path / "e.zip", [("cats\\a.jpg", b"a"), ("dogs\\b.jpg", b"b")]), tmp_path / "cache")
    assert (root / "cats" / "a.jpg").read_bytes() == b"a"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("cats/first.jpg"))
        info = tarfile.TarInfo("cats/odd.jpg")
        info.type, info.linkname = kind, "first.jpg"
        archive.addfile(info)
    message = refused(tmp_path / "d.tar", tmp_path / "cache")
    assert "cats/odd.jpg" in message and "link or a device" in message


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("cats/link.jpg")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "cats/link.jpg" in refused(tmp_path / "d.zip", tmp_path / "cache")


def test_an_encrypted_zip_is_refused_by_name(tmp_path):
    source = make_zip(tmp_path / "d.zip", [("cats/a.jpg", b"secret")])
    content = bytearray(source.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + at] |= 1
    source.write_bytes(content)
    message = refused(source, tmp_path / "cache")
    assert "cats/a.jpg" in message and "encrypted" in message


@pytest.mark.parametrize("name", ["d.zip", "d.tar.gz", "d.tar.xz"])
def test_a_bomb_is_stopped_while_it_grows(tmp_path, name):
    source = make(tmp_path / name, [("cats/a.jpg", b"a"), ("cats/bomb.jpg", bytes(40 << 20))])
    message = refused(source, tmp_path / "cache", ratio_from_bytes=8 << 20)
    assert "cats/bomb.jpg" in message and "bomb" in message
    assert "limit of" in refused(source, tmp_path / "cache", total_bytes=1 << 20)


def test_too_many_entries_are_refused(tmp_path):
    source = make(tmp_path / "d.tar", [(f"cats/{i}.jpg", b"") for i in range(11)])
    assert "too many" in refused(source, tmp_path / "cache", entries=10)
    assert open_source(source, tmp_path / "cache", Limits(entries=11)).is_dir()


def test_a_header_that_lies_about_sizes_does_not_fool_the_count(tmp_path):
    source = make_zip(tmp_path / "d.zip", [("cats/a.jpg", bytes(4 << 20))])
    content = bytearray(source.read_bytes())
    central = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, central + 24, 100)  # claimed uncompressed size
    source.write_bytes(content)
    refused(source, tmp_path / "cache", total_bytes=1 << 20)


@pytest.mark.parametrize("name", ["d.zip", "d.tar", "d.tar.gz", "d.tar.xz", "d.tar.bz2"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
def test_a_cut_archive_is_damaged_wherever_it_was_cut(tmp_path, name, share):
    noise = [(f"cats/{i}.jpg", os.urandom(3000)) for i in range(20)]
    source = make(tmp_path / name, noise)
    content = source.read_bytes()
    end = content.rindex(noise[-1][1][-100:]) + 600 if name == "d.tar" else len(content)  # the rest of a tar is padding
    source.write_bytes(content[: int(end * share)])
    assert "damaged" in refused(source, tmp_path / "cache")


def test_a_tar_cut_between_two_members_is_noticed(tmp_path):
    source = make(tmp_path / "d.tar", [(f"cats/{i}.jpg", b"x" * 512) for i in range(4)])
    source.write_bytes(source.read_bytes()[:2048])  # two whole members; the standard library says nothing
    assert "the end of the archive" in refused(source, tmp_path / "cache")


def test_flipped_bytes_are_noticed_and_the_member_is_named(tmp_path):
    source = make_zip(tmp_path / "d.zip", [("cats/a.jpg", os.urandom(5000)), ("cats/b.jpg", os.urandom(5000))])
    content = bytearray(source.read_bytes())
    content[7000] ^= 255
    source.write_bytes(content)
    assert "cats/b.jpg" in refused(source, tmp_path / "cache")


def test_a_file_in_the_way_of_a_folder_is_refused(tmp_path):
    for order in (1, -1):
        members = [("cats", b"a file"), ("cats/a.jpg", b"x")][::order]
        assert "file and a folder" in refused(make(tmp_path / "d.tar", members), tmp_path / "cache")


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    assert "too long" in refused(make(tmp_path / "d.tar", [("x" * 300 + ".jpg", b"x")]), tmp_path / "cache")


def test_names_that_are_not_utf8_are_kept(tmp_path):
    name = os.fsdecode(b"cats/caf\xe9.jpg")
    with tarfile.open(tmp_path / "d.tar", "w", errors="surrogateescape") as archive:
        archive.addfile(tarfile.TarInfo(name))
    root = open_source(tmp_path / "d.tar", tmp_path / "cache")
    assert b"caf\xe9.jpg" in os.listdir(os.fsencode(root / "cats"))


def test_what_is_not_there_and_what_is_no_archive(tmp_path):
    (tmp_path / "flowers").mkdir()
    (tmp_path / "x.doc").write_text("hello")
    with pytest.raises(DataError, match="no such file") as caught:
        open_source(tmp_path / "flower", tmp_path / "cache")
    assert caught.value.code == "D001" and caught.value.try_.endswith("flowers")
    with pytest.raises(DataError, match="neither a folder"):
        open_source(tmp_path / "x.doc", tmp_path / "cache")
    make(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="holds no files") as caught:
        open_source(tmp_path / "empty.tar", tmp_path / "cache")
    assert caught.value.code == "D002" and os.listdir(tmp_path / "cache") == []
