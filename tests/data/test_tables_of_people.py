"""Tables as Excel, Numbers and people at a spreadsheet write them: each is good in the eye of the program that wrote it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from imgcls_fast.data.listing import Listing
from imgcls_fast.data.tables import list_table

ROWS = [(f"im/{c}/{k}.png", c) for c in ("cat", "dog") for k in range(3)]
BODY = "".join(f"{path},{label}\n" for path, label in ROWS)
UMLAUT = "im/cat/größe.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in (*(path for path, _ in ROWS), UMLAUT):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    return tmp_path


def read(folder: Path, text: str | bytes) -> Listing:
    (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return list_table(folder / "t.csv")


GOOD = {
    "sep= line": "sep=;\r\npath;label\r\n" + BODY.replace(",", ";"),
    "sep= line, quoted, with a mark": '\ufeff"sep=;"\r\npath;label\r\n' + BODY.replace(",", ";"),
    "sep= a bar": "sep=|\npath|label\n" + BODY.replace(",", "|"),
    "bars": "path|label\n" + BODY.replace(",", "|"),
    "blank rows at the end": "path,label\n" + BODY + ",\n,\n , \n\n",
    "UTF-16 without a mark": ("path,label\n" + BODY).encode("utf-16-le"),
    "UTF-16, the other way round": ("path,label\n" + BODY).encode("utf-16-be"),
    "blanks behind the path": "path,label\n" + BODY.replace(".png,", ".png ,"),
    "unseen blanks around the path": "path,label\n" + BODY.replace("im/", "\u200bim/").replace(".png", ".png\xa0"),
    "unseen mark before a column": "path,\ufefflabel\n" + BODY,
    "a comma behind each row": "path,label\n" + "".join(f"{path},{label},\n" for path, label in ROWS),
    "commas behind all": "path,label,,\n" + "".join(f"{path},{label},,\n" for path, label in ROWS),
    "a column labels": "image,labels\n" + BODY,
    "columns of other tools": "image_name,class_name\n" + BODY,
    "splits in other words": "path,label,split\n" + "".join(f"{p},{c},{'Training' if '0' in p else 'TEST'}\n" for p, c in ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_programs_write_is_read(name: str, folder: Path) -> None:
    listing = read(folder, GOOD[name])
    assert (listing.problems, listing.notices, listing.classes) == ([], [], ["cat", "dog"])
    assert listing.paths == [path for path, _ in ROWS]


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_path_is_found_in_either_form_of_its_umlauts(folder: Path, written: str, stored: str) -> None:
    (folder / UMLAUT).rename(folder / unicodedata.normalize(stored, UMLAUT))
    listing = read(folder, unicodedata.normalize(written, f"path,label\n{BODY}{UMLAUT},cat\n"))
    assert listing.problems == [] and unicodedata.normalize(stored, UMLAUT) in listing.paths


def test_a_path_in_the_code_page_of_windows_is_found(folder: Path) -> None:
    listing = read(folder, f"path,label\n{BODY}{UMLAUT},cat\n".encode("cp1252"))
    assert listing.problems == [] and UMLAUT in listing.paths


def test_lines_are_counted_from_the_top_also_behind_a_sep_line(folder: Path) -> None:
    listing = read(folder, "sep=;\npath;label\nim/cat/0.png;cat\nim/cat/1.png;\n\n;\nim/cat/2.png\n")
    assert [problem.where for problem in listing.problems] == ["t.csv, line 4", "t.csv, line 7"]


@pytest.mark.parametrize(("other", "how"), [("Cat", "capitals"), ("\u200bcat", "cannot be seen"), ("c\u0430t\u200b", "")])
def test_classes_that_look_alike_stay_apart_and_are_pointed_out(folder: Path, other: str, how: str) -> None:
    listing = read(folder, "path,label\n" + BODY.replace("0.png,cat", f"0.png,{other}"))
    assert len(listing.classes) == 3
    assert [how in notice and ascii("cat") in notice for notice in listing.notices] == [True] * bool(how)


def test_names_that_differ_in_a_word_are_nothing_to_speak_of(folder: Path) -> None:
    listing = read(folder, "path,label\n" + BODY.replace(",cat", ",-1").replace(",dog", ",1"))
    assert listing.classes == ["-1", "1"] and listing.notices == []
