"""The gate: which rows may judge, what they are shown when, what is refused with which words, and what gate.json keeps."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls_fast.cli.app import parse
from imgcls_fast.core.batch import Batch
from imgcls_fast.core.errors import DataError, GateFailed
from imgcls_fast.core.exports import way_of
from imgcls_fast.core.files import write_json
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.evaluation.paired import judge
from imgcls_fast.exporting.gate import (
    Gate,
    GateData,
    answers_of,
    counts_as_passed,
    demand,
    gate_data,
    gate_report,
    rows_digest,
    split_rows,
)

CLASSES = ("cat", "dog", "emu")


def manifest_of(n: int, split: str | list[str] = "val", *, first: int = 0, root: Path = Path("/photos")) -> Manifest:
    """`n` rows whose classes take turns and whose digests are their numbers from `first` on."""
    codes = {"train": 0, "val": 1, "test": 2}
    splits = [split] * n if isinstance(split, str) else split
    number = np.arange(first, first + n, dtype="<u8")
    return Manifest(
        root=root,
        paths=PathList.of([f"{k}.jpg" for k in number]),
        labels=LabelSpace.single(CLASSES),
        answers=((np.arange(n) % 3).astype(np.int32),),
        split=np.array([codes[name] for name in splits], np.uint8),
        group=np.full(n, -1, np.int32),
        width=np.full(n, 8, np.int32),
        height=np.full(n, 8, np.int32),
        orientation=np.ones(n, np.uint8),
        digest=np.concatenate([np.zeros((n, 8), np.uint8), number.view(np.uint8).reshape(n, 8)], 1),
        flags=np.zeros(n, np.uint8),
    )


class Answers:
    """An engine that gives row k the answer `answers[k]`; a row's number is written into its pixels."""

    labels, pixels = LabelSpace.single(CLASSES), Pixels(1, 1.0, "bilinear", "rgba", "apply", (0.5,) * 4, (0.5,) * 4)
    max_batch, thread_safe, runtime, precision, thresholds = 512, True, "double", "fp32", None

    def __init__(self, answers: np.ndarray) -> None:
        self.answers, self.seen = np.asarray(answers), np.zeros(0, np.int64)

    def scores(self, pixels: Any) -> np.ndarray:
        rows = np.ascontiguousarray(pixels).view("<u4").ravel().astype(np.int64)
        self.seen = np.concatenate([self.seen, rows])
        return np.float32(0.1) + np.float32(0.7) * np.eye(3, dtype=np.float32)[self.answers[rows]]

    def warmup(self, n: int) -> None: ...

    def close(self) -> None: ...


def batches_of(manifest: Manifest, size: int = 512) -> Callable[[np.ndarray], Iterator[Batch]]:
    """Batches of rows, the last one padded."""

    def batches(rows: np.ndarray) -> Iterator[Batch]:
        for at in range(0, len(rows), size):
            own = rows[at : at + size]
            padded = np.concatenate([own, np.full(size - len(own), -1, np.int64)])
            known = np.where(padded >= 0, padded, own[0])
            pixels = known.astype("<u4").view(np.uint8).reshape(size, 1, 1, 4)
            yield Batch(pixels, manifest.targets(known), (padded >= 0).astype(np.float32), padded)

    return batches


def gate_of(n: int, **more: Any) -> tuple[Gate, np.ndarray]:
    """A gate over `n` rows that FP32 gets all right, and the right answers."""
    data = gate_data(manifest_of(n))
    truth = data.manifest.label
    settings = {"max_drop_pp": 1.0, "seed": 3, **more}
    return Gate(data, Answers(truth), batches_of(data.manifest), **settings), truth


def wrong_at(truth: np.ndarray, rows: Any) -> Answers:
    answers = truth.copy()
    answers[rows] = (answers[rows] + 1) % 3
    return Answers(answers)


# ---------------------------------------------------------------- rows that may judge


def test_calibration_and_training_files_never_judge_under_whatever_name():
    own = manifest_of(12, ["train"] * 4 + ["val"] * 6 + ["test"] * 2)
    extra = manifest_of(10, "train", first=2, root=Path("/more"))  # files 2..11: trained on 2 and 3, own rows are 4..11
    data = gate_data(own, "val", calibration=own.digest[[4, 10]], extra=extra)
    assert data.left_out == {"calibration": 3, "training": 2, "repeated": 5}
    assert data.manifest.digest[:, 8].tolist() == [5, 6, 7, 8, 9, 11]
    assert [data.manifest.path(k).name for k in range(6)] == ["5.jpg", "6.jpg", "7.jpg", "8.jpg", "9.jpg", "11.jpg"]
    assert data.manifest.path(0) == Path("/photos/5.jpg") and data.manifest.path(5) == Path("/more/11.jpg")
    assert data.manifest.label.tolist() == [2, 0, 1, 2, 0, 0]
    assert data.manifest.targets(np.array([5])).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("which", "count"), [("val", 6), ("test", 2), ("val+test", 8)])
def test_the_named_splits_judge(which, count):
    own = manifest_of(12, ["train"] * 4 + ["val"] * 6 + ["test"] * 2)
    data = gate_data(own, which)
    assert len(data) == count and not data.left_out
    assert data.digest() == rows_digest(own.digest[4 : 4 + count] if which != "test" else own.digest[10:])


def test_unlabelled_rows_are_counted_and_foreign_classes_refused():
    own = manifest_of(6)
    own.label[2] = -1
    assert gate_data(own).left_out == {"unlabelled": 1}
    from dataclasses import replace

    other = replace(manifest_of(3, first=50), labels=LabelSpace.single(("cat", "dog", "fox")))
    with pytest.raises(ValueError, match="fox"):
        gate_data(own, extra=other)
    with pytest.raises(ValueError, match="train"):
        gate_data(own, "train")


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 5), max_size=120), st.integers(0, 2**63), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_the_parts_are_disjoint_complete_repeatable_and_stratified(label, seed, fraction):
    label = np.array(label, np.int64)
    parts = split_rows(label, seed, fraction)
    again = split_rows(label.copy(), seed, fraction)
    assert np.array_equal(parts.search, again.search) and np.array_equal(parts.verdict, again.verdict)
    assert np.array_equal(np.sort(np.concatenate([parts.search, parts.verdict])), np.arange(len(label)))
    assert len(parts.search) == int(np.floor(len(label) * fraction))
    for k in range(6):
        expected = (label == k).sum() * fraction
        assert abs((label[parts.search] == k).sum() - expected) <= 1
    assert (np.diff(parts.search) > 0).all() and (np.diff(parts.verdict) > 0).all()


def test_another_seed_divides_otherwise_and_a_whole_fraction_is_refused():
    assert not np.array_equal(split_rows(100, 1).search, split_rows(100, 2).search)
    with pytest.raises(ValueError, match="fraction"):
        split_rows(10, 0, 1.0)


# ---------------------------------------------------------------- the procedure


def test_a_search_never_sees_verdict_rows_and_the_verdict_never_search_rows():
    gate, truth = gate_of(1200)
    candidate = wrong_at(truth, gate.rows.search[:20])
    assert gate.look("int8", candidate, simulated=True, excluded=0).lost == 20
    assert set(candidate.seen) == set(gate.rows.search)
    gate.look("int8", candidate, simulated=True)  # as often as it likes
    chosen = wrong_at(truth, gate.rows.verdict[:1])
    got = gate.verdict("int8, rescued", chosen, simulated=True)
    assert set(chosen.seen) == set(gate.rows.verdict)
    assert (got.rows, got.lost) == (600, 1)
    with pytest.raises(RuntimeError, match="judged int8, rescued"):
        gate.verdict("int8", candidate, simulated=True)
    assert [(entry["name"], entry["lost"], entry.get("excluded")) for entry in gate.history] == [
        ("int8", 20, 0),
        ("int8", 20, None),
    ]


def test_without_a_search_all_rows_judge():
    gate, truth = gate_of(300, fraction=0.0)
    assert gate.verdict("onnx-fp16", Answers(truth), simulated=False).rows == 300


def test_batch_sizes_and_padding_change_no_count():
    gate, truth = gate_of(100, fraction=0.0)
    engine = wrong_at(truth, [0, 50, 99])
    for size in (1, 7, 100, 512):
        data = gate.data
        said = answers_of(engine, data.manifest, batches_of(data.manifest, size)(gate.rows.verdict))
        right = answers_of(Answers(truth), data.manifest, batches_of(data.manifest, size)(gate.rows.verdict))
        got = judge(right, said, 1, simulated=False)
        assert (got.rows, got.lost, got.gained) == (100, 3, 0)


def test_a_file_that_can_no_longer_be_read_is_an_error_and_no_smaller_sample():
    gate, truth = gate_of(60)
    whole = gate._batches
    gate.look("one", Answers(truth), simulated=False)
    gate._batches = lambda rows: whole(rows[1:])
    with pytest.raises(DataError) as refused:
        gate.look("two", Answers(truth), simulated=False)
    assert refused.value.code == "D010" and f"{gate.rows.search[0]}.jpg" in refused.value.message


@pytest.mark.slow
def test_200_searches_over_engines_that_lose_the_whole_budget_pass_in_7_of_100_at_most(capsys):
    """The whole procedure: eight engines that each lose exactly the budget, the best on the search rows is judged once."""
    seed, n, budget, gain, searches = 7, 2400, 0.01, 0.008, 200
    draw = np.random.default_rng(seed)
    data = gate_data(manifest_of(n))
    batches = batches_of(data.manifest, n)
    truth = data.manifest.label
    passed = greedy = 0
    for search in range(searches):
        reference = np.where(draw.random(n) < 0.9, truth, (truth + 1) % 3)  # FP32 is right on 90 % of the rows
        right = reference == truth
        gate = Gate(data, Answers(reference), batches, max_drop_pp=100 * budget, seed=search)
        best: tuple[float, Answers] | None = None
        for k in range(8):
            changed = np.where(right, draw.random(n) < (budget + gain) / 0.9, draw.random(n) < gain / 0.1)
            engine = Answers(np.where(changed, np.where(right, (truth + 2) % 3, truth), reference))
            found = gate.look(f"candidate {k}", engine, simulated=False)
            best = min(best or (2.0, engine), (found.bound, engine), key=lambda entry: entry[0])
        assert best is not None
        greedy += best[0] <= budget
        passed += gate.verdict("chosen", best[1], simulated=False).passed
    with capsys.disabled():
        print(f"\nseed {seed}: {passed} of {searches} passed; judged by the rows that chose it, {greedy} would have")  # noqa: T201
    assert passed <= 0.07 * searches
    assert greedy > 3 * passed


# ---------------------------------------------------------------- refusals


def refusal(truth: np.ndarray, gate: Gate, wrong: int, name: str = "trt-int8", **more: Any) -> GateFailed:
    got = gate.verdict(name, wrong_at(truth, gate.rows.verdict[:wrong]), simulated=more.pop("simulated", False))
    with pytest.raises(GateFailed) as refused:
        demand(got, way_of(*name.split("-")), **more)
    assert refused.value.exit_code == 5
    command = refused.value.try_
    assert command.startswith("imgcls-fast ")
    parse(shlex.split(command)[1:])
    return refused.value


def test_an_engine_that_lost_too_much_is_refused_with_the_numbers():
    gate, truth = gate_of(1000, fraction=0.0)
    error = refusal(truth, gate, 50, run="runs/last", simulated=True)
    assert error.code == "E902"
    for text in (
        "trt-int8 lost 5 points",
        "100.00% -> 95.00%",
        "50 lost and 0 gained of 1,000 rows",
        "allowed: 1",
        "95 %",
    ):
        assert text in error.message
    assert "another runtime" in error.where and "the class that lost most" in error.why
    assert error.try_ == "imgcls-fast export runs/last --trt --precision fp16"


def test_too_few_rows_are_named_with_the_number_that_would_do():
    gate, truth = gate_of(100, fraction=0.0, max_drop_pp=0.5)
    error = refusal(truth, gate, 0, verdict_share=0.5)
    assert error.code == "E903"
    assert "100 rows cannot show" in error.message and "539 rows" in error.message and "2.634" in error.message
    assert "878" in error.why  # (539 - 100) / 0.5
    assert error.try_ == "imgcls-fast export RUN --trt --precision int8 --gate-data DATA"


def test_where_more_rows_cannot_help_nothing_of_the_kind_is_promised():
    gate, truth = gate_of(100, fraction=0.0)
    error = refusal(truth, gate, 1, "onnx-int8")
    assert error.code == "E903" and "would show it" not in error.message
    assert "not below 1" in error.why
    assert error.try_ == "imgcls-fast export RUN --onnx --precision fp16"


def test_a_failing_fp32_engine_is_sent_to_verify():
    gate, truth = gate_of(1000, fraction=0.0)
    assert refusal(truth, gate, 100, "aoti-fp32").try_ == "imgcls-fast verify RUN"


def test_an_engine_that_passed_goes_on():
    gate, truth = gate_of(1000, fraction=0.0)
    demand(gate.verdict("trt-int8", wrong_at(truth, gate.rows.verdict[:2]), simulated=False), way_of("trt", "int8"))


# ---------------------------------------------------------------- gate.json


def report_of(simulated: bool, tmp_path: Path) -> dict[str, Any]:
    gate, truth = gate_of(1000)
    gate.look("int8", wrong_at(truth, gate.rows.search[:30]), simulated=simulated, excluded=[])
    got = gate.verdict("int8, 1 layer in fp16", wrong_at(truth, gate.rows.verdict[:1]), simulated=simulated)
    calibration = manifest_of(5, first=5000).digest
    report = gate_report(
        got, gate, judge_runtime="onnx" if simulated else "trt", judge_precision="int8", exported_runtime="trt",
        versions={"onnxruntime": "1.32.0"}, bundle="b" * 64, engine="e" * 64, calibration=calibration,
    )  # fmt: skip
    write_json(tmp_path / "gate.json", report)
    again: dict[str, Any] = json.loads((tmp_path / "gate.json").read_text("utf-8"))
    assert again == report
    assert not re.search(r"NaN|Infinity", (tmp_path / "gate.json").read_text("utf-8"))
    return again


def test_the_report_says_who_judged_what_on_which_rows(tmp_path):
    report = report_of(False, tmp_path)
    assert report["schema"] == 1 and report["verdict"] == "pass" and report["simulated"] is False
    assert report["judge"] == {"runtime": "trt", "precision": "int8", "exported_for": "trt"}
    assert (report["rows"], report["lost"], report["gained"], report["agreement"]) == (500, 1, 0, 0.998)
    assert (
        report["drop_pp"] == pytest.approx(0.2) and report["drop_pp"] < report["bound_pp"] <= report["max_drop_pp"] == 1
    )
    assert report["confidence"] == 0.95 and "Tango" in report["method"] and 0 < report["mcnemar_p"] <= 1
    assert {entry["class"] for entry in report["per_class"]} == set(CLASSES)
    assert sum(entry["rows"] for entry in report["per_class"]) == 500
    assert sum(entry["lost"] for entry in report["per_class"]) == 1
    assert report["split"] == {
        "seed": 3, "search_fraction": 0.5, "search_rows": 500, "verdict_rows": 500, "left_out": {},
    }  # fmt: skip
    assert report["digests"]["bundle"] == "b" * 64 and report["digests"]["engine"] == "e" * 64
    assert report["digests"]["gate_rows"] != report["digests"]["verdict_rows"]
    assert report["digests"]["calibration_rows"] == rows_digest(manifest_of(5, first=5000).digest[::-1])
    assert report["versions"] == {"onnxruntime": "1.32.0"}
    assert [(entry["name"], entry["verdict"]) for entry in report["search"]] == [("int8", "fail")]


def test_only_the_judged_file_counts_as_passed(tmp_path):
    report = report_of(False, tmp_path)
    assert counts_as_passed(report, "e" * 64)
    assert not counts_as_passed(report, "f" * 64)
    assert not counts_as_passed({**report, "verdict": "underpowered"}, "e" * 64)
    assert not counts_as_passed(None, "e" * 64)


def test_a_simulated_verdict_passes_no_plan_and_says_so(tmp_path):
    report = report_of(True, tmp_path)
    assert report["verdict"] == "pass" and report["simulated"] is True
    assert "simulation" in report["statement"] and "only when that engine was judged" in report["statement"]
    assert not counts_as_passed(report, "e" * 64)


# ---------------------------------------------------------------- real photos


def test_the_100_validation_photos_are_too_few(shared_data: Path, bundle_of: Callable[..., Any]) -> None:
    from imgcls_fast.core.undecoded import Undecoded
    from imgcls_fast.data.findings import ScanOptions
    from imgcls_fast.data.scan import scan
    from imgcls_fast.engines.runtimes import open_engine
    from imgcls_fast.loading.loader import read_rows

    manifest = scan(shared_data / "photos", ScanOptions(threads=2)).manifest
    bundle = bundle_of(size=32, classes=5)
    data = gate_data(manifest, "val")
    assert len(data) == 100
    left = Undecoded()

    def photos(rows: np.ndarray) -> Iterator[Batch]:
        return read_rows(data.manifest, rows, bundle.pixels, on_bad=left.of(data.manifest))

    gate = Gate(data, open_engine(bundle), photos, max_drop_pp=0.5, fraction=0.0)
    got = gate.verdict("onnx-fp16", open_engine(bundle), simulated=False)
    assert (got.rows, got.agreement, got.verdict) == (100, 1.0, "underpowered")
    with pytest.raises(GateFailed) as refused:
        demand(got, way_of("onnx", "fp16"))
    assert refused.value.code == "E903" and "539" in refused.value.message


def test_data_of_nothing_but_calibration_rows_is_underpowered_and_not_a_crash():
    own = manifest_of(9)
    data = gate_data(own, calibration=own.digest)
    assert len(data) == 0 and isinstance(data, GateData)
    gate = Gate(data, Answers(own.label), batches_of(own), max_drop_pp=0.5)
    got = gate.verdict("onnx-int8", Answers(own.label), simulated=False)
    assert (got.rows, got.bound, got.verdict, got.rows_needed) == (0, 1.0, "underpowered", 539)
    with pytest.raises(GateFailed, match="0 rows cannot show"):
        demand(got, way_of("onnx", "int8"))
