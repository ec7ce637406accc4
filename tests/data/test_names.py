"""No class swallows another without a word, whatever its name is written in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgcls_fast.data.folders import list_folder
from imgcls_fast.data.listing import Listing
from imgcls_fast.data.tables import Columns, list_table


def images(root: Path, *names: bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")


def counts(listing: Listing) -> dict[str, int]:
    assert not listing.problems, listing.problems
    return {name: list(listing.labels).count(k) for k, name in enumerate(listing.classes)}


def test_folders_whose_names_differ_in_one_byte_that_is_not_utf8_stay_apart(tmp_path: Path) -> None:
    images(tmp_path, *(b"Gr%sn/%d.png" % (byte, k) for byte in (b"\xfc", b"\xf6", b"\xee") for k in range(3)))
    listing = list_folder(tmp_path)
    assert sorted(counts(listing).values()) == [3, 3, 3] and listing.notices == []
    assert {os.fsencode(name) for name in listing.classes} == {b"Gr\xfcn", b"Gr\xf6n", b"Gr\xeen"}


def test_every_byte_is_a_class_of_its_own(tmp_path: Path) -> None:
    odd = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    images(tmp_path, *(b"x%s/1.png" % name for name in odd))
    listing = list_folder(tmp_path)
    assert len(listing.classes) == len(odd) == len(set(listing.classes)) and set(counts(listing).values()) == {1}


def test_two_spellings_of_one_class_are_one_and_that_is_said(tmp_path: Path) -> None:
    images(tmp_path, "é/1.png".encode(), "e\u0301/2.png".encode(), b"b/1.png")
    listing = list_folder(tmp_path)
    assert counts(listing) == {"b": 1, "é": 2}
    assert listing.notices == [r"'e\u0301' and '\xe9' are taken as one class, 'é'"]


def table(folder: Path, content: bytes, name: str = "list.csv") -> Listing:
    (folder / name).write_bytes(content)
    return list_table(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images(tmp_path, *(b"x/%d.png" % k for k in range(6)))
    return tmp_path


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_table_of_windows_is_read_as_such_and_that_is_said(folder: Path, end: bytes) -> None:
    labels = ["Grün", "Grîn", "Rot", "Grün", "Grîn", "Rot"]
    rows = [b"path;label", *(f"x\\{k}.png;{label}".encode("cp1252") for k, label in enumerate(labels))]
    listing = table(folder, end.join(rows) + end)
    assert counts(listing) == {"Grîn": 2, "Grün": 2, "Rot": 2}
    (notice,) = listing.notices
    assert (
        "list.csv is not UTF-8" in notice and "2 class names are read as Windows-1252" in notice and "'Grün'" in notice
    )


def test_what_windows_does_not_know_stays_apart(folder: Path) -> None:
    listing = table(folder, b"path,label\nx/0.png,a\x81\nx/1.png,a\x8d\nx/2.png,a\n")
    assert sorted(counts(listing).values()) == [1, 1, 1]


def test_names_of_files_are_found_in_either_encoding(tmp_path: Path) -> None:
    images(tmp_path, "Grün.png".encode(), b"Gr\xf6n.png")
    listing = table(tmp_path, "path,label\nGrün.png,a\n".encode("cp1252"))
    assert list(listing.paths) == ["Grün.png"] and counts(listing) == {"a": 1}
    listing = table(
        tmp_path, b"path,label\nGr\xf6n.png,Gr\xf6n\n"
    )  # the disk is not UTF-8 either: names stay as they are
    assert os.fsencode(listing.paths[0]) == b"Gr\xf6n.png" and os.fsencode(listing.classes[0]) == b"Gr\xf6n"
    assert listing.notices == []


def test_the_two_encodings_of_a_class_in_one_table_are_one_and_that_is_said(folder: Path) -> None:
    listing = table(folder, b"path,label\nx/0.png,Gr\xfcn\nx/1.png,Gr\xc3\xbcn\n")
    assert counts(listing) == {"Grün": 2} and any("taken as one class, 'Grün'" in notice for notice in listing.notices)


def test_labels_that_differ_in_their_edges_are_one_and_that_is_said(folder: Path) -> None:
    listing = table(folder, b"path,label\nx/0.png,cat\nx/1.png,cat \n")
    assert counts(listing) == {"cat": 2} and listing.notices == ["'cat' and 'cat ' are taken as one class, 'cat'"]
    listing = table(folder, b"path, label\nx/0.png, cat\nx/1.png, cat\n")  # always written so: nothing to say
    assert counts(listing) == {"cat": 2} and listing.notices == []


def test_a_column_is_named_as_people_write_it(folder: Path) -> None:
    (folder / "list.csv").write_bytes("path,Größe\nx/0.png,a\n".encode("cp1252"))
    assert counts(list_table(folder / "list.csv", Columns(label="Größe"))) == {"a": 1}


def test_half_of_a_character_in_json_is_a_fault_of_its_row(folder: Path) -> None:
    listing = table(
        folder,
        b'{"path":"x/0.png","label":"a"}\n{"path":"x/1.png","label":"\\ud83d"}\n{"path":"\\ud83d","label":"a"}\n',
        "x.jsonl",
    )
    assert [problem.where for problem in listing.problems] == ["x.jsonl, line 2", "x.jsonl, line 3"]
    assert all("lone surrogate" in problem.message for problem in listing.problems) and list(listing.paths) == [
        "x/0.png"
    ]
