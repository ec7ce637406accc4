"""Every verb that leaves images out reports how many and which: on the console, as JSON, in its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imgcls_fast as ic
from imgcls_fast.cli.app import main
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.core.undecoded import Undecoded
from imgcls_fast.training import session

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


def test_a_bench_sample_and_calibration_images_name_what_they_left_out(spoiled: tuple[Run, list[str]]) -> None:
    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.exporting.images import pixels_of
    from imgcls_fast.exporting.worth import sample_of

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
    original = session.make_bundle

    def spoil_first(run: Run, manifest: Any, *arguments: Any) -> Any:
        manifest.path(int(manifest.rows("test")[0])).write_bytes(b"this is no image")
        return original(run, manifest, *arguments)

    monkeypatch.setattr(session, "make_bundle", spoil_first)
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
