"""Tables with labels of every kind: what is read from them, and every problem of a bad one at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import imgcls_fast as ic
from imgcls_fast.core.labels import LabelSpace, Task, demand_answers
from imgcls_fast.core.manifest import Manifest
from imgcls_fast.data.columns import Columns
from imgcls_fast.data.findings import DataProblems, ScanOptions, ScanResult
from imgcls_fast.data.scan import inspect, scan
from imgcls_fast.data.split import make_splits, write_split_csv
from imgcls_fast.data.tables import list_table

BLOOD_CELLS = "blood_cells/MANIFEST.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small pictures, 0.png to 11.png."""
    root = tmp_path_factory.mktemp("labels")
    for k in range(12):
        noise = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{k}.png")
    return root


def look(folder: Path, text: str, name: str = "t.csv", **options: Any) -> ScanResult:
    (folder / name).write_text(text, encoding="utf-8")
    return inspect(folder / name, ScanOptions(advice=False, **options))


def rows(head: str, *lines: str) -> str:
    """A table whose k-th row is of the k-th picture."""
    return "\n".join([f"path,{head}", *(f"{k}.png,{line}" for k, line in enumerate(lines))]) + "\n"


def objects(*labels: Any) -> str:
    return "".join(json.dumps({"path": f"{k}.png", "label": label}) + "\n" for k, label in enumerate(labels))


def told(found: ScanResult) -> list[str]:
    return [f"{problem.where}: {problem.message}" for problem in found.problems]


def targets(manifest: Manifest) -> list[list[float | None]]:
    values = manifest.targets(np.arange(len(manifest))).astype(float).round(5).tolist()
    return [[None if v != v else v for v in row] for row in values]


# ---------------------------------------------------------------- what is read


ANY = LabelSpace((Task("label", ("a", "b", "c"), "any_of"),))
GOOD: dict[str, tuple[str, str, dict[str, Any], LabelSpace, list[list[float | None]], str]] = {
    "separators": (
        "t.csv", rows("label", "a|b", "b", "c|a"), {}, ANY,
        [[1, 1, 0], [0, 1, 0], [1, 0, 1]], "labels: 3 classes, several per image (any_of): separator |",
    ),
    "semicolons with blanks": (
        "t.csv", rows("label", "a; b", "b", "c ;a"), {}, ANY,
        [[1, 1, 0], [0, 1, 0], [1, 0, 1]], "labels: 3 classes, several per image (any_of): separator ;",
    ),
    "0/1 columns, one of them unknown in a row": (
        "t.csv", rows("c,a,b", "0,1,1", "0,,1", "1.0,TRUE,false"), {"label_cols": "a,b,c"}, ANY,
        [[1, 1, 0], [None, 1, 0], [1, 0, 1]], "labels: 3 classes, several per image (any_of): 0/1 columns",
    ),
    "lists, one empty": (
        "t.jsonl", objects(["a", "b"], [], "c"), {}, ANY,
        [[1, 1, 0], [0, 0, 0], [0, 0, 1]], "labels: 3 classes, several per image (any_of): lists",
    ),
    "one class each, and told to be any_of": (
        "t.csv", rows("label", "a", "b", "c"), {"label_kind": "any_of"}, ANY,
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "labels: 3 classes, several per image (any_of): data.label_kind",
    ),
    "probabilities in columns": (
        "t.csv", rows("a,b,c", ".2,.3,.5", "1,0,0", ",,"), {"label_cols": "a,b,c"}, LabelSpace.single("abc"),
        [[.2, .3, .5], [1, 0, 0]], "",
    ),
    "objects of probabilities": (
        "t.jsonl", objects({"a": 0.25, "b": 0.75}, "a", {"c": 1}), {}, LabelSpace.single("abc"),
        [[.25, .75, 0], [1, 0, 0], [0, 0, 1]], "labels: 3 classes (one_of): probabilities",
    ),
    "probabilities of independent labels": (
        "t.csv", rows("a,b,c", ".9,.8,.7", "0,1,.5"), {"label_cols": "a,b,c", "label_kind": "any_of"}, ANY,
        [[.9, .8, .7], [0, 1, .5]], "labels: 3 classes, several per image (any_of): probabilities",
    ),
    "one column with 1 in each row": (
        "t.csv", rows("a,b,c", "1,0,0", "0,0,1", "0,1,0"), {"label_cols": "a,b,c"}, LabelSpace.single("abc"),
        [[1, 0, 0], [0, 0, 1], [0, 1, 0]],
        "labels: 3 classes, exactly one per image in the columns (one_of); --label-kind any_of: any number of them",
    ),
    "two tasks, of one a fifth missing": (
        "t.csv", rows("color,tags", "red,new|old", "blue,new", ",old", "red,new", "blue,old"), {"label_col": "color,tags"},
        LabelSpace((Task("color", ("blue", "red")), Task("tags", ("new", "old"), "any_of"))),
        [[0, 1, 1, 1], [1, 0, 1, 0], [None, None, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]],
        "labels: 2 tasks, color has 2 classes (one_of), 20% unknown; tags has 2 classes, several per image (any_of): separator |",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_labels_of_every_kind_are_read(name: str, folder: Path) -> None:
    file, text, options, labels, values, notice = GOOD[name]
    empty = name == "probabilities in columns"
    found = look(folder, text.replace("2.png,,,\n", "") if empty else text, file, **options)
    assert told(found) == []
    assert found.manifest.labels == labels
    assert targets(found.manifest) == values
    assert not notice or found.notices[0] == notice


def test_one_label_tables_and_names_with_a_comma_stay_what_they_were(folder: Path) -> None:
    found = look(folder, rows("label", '"Smith, Jane"', '"Smith, John"', '"Doe, John"'))
    assert found.manifest.labels == LabelSpace.single(["Doe, John", "Smith, Jane", "Smith, John"])
    assert found.manifest.answers[0].dtype == np.int32 and not found.notices and "tasks" not in found.to_dict()
    assert look(folder, rows("label", "a|b", "a", "b"), label_kind="one_of").manifest.labels.classes == ("a", "a|b", "b")


def test_the_order_of_labels_in_a_cell_does_not_matter(folder: Path) -> None:
    found = look(folder, rows("label", "a|b", "a", "b") + "0.png,b|a\n")
    assert told(found) == [] and len(found.manifest) == 3


def test_unlabelled_use_asks_for_no_labels(folder: Path) -> None:
    for text, more in ((rows("x", "1", "2"), {}), (rows("label", "a|", ""), {}), (rows("a,b", "7,x", ","), {"label_cols": "a,b"})):
        assert len(look(folder, text, purpose="predict", **more).manifest) == 2


def test_blood_cells_scan_and_split_the_same_from_names_and_from_columns(shared_data: Path) -> None:
    source = shared_data / BLOOD_CELLS
    names = scan(source, ScanOptions(advice=False, split_col=""))
    columns = scan(source, ScanOptions(advice=False, split_col="", label_cols="Platelets,RBC,WBC"))
    assert names.notices[0] == "labels: 3 classes, several per image (any_of): separator |"
    assert columns.notices[0] == "labels: 3 classes, several per image (any_of): 0/1 columns"
    assert names.manifest.counts().tolist() == columns.manifest.counts().tolist() == [151, 262, 268]
    assert names.manifest.fingerprint == columns.manifest.fingerprint
    done = make_splits(names.manifest)
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert np.abs(done.counts(split) - share * done.counts()).max() <= 1.4, "RBC is lacking in 11 of 273 images"
    assert scan(source).manifest.counts("val").sum() == 0 and make_splits(scan(source).manifest).counts("val").min() > 10
    assert any("WBC without 5, RBC without 11" in notice for notice in scan(source).notices)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "one column with 1 in each row"])
def test_the_table_of_a_split_gives_the_same_labels_again(name: str, folder: Path) -> None:
    file, text, options, *_ = GOOD[name]
    first = look(folder, text.replace("2.png,,,\n", ""), file, **options).manifest
    write_split_csv(folder / "split.csv", first)
    again = scan(folder / "split.csv", ScanOptions(advice=False)).manifest
    assert again.labels == first.labels and targets(again) == targets(first)


def test_check_split_and_stats_report_each_task(folder: Path) -> None:
    text = rows("color,tags", *(["red,new|old", "blue,new", ",old", "red,old"] * 3))
    (folder / "tasks.csv").write_text(text)
    asked = {"label_col": "color,tags", "split_ratio": "0.5,0.25,0.25"}
    checked = ic.check_data(folder / "tasks.csv", **asked)
    assert checked["ok"] and checked["line"].startswith("12 images, 4 classes of 2 tasks")
    color, tags = checked["tasks"]
    assert color == {"name": "color", "kind": "one_of", "counts": {"blue": 3, "red": 6}, "unknown": {"blue": 3, "red": 3}}
    assert tags == {"name": "tags", "kind": "any_of", "counts": {"new": 6, "old": 9}, "unknown": {}}
    done = ic.split_data(folder / "tasks.csv", out=folder / "done.csv", force=True, **asked)
    stats = ic.data_stats(folder / "done.csv")
    assert done["per_split"] == stats["per_split"] and stats["tasks"] == checked["tasks"]
    assert stats["splits"] == {"train": 6, "val": 3, "test": 3} and min(stats["per_split"]["train"].values()) >= 1


# ---------------------------------------------------------------- what is wrong

BAD: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "cells": (
        "t.csv", rows("label", "a|b", "a||b", "b|a|a", "a;b", "|a", "a", "b"), {},
        ["t.csv, line 3: 1.png ('a||b') has an empty label", "t.csv, line 4: 2.png ('b|a|a') names 'a' twice",
         "t.csv, line 5: 3.png ('a;b') parts its labels with ';', and '|' stands in the other rows",
         "t.csv, line 6: 4.png ('|a') has an empty label"],
    ),
    "empty and contradicting": (
        "t.csv", rows("label", "a|b", "", "a", "b") + "0.png,a\ngone.png,b\n2.png,a|b\n", {},
        ["line 3: 1.png has no label", "line 6: 0.png is listed again with another label", "line 7: gone.png does not exist",
         "line 8: 2.png is listed again with another label"],
    ),
    "two tasks": (
        "t.csv", rows("color,tags", "red,a|b", ",", "blue,a", "red,a|", "red,b") + "0.png,blue,b|a\n",
        {"label_col": "color,tags"},
        ["line 5: tags of 3.png ('a|') has an empty label",
         "line 7: color of 0.png is listed again with another label"],
    ),
    "two tasks without a label": (
        "t.csv", rows("color,tags", ",", " ,"), {"label_col": "color,tags"}, ["line 2: no row has a label in any of color, tags"],
    ),
    "columns that are not there": (
        "t.csv", rows("color,shape", "red,round"), {"label_col": "colour,shape,shape,weight"},
        ["no column 'colour'", "one column 'shape', and --label-col names it twice", "no column 'weight'"],
    ),
    "classes that are not there": (
        "t.csv", rows("a,b", "1,0"), {"label_cols": "a,B,a", "split_col": "sets"},
        ["no column 'B'", "one column 'a', and --label-cols names it twice", "no column 'sets'"],
    ),
    "two ways to the labels": (
        "t.csv", rows("label,a,a", "x,1,0"), {"label_col": "label", "label_cols": "a"},
        ["asked for labels in two ways", "2 columns that are called 'a'"],
    ),
    "0/1 columns": (
        "t.csv", rows("a,b", "1,1", "2,0", "0,-1", "yes,1", "0,nan", "0.5,1", "0,0"), {"label_cols": "a,b"},
        ["line 3: 1.png has '2' in a", "line 4: 2.png has '-1' in b", "line 5: 3.png has 'yes' in a", "line 6: 4.png has 'nan' in b",
         "line 7: 5.png has 0.5 in a, which is neither 0 nor 1 as in the other rows"],
    ),
    "counts instead of marks": (
        "t.csv", rows("a,b", "19,0", "18,1", "0,1", "1,1"), {"label_cols": "a,b"},
        ["line 2: 0.png has '19' in a, which is neither 0 nor 1 nor a probability; where it is unknown, write nothing", "line 3: 1.png"],
    ),
    "probabilities in columns": (
        "t.csv", rows("a,b", ".5,.5", ".25,.75", ".5,.6", ".3,", "-.5,1.5", "x,1", ".1,.9", ".3,.7"), {"label_cols": "a,b"},
        ["line 4: 2.png has probabilities that sum to 1.1, and not to 1", "line 5: 3.png has a probability for some classes only",
         "line 6: 4.png has '-.5' in a, '1.5' in b", "line 7: 5.png has 'x' in a"],
    ),
    "probabilities in objects": (
        "t.jsonl", objects({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.4}, {"a": -1, "b": 2}, {"a": "1"}, {}, ["a"], {"b": True}), {},
        ["line 2: 1.png ({'a': 0.5, 'b': 0.4}) has probabilities that sum to 0.9", "line 3: 2.png ... has -1 for a ... has 2 for b",
         "line 4: 3.png ... has '1' for a, which is no number", "line 5: 4.png ({}) is empty", "line 6: 5.png ... is a list among",
         "line 7: 6.png ... has True for b"],
    ),
    "lists": (
        "t.jsonl", objects(["a", "b"], ["a", "a"], ["a", None], ["b", ""], [" a", "a"]), {},
        ["line 2: 1.png (['a', 'a']) names 'a' twice", "line 3: 2.png", "line 4: 3.png", "line 5: 4.png"],
    ),
    "lists where one_of was asked for": (
        "t.jsonl", objects("a", ["a", "b"], "b", ["b"]), {"label_kind": "one_of"},
        ["line 2: 1.png ... is a list, and data.label_kind is one_of", "line 4: 3.png"],
    ),
    "several marks where one_of was asked for": (
        "t.csv", rows("a,b", "1,0", "1,1", "0,0", "0,1"), {"label_cols": "a,b", "label_kind": "one_of"},
        ["line 3: 1.png has 2 columns with 1, and data.label_kind is one_of", "line 4: 2.png has 0 columns with 1"],
    ),
    "tasks with one class": (
        "t.csv", rows("color,shape", "red,round", "red,", ",round"), {"label_col": "color,shape"},
        ["the column 'color' of ... has 1 class ('red'), and a task needs at least 2", "the column 'shape' of"],
    ),
    "classes in one split only": (
        "t.csv", rows("color,tags,split", "red,a|b,train", "blue,a,train", "green,a,test", "red,c|b,test", "red,b|c,val"),
        {"label_col": "color,tags"},
        ["class 'green' of color has 0 val and 1 test images and no training images",
         "class 'c' of tags has 1 val and 1 test images and no training images"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_gives_all_its_problems_at_once(name: str, folder: Path) -> None:
    file, text, options, expected = BAD[name]
    try:
        found = told(look(folder, text, file, **options))
    except DataProblems as error:
        found = [f"{problem.where}: {problem.message}" for problem in error.problems]
        assert all(problem.where.startswith(str(folder / file)) for problem in error.problems)
    assert len(found) == len(expected), found
    for problem, words in zip(found, expected, strict=True):
        assert all(part in problem for part in words.split(" ... ")), f"{words!r} is not in {problem!r}"


CELL = st.text("ab|;, 01.-", max_size=5)
VALUE = st.one_of(CELL, st.lists(CELL | st.none(), max_size=3), st.dictionaries(CELL, st.floats(-1, 2) | CELL | st.booleans(), max_size=3))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 3), VALUE, VALUE), min_size=1, max_size=6),
    st.sampled_from([Columns(label="x"), Columns(label="x,y"), Columns(labels="x,y"), Columns(labels="x")]),
    st.sampled_from(["auto", "one_of", "any_of"]),
)
def test_whatever_a_table_holds_is_read_or_a_problem(folder: Path, lines: list[Any], columns: Columns, kind: Any) -> None:
    text = "".join(json.dumps({"path": f"{k}.png", "x": x, "y": y}) + "\n" for k, x, y in lines)
    (folder / "any.jsonl").write_text(text)
    listing = list_table(folder / "any.jsonl", replace(columns, kind=kind))
    for task in listing.tasks:
        demand_answers(Task(task.name, tuple(task.classes), task.kind), task.answers)
        assert listing.problems or len(task.answers) == len(listing.paths)
    assert listing.tasks or max(listing.labels, default=-1) < max(1, len(listing.classes))
    assert all(problem.where.startswith("any.jsonl, line ") for problem in listing.problems)


def test_rows_without_a_label_in_any_task_are_left_out_and_counted(folder: Path) -> None:
    found = look(folder, rows("color,tags", "red,a|b", ",", "blue,a", " , ", ",b"), label_col="color,tags")
    assert not found.problems and targets(found.manifest) == [[0, 1, 1, 1], [1, 0, 1, 0], [None, None, 0, 1]]
    assert "2 rows of t.csv without a label in any of color, tags were left out: the first is 1.png, line 3" in found.notices
    model = LabelSpace((Task("color", ("red", "blue")), Task("tags", ("a", "b"), "any_of")))
    part = look(folder, rows("color", "red", ""), purpose="judge", labels=model)
    assert part.notices[0] == "1 row of t.csv without a label in color was left out: 1.png, line 3"
    (empty,) = look(folder, rows("label", "a|b", "", "a", "b")).problems  # of one task an empty cell may also mean none
    assert empty.message == "1.png has no label" and "where no class holds" in empty.try_


def test_a_column_that_is_spelled_almost_right_is_named(folder: Path) -> None:
    with pytest.raises(DataProblems) as caught:
        look(folder, rows("color,shape", "red,round"), label_col="colour,shape,weight")
    assert caught.value.problems[0].try_ == "--label-col color,shape,weight"


def test_the_same_picture_with_other_labels_is_noted(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    found = look(folder, rows("label", "a|b", "a", "b") + "copy.png,a\n")
    assert "the same image has 2 labels: 0.png (a|b), copy.png (a)" in found.notices
    (folder / "copy.png").unlink()


def test_labels_that_no_image_has_are_left_out(folder: Path) -> None:
    found = look(folder, rows("a,b,c", "1,1,0", "0,1,0", "1,0,0"), label_cols="a,b,c")
    assert found.manifest.labels.classes == ("a", "b")
    assert "no usable image in 1 of the classes, left out: c" in found.notices


# ---------------------------------------------------------------- with the classes of a model


def judged(folder: Path, text: str, labels: LabelSpace, **options: Any) -> ScanResult:
    return look(folder, text, purpose="judge", labels=labels, **options)


def test_unknown_labels_are_left_out_and_one_that_may_be_meant_is_not_judged(folder: Path) -> None:
    model = LabelSpace((Task("label", ("WBC", "RBC"), "any_of"),))
    found = judged(folder, rows("label", "RBC|wbc", "RBC|odd", "WBC", "RBC"), model)
    assert found.manifest.labels == model
    assert targets(found.manifest) == [[None, 1], [0, 1], [1, 0], [0, 1]]
    notice = found.notices[-1]
    assert "2 labels that the model does not know were left out" in notice and "wbc 1 (perhaps the model's WBC)" in notice
    assert targets(judged(folder, rows("RBC", "1", "0"), model, label_cols="RBC").manifest) == [[None, 1], [None, 0]]


def test_tasks_are_found_by_name_and_numbered_as_the_model_does(folder: Path) -> None:
    model = LabelSpace((Task("tags", ("b", "a"), "any_of"), Task("color", ("red", "blue"))))
    found = judged(folder, rows("color,tags", "red,a", "pink,b", "blue,"), model, label_col="color,tags")
    assert targets(found.manifest) == [[0, 1, 1, 0], [1, 0, None, None], [None, None, 0, 1]]
    assert "1 image of 1 class that the model does not know was left out: pink 1" in found.notices[0]
    part = judged(folder, rows("color", "red", "blue"), model)  # the columns of the model's tasks are found by name
    assert targets(part.manifest) == [[None, None, 1, 0], [None, None, 0, 1]]
    assert part.notices == (f"{folder / 't.csv'} has no labels for tags: these are not judged",)
    learnt = judged(folder, rows("color", "red", "blue"), model, label_col="color,tags")  # as the run has learnt from both
    assert learnt.notices == part.notices and targets(learnt.manifest) == targets(part.manifest)
    other = judged(folder, rows("label", "red", "blue"), model)
    assert [problem.kind for problem in other.problems][:1] == ["labels of another model"]


def test_other_data_of_a_model_may_name_the_same_labels_in_another_form(folder: Path) -> None:
    model = LabelSpace((Task("label", ("a", "b"), "any_of"),))
    found = judged(folder, rows("label", "a|b", "b"), model, label_cols="a,b")
    assert targets(found.manifest) == [[1, 1], [0, 1]]
    with pytest.raises(DataProblems):
        judged(folder, rows("a,label", "1,a"), model, label_cols="a,b")


def test_columns_that_are_called_as_the_classes_of_a_model_are_found(folder: Path) -> None:
    model = LabelSpace((Task("label", ("a", "b", "c"), "any_of"),))
    text = rows("c,odd,a", "1,1,0", ",0,1")
    for options in ({"label_col": "label"}, {}):
        assert targets(judged(folder, text, model, **options).manifest) == [[0, None, 1], [1, None, None]]
    with pytest.raises(DataProblems, match="no column 'label'"):
        judged(folder, rows("x", "1"), model, label_col="label")
    one = look(folder, rows("b,a", "1,0", "0,1"), purpose="judge", classes=("a", "b"))
    assert one.manifest.label.tolist() == [1, 0]
    with pytest.raises(DataProblems, match="no column for the label"):  # the third class may be the answer to any row
        look(folder, rows("b,a", "1,0", "0,1"), purpose="judge", classes=("a", "b", "c"))


def test_probabilities_stay_probabilities_for_a_model_of_one_label(folder: Path) -> None:
    found = look(folder, rows("b,a,x", ".25,.75,0", "1,0,0", ".5,.4,.1"), label_cols="b,a,x", purpose="judge", classes=("b", "a"))
    assert targets(found.manifest) == [[0.25, 0.75], [1, 0]] and "x 1" in found.notices[0]


def test_folders_cannot_judge_a_model_of_several_labels(folder: Path, tmp_path: Path) -> None:
    for name in ("RBC", "WBC"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes((folder / "0.png").read_bytes() + name.encode())
    found = inspect(tmp_path, ScanOptions(purpose="judge", labels=LabelSpace((Task("label", ("RBC", "WBC"), "any_of"),))))
    (problem,) = found.problems
    assert problem.code == "D014" and "gives one class per image" in problem.message


def test_labels_of_several_tasks_cannot_judge_a_model_of_one_label(folder: Path) -> None:
    table = rows("label (any_of): a,label (any_of): b", "1,0", "1,1")
    found = look(folder, table, purpose="judge", classes=("a", "b"))
    assert found.problems[0].code == "D014" and "gives several classes per image" in found.problems[0].message
    other = look(folder, rows("color: a,color: b,size: s", "1,0,1", "0,1,1"), purpose="judge", classes=("a", "b"))
    assert other.problems[0].kind == "labels of another model"
