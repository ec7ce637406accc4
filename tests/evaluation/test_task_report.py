"""The report and the evaluation folder of images with several labels."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.data.store import reader
from imgcls_fast.evaluation import plots
from imgcls_fast.evaluation.metrics import Metrics
from imgcls_fast.evaluation.multilabel import AnyOfMetrics
from imgcls_fast.evaluation.paired import compare
from imgcls_fast.evaluation.report import ReportFacts, write_evaluation, write_report
from imgcls_fast.evaluation.task_report import alternatives, file_names, task_context
from imgcls_fast.evaluation.tasks import judge_all
from imgcls_fast.evaluation.thumbnails import MAX_BYTES

EVIL = "<u>ev & il</u>"
TWO = LabelSpace((Task("stain", ("H&E", "none")), Task(EVIL, ("a", "b", "<u>", "empty"), "any_of")))


def answered(labels: LabelSpace = TWO, n: int = 60, seed: int = 0) -> Predictions:
    draw = np.random.default_rng(seed)
    targets = np.zeros((n, labels.size), np.float32)
    for task, part in labels.parts:
        if task.kind == "any_of":
            targets[:, part] = draw.random((n, len(task.classes))) < 0.4
            targets[:, part.stop - 1] = 0  # a class that holds nowhere
        else:
            targets[np.arange(n), part.start + draw.integers(0, len(task.classes), n)] = 1
    scores = np.clip(0.25 + 0.5 * targets + 0.2 * draw.normal(size=targets.shape), 0.01, 0.99).astype(np.float32)
    for task, part in labels.parts:
        if task.kind == "one_of":
            scores[:, part] /= scores[:, part].sum(1, keepdims=True)
        else:
            targets[:, part][draw.random((n, len(task.classes))) < 0.2] = np.nan
    least = np.linspace(0.4, 0.6, labels.size).astype(np.float32)
    return Predictions(np.arange(n), scores, targets, labels, tuple(f"{EVIL}{k}.jpg" for k in range(n)), "", least)


def named(own: Predictions, metrics: Metrics | AnyOfMetrics) -> dict[str, bytes]:
    """The names of `plots.judgement_plots`: the pictures take seconds."""
    shared = ("precision_recall", "reliability")
    kinds = {"one_of": ("confusion", *shared, "coverage"), "any_of": ("co_occurrence", *shared)}
    return dict.fromkeys(kinds[metrics.kind], b"png")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("tasks")
    test, val, base = answered(), answered(seed=1), answered(seed=2)
    metrics = judge_all(test, bootstrap=20)
    facts = ReportFacts(
        name="run",
        splits={"test": (test, metrics), "val": (val, judge_all(val, bootstrap=0))},
        read=reader(root, MAX_BYTES),
        counts={"train": np.arange(6)},
        epochs=[{"epoch": k, "val_macro_ap": 0.5 + k / 10} for k in (1, 2)],
        baseline={"name": "linear probe", **judge_all(base, bootstrap=0).headline()},  # type: ignore[union-attr]
        against=compare(Predictions(test.rows, base.scores, test.targets, TWO, test.paths), test),
        calibration="temperatures 1.2 and 0.9",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "judgement_plots", named)
        patch.setattr(plots, "training_curves", lambda epochs: {})
        return write_report(root / "report.html", facts).read_text("utf-8")


def test_each_task_has_a_section_with_its_classes_thresholds_and_pictures(page: str) -> None:
    sections = re.findall(r'<section id="task-(\d)">(.*?)</section>', page, re.S)
    assert [number for number, _ in sections] == ["1", "2"]
    stain, marks = (text for _, text in sections)
    assert stain.count("<img") >= 4 and marks.count('<figure class="plot">') == 3
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', marks)
    assert heads == ["class", "AP", "F1", "precision", "recall", "ROC-AUC", "threshold", "images", "answered", "known"]
    rows = re.findall(r"<tr[^>]*>(<td class=\"name.*?)</tr>", marks, re.S)
    assert len(rows) == 4 and all(re.findall(r'data-label="([^"]*)"', row) == heads[1:] for row in rows)
    assert '<td class="name any">empty</td><td class="n" data-label="AP">–</td>' in rows[-1]
    assert 'data-label="threshold">0.48' in marks


def test_the_head_compares_with_chance_and_the_baseline_and_names_the_mean(page: str) -> None:
    head = page[page.index('id="result"') : page.index('id="task-1"')]
    assert "Mean average precision on test, 60 images" in head and "random scores" in head and "baseline" in head
    assert "Right answers: this model" in head and "exact match: all answers of an image right" in head
    assert "true of no row" in page  # the warning of the class that holds nowhere


def test_hostile_names_stay_text_and_the_page_needs_nothing_else(page: str) -> None:
    assert EVIL not in page and "&lt;u&gt;ev &amp; il&lt;/u&gt;" in page
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_mistakes_are_those_of_each_class_the_surest_first() -> None:
    predictions = answered(LabelSpace(TWO.tasks[1:]))
    (section,) = task_context(predictions, judge_all(predictions, bootstrap=0), lambda name: b"", None)["sections"]  # type: ignore[arg-type]
    true, answers = np.nan_to_num(predictions.targets) == 1, predictions.answers
    wrong = (answers != true) & ~np.isnan(predictions.targets)
    assert section["wrong"] == wrong.sum()
    by_class: dict[str, list[float]] = {}
    for tile in section["mistakes"]:
        kind, share = tile["said"].split(", ")
        row, column = predictions.paths.index(tile["path"]), predictions.labels.classes.index(tile["name"])
        assert wrong[row, column] and true[row, column] == (kind == "missed")
        sure = float(share.rstrip("%")) / 100
        by_class.setdefault(tile["name"], []).append(1 - sure if kind == "missed" else sure)
    assert all(sorted(found, reverse=True) == found and len(found) <= 4 for found in by_class.values())


def test_the_folder_has_a_table_of_classes_and_pairs_for_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "judgement_plots", named)
    predictions = answered()
    metrics = judge_all(predictions, bootstrap=0)
    write_evaluation(tmp_path / "test", predictions, metrics, tmp_path / "plots")
    assert file_names([task.name for task in TWO.tasks]) == ["stain", "u_ev_il_u"]
    facts = json.loads((tmp_path / "test/metrics.json").read_text())
    assert facts["tasks"]["stain"]["kind"] == "one_of" and "confusion" not in facts["tasks"]["stain"]
    with open(tmp_path / "test/u_ev_il_u_co_occurrence.csv", encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["holds", "a", "b", "<u>", "empty"]
    assert [[int(x) for x in row[1:]] for row in table[1:]] == metrics.tasks[EVIL].together.tolist()  # type: ignore[union-attr]
    assert len((tmp_path / "test/stain_confusion.csv").read_text().splitlines()) == 3
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {"stain_confusion_test", "u_ev_il_u_co_occurrence_test", "u_ev_il_u_reliability_test"} <= drawn
    assert Predictions.load(tmp_path / "test").labels == TWO


def test_names_of_files_are_safe_and_no_two_alike() -> None:
    assert file_names(["a/b"]) == [""]
    assert file_names(["a/b", "a b", "花", ".."]) == ["a_b_1", "a_b_2", "task_3", "task_4"]


def test_every_picture_is_described() -> None:
    metrics = judge_all(answered(), bootstrap=0)
    told = alternatives(["stain_confusion", "u_ev_il_u_reliability"], metrics)  # type: ignore[arg-type]
    assert told["stain_confusion"].startswith("stain: Confusion") and told["u_ev_il_u_reliability"].startswith(EVIL)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [2, pytest.param(31, marks=pytest.mark.slow)])
def test_any_number_of_classes_share_one_picture_and_nothing_warns(size: int) -> None:
    labels = LabelSpace((Task("label", tuple(f"name {k}" for k in range(size)), "any_of"),))
    predictions = answered(labels, 80)
    metrics = judge_all(predictions, bootstrap=0).tasks["label"]  # type: ignore[union-attr]
    assert all(png.startswith(b"\x89PNG") for png in plots.judgement_plots(predictions.of_task(0), metrics).values())
