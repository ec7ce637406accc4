"""Every verb that leaves images out reports how many and which: on the console, as JSON, in its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imgcls_fast as ic
from imgcls_fast.cli.app import main
from imgcls_fast.core.errors import DataError
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.core.undecoded import Undecoded
from imgcls_fast.data import reach, unknown
from imgcls_fast.training import judging, session
from imgcls_fast.training.learnt import about_missing
from imgcls_fast.training.reporting import judged

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def spoiled(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    """A finished run of whose nine test images two have gone bad since, and their paths."""
    data = shutil.copytree(tiny_data, tmp_path_factory.mktemp("spoiled") / "data")
    settings = {
        "model.arch": "small-cnn", "model.args": {"width": 8}, "pixels.size": 32, "train.epochs": 1, "train.batch_size": 8,
        "train.threads": 1, "train.workers": 0, "train.loader": "torch", "train.baseline": False, "evaluate.bootstrap": 20,
    }  # fmt: skip
    run = session.start(build_config({**settings, "data.source": str(data), "out": str(data.parent / "run")}))
    paths = [run.manifest.paths[int(row)] for row in run.manifest.rows("test")[[2, 5]]]
    for path in paths:
        (data / path).write_bytes(b"this is no image")
    return run, paths


def test_evaluate_verify_and_export_name_the_images_that_they_left_out(
    spoiled: tuple[Run, list[str]], tmp_path: Path, capsys: Capture
) -> None:
    run, paths = spoiled
    out = tmp_path / "judged"
    capsys.readouterr()
    assert main(["eval", str(run.directory), "--json", "--out", str(out)]) == 0
    answer = json.loads(capsys.readouterr().out)["metrics"]
    assert answer["n"] == 7
    assert [file["path"] for file in answer["undecodable_files"]] == paths
    assert any("2 images cannot be decoded" in text and paths[0] in text for text in answer["warnings"])
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["undecodable_files"] == answer["undecodable_files"]
    assert all(file["reason"] for file in stored["undecodable_files"])
    assert main(["eval", str(run.directory)]) == 0
    assert "note: 2 images cannot be decoded and were left out" in capsys.readouterr().out

    said: list[str] = []
    ic.export(run, "onnx", say=said.append)
    assert any("comparison images: 2 images cannot be decoded" in text and paths[1] in text for text in said)
    compared = ic.verify(run)
    assert compared["undecodable"] == 2
    assert [file["path"] for file in compared["undecodable_files"]] == paths
    assert paths[0] in compared["notices"][0]


def test_evaluate_on_other_images_reports_what_their_scan_left_out(
    spoiled: tuple[Run, list[str]], own_data: Path
) -> None:
    run, _ = spoiled
    bad = own_data / "val" / "a" / "000.jpg"
    bad.write_bytes(b"\xff\xd8 cut")
    (own_data / "val" / "unknown").mkdir()
    (own_data / "val" / "unknown" / "1.jpg").write_bytes((own_data / "val" / "b" / "001.jpg").read_bytes())
    metrics = ic.evaluate(run, own_data / "val")
    assert [file["path"] for file in metrics.undecodable_files] == ["a/000.jpg"]
    assert any("a/000.jpg" in text for text in metrics.warnings)
    assert any("unknown" in text for text in metrics.warnings)


def test_images_that_the_run_was_trained_on_are_left_out_and_counted(
    spoiled: tuple[Run, list[str]], own_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, _ = spoiled
    capsys.readouterr()
    out = tmp_path / "judged"
    assert main(["eval", str(run.directory), str(own_data), "--json", "--out", str(out)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["metrics"]["n"] == 23
    assert answer["metrics"]["seen"] == {"train_left_out": 42, "train_judged": 0, "val_judged": 14}
    assert json.loads((out / "metrics.json").read_text())["seen"] == answer["metrics"]["seen"]
    for told in (answer["warnings"], answer["metrics"]["warnings"]):
        assert any(text.startswith("42 of 65 images are training images") for text in told)
        assert any(text.startswith("14 of 23 judged images also chose the epoch") for text in told)
    assert main(["eval", str(run.directory), str(own_data), "--include-train"]) == 0
    shown = capsys.readouterr()
    assert "on 65 images" in shown.out and "note: 42" not in shown.out  # a warning once, not again as a note
    assert "warning: 42 of 65 images are training images" in shown.err and "flatter" in shown.err


def test_training_images_alone_are_refused_and_can_be_judged_anyhow(
    spoiled: tuple[Run, list[str]], own_data: Path
) -> None:
    run, _ = spoiled
    with pytest.raises(DataError, match=r"all 42 images of .* are training images") as caught:
        ic.evaluate(run, own_data / "train")
    assert caught.value.code == "D014" and "--include-train" in caught.value.try_
    with pytest.warns(UserWarning, match="flatter"):
        assert ic.evaluate(run, own_data / "train", include_train=True).n == 42


def test_classes_that_the_model_does_not_know_are_named_with_their_images(
    spoiled: tuple[Run, list[str]], own_data: Path, capsys: Capture
) -> None:
    run, _ = spoiled
    (own_data / "test" / "a").rename(own_data / "test" / "A")
    capsys.readouterr()
    assert main(["eval", str(run.directory), str(own_data / "test"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    said = "3 images of 1 class that the model does not know were left out: A 3 (perhaps the model's a)"
    assert answer["metrics"]["unknown_classes"] == {"A": 3} and answer["metrics"]["n"] == 6
    assert said in answer["warnings"] and said in answer["metrics"]["warnings"]
    for name in "bc":
        (own_data / "test" / name).rename(own_data / "test" / f"wolf {name}")
    with pytest.raises(DataError, match=r"none of the 3 classes .* is a class of the model: A 3 .*wolf b 3, wolf c 3") as caught:
        ic.evaluate(run, own_data / "test")
    assert (caught.value.code, caught.value.why, caught.value.try_) == ("D014", "the model knows a, b, c", "rename A to a")


def test_the_runs_own_images_are_judged_only_as_they_were(
    spoiled: tuple[Run, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that became another picture was judged under its old label, without a word."""
    monkeypatch.setattr(reach, "WAITS_S", ())
    run, bad = spoiled
    manifest = run.manifest
    good = [manifest.path(row) for row in manifest.rows("test") if manifest.paths[row] not in bad]
    data, content = manifest.root, good[0].read_bytes()
    good[0].write_bytes(good[1].read_bytes())
    with pytest.warns(UserWarning, match="1 image changed since the run was trained and was left out: test/"):
        metrics = ic.evaluate(run)
    assert metrics.n == 6 and [data / path for path in metrics.changed_files] == [good[0]]
    good[1].unlink()
    with pytest.raises(DataError, match=r"1 of 9 test images of .* are missing under .*, and 3 have changed") as caught:
        ic.evaluate(run)
    assert caught.value.code == "D015" and str(data) in caught.value.try_
    good[1].write_bytes(good[0].read_bytes())
    data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"all 9 test images of .* are missing under") as caught:
        ic.evaluate(run)
    assert caught.value.code == "D015" and "where the images are now" in caught.value.try_
    (tmp_path / "moved").rename(data)
    kept = {path: path.read_bytes() for path in good}
    for path in good:
        path.write_bytes(content + b"more")
    with pytest.raises(DataError, match=r"all 9 test images .* changed") as caught:
        ic.evaluate(run)
    assert caught.value.code == "D010"
    for path, whole in {**kept, good[0]: content}.items():
        path.write_bytes(whole)
    assert ic.evaluate(run).n == 7


def test_an_image_of_several_splits_counts_as_learnt(tiny_data: Path) -> None:
    from imgcls_fast.core.manifest import NO_SPLIT
    from imgcls_fast.data.scan import scan
    from imgcls_fast.training.learnt import splits_seen

    own = scan(tiny_data).manifest
    assert (splits_seen(own, own) == own.split).all()
    own.digest[own.rows("test")[0]] = own.digest[own.rows("train")[0]]
    own.digest[own.rows("val")[0]] = 0  # never hashed, so nothing is known of it
    seen = splits_seen(own, own)
    assert seen[own.rows("test")[0]] == 0 and seen[own.rows("val")[0]] == NO_SPLIT
    assert len(splits_seen(own, own.take(np.zeros(0, np.int64)))) == 0


def test_images_of_the_run_whose_weights_it_began_with_count_as_learnt(
    spoiled: tuple[Run, list[str]], own_data: Path, tmp_path: Path
) -> None:
    parent, _ = spoiled
    child = Run(Path(shutil.copytree(parent.directory, tmp_path / "child")))
    manifest = child.manifest
    split = manifest.split.copy()
    split[manifest.rows("train")[:5]], split[manifest.rows("test")[0]] = 2, 0
    manifest.with_splits(split).save(child.manifest_path)
    record = {"created": 0, "work": [], "parent": {"run": "run", "directory": str(parent.directory)}}
    (child.directory / "run.json").write_text(json.dumps(record))
    said = "5 of 13 test images are training images of run, whose weights child began with: the figures flatter the model"
    with pytest.warns(UserWarning, match=said):
        assert said in ic.evaluate(child).warnings
    assert said in judged(child)["test"][1].warnings  # and so in the report
    metrics = ic.evaluate(child, own_data)
    assert metrics.seen == {"train_left_out": 43, "train_judged": 0, "val_judged": 14}
    assert "43 of 65 images are training images of child or run and were left out" in metrics.warnings[-2]
    (child.directory / "run.json").write_text(json.dumps(record | {"parent": {"directory": str(child.directory)}}))  # a circle
    assert ic.evaluate(child, own_data).seen["train_left_out"] == 38


@pytest.mark.parametrize("how", ["gone", "damaged", "gone before"])
def test_a_run_before_that_is_gone_is_named_where_its_images_cannot_be_left_out(
    spoiled: tuple[Run, list[str]], own_data: Path, tmp_path: Path, capsys: Capture, how: str
) -> None:
    """A parent that was moved or deleted ended the chain without a word, and its training images counted as fresh."""
    original, _ = spoiled
    child, parent = (Run(Path(shutil.copytree(original.directory, tmp_path / name))) for name in ("child", "parent"))
    away = tmp_path / "away" if how == "gone before" else parent.directory
    links = {child: parent.directory} | ({parent: away} if how == "gone before" else {})
    for run, before in links.items():
        record = {"created": 0, "work": [], "parent": {"run": before.name, "directory": str(before)}}
        (run.directory / "run.json").write_text(json.dumps(record))
    if how == "gone":
        shutil.rmtree(parent.directory)
    elif how == "damaged":
        parent.manifest_path.write_bytes(b"")
    reason = "has a damaged list of images" if how == "damaged" else "is not there any more"
    said = f"the weights came from {away}, which {reason}: images that it was trained on cannot be left out"
    assert about_missing(child) == said
    if how != "gone":
        return
    capsys.readouterr()
    assert main(["eval", str(child.directory), str(own_data), "--json", "--out", str(tmp_path / "judged")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert said in answer["warnings"] and said in answer["metrics"]["warnings"]
    assert said in json.loads((tmp_path / "judged" / "metrics.json").read_text())["warnings"]
    assert said in judged(child)["test"][1].warnings  # and so in the report
    assert main(["eval", str(child.directory)]) == 0
    assert f"warning: {said}" in " ".join(capsys.readouterr().err.split())


def test_a_bench_sample_and_calibration_images_name_what_they_left_out(spoiled: tuple[Run, list[str]]) -> None:
    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.loading.loader import pixels_of
    from imgcls_fast.measuring.quality import sample_of

    run, paths = spoiled
    bundle = read_bundle(run.bundle_path)
    assert list(sample_of(run, bundle).undecoded.files) == paths
    left = Undecoded()
    parts = pixels_of(bundle, run.manifest, run.manifest.rows("test"), left)
    assert sum(map(len, parts)) == 7
    assert list(left.files) == paths


def test_the_judgement_of_a_run_names_its_quarantined_rows(
    configure: Callable[..., Any], own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = judging.make_bundle

    def spoil_first(run: Run, manifest: Any, *arguments: Any) -> Any:
        manifest.path(int(manifest.rows("test")[0])).write_bytes(b"this is no image")
        return original(run, manifest, *arguments)

    monkeypatch.setattr(judging, "make_bundle", spoil_first)
    run = session.start(configure({"train.epochs": 1}, own_data))
    metrics = run.metrics("test")
    assert metrics is not None
    assert [file["path"] for file in metrics["undecodable_files"]] == [
        run.manifest.paths[int(run.manifest.rows("test")[0])]
    ]
    assert "undecodable_files" in (run.metrics("val") or {})


def test_the_sentence_counts_all_and_names_three() -> None:
    assert Undecoded().sentence() == ""
    assert Undecoded({"a": "cut"}).sentence() == "1 image cannot be decoded and was left out: a (cut)"
    many = Undecoded({f"{k}.jpg": "cut" for k in range(5)})
    assert many.sentence().endswith("2.jpg (cut), +2 more")
    assert len(many.to_list()) == 5


def test_of_many_unknown_classes_only_those_that_are_shown_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(unknown, "near", lambda name, known: asked.append(name) or "")
    counts = {f"K{k}": 5_000 - k for k in range(5_000)}
    problem = unknown.no_known_class(counts, ["k0", "other"], "photos")
    assert problem.try_ == "rename K0 to k0" and "K0 5,000 (perhaps the model's k0)" in problem.message
    assert len(set(asked)) < 20
