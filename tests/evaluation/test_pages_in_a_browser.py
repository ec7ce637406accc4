"""The two pages, as a phone and a desk see them: measured in headless Chromium where there is one."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.data.store import reader
from imgcls_fast.evaluation import plots
from imgcls_fast.evaluation.metrics import judge
from imgcls_fast.evaluation.report import ReportFacts, write_report
from imgcls_fast.evaluation.tasks import judge_tasks
from imgcls_fast.evaluation.thumbnails import MAX_BYTES
from imgcls_fast.measuring import page as benchpage

WIDTHS = (390, 1280)
LONG = "an_endless_name_without_a_single_blank_" * 3
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")  # fmt: skip
# each page in frames of its own, as wide as the screens: one start of the browser measures them all
MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, width = frame.clientWidth, all = [...page.body.querySelectorAll("*")];
    const scrolls = (e, side) => ["auto", "scroll"].includes(getComputedStyle(e)[side]);
    const wide = all.filter((e) => {
      if (e.closest("figure[tabindex]")) return false;       // may be moved sideways, and a caption tells it
      const box = e.getBoundingClientRect();
      const leaves = box.right > width + 1 || box.left < -1;
      return box.width && (leaves || (e.scrollWidth > e.clientWidth + 1 && scrolls(e, "overflowX")));
    });
    const hidden = all.filter((e) => e.scrollHeight > e.clientHeight + 1 && scrolls(e, "overflowY"));
    const text = [...page.querySelectorAll("td, dd, p, figcaption, .tick, .above, .below")];
    return {page: frame.name, width, scroll: page.documentElement.scrollWidth,
            wide: wide.map((e) => e.tagName + "." + e.className + " " + e.textContent.slice(0, 40)),
            smallest: Math.min(...text.map((e) => parseFloat(getComputedStyle(e).fontSize))),
            hidden: hidden.map((e) => [e.className, e.tabIndex, (e.nextElementSibling || {}).textContent || ""])};
  });
  document.body.innerHTML = "<pre id=found>" + btoa(unescape(encodeURIComponent(JSON.stringify(found)))) + "</pre>";
});
</script>
"""


def measure(pages: dict[str, str], folder: Path) -> list[dict]:
    frames = "".join(
        f'<iframe name="{name}" style="border:0;width:{width}px;height:800px" srcdoc="{html.escape(open_to_us(page))}"></iframe>'
        for name, page in pages.items()
        for width in WIDTHS
    )
    (folder / "harness.html").write_text(f"<!doctype html><meta charset=utf-8>{MEASURE}<body>{frames}", "utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", "--dump-dom"]
    ended = subprocess.run([*command, (folder / "harness.html").as_uri()], capture_output=True, text=True, timeout=240)
    found = re.search(r"<pre id=\"found\">([^<]+)</pre>", ended.stdout)
    assert found, ended.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


def open_to_us(page: str) -> str:
    """The page without the rule that forbids every script, ours included."""
    changed = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)
    assert changed != page
    return changed


@pytest.fixture(scope="module")
def report(tmp_path_factory, drawn, predictions_of) -> str:
    """A run with names that no line can hold, more classes than a screen, and every section."""
    root = tmp_path_factory.mktemp("pages")
    scores, truth = drawn(400, 45)
    test = predictions_of(
        scores, truth, [f"{LONG}{k}" for k in range(45)], [f"{LONG}/{LONG}{k}.jpg" for k in range(400)]
    )
    metrics = judge(test, bootstrap=50)
    table = {
        "heads": ["engine", "precision", *(f"a long heading {k}" for k in range(8))],
        "rows": [[LONG, "fp32", *["123.45 [1.2, 3.4]"] * 8]],
    }
    bench = {
        "machine": {"gpu": None, "cpu": LONG, "threads": 2, "cpus": 2, "others": 1.5, "date": "today"},
        "tables": [table],
        "data": {"line": LONG},
        "notices": [LONG],
        "absent": [{"name": "x", "reason": LONG, "remedy": LONG}],
        "method": {"ratio": "5 x 15 pairs"},
    }
    facts = ReportFacts(
        name=LONG, splits={"test": (test, metrics), "val": (test, metrics)}, read=reader(root, MAX_BYTES),
        summary={"data": LONG, "model": "x"},
        counts=dict.fromkeys(("train", "val", "test"), np.full(45, 1_234_567)), images=123_456_789, bad=700, duplicates=31,
        epochs=[{"epoch": k, "train_loss": 1 / k, "val_accuracy": 0.5, "lr": 0.1} for k in (1, 2)],
        config=[(f"augment.setting_{k}", [0.123456789] * 3, f"because {LONG}") for k in range(60)],
        quarantine=[(f"{LONG}/{k}.jpg", LONG) for k in range(60)], baseline={"name": LONG, "accuracy": 0.995},
        env={"command": LONG, LONG: "1"}, reproduce=f"imgcls-fast train {LONG} -c {LONG}", commands=[f"imgcls-fast predict {LONG}"],
        warnings=[LONG], efficiency=bench,
    )  # fmt: skip
    before = plots.judgement_plots
    plots.judgement_plots = lambda p, m: {"reliability": plots.reliability(m)}  # type: ignore[assignment]
    try:
        return write_report(root / "report.html", facts).read_text("utf-8")
    finally:
        plots.judgement_plots = before


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """A run with two questions, one of which any of many classes may answer, and names that no line can hold."""
    root = tmp_path_factory.mktemp("tasks")
    labels = LabelSpace((Task(LONG, (f"{LONG}a", "b")), Task(f"{LONG}2", tuple(f"{LONG}{k}" for k in range(45)), "any_of")))
    draw = np.random.default_rng(0)
    targets = (draw.random((60, 47)) < 0.4).astype(np.float32)
    targets[:, 1] = 1 - targets[:, 0]
    test = Predictions(np.arange(60), draw.random((60, 47), np.float32), targets, labels, (f"{LONG}.jpg",) * 60)
    metrics = judge_tasks(test, bootstrap=20)
    facts = ReportFacts(
        name=LONG, splits={"test": (test, metrics), "val": (test, metrics)}, read=reader(root, MAX_BYTES),
        counts={"train": np.full(47, 1_234_567)},
        baseline={"name": LONG, **metrics.headline()}, calibration=LONG, images=123_456_789,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "judgement_plots", lambda p, m: {"reliability": plots.reliability(m)})
        return write_report(root / "report.html", facts).read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_nothing_leaves_the_screen_sideways_on_a_phone_and_on_a_desk(report, tasks, bench_area, tmp_path):
    area = bench_area(
        [(LONG, LONG, "formula", 0.5), ("plain", "kernel", LONG, 1.5)], missing=[(LONG, LONG, "absent", LONG)]
    )
    bench = benchpage.page([{"ops": area}], {(0, "ops"): plots.training_curves([{"train_loss": 1.0}])["curves_loss"]})
    found = measure({"report": report, "tasks": tasks, "bench": bench}, tmp_path)
    assert [(f["page"], f["width"]) for f in found] == [
        (page, width) for page in ("report", "tasks", "bench") for width in WIDTHS
    ]
    for frame in found:
        assert frame["wide"] == [] and frame["scroll"] <= frame["width"], (
            frame["page"],
            frame["width"],
            len(frame["wide"]),
            frame["wide"][:9],
        )
        assert frame["smallest"] >= 11.5  # pixels of the screen
        for kind, tab, told in frame["hidden"]:
            assert kind == "tall" and tab == 0 and "the box scrolls" in told


def test_only_a_list_longer_than_a_screen_scrolls_and_tells_it(report):
    boxes = re.findall(r'<div class="tall" tabindex="0" role="region" aria-label="([^"]+), scrolls">', report)
    assert boxes == ["Classes", "Images of each class", "Files that were put aside"]
    assert report.count("rows: the box scrolls.") == len(boxes)
    settings = report[report.index('id="settings"') : report.index('id="reproduce"')]
    assert settings.count("<tr>") == 61 and 'class="tall"' not in settings


def test_a_table_with_many_columns_names_them_in_every_row_for_narrow_screens(report):
    wide = re.findall(r'<table class="wide[^"]*">.*?</table>', report, re.S)
    assert len(wide) == 6  # splits, classes, confusions, efficiency, images, settings
    for table in wide[:5]:
        heads = re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", table)
        for row in re.findall(r"<tr[^>]*>(<td.*?)</tr>", table, re.S):
            assert re.findall(r'data-label="([^"]*)"', row) == heads[1:]
    assert "@media (max-width: 640px)" in report and "overflow-x: auto" not in report
