"""Runs whose images have several labels, several questions with missing answers, or probabilities: planned, trained, judged."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imgcls_fast as ic
from imgcls_fast.core.bundle import read_bundle
from imgcls_fast.core.errors import Interrupted, ModelError
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.overview import brief
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.core.run import Run
from imgcls_fast.data.prepare import prepare
from imgcls_fast.training import judging, session
from imgcls_fast.training.baseline import fit_probes
from imgcls_fast.training.defaults import Machine
from imgcls_fast.training.identity import require_same_trajectory, trajectory
from imgcls_fast.training.judged_rows import chosen_by_validation
from imgcls_fast.training.plan import Start, make_plan
from imgcls_fast.training.plan_model import _head_reason

Configure = Callable[..., Any]
COLORS, LEVELS = ("red", "green", "blue"), ("dark", "light")
TWO_TASKS = LabelSpace((Task("color", COLORS), Task("marks", ("dot", "bar", "edge"), "any_of")))


def write_table(folder: Path, kind: str, n: int = 60) -> Path:
    """Images of three colors, two levels and two marks, and a table of the labels that a kind of data would have of them."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows: list[list[Any]] = []
    for k in range(n):
        color, level, dot, bar = k % 3, int(draw.random() < 0.5), int(draw.random() < 0.6), int(draw.random() < 0.3)
        image = draw.integers(0, 80, (32, 32, 3)) + 60 * level
        image[..., color] += 70
        image[4:12, 4:12] += 60 * dot
        image[24:28] += 60 * bar
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{k:03}.jpg", quality=92)
        split = "train" if k < 0.6 * n else "val" if k < 0.8 * n else "test"
        name = f"images/{k:03}.jpg"
        if kind == "any_of":
            rows.append([name, split, "|".join([COLORS[color], *["dot"] * dot, *["bar"] * bar])])
        elif kind == "tasks":  # one answer in five is missing
            told = [value if draw.random() < 0.8 else "" for value in (COLORS[color], LEVELS[level])]
            rows.append([name, split, *told] if any(told) else [name, split, COLORS[color], ""])
        else:
            p = np.full(3, 0.1) + 0.7 * np.eye(3)[color]
            rows.append([name, split, *p.round(3)])
    heads = {"any_of": ["label"], "tasks": ["color", "level"], "soft": list(COLORS)}[kind]
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "split", *heads], *rows])
    return folder / "labels.csv"


ASKED: dict[str, dict[str, Any]] = {"any_of": {}, "tasks": {"data.label_col": "color,level"}, "soft": {"data.label_cols": ",".join(COLORS)}}


@pytest.fixture(params=ASKED)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_plan_for_other_labels_watches_a_figure_of_theirs_and_has_a_column_per_class(
    kind: str, configure: Configure, tmp_path: Path
) -> None:
    config = configure({**ASKED[kind], "loss.class_weights": "auto"}, write_table(tmp_path / kind, kind, 30))
    prepared = prepare(config)
    plan = make_plan(config, prepared.manifest, Machine(cpus=1))
    labels = prepared.manifest.labels
    assert plan.config.train.monitor == {"any_of": "val/macro_ap", "tasks": "val/accuracy", "soft": "val/loss"}[kind]
    assert plan.spec["num_outputs"] == labels.size == len(plan.config.loss.class_weights) == {"any_of": 5, "tasks": 5, "soft": 3}[kind]
    shown = {name: value for name, value, _ in plan.rows}.get("data.label_kind")
    assert shown == {"any_of": "any_of", "tasks": "color one_of, level one_of", "soft": None}[kind]
    assert (labels.is_single, len(labels.tasks)) == {"any_of": (False, 1), "tasks": (False, 2), "soft": (True, 1)}[kind]


def test_each_task_has_a_probe_fitted_to_its_known_rows_and_a_lone_answer_is_a_constant() -> None:
    draw = np.random.default_rng(0)
    n = 200
    color, dot = np.arange(n) % 3, draw.integers(0, 2, n)
    x = (draw.normal(0, 0.3, (n, 6)) + np.eye(3, 6)[color] + np.eye(4, 6)[3] * dot[:, None]).astype(np.float32)
    targets = np.concatenate([np.eye(3)[color], dot[:, None], np.zeros((n, 2))], 1).astype(np.float32)
    targets[::5, :3] = np.nan  # no answer about the color
    targets[1::5, 3] = np.nan
    targets[:, 5] = np.nan  # nobody was ever asked
    probes, used = fit_probes(x, targets, TWO_TASKS, 60, 0)
    assert used == n and len(probes) == 4
    scores = np.zeros((n, 6), np.float32)
    for probe in probes:
        scores[:, probe.columns] = probe.scores(x)
    assert (scores[:, :3].argmax(1) == color).mean() > 0.9 and np.allclose(scores[:, :3].sum(1), 1, atol=1e-5)
    assert ((scores[:, 3] > 0.5) == dot).mean() > 0.9
    assert np.allclose(scores[:, 4], 1 / (n + 2)) and np.allclose(scores[:, 5], 0.5)


def test_temperatures_are_fitted_per_task_and_thresholds_to_scores_that_have_them() -> None:
    draw = np.random.default_rng(0)
    n = 400
    color, marks = np.arange(n) % 3, (draw.random((n, 3)) < (0.5, 0.1, 0.5)).astype(np.float32)
    logits = np.concatenate([2 * np.eye(3)[color] + draw.normal(0, 1, (n, 3)), 4 * (2 * marks - 1) + draw.normal(0, 4, (n, 3))], 1)
    scores = np.concatenate([np.exp(logits[:, :3]) / np.exp(logits[:, :3]).sum(1, keepdims=True), 1 / (1 + np.exp(-logits[:, 3:]))], 1)
    targets = np.concatenate([np.eye(3)[color], marks], 1).astype(np.float32)
    targets[::4, :3] = np.nan
    rows, paths = np.arange(n), tuple(map(str, range(n)))
    thresholds = judging._thresholds(Predictions(rows, scores.astype(np.float32), targets, TWO_TASKS, paths, ""))
    assert thresholds[:3] == [0.5] * 3 and all(0 < value < 1 for value in thresholds)
    assert "thresholds fitted on 400 validation images" in judging._calibration(TWO_TASKS, (1.5, 0.8), "fitted", n)
    assert judging._calibration(TWO_TASKS, (1.5, 0.8), "fitted", n).startswith("temperature color 1.5, marks 0.8")


def test_the_warning_about_validation_images_names_all_that_they_have_chosen() -> None:
    assert chosen_by_validation(LabelSpace.single("ab")) == "the epoch and the temperature"
    assert chosen_by_validation(TWO_TASKS) == "the epoch, temperatures and thresholds"


def test_a_checkpoint_of_another_label_space_is_refused_by_what_was_asked(configure: Configure, tmp_path: Path) -> None:
    shapes = []
    for kind in ("any_of", "tasks", "soft"):
        config = configure(ASKED[kind], write_table(tmp_path / kind, kind, 30))
        manifest = prepare(config).manifest
        shapes.append(trajectory(make_plan(config, manifest, Machine(cpus=1)), manifest))
    others = r"labels was label \(any_of\): .* and is now color \(one_of\)"
    for before, now, words in ((0, 1, others), (2, 0, "labels was one class per image")):
        with pytest.raises(ModelError, match=words) as refused:
            require_same_trajectory(shapes[before], shapes[now], Run(tmp_path), tmp_path)
        assert refused.value.code == "M006"


@pytest.mark.slow
def test_a_run_with_other_labels_is_stopped_resumed_judged_reported_and_evaluated(
    kind: str, configure: Configure, stop_at: Callable[..., None], tmp_path: Path
) -> None:
    table = write_table(tmp_path / kind, kind)
    asked = {**ASKED[kind], "train.baseline": True, "loss.class_weights": "auto", "train.micro_batch": 3}
    events: list[dict[str, Any]] = []
    stop_at(3)
    config = configure(asked, table)
    with pytest.raises(Interrupted):
        session.start(config)
    run = session.resume(Run(Path(config.out)), {}, [events.append])
    done, manifest, bundle = events[-1], run.manifest, read_bundle(run.bundle_path)
    assert done["event"] == "done" and done["split"] == "test" and done["n"] == len(manifest.rows("test"))
    assert len(bundle.temperatures) == len(manifest.labels.tasks)
    assert (bundle.thresholds is not None) == manifest.labels.any_of.any()
    metrics = run.metrics("test")
    assert metrics is not None and ("tasks" in metrics) == ("tasks" in done) == (kind != "soft")
    assert metrics["accuracy"] == pytest.approx(done["accuracy"]) and brief(run)["accuracy"] == metrics["accuracy"]
    assert run.read_json("baseline.json")["n"] == done["n"] and done["against"]["rows"] == done["n"]
    assert manifest.labels.classes[0] in run.report_path.read_text("utf-8")
    again = ic.evaluate(run, split="test")
    assert again.accuracy == pytest.approx(done["accuracy"], abs=1e-6)
    other = tmp_path / "other"
    shutil.copytree(table.parent, other)
    elsewhere = ic.evaluate(run, other / table.name, include_train=True)
    assert elsewhere.n == len(manifest) and elsewhere.seen["train_judged"] == len(manifest.rows("train"))


@pytest.mark.slow
def test_a_bundle_is_the_start_of_a_run_with_another_kind_of_labels(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session.start(configure(data=write_table(tmp_path / "one", "any_of")))
    monkeypatch.setattr(session, "_finish", lambda stage, baseline: None)
    table = write_table(tmp_path / "two", "soft")
    second = session.start(configure({**ASKED["soft"], "model.init": str(first.directory), "train.epochs": 1}, table))
    reasons = {name: reason for name, _, reason in second.plan_facts["plan"]}  # type: ignore[index]
    assert "the head by name, for all 3 classes" in reasons["model.init"]


@pytest.mark.slow
def test_blood_cells_with_any_number_of_classes_per_image_are_learnt_and_judged(
    configure: Configure, shared_data: Path, tmp_path: Path
) -> None:
    asked = {"train.baseline": True, "train.batch_size": 16, "loss.class_weights": "auto", "train.epochs": 1}
    run = session.start(configure(asked, shared_data / "blood_cells" / "MANIFEST.csv"))
    bundle, metrics = read_bundle(run.bundle_path), run.metrics("test")
    assert run.manifest.labels.tasks == (Task("label", ("Platelets", "RBC", "WBC"), "any_of"),)
    assert metrics is not None and bundle.thresholds is not None and len(bundle.thresholds) == 3
    figures = metrics["tasks"]["label"]
    assert figures["n"] == len(run.manifest.rows("test")) and 0 < figures["macro_ap"] <= 1
    assert run.predictions("test").thresholds is not None and run.report_path.exists()


def test_the_head_of_a_start_is_taken_by_the_names_of_its_columns_per_task() -> None:
    start = Start("file", Path("x"), labels=TWO_TASKS)
    same_names = LabelSpace((Task("color", ("blue", "red", "gray")), Task("other", ("dot",), "any_of")))
    reason = _head_reason(start, same_names)
    assert reason == "the head keeps 2 of 4 classes; begun anew: color: gray, other: dot"
    assert _head_reason(start, LabelSpace.single(COLORS)).startswith("its head has none of these classes")
