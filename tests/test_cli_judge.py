"""What `predict`, `export` and `runs show` make of their words and answers; the model itself is replaced."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.api import export, judge, runs
from imgcls_fast.cli.answer import plain
from imgcls_fast.cli.app import main
from imgcls_fast.cli.figures import headline, show_judged
from imgcls_fast.core.exports import Export
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.evaluation.tasks import judge_tasks
from imgcls_fast.tracking.console import make_console

PHOTO = Path("photos", "a.jpg")
Capture = pytest.CaptureFixture[str]
HOSTILE = [
    "plain.jpg",
    'comma, "quote".jpg',
    "line\nbreak.jpg",
    "line\u2028separator.jpg",
    "tab\t.jpg",
    "caf\udce9.jpg",
    "\x1b[31m.jpg",
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces `api.predict`; what it was asked is kept, and `answers` is what it says."""
    kept: dict[str, Any] = {"answers": [_answer(name) for name in HOSTILE]}

    def predict(run: Any, images: Any, **options: Any) -> list[dict[str, Any]]:
        kept.update(run=run, images=images, **options)
        return kept["answers"]

    monkeypatch.setattr(judge, "predict", predict)
    return kept


def _answer(path: str) -> dict[str, Any]:
    return {"path": path, "label": "cat", "confidence": 0.75, "top": [("cat", 0.75), ("dog", 0.25)]}


def _make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.yaml", "manifest.npz"):
        (folder / name).write_text("")
    return folder


def test_predict_without_a_run_means_the_last_one(asked: dict[str, Any]) -> None:
    assert main(["predict", "photos"]) == 0
    assert (asked["run"], asked["images"], asked["top_k"], asked["runtime"]) == (None, (PHOTO,), 1, "torch")


def test_predict_takes_its_first_word_as_run_if_it_is_one(asked: dict[str, Any], tmp_path: Path) -> None:
    _make_run(tmp_path / "runs" / "mine")
    for run in ("mine", "runs/mine"):
        assert main(["predict", run, "--top-k", "2", "photos", "photos", "-b", "7"]) == 0
        assert (asked["run"], asked["images"]) == (run, (PHOTO, PHOTO))
        assert (asked["top_k"], asked["batch_size"]) == (2, 7)


def test_predict_takes_a_file_that_begins_with_a_dash_after_two_dashes(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "-x.jpg").write_text("")
    assert main(["predict", "-b", "7", "--", "-x.jpg", "photos"]) == 0
    assert (asked["run"], asked["images"], asked["batch_size"]) == (None, (Path("-x.jpg"), PHOTO), 7)


@pytest.mark.parametrize(
    ("words", "code", "rc", "said"),
    [
        (["mien", "photos"], "U003", 2, "runs show mine"),
        (["mine"], "U002", 2, "predict needs images"),
        (["missing.jpg"], "D001", 3, "missing.jpg does not exist"),
        (["missing.jpg", "photos"], "D001", 3, "missing.jpg does not exist"),
        (["nowhere/missing.jpg"], "D001", 3, "there is no folder nowhere"),
        (["photo"], "U003", 2, "is not a run"),
        (["phots/"], "D001", 3, "photos"),
        (["mine", "no.jpg", "nor.jpg"], "D001", 3, "no.jpg does not exist, nor do 1 more"),
    ],
)
def test_predict_says_which_word_is_wrong(
    words: list[str], code: str, rc: int, said: str, asked: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    _make_run(tmp_path / "runs" / "mine")
    assert main(["predict", *words]) == rc
    err = capsys.readouterr().err
    assert f"error[{code}]" in err
    assert said in err
    assert "run" not in asked  # no model was loaded for it


def test_a_csv_of_answers_reads_back_whatever_the_files_are_called(asked: dict[str, Any]) -> None:
    asked["answers"].append({"path": "bad.jpg", "error": "truncated"})
    assert main(["predict", "photos", "-k", "3", "-o", "answers.csv"]) == 0
    with open("answers.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [*HOSTILE, "bad.jpg"]
    assert {row["label_2"] for row in rows[:-1]} == {"dog"}
    assert "label_3" not in rows[0]  # there are two classes only
    assert (rows[-1]["label"], rows[-1]["error"]) == ("", "truncated")


def test_a_jsonl_of_answers_has_one_object_a_line(asked: dict[str, Any]) -> None:
    assert main(["predict", "photos", "-o", "answers.jsonl"]) == 0
    lines = Path("answers.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line)["path"] for line in lines if line] == HOSTILE


def test_in_a_pipe_each_image_is_one_line_without_control_characters(asked: dict[str, Any], capsys: Capture) -> None:
    assert main(["predict", "photos"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == len(HOSTILE) + 2  # a heading and the last line's end
    assert [line.split("\t")[1] for line in lines[1:-1]] == ["cat"] * len(HOSTILE)
    assert not [line for line in lines if "\x1b" in line]


def test_more_answers_than_classes_are_as_many_as_there_are_classes(asked: dict[str, Any], capsys: Capture) -> None:
    assert main(["predict", "photos", "-k", "99", "-o", "answers.csv"]) == 0
    heads = Path("answers.csv").read_text("utf-8", "surrogateescape").splitlines()[0]
    assert heads == "path,label,confidence,label_2,confidence_2,error"
    assert "the model has 2 classes" in capsys.readouterr().err


def test_answers_with_several_labels_are_one_line_per_image(asked: dict[str, Any]) -> None:
    top = [("rbc", 0.9), ("wbc", 0.75), ("platelet", 0.1)]
    asked["answers"] = [
        {"path": "a.jpg", "labels": top[:2], "top": top},
        {"path": "b.jpg", "labels": [], "top": top[2:] + top[:2]},
        {"path": "bad.jpg", "error": "truncated"},
    ]
    for words, heads, first in (
        ([], "path,labels,probabilities,error", "a.jpg,rbc|wbc,0.900000|0.750000,"),
        (["-k", "1"], "path,labels,probabilities,error", "a.jpg,rbc|wbc,0.900000|0.750000,"),
        (
            ["-k", "2"],
            "path,labels,probabilities,label_1,confidence_1,label_2,confidence_2,error",
            "a.jpg,rbc|wbc,0.900000|0.750000,rbc,0.900000,wbc,0.750000,",
        ),
    ):
        assert main(["predict", "photos", *words, "-o", "answers.csv"]) == 0  # and replaces what it wrote before
        lines = Path("answers.csv").read_text("utf-8").splitlines()
        assert lines[:2] == [heads, first]
        assert lines[2].startswith("b.jpg,,") and lines[3] == "bad.jpg" + "," * heads.count(",") + "truncated"


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_answers_to_several_tasks_stand_side_by_side(ending: str, asked: dict[str, Any]) -> None:
    tasks = {
        "colour, main": {"label": "red", "confidence": 0.75, "top": [("red", 0.75), ("blue", 0.25)]},
        "marks": {"labels": [("dot", 0.5)], "top": [("dot", 0.5), ("bar", 0.25)]},
    }
    asked["answers"] = [{"path": "a.jpg", "tasks": tasks}, {"path": "bad.jpg", "error": "truncated"}]
    for _ in range(2):  # the second replaces the first
        assert main(["predict", "photos", "-o", f"answers.{ending}"]) == 0
    if ending == "jsonl":
        assert set(json.loads(Path("answers.jsonl").read_text("utf-8").splitlines()[0])["tasks"]) == set(tasks)
        return
    with open("answers.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "path": "a.jpg", "colour, main: label": "red", "colour, main: confidence": "0.750000",
        "marks: labels": "dot", "marks: probabilities": "0.500000", "error": "",
    }  # fmt: skip
    assert (rows[1]["path"], rows[1]["marks: labels"], rows[1]["error"]) == ("bad.jpg", "", "truncated")


def test_quiet_still_prints_the_answers_and_nothing_else(asked: dict[str, Any], capsys: Capture) -> None:
    assert main(["predict", "photos", "-q"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == ["path\tlabel\tconfidence\terror", "plain.jpg\tcat\t0.750000\t"]
    assert len(out.splitlines()) == 1 + len(HOSTILE)
    assert err == ""


@pytest.mark.parametrize(("good", "rc"), [(0, 3), (1, 0)])
def test_predict_fails_only_if_no_image_could_be_read(
    good: int, rc: int, asked: dict[str, Any], capsys: Capture
) -> None:
    asked["answers"] = [_answer("a.jpg")] * good + [{"path": "b.jpg", "error": "empty"}] * 2
    assert main(["predict", "photos", "--json"]) == rc
    found = json.loads(capsys.readouterr().out)
    assert (found["failed"], len(found["predictions"])) == (2, good + 2)


def test_files_that_predict_passes_over_are_counted_in_json_and_named_on_the_console(
    asked: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    for name in ("notes", "b.txt"):
        (tmp_path / "photos" / name).write_text("no image")
    assert main(["predict", "photos", "--json"]) == 0
    found, said = json.loads((output := capsys.readouterr()).out), "2 files that are not images were passed over: photos/b.txt"
    assert found["passed_over"] == 2 and said in found["warnings"][0] and said in output.err


def test_an_operator_set_outside_the_schema_is_refused_before_anything_is_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    asked: list[Any] = []
    made = Export(tmp_path, {"file": "model.onnx", "target": "onnx", "precision": "fp32"})
    monkeypatch.setattr(export, "export", lambda run, target, **options: asked.append(options["overrides"]) or made)
    _make_run(tmp_path / "runs" / "mine")
    for opset in ("17", "99", "x"):
        assert main(["export", "mine", "--opset", opset]) == 2
        err = capsys.readouterr().err
        assert "export.opset" in err
        assert f"--opset {opset}" in err
    assert asked == []
    assert main(["export", "mine", "--opset", "21"]) == main(["export", "mine"]) == 0
    assert asked == [{"export.opset": 21}, {}]


def test_a_run_shows_its_date_to_people_and_its_seconds_to_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    made = os.stat(".").st_mtime
    monkeypatch.setattr(runs, "show_run", lambda name: {"name": name, "created": made})
    assert main(["runs", "show", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["created"] == made
    assert main(["runs", "show", "mine"]) == 0
    assert "created  20" in capsys.readouterr().out


def test_eval_shows_the_largest_class_and_balanced_accuracy_where_classes_are_unequal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    from imgcls_fast.api import judge as api
    from imgcls_fast.core.labels import LabelSpace
    from imgcls_fast.core.predictions import Predictions
    from imgcls_fast.evaluation.metrics import judge

    truth, eye = np.repeat([0, 1], [40, 10]), np.eye(2, dtype=np.float32)
    labels, paths = LabelSpace.single(["whole", "broken"]), tuple(map(str, range(50)))
    answers = Predictions(np.arange(50), eye[np.zeros(50, int)], eye[truth], labels, paths)
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: judge(answers, bootstrap=0))
    _make_run(tmp_path / "runs" / "mine")
    assert main(["eval", "mine"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].startswith("test accuracy 0.800 [") and lines[0].endswith(", balanced 0.500, on 50 images")
    assert lines[1] == "  largest class: 0.800 by always answering whole, no better: right about the same images"
    assert main(["eval", "mine", "-q"]) == 0
    assert "balanced 0.500" in capsys.readouterr().out


def test_eval_shows_each_task_with_its_classes_and_thresholds(capsys: Capture) -> None:
    labels = LabelSpace((Task("colour", ("red", "green"), "one_of"), Task("parts", ("wheel", "door"), "any_of")))
    targets = np.array([[1, 0, 1, 0], [0, 1, 1, 1], [np.nan, np.nan, 0, 1], [0, 1, 0, 0]], np.float32)
    scores = np.array([[0.9, 0.1, 0.8, 0.3], [0.2, 0.8, 0.4, 0.9], [0.5, 0.5, 0.1, 0.7], [0.6, 0.4, 0.2, 0.2]], np.float32)
    thresholds = np.array([0.5, 0.5, 0.35, 0.5], np.float32)
    found = judge_tasks(Predictions(np.arange(4), scores, targets, labels, list("abcd"), "x", thresholds), bootstrap=0)
    show_judged(make_console(sys.stdout), headline(plain(found)), plain(found), [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mAP 1.000, labels right 0.833 [0.365, 0.969], all labels right 0.750 [0.301, 0.954]"
    assert "colour: 3 images" in lines
    assert "parts: 4 images" in lines
    assert "wheel\t2\t1.000\t1.000\t1.000\t1.000\t0.350" in lines
