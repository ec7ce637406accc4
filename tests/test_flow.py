"""The main job as a stranger does it: train, judge, predict, export, report; on the command line and in Python."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imgcls_fast
from imgcls_fast.core.errors import ConfigError

SETTINGS = {
    "pixels.size": 32, "model.arch": "small-cnn", "model.args": '{"width": 8}', "train.epochs": 2, "train.batch_size": 64,
    "train.threads": 1, "train.workers": 1, "evaluate.bootstrap": 50, "augment.policy": "light", "optim.ema": 0, "export.verify_images": 32,
}  # fmt: skip


class Shell:
    """Runs the command line in a folder of its own."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "IMGCLS_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "COLUMNS": "120",
        }
        self.environment.pop("IMGCLS_RUNS", None)

    def __call__(self, *words: str, code: int = 0) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "imgcls_fast", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    def json(self, *words: str, code: int = 0) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self(*words, "--json", code=code)[0])


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("flow")
    return Shell(folder, folder / "cache")


@pytest.fixture(scope="module")
def trained(shell: Shell) -> dict[str, Any]:
    words = [
        word
        for name, value in SETTINGS.items()
        for word in ("--set", f"{name}={str(value).lower() if value is False else value}")
    ]
    return shell.json("train", *words)


@pytest.mark.slow
class TestCommandLine:
    """In the order in which one would do it."""

    def test_train_leaves_one_run_with_everything_in_it(self, shell: Shell, trained: dict[str, Any]) -> None:
        run = shell.folder / trained["run"]
        assert [path.name for path in (shell.folder / "runs").iterdir() if path.is_dir() and not path.is_symlink()] == [
            run.name
        ]
        assert " " not in run.name
        for name in (
            "config.yaml", "env.json", "data.json", "split.csv", "quarantine.csv", "log.txt", "events.jsonl", "metrics.csv", "report.html",
            "checkpoints/last/manifest.json", "checkpoints/best/manifest.json", "bundle/bundle.json", "bundle/weights.safetensors",
            "eval/val/metrics.json", "eval/test/metrics.json", "eval/test/per_class.csv", "eval/test/confusion.csv",
            "eval/test/predictions.csv", "eval/test/scores.npy",
        ):  # fmt: skip
            assert (run / name).is_file(), name
        left = [line for line in (run / "config.yaml").read_text().splitlines() if "auto" in line]
        assert left == ["  label_kind: auto"]  # other data, which are judged later, are read by it as well
        assert trained["finished"]
        assert 0 <= trained["test"]["accuracy"] <= 1
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]

    def test_scores_are_aligned_with_file_names(self, shell: Shell, trained: dict[str, Any]) -> None:
        folder = shell.folder / trained["run"] / "eval" / "test"
        scores = np.load(folder / "scores.npy")
        with open(folder / "predictions.csv", newline="") as file:
            table = list(csv.DictReader(file))
        assert len(table) == len(scores)
        classes = [name.removeprefix("p:") for name in table[0] if name.startswith("p:")]
        for line, score in zip(table, scores, strict=True):
            assert line["pred"] == classes[score.argmax()]
            assert f"/{line['label']}/" in f"/{line['path']}"
        paths = [str(shell.folder / "cache" / "digits-v1" / line["path"]) for line in table[:20]]
        answers = shell.json("predict", trained["run"], *paths, "--top-k", "10")
        for answer, score in zip(_predictions(answers), scores[:20], strict=True):
            np.testing.assert_allclose(
                [dict(answer["top"])[name] for name in classes], score, atol=2e-2
            )  # DALI decodes, here Pillow
            assert answer["label"] == classes[score.argmax()]

    def test_eval_gives_the_metrics_of_training_again(self, shell: Shell, trained: dict[str, Any]) -> None:
        again = shell.json("eval")
        found = again.get("metrics", again)
        assert found["accuracy"] == pytest.approx(trained["test"]["accuracy"], abs=1e-6)
        assert found["n"] == trained["test"]["n"]
        val = shell.json("eval", trained["run"], "--split", "val")
        assert val.get("metrics", val)["accuracy"] == pytest.approx(trained["val"]["accuracy"], abs=1e-6)

    def test_export_then_predict_and_eval_with_onnx_agree_with_torch(
        self, shell: Shell, trained: dict[str, Any]
    ) -> None:
        folder = str(shell.folder / "cache" / "digits-v1" / "test" / "3")
        shell("predict", "last", folder, "--runtime", "onnx", code=1)  # E001: not exported yet
        made = shell.json("export", "--onnx")
        assert made["comparison"]["same_top1"] == made["comparison"]["images"] == 32
        assert made["comparison"]["max_score_diff"] <= 1e-4
        assert "export.opset" in shell("export", "--onnx", "--opset", "99", code=2)[1]
        with pytest.raises(ConfigError, match=r"export\.opset"):
            imgcls_fast.export(shell.folder / trained["run"], opset=99)
        half = imgcls_fast.export(shell.folder / trained["run"], precision="fp16", say=lambda sentence: None)
        assert half.gate is not None and half.gate["rows"] == trained["val"]["n"]
        verified = shell.json("verify")
        assert {entry["name"] for entry in verified["scores"]["compared"]} >= {"onnx fp32", "onnx fp16"}
        assert "trt fp16" in verified["scores"]["absent"]
        by_torch = _predictions(shell.json("predict", "last", folder))
        words = ("predict", "last", folder, "--runtime", "onnx", "--engine-precision", "fp32")
        by_onnx = _predictions(shell.json(*words))
        assert len(by_torch) > 20
        for a, b in zip(by_torch, by_onnx, strict=True):
            assert (a["path"], a["label"]) == (b["path"], b["label"])
            assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-4)

    def test_report_list_and_show_read_the_run_again(self, shell: Shell, trained: dict[str, Any]) -> None:
        report = shell.folder / trained["report"]
        report.unlink()
        shell("report")
        assert report.stat().st_size > 10_000
        listed = shell.json("runs", "list")
        assert [run["name"] for run in listed["runs"]] == [trained["name"]]
        shown = shell.json("runs", "show", trained["name"])
        assert shown["settings"]["train.epochs"] == 2
        assert [line["epoch"] for line in shown["history"]] == [1, 2]

    def test_resuming_the_finished_run_says_so(self, shell: Shell, trained: dict[str, Any]) -> None:
        _, errors = shell("train", "--resume")
        assert "finished" in errors

    def test_a_run_is_not_data(self, shell: Shell, trained: dict[str, Any]) -> None:
        _, errors = shell("train", trained["run"], code=2)
        assert "U002" in errors


def _predictions(answer: Any) -> list[dict[str, Any]]:
    return answer["predictions"] if "predictions" in answer else answer["answers"]


@pytest.mark.slow
def test_every_public_function_can_be_called_twice_because_no_room_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell, trained: dict[str, Any]
) -> None:
    import imgcls_fast as ic

    monkeypatch.setenv("IMGCLS_CACHE", str(shell.folder / "cache"))
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    place = shell.folder / trained["run"]
    picture = next((shell.folder / "cache" / "digits-v1" / "test" / "3").iterdir())
    tiny = {
        "epochs": 1,
        "img_size": 32,
        "overrides": {"model.args": {"width": 8}, "train.threads": 1, "train.workers": 1, "train.baseline": False},
    }
    for turn in (1, 2):
        run = ic.train(None, **tiny)
        assert isinstance(run, ic.Run)
        assert ic.evaluate(run).n == ic.evaluate(place).n
        assert ic.predict(place, picture)[0]["path"] == str(picture)
        assert ic.Predictor(place)(picture).label in ic.load_model(place).classes
        assert ic.plan(None, **tiny)["epochs"] == 1
        assert ic.check_data()["ok"]
        assert ic.split_data(out=tmp_path / "split.csv")["images"] > 1000
        assert ic.data_stats()["images"] > 1000
        assert len(ic.list_runs()) == turn
        assert ic.show_run(run)["name"] == run.name
        assert ic.report(run).is_file()
        assert ic.doctor()["sections"]
