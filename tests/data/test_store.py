"""A row's bytes are asked of one object: the same images from a folder and from a zip archive give the same batches."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import DataError
from imgcls_fast.data import reach
from imgcls_fast.data.decode import Undecodable, read_file
from imgcls_fast.data.prepare import changed_files, channel_statistics
from imgcls_fast.data.quarantine import examine_isolated
from imgcls_fast.data.store import Folder, Store, Zip, open_store, reader
from imgcls_fast.loading.loader import dali_missing, read_rows

METHODS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}


@pytest.fixture
def photos(shared_data: Path) -> Path:
    """Real photos: one class of the validation images."""
    return sorted((shared_data / "photos" / "val").iterdir())[0]


def packed(photos: Path, archive: Path, method: int = zipfile.ZIP_DEFLATED, inside: str = "") -> list[str]:
    names = sorted(path.name for path in photos.iterdir())[:12]
    with zipfile.ZipFile(archive, "w", method) as file:
        for name in names:
            file.write(photos / name, inside + name)
    return names


@pytest.mark.parametrize("method", METHODS)
def test_a_zip_gives_the_bytes_of_the_files_that_were_packed(photos: Path, tmp_path: Path, method: str) -> None:
    names = packed(photos, tmp_path / "photos.zip", METHODS[method], "album/")
    folder, archive = open_store(photos), open_store(tmp_path / "photos.zip" / "album")
    assert isinstance(folder, Folder) and isinstance(archive, Zip)
    for name in names:
        assert archive.read(name) == folder.read(name) == (photos / name).read_bytes()
        assert archive.digest(name) == folder.digest(name) == sha256(folder.read(name)).digest()
        assert archive.size(name) == folder.size(name) and archive.holds(name) and folder.holds(name)
    assert archive.where(names[0]) == str(tmp_path / "photos.zip" / "album" / names[0])
    assert not archive.holds("none.jpg") and not folder.holds("none.jpg")


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("dali-cpu", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI"))]
)
def test_loaders_statistics_and_the_check_for_changes_read_a_zip_as_they_read_the_folder(
    kit: Any, photos: Path, tmp_path: Path, backend: str
) -> None:
    names = packed(photos, tmp_path / "photos.zip")
    loose = kit.manifest(photos, names)
    digest = np.stack([np.frombuffer(sha256((photos / name).read_bytes()).digest()[:16], np.uint8) for name in names])
    loose = replace(loose, digest=digest)
    zipped = replace(loose, root=tmp_path / "photos.zip")
    ours, theirs = (
        [kit.copy(batch) for batch in read_rows(m, np.arange(12), kit.pixels(), batch_size=5, backend=backend, workers=0)]
        for m in (zipped, loose)
    )
    kit.assert_same(ours, theirs)
    assert not changed_files(zipped, 2).all
    assert channel_statistics(zipped, "rgb") == channel_statistics(loose, "rgb")
    assert examine_isolated(names[:3], root=zipped.root) == examine_isolated(names[:3], root=photos)


def test_a_report_looks_at_images_of_either_without_waiting(photos: Path, tmp_path: Path) -> None:
    name = packed(photos, tmp_path / "photos.zip")[0]
    for root in (photos, tmp_path / "photos.zip"):
        assert reader(root, 1 << 20)(name) == (photos / name).read_bytes()
        assert reader(root, 10)(name) == reader(root, 1 << 20)("none.jpg") == b""
    (tmp_path / "cut.zip").write_bytes(b"PK")
    assert reader(tmp_path / "cut.zip", 10)(name) == b""


def stores(photos: Path, tmp_path: Path) -> list[Store]:
    packed(photos, tmp_path / "photos.zip")
    return [Folder(photos), Zip(tmp_path / "photos.zip")]


def test_a_missing_or_too_large_image_is_the_same_error_in_both(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "WAITS_S", (0.01,))
    for store in stores(photos, tmp_path):
        with pytest.raises(DataError, match=r"none\.jpg") as away:
            store.read("none.jpg")
        assert away.value.code == "D015"
        with pytest.raises(FileNotFoundError):
            store.read("none.jpg", seen=False)
        with pytest.raises(OSError):
            store.size("none.jpg")
        with pytest.raises(reach.NotAFile, match="too large"):
            store.read(sorted(path.name for path in photos.iterdir())[0], most=10)


def test_an_archive_that_is_away_for_a_moment_is_waited_for_and_one_that_was_replaced_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = stores(photos, tmp_path)[1], sorted(path.name for path in photos.iterdir())[0]
    archive, real = tmp_path / "photos.zip", reach._open
    tries: list[Path] = []

    def flaky(path: Path) -> Any:
        tries.append(path)
        if len(tries) == 1:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(reach, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(reach, "_open", flaky)
    assert store.read(name) == (photos / name).read_bytes() and tries == [archive, archive]
    os.utime(archive, ns=(1, 1))
    with pytest.raises(DataError, match="was replaced") as replaced:
        store.read(name)
    assert replaced.value.code == "D010"


def flip(content: bytearray, archive: zipfile.ZipFile) -> None:
    content[archive.infolist()[0].header_offset + 200] ^= 255


def lose_header(content: bytearray, archive: zipfile.ZipFile) -> None:
    content[archive.infolist()[0].header_offset] ^= 255


def encrypt(content: bytearray, archive: zipfile.ZipFile) -> None:
    content[content.index(b"PK\1\2") + 8] |= 1


@pytest.mark.parametrize(
    ("damage", "reason"), [(flip, "damaged in"), (lose_header, "no header"), (encrypt, "encrypted")]
)
def test_a_damaged_member_is_a_bad_image_with_a_reason_and_the_others_stay_good(
    photos: Path, tmp_path: Path, damage: Callable[[bytearray, zipfile.ZipFile], None], reason: str
) -> None:
    names = packed(photos, tmp_path / "photos.zip")
    content = bytearray((tmp_path / "photos.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "photos.zip") as archive:
        damage(content, archive)
    (tmp_path / "photos.zip").write_bytes(content)
    store = Zip(tmp_path / "photos.zip")
    with pytest.raises(Undecodable, match=reason):
        read_file(names[0], store=store)
    assert read_file(names[1], store=store) == (photos / names[1]).read_bytes()


def test_an_archive_without_a_sound_index_or_that_is_a_bomb_is_refused_before_any_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4 and no more")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.jpg", bytes(8 << 20))
    content = bytearray((tmp_path / "bomb.zip").read_bytes())
    at = content.index(b"PK\1\2") + 24
    content[at : at + 4] = (0xFFFFFFFE).to_bytes(4, "little")  # claims 4 GiB
    (tmp_path / "bomb.zip").write_bytes(content)
    for name in ("cut.zip", "bomb.zip"):
        with pytest.raises(DataError, match="cannot be read in place") as refused:
            open_store(tmp_path / name)
        assert refused.value.code == "D007"
