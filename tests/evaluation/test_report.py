"""The report: one file that needs nothing else, shows what it must, and can hold any name; and the evaluation folder."""

from __future__ import annotations

import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.data.store import reader
from imgcls_fast.evaluation.metrics import judge
from imgcls_fast.evaluation.paired import compare
from imgcls_fast.evaluation.report import ReportFacts, write_evaluation, write_report
from imgcls_fast.evaluation.text import printable, shorten
from imgcls_fast.evaluation.thumbnails import MAX_BYTES

EVIL = (
    "<script>alert(1)</script>.png",
    "\"double\" 'single' & amp;.png",
    "<img src=x onerror=alert(1)>.png",
    '" onmouseover="alert(1).png',
    "javascript:alert(1).png",
    "{{ 7 * 7 }}{% raw %}.png",
    "🐱 花.png",
    os.fsdecode(b"caf\xe9 \xff.png"),
    "two\nlines\t\x01.png",
    "\u202egnp.png",
)
CLASSES = ("<b>bold</b>", '"&quot;', "</style><script>alert(2)</script>", "$x$")
REASON = "<i>truncated</i> after 12 & 7 bytes"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see; fails where elements are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.raw = path.read_bytes().decode("utf-8")  # strict: surrogates may not get here
        self.feed(self.raw)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def assert_stands_alone(page: Page) -> None:
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "i", "u"})
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", value) for value in page.values("src"))
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and set(page.values("href")) <= {f"#{name}" for name in ids}
    assert not page.values("srcset") and not re.search(r"url\(|@import|https?://|file:", page.raw)
    assert all(page.values("alt")) and len(page.values("alt")) == len(page.values("src"))


def save_noise(path: Path, seed: int = 0, side: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, "PNG" if path.suffix == ".png" else "JPEG")


@pytest.fixture(scope="module")
def evil(tmp_path_factory, drawn, predictions_of) -> tuple[Page, ReportFacts]:
    """The report of a run in which every file with an evil name is a mistake, and every text is hostile."""
    root = tmp_path_factory.mktemp("evil")
    for k, name in enumerate(EVIL):
        save_noise(root / name, k)
    whole = root / "<u>cut</u>.jpg"
    save_noise(whole)
    whole.write_bytes(whole.read_bytes()[:9000])
    scores, truth = drawn(200, 4)
    paths = [*EVIL, *(f"{k}.jpg" for k in range(len(EVIL), 200))]
    for k in range(len(EVIL)):
        scores[k] = np.roll(np.float32([0.97, 0.01, 0.01, 0.01]), truth[k] + 1)
    test, val = predictions_of(scores, truth, CLASSES, paths), predictions_of(*drawn(80, 4), CLASSES)
    facts = ReportFacts(
        name="<h1>run & co</h1>",
        splits={"val": (val, judge(val)), "test": (test, judge(test))},
        read=reader(root, MAX_BYTES),
        summary={"<u>key</u>": "<u>value</u>", "path": Path(os.fsdecode(b"/data/caf\xe9<u>"))},
        counts={"train": np.array([5, 6, 7, 1234]), "test": [1, 2, 3, 4]},
        images=1251,
        bad=2,
        duplicates=31,
        epochs=[{"epoch": k, "train_loss": 1 / k, "val_accuracy": 0.5} for k in (1, 2)],
        config=[("optim.lr", [os.fsdecode(b"\xff"), "<u>"], "because <u>1 < 2</u>"), ("data.root", None, "")],
        quarantine=[(str(whole.relative_to(root)), REASON), ("gone/" + EVIL[0], "empty file")],
        baseline={"name": "linear probe <u>", "accuracy": 0.25, "seconds": 1.5},
        temperature=1.375,
        env={"<u>python": "3.11"},
        reproduce="imgcls-fast train '<u>data</u>' && echo \"done\"",
        commands=["imgcls-fast predict <RUN> <IMAGES>"],
        warnings=["<u>few</u> images"],
    )
    return Page(write_report(root / "report.html", facts)), facts


def test_the_report_is_well_formed_and_needs_no_other_file(evil):
    page, _ = evil
    assert_stands_alone(page)
    assert page.raw.startswith("<!doctype html>") and len(page.raw) < 3_000_000
    assert "default-src 'none'" in page.raw


def test_hostile_names_and_texts_are_shown_as_text_and_never_become_markup(evil):
    page, facts = evil
    assert "u" not in page.tags and "7 * 7" in page.raw and "49" not in page.values("title")
    assert {printable(name) for name in EVIL} <= set(page.values("title"))
    assert r"caf\udce9 \udcff.png" in page.text and r"two\x01" not in page.text and "🐱 花.png" in page.text
    assert "\u202e" not in page.raw and r"\u202egnp.png" in page.text
    for text in (*CLASSES, facts.name, REASON, facts.reproduce, *facts.commands, *facts.warnings):
        assert re.sub(r"\s+", " ", text) in page.text
    assert "because <u>1 < 2</u>" in page.text and "<u>key</u>" in page.text and "linear probe <u>" in page.text


def test_the_head_says_accuracy_interval_and_baseline_of_the_test_split(evil):
    page, facts = evil
    metrics = facts.splits["test"][1]
    low, high = (f"{100 * share:.1f}%" for share in metrics.accuracy_ci)
    assert facts.headline == "test" and "Accuracy on test, 200 images" in page.text
    assert f"{100 * metrics.accuracy:.1f}%" in page.text and f"95% interval {low} to {high}" in page.text
    points = f"{100 * metrics.accuracy - 25:+.1f} points"
    assert f"differs from the baseline by {points}, whose answers were not kept" in page.text
    assert "linear probe" in page.text and "fitted in 1.5 s" in page.text and "temperature 1.375" in page.text
    assert f"{metrics.macro_f1:.3f}" in page.text and f"{metrics.ece:.3f}" in page.text


def test_mistakes_and_quarantined_files_have_pictures_where_something_can_be_decoded(evil):
    page, facts = evil
    jpegs = [value for value in page.values("src") if value.startswith("data:image/jpeg")]
    assert len(jpegs) == len(EVIL) + 1  # the cut JPEG shows what is left of it
    assert len(page.values("src")) - len(jpegs) == 7 and "nothing to show" in page.text and "no picture" in page.text
    assert "empty file" in page.text and "1,251" in page.text and "31" in page.text and "1,234" in page.text
    wrong = int((facts.splits["test"][0].truth != facts.splits["test"][0].predicted).sum())
    assert f"The 24 most confident of {wrong} wrong predictions" in page.text


def test_two_classes_with_nothing_but_val_are_enough(tmp_path, drawn, predictions_of):
    scores, truth = drawn(30, 2)
    ours = predictions_of(scores, truth, paths=["missing.jpg"] * 30)
    (tmp_path / "missing.jpg").write_bytes(b"not an image")
    page = Page(write_report(tmp_path / "r.html", ReportFacts("plain", {"val": (ours, judge(ours))}, reader(tmp_path, MAX_BYTES))))
    assert_stands_alone(page)
    assert "Accuracy on val, 30 images" in page.text and "No baseline was computed" in page.text
    assert "Scores were not temperature-scaled" in page.text and "no picture" in page.text
    for absent in ("Quarantine", "Settings", "Training", "All splits", "Warnings"):
        assert absent not in page.text


def test_sixty_classes_and_as_many_pictures_as_there_can_be_stay_below_three_megabytes(tmp_path, drawn, predictions_of):
    scores, truth = drawn(1200, 60)
    names = [f"{k}.jpg" for k in range(1200)]
    wrong = np.flatnonzero(scores.argmax(1) != truth)
    for k in wrong[np.argsort(-scores.max(1)[wrong], kind="stable")[:24]]:
        save_noise(tmp_path / names[k], k, 320)
    bad = [(f"bad/{k}.jpg", f"reason {k}.") for k in range(700)]
    for k in range(24):
        save_noise(tmp_path / bad[k][0], k, 320)
    ours = predictions_of(scores, truth, paths=names)
    facts = ReportFacts("big", {"test": (ours, judge(ours))}, reader(tmp_path, MAX_BYTES), quarantine=bad, bad=700)
    page = Page(write_report(tmp_path / "r.html", facts))
    assert_stands_alone(page)
    assert len(page.raw) < 3_000_000 and len(page.values("src")) == 24 + 24 + 5
    assert "reason 499." in page.text and "reason 500." not in page.text and "All 700 files" in page.text
    assert all(f"class {k}" in page.text for k in range(60))


def test_a_run_that_was_not_judged_still_has_a_report(tmp_path):
    page = Page(
        write_report(tmp_path / "r.html", ReportFacts("new", {}, reader(tmp_path, MAX_BYTES), quarantine=[("x.jpg", "empty file")]))
    )
    assert_stands_alone(page)
    assert "empty file" in page.text and "Accuracy" not in page.text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(60, "is better than the baseline by 10.0 points (95% interval"), (20, "is worse than the baseline by 10.0 points"),
     (42, "cannot be told apart from the baseline (+1.0 points, 95% interval")],
)  # fmt: skip
def test_the_verdict_compares_model_and_baseline_on_the_same_rows(wrong, words, tmp_path, monkeypatch, predictions_of):
    monkeypatch.setattr("imgcls_fast.evaluation.plots.judgement_plots", lambda *_: {})
    one_sided = np.tile(np.float32([0.8, 0.2]), (200, 1))
    truth = np.arange(200) >= 160  # 40 wrong
    ours = predictions_of(one_sided, truth)
    scores = one_sided.copy()
    if wrong < 40:
        scores[160 : 160 + 40 - wrong] = scores[160 : 160 + 40 - wrong, ::-1]
    else:
        scores[: wrong - 40] = scores[: wrong - 40, ::-1]
    theirs = predictions_of(scores, truth)
    assert (theirs.predicted != theirs.truth).sum() == wrong
    facts = ReportFacts(
        "r", {"test": (ours, judge(ours))}, reader(tmp_path, MAX_BYTES),
        baseline={"name": "probe", "accuracy": 1 - wrong / 200, "train_rows": 1500, "train_of": 9000, "limit": "20 s of reading"},
        against=compare(theirs, ours),
    )  # fmt: skip
    page = Page(write_report(tmp_path / "r.html", facts)).text
    assert words in page and "on the same 200 images" in page
    assert "1,500 of 9,000 training images (no more in 20 s of reading)" in page


def test_on_imbalanced_data_the_report_holds_the_model_against_the_largest_class(tmp_path, monkeypatch, predictions_of):
    """76 solar cells, of which 44 are functional: "chance 25 %" was the only figure beside an accuracy of 58 %."""
    monkeypatch.setattr("imgcls_fast.evaluation.plots.judgement_plots", lambda *_: {})
    truth = np.repeat(np.arange(4), [44, 8, 3, 21])
    names, eye = ("functional", "probably", "perhaps", "defective"), np.eye(4, dtype=np.float32)
    probe = eye[np.where(np.arange(76) % 9 < 5, truth, 0)]
    ours, theirs = predictions_of(eye[np.zeros(76, int)], truth, names), predictions_of(probe, truth, names)
    told = judge(theirs, bootstrap=0)
    baseline = {"name": "probe", "accuracy": told.accuracy, "balanced_accuracy": told.balanced_accuracy}
    facts = ReportFacts("r", {"test": (ours, judge(ours))}, reader(tmp_path, MAX_BYTES), baseline=baseline, against=compare(theirs, ours))
    page = Page(write_report(tmp_path / "r.html", facts)).text
    assert "always functional 58%" in page and "chance" not in page
    assert "this model is no better than the 57.9% of always answering functional: it is right about the same images" in page
    assert "is worse than the baseline by" in page
    assert f"balanced accuracy 25.0% against {100 * told.balanced_accuracy:.1f}%" in page and "points worse" in page
    equal = predictions_of(eye[np.arange(76) % 4], np.arange(76) % 4, names)
    page = Page(write_report(tmp_path / "e.html", ReportFacts("r", {"test": (equal, judge(equal))}, reader(tmp_path, MAX_BYTES)))).text
    assert "chance 25%" in page and "imbalanced" not in page


def test_a_lower_accuracy_is_never_called_the_same(tmp_path, monkeypatch, predictions_of):
    monkeypatch.setattr("imgcls_fast.evaluation.plots.judgement_plots", lambda *_: {})
    truth = np.arange(60) % 2
    eye = np.eye(2, dtype=np.float32)
    ours, theirs = (predictions_of(eye[np.where(np.arange(60) < wrong, 1 - truth, truth)], truth) for wrong in (3, 1))
    facts = ReportFacts(
        "r", {"test": (ours, judge(ours))}, reader(tmp_path, MAX_BYTES), baseline={"name": "p", "accuracy": 59 / 60},
        against=compare(theirs, ours),
    )  # fmt: skip
    assert "is not better than the baseline (-3.3 points" in Page(write_report(tmp_path / "r.html", facts)).text


def test_the_evaluation_folder_holds_what_was_found(tmp_path, monkeypatch, drawn, predictions_of):
    monkeypatch.setattr("imgcls_fast.evaluation.plots.judgement_plots", lambda *_: {"roc": b"1", "confusion": b"2"})
    scores, truth = drawn(60, 4)
    truth[truth == 2] = 1  # a class without rows: its figures are empty, not "nan"
    ours = predictions_of(scores, truth, CLASSES, [*EVIL, *(f"{k}.jpg" for k in range(50))])
    metrics = judge(ours, bootstrap=50)
    place = tmp_path / "evaluation" / "test"
    write_evaluation(place, ours, metrics, plots=tmp_path / "plots")
    files = {"metrics.json", "per_class.csv", "confusion.csv", "scores.npy", "predictions.csv", "predictions.json"}
    assert {path.name for path in place.iterdir()} == files
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"roc_test.png": b"1", "confusion_test.png": b"2"}
    facts = json.loads((place / "metrics.json").read_text("utf-8"))
    assert facts == json.loads(json.dumps({k: v for k, v in metrics.to_dict().items() if k != "confusion"}))


def test_tables_of_classes_and_confusions_equal_the_metrics(tmp_path, drawn, predictions_of):
    scores, truth = drawn(60, 4)
    truth[truth == 2] = 1
    metrics = judge(predictions_of(scores, truth, CLASSES), bootstrap=0)
    write_evaluation(tmp_path / "val", predictions_of(scores, truth, CLASSES), metrics)
    with open(tmp_path / "val" / "per_class.csv", encoding="utf-8", newline="") as file:
        for line, figures in zip(csv.DictReader(file), metrics.per_class, strict=True):
            for name, value in vars(figures).items():
                assert line[name] == ("" if value != value else str(value))
    with open(tmp_path / "val" / "confusion.csv", encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["truth", *CLASSES] and [line[0] for line in lines] == list(CLASSES)
    np.testing.assert_array_equal(np.array([line[1:] for line in lines], int), metrics.confusion)


def test_scores_are_aligned_with_the_lines_of_the_table_and_judged_alike_when_loaded(tmp_path, drawn, predictions_of):
    scores, truth = drawn(60, 4)
    ours = predictions_of(scores, truth, CLASSES, [*EVIL, *(f"{k}.jpg" for k in range(50))])
    metrics = judge(ours, bootstrap=50)
    write_evaluation(tmp_path / "val", ours, metrics)
    stored = np.load(tmp_path / "val" / "scores.npy", allow_pickle=False)
    np.testing.assert_array_equal(stored, scores)
    with open(tmp_path / "val" / "predictions.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = list(csv.DictReader(file))
    assert (
        tuple(line["path"] for line in lines) == ours.paths
        and [int(line["row"]) for line in lines] == ours.rows.tolist()
    )
    np.testing.assert_allclose([[float(line[f"p:{name}"]) for name in CLASSES] for line in lines], stored, rtol=1e-5)
    assert [line["pred"] for line in lines] == [CLASSES[k] for k in stored.argmax(1)]
    assert judge(Predictions.load(tmp_path / "val"), bootstrap=50).to_dict() == metrics.to_dict()


def test_a_place_that_cannot_be_written_is_h003(tmp_path, drawn, predictions_of):
    (tmp_path / "file").write_bytes(b"")
    ours = predictions_of(*drawn(5, 2))
    for write in (
        lambda: write_report(tmp_path / "absent" / "r.html", ReportFacts("r", {}, reader(tmp_path, MAX_BYTES))),
        lambda: write_evaluation(tmp_path / "file" / "val", ours, judge(ours, bootstrap=0)),
    ):
        with pytest.raises(HardwareError) as caught:
            write()
        assert caught.value.code == "H003" and str(tmp_path) in caught.value.message


def test_long_names_lose_their_middle():
    assert shorten("a" * 40 + "end.jpg", 20) == "aaaaaaaaa…aaaend.jpg" and shorten("short", 5) == "short"
