"""Folders as they come out of archives: splits by any of their names, and nothing of ours taken for data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.manifest import NO_SPLIT, SPLITS
from imgcls_fast.data.fetch import open_source
from imgcls_fast.data.folders import list_folder
from imgcls_fast.data.listing import Listing
from imgcls_fast.data.scan import unlabelled
from imgcls_fast.data.skipped import first_skipped
from imgcls_fast.data.spelling import split_of
from imgcls_fast.data.tables import list_table
from imgcls_fast.engines.predictor import gather


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def sorted_into(listing: Listing) -> set[tuple[str, str]]:
    """(split, class) of all rows."""
    assert not listing.problems, listing.problems
    return {
        (SPLITS[split] if split != NO_SPLIT else "", listing.classes[label])
        for split, label in zip(listing.splits, listing.labels, strict=True)
    }


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("Training", "Testing", "test"), ("training", "validation", "val"), ("train", "eval", "val"),
        ("seg_train", "seg_test", "test"), ("training_set", "test_set", "test"), ("Training", "Test", "test"),
        ("TRAIN", "Dev", "val"), ("train_images", "valid_images", "val"), ("train2017", "val2017", "val"),
        ("traindata", "hold-out", "test"), ("train", "Evaluation", "val"), ("trainset", "testset", "test"),
    ],
)  # fmt: skip
def test_splits_are_found_by_what_people_call_them(tmp_path: Path, train: str, other: str, split: str) -> None:
    tree(tmp_path, *(f"{s}/{c}/{s}{k}.png" for s in (train, other) for c in "ab" for k in range(2)))
    assert sorted_into(list_folder(tmp_path)) == {("train", "a"), ("train", "b"), (split, "a"), (split, "b")}


@pytest.mark.parametrize("name", ["latest", "contest", "testimony", "strain", "images", "data", "set", "device", "x_train_y"])
def test_a_name_that_only_holds_such_a_word_is_no_split(name: str) -> None:
    assert split_of(name) is None


def test_a_split_that_is_wrapped_once_more_is_entered(tmp_path: Path) -> None:
    names = [f"{s}/{s}/{c}/{k}.jpg" for s in ("seg_train", "seg_test") for c in ("forest", "sea") for k in range(2)]
    listing = list_folder(tree(tmp_path, *names, "seg_pred/seg_pred/1.jpg"))
    assert sorted_into(listing) == {(s, c) for s in ("train", "test") for c in ("forest", "sea")}
    assert any("'seg_pred' beside the split folders is not a split" in notice for notice in listing.notices)


def test_classes_that_are_split_each_on_its_own_keep_their_splits(tmp_path: Path) -> None:
    listing = list_folder(tree(tmp_path, *(f"{c}/{s}/{c}{s}.png" for c in ("cat", "dog") for s in ("train", "test"))))
    assert sorted_into(listing) == {(s, c) for s in ("train", "test") for c in ("cat", "dog")}
    assert any("cat/test, cat/train" in notice for notice in listing.notices)


def test_equal_folders_in_every_class_are_pointed_out(tmp_path: Path) -> None:
    listing = list_folder(tree(tmp_path, *(f"{s}/{c}/1.png" for s in ("batch one", "batch two") for c in ("cat", "dog"))))
    assert listing.classes == ["batch one", "batch two"]
    (notice,) = listing.notices
    assert "'cat', 'dog'" in notice and "rename the outer ones to train, val and test" in notice


def test_other_folders_in_classes_are_nothing_to_speak_of(tmp_path: Path) -> None:
    assert list_folder(tree(tmp_path, "cat/indoor/1.png", "cat/2.png", "dog/garden/1.png")).notices == []


def test_splits_without_class_folders_are_refused_with_the_table_that_lies_beside(tmp_path: Path) -> None:
    listing = list_folder(tree(tmp_path, "train/1.png", "test/2.png", "labels.csv"))
    (problem,) = listing.problems
    assert problem.code == "D002" and "'test', 'train'" in problem.message
    assert problem.try_ == f"imgcls-fast data check {tmp_path / 'labels.csv'}"


def test_a_lone_training_folder_beside_another_one_is_pointed_out(tmp_path: Path) -> None:
    listing = list_folder(tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "unlabelled/1.png"))
    assert listing.classes == ["train", "unlabelled"] and str(tmp_path / "train") in listing.notices[0]


# ---------------------------------------------------------------- ours


def run_in(folder: Path) -> Path:
    return tree(folder, "config.yaml", "manifest.npz", "plots/curve.png", "bundle/bundle.json", "report.html")


def test_runs_and_what_is_made_of_them_are_never_taken_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tree(tmp_path / "d", "cat/1.png", "dog/1.png", "dog/deep/2.png")
    run_in(data / "runs" / "first")
    (data / "runs" / "last.txt").write_text("first\n# the last run; written by imgcls-fast\n")
    (data / "runs" / "last").symlink_to("first")
    run_in(data / "dog" / "deep" / "second")
    tree(data, "handed on/bundle.json", "handed on/sample.png", "cache/archives/1/cat/3.png")
    tree(data, "onnx/preview.png")
    (data / "onnx" / "meta.json").write_text('{"bundle": "0a", "target": "onnx", "precision": "fp32", "file": "model.onnx"}')
    monkeypatch.setenv("IMGCLS_CACHE", str(data / "cache"))
    expected = ["cat/1.png", "dog/1.png", "dog/deep/2.png"]
    assert list_folder(data).paths == expected and list_folder(data).classes == ["cat", "dog"]
    assert [p for p in list_folder(data, labelled=False).paths if p.endswith(".png")] == expected
    passed = dict(list_folder(data).ours)
    assert passed["runs"] == "the folder of runs" and passed["dog/deep/second"] == "a run" and len(passed) == 5
    (notice,) = list_folder(data).notices
    assert "passed over, because no data" in notice and notice.endswith(", 2 more")


def test_a_class_may_be_called_runs_and_hold_a_meta_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree(tmp_path, "runs/1.png", "goals/1.png", "goals/config.yaml"))
    monkeypatch.delenv("IMGCLS_RUNS", raising=False)
    (tmp_path / "runs" / "meta.json").write_text('{"taken": 2020}')
    (tmp_path / "runs" / "last.txt").write_text("1.png\n")
    assert list_folder(tmp_path).classes == ["goals", "runs"]


def test_a_run_in_the_folder_of_its_own_data_leaves_the_classes(tmp_path: Path) -> None:
    run_in(tree(tmp_path, "cat/1.png", "dog/1.png"))
    assert list_folder(tmp_path).classes == ["cat", "dog"]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_run_that_is_named_as_data_is_refused(tmp_path: Path, labelled: bool) -> None:
    wanted = "images to learn from" if labelled else "a folder of images"
    with pytest.raises(DataError, match=f"is a run, not {wanted}") as caught:
        list_folder(run_in(tmp_path / "r"), labelled=labelled)
    assert caught.value.code == "D001"


def test_a_table_that_names_the_pictures_of_a_run_is_refused(tmp_path: Path) -> None:
    run_in(tree(tmp_path, "cat/1.png") / "runs" / "a")
    (tmp_path / "t.csv").write_text("path,label\ncat/1.png,cat\nruns/a/plots/curve.png,dog\n")
    (problem,) = list_table(tmp_path / "t.csv").problems
    assert problem.where == "t.csv, line 3" and "drawn by a run" in problem.message


def test_a_class_folder_that_cannot_be_entered_is_a_problem_with_its_name(tmp_path: Path, close: Callable[[Path], Path]) -> None:
    tree(tmp_path, "a/1.png", "b/1.png", "closed/1.png")
    close(tmp_path / "closed")
    (problem,) = list_folder(tmp_path).problems
    assert problem.code == "D001" and f"the folder {tmp_path}/closed cannot be read: Permission denied" in problem.message


def test_data_that_cannot_be_entered_is_not_called_missing(tmp_path: Path, close: Callable[[Path], Path]) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data/set cannot be read: Permission denied"):
        open_source(close(tmp_path / "data") / "set", tmp_path)


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_called_as_our_files_are_is_not_waited_for(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "b/1.png")
    for name in ("meta.json", "last.txt", "begun.txt"):
        os.mkfifo(tmp_path / "a" / name)
    assert list_folder(tmp_path).classes == ["a", "b"]


def test_a_pipe_among_the_data_is_no_file_to_wait_for(tmp_path: Path) -> None:
    for name in ("pipe", "meta.json", "last.txt", "bench.html"):
        os.mkfifo(tree(tmp_path, "cat/1.png") / name)
    os.mkfifo(tmp_path / "cat" / "meta.json")
    handle = os.open(tmp_path / "pipe", os.O_RDWR)  # so that a reader would get an answer, and the test fails and does not hang
    os.write(handle, b"x" * 1024)
    try:
        (first,) = first_skipped(str(tmp_path), ["pipe"], [])
    finally:
        os.close(handle)
    assert first.reason == "no regular file"
    assert list_folder(tmp_path).paths == ["cat/1.png"]


@pytest.mark.parametrize("name", ["test-data", "Test_Images", "evaluation", "dev"])
def test_a_lone_folder_called_after_a_test_is_a_wrapper(tmp_path: Path, name: str) -> None:
    tree(tmp_path / "plain", *(f"{name}/{c}/1.png" for c in ("cat", "dog")))
    listing = list_folder(tmp_path / "plain")
    assert sorted_into(listing) == {("", "cat"), ("", "dog")} and listing.paths == ["cat/1.png", "dog/1.png"]
    assert any(f"{name!r} is alone" in notice for notice in listing.notices)
    tree(tmp_path / "split", *(f"{name}/{s}/{c}/1.png" for s in ("train", "test") for c in ("cat", "dog")))
    assert sorted_into(list_folder(tmp_path / "split")) == {(s, c) for s in ("train", "test") for c in ("cat", "dog")}


def test_evaluations_and_pages_of_benchmarks_are_no_classes(tmp_path: Path) -> None:
    data = tree(tmp_path, "cat/1.png", "dog/1.png", "judged/plots/confusion.png", "cat/judged/plots/confusion.png", "page/bars.png")
    for folder in ("judged", "cat/judged", "dog", ""):
        (data / folder / "predictions.json").write_text('{"labels": {}, "fingerprint": "0a", "has_targets": true}')
    tree(data, "plots/confusion.png")
    (data / "page" / "bench.html").write_text("<title>Benchmarks \u00b7 imgcls-fast</title>", encoding="utf-8")
    listing = list_folder(data)
    assert listing.classes == ["cat", "dog"] and [p for p in listing.paths if p.endswith(".png")] == ["cat/1.png", "dog/1.png"]
    assert {"judged": "an evaluation", "page": "a page of benchmarks"}.items() <= dict(listing.ours).items()


def test_inner_splits_stay_where_a_class_lacks_one_or_holds_a_readme(tmp_path: Path) -> None:
    names = [f"{c}/{s}/{c}{s}.png" for c in ("cat", "dog", "eel") for s in ("train", "test")]
    listing = list_folder(tree(tmp_path, *names, "fox/train/1.png", "cat/README.md"))
    assert sorted_into(listing) == {(s, c) for s in ("train", "test") for c in ("cat", "dog", "eel")} | {("train", "fox")}
    assert any("lack a split" in notice and "'fox'" in notice for notice in listing.notices)
    assert listing.strays == ["cat/README.md"]


def test_a_class_without_inner_splits_beside_others_is_named(tmp_path: Path) -> None:
    names = [f"{c}/{s}/{c}{s}.png" for c in ("cat", "dog") for s in ("train", "test")]
    (problem,) = list_folder(tree(tmp_path, *names, "fox/1.png")).problems
    assert "'fox' not" in problem.message


def test_equal_inner_folders_that_are_called_after_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    (notice,) = list_folder(tree(tmp_path, *(f"{c}/{s}/1.png" for c in ("cat", "dog") for s in ("val", "test")))).notices
    assert "not taken as splits" in notice and "rename" not in notice


def test_vehicles_with_a_sub_folder_are_classes(tmp_path: Path) -> None:
    names = [f"{c}/{k}.png" for c in ("train", "test", "car") for k in range(3)]
    listing = list_folder(tree(tmp_path, *names, "train/night/1.png"))
    assert sorted_into(listing) == {("", c) for c in ("train", "test", "car")}


def test_a_link_that_comes_back_is_told_of_where_images_are_predicted(tmp_path: Path) -> None:
    (tree(tmp_path, "a/1.png") / "a" / "again").symlink_to(tmp_path / "a")
    assert unlabelled(tmp_path).notices == ("folder 'a/again' is a link to a folder seen before: not followed again",)
    assert "not followed again" in gather(tmp_path).note()
