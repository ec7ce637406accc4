"""The command line as a person and as a program meet it: answers, errors, exit codes, and who gets stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgcls_fast.api import runs as api
from imgcls_fast.cli import app
from imgcls_fast.cli.app import main
from imgcls_fast.core.errors import (
    ConfigError,
    DataError,
    ExportError,
    GateFailed,
    HardwareError,
    ImgclsError,
    Interrupted,
    ModelError,
    UsageError,
)
from imgcls_fast.core.options import flags_of
from imgcls_fast.core.settings import build_config
from imgcls_fast.core.verbs import LATER_VERBS, VERBS

Capture = pytest.CaptureFixture[str]
MACHINE: dict[str, Any] = {
    "sections": [("here", [("python", "3.11", True, ""), ("gpu", None, False, "buy one"), ("x", 1.5, None, "")])]
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def doctor_does(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the verb `doctor` return or raise something."""

    def set_to(result: Any) -> None:
        def fake() -> Any:
            if isinstance(result, BaseException):
                raise result
            return result() if callable(result) else result

        monkeypatch.setattr(api, "doctor", fake)

    return set_to


def one_object(capsys: Capture) -> tuple[dict[str, Any], str]:
    """stdout, which must be exactly one JSON object on one line, and stderr."""
    out, err = capsys.readouterr()
    assert out.endswith("}\n")
    assert out.count("\n") == 1
    return json.loads(out), err


# ---- wrong words ----


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["trian"], "U001", "imgcls-fast train"),
        (["evaluate"], "U001", "imgcls-fast"),
        (["data", "chek", "x"], "U001", "imgcls-fast data check"),
        (["data"], "U002", "imgcls-fast data check"),
        (["runs", "ls"], "U001", "imgcls-fast runs"),
        (["train", "--epoch", "3"], "U001", "--epochs"),
        (["train", "--epoch=3"], "U001", "--epochs=3"),
        (["eval", "--jsn"], "U001", "--json"),
        (["runs", "list", "--epochs", "3"], "U001", "runs list --help"),
        (["train", "a", "b"], "U002", "imgcls-fast train --help"),
        (["predict"], "U002", "imgcls-fast predict --help"),
        (["data", "check"], "U002", "imgcls-fast data check --help"),
        (["train", "--lr"], "U002", "imgcls-fast train --help"),
        (["-e", "3"], "U001", "imgcls-fast train DATA"),
        (["--learning_rate", "3"], "U001", "imgcls-fast train DATA"),
        (["--nonsense"], "U001", "imgcls-fast --help"),
        (["qqqq"], "U001", "imgcls-fast --help"),
        (["train", "--folds", "5"], "U001", "imgcls-fast train --help"),
        (["serve"], "U001", "imgcls-fast --help"),
        (["eval", "--split", "tset"], "U002", "--split test"),
        (["predict", "x.jpg", "--top-k", "0"], "U002", "--top-k 1"),
        (["predict", "x.jpg", "-o", "x.txt"], "U002", "--out x.csv"),
        (["train", "--resume", "--dry-run"], "U002", "--resume"),
        (["eval", "no-run"], "U003", "imgcls-fast runs list"),
        (["runs", "show"], "U003", "imgcls-fast train DATA"),
        (["train", "--opt", "adam"], "C003", "--opt adamw"),
        (["train", "--set", "train.epohs=3"], "C001", "train.epochs"),
        (["train", "--preset", "fsat"], "C003", "--preset fast"),
        (["train", "--config", "none.yaml"], "C005", "--dump-config"),
        (["train", "x", "-epochs", "3"], "U001", "--epochs 3"),
        (["train", "x", "-epoch", "3"], "U001", "--epochs 3"),
        (["train", "x", "-lr", "0.1"], "U001", "--lr 0.1"),
        (["train", "x", "--learning-rate", "0.1"], "U001", "--lr 0.1"),
        (["train", "x", "--imgsz=224"], "U001", "--img-size 224"),
        (["train", "x", "--momentum", "0.8"], "U001", "--set optim.momentum=0.8"),
        (["train", "x", "--pretrained"], "U001", "--init pretrained"),
        (["train", "x", "--gpu", "0"], "U001", "--device cuda"),
        (["train", "x", "-j", "8"], "U001", "--workers 8"),
        (["train", "x", "--num-classes", "5"], "U001", "leave --num-classes out"),
        (["train", "--data-dir", "my photos"], "U001", "imgcls-fast train 'my photos'"),
        (["train", "x", "--foo", "1"], "U001", "imgcls-fast train --help"),
        (["train", "x", "--set", "optim.lr", "0.1"], "U002", "--set optim.lr=0.1"),
        (["train", "--set", "optim.lr", "0.1", "photos"], "U002", "--set optim.lr=0.1"),
        (["train", "photos", "--set", "optim.lr"], "U002", "--set optim.lr=VALUE"),
        (["train", "x", "--no-compile", "0"], "U002", "try:   --compile"),
        (["train", "x", "--amp", "off"], "U001", "--precision fp32"),
        (["train", "x", "--pretrained", "false"], "U001", "--init scratch"),
        (["train", "x", "--split", "0.8", "0.1", "0.1"], "U001", "--split-ratio 0.8,0.1,0.1"),
        (["train", "x", "-bs", "64"], "U001", "--batch-size 64"),
        (["train", "data=x", "epochs=3", "lr0=.1", "nc=3"], "U002", "imgcls-fast train x --epochs 3 --lr .1"),
        (["predict", "model=runs/last", "source=x.jpg"], "U002", "imgcls-fast predict runs/last x.jpg"),
        (["predict", "--weights", "best.pt", "x.jpg"], "U001", "imgcls-fast predict RUN IMAGES..."),
        (["export", "--format", "engine"], "U001", "--trt"),
        (["train", "--resume=runs/a"], "U002", "imgcls-fast train runs/a --resume"),
        (["train", "x", "--compile", "false"], "U002", "--no-compile"),
        (["fit", "x"], "U001", "imgcls-fast train x"),
        (["val"], "U001", "imgcls-fast eval"),
        (["infer", "x.jpg"], "U001", "imgcls-fast predict x.jpg"),
        (["train", "x", "--lr", "1e6"], "C003", "--lr auto"),
        (["train", "x", "--img-size", "224x224"], "C003", "--img-size 224"),
        (["train", "x", "--split-ratio", "80,10,10"], "C003", "--split-ratio 0.8,0.1,0.1"),
        (["train", "x", "--split-ratio", "0.8"], "C002", "--split-ratio 0.8,0.1,0.1"),
        (["train", "x", "--class-weights", "balanced"], "C003", "--class-weights auto"),
        (["train", "x", "--freeze", "all"], "C003", "--freeze backbone"),
        (["train", "x", "--device", "gpu"], "C003", "--device cuda"),
        (["train", "x", "--precision", "16-mixed"], "C003", "--precision fp16"),
        (["train", "x", "--augment", "randaugment"], "C003", "--augment medium"),
        (["train", "x", "--channels", "RGB"], "C003", "--channels 3"),
        (["train", "x", "--max-bad", "10%"], "C002", "--max-bad 0.1"),
        (["train", "x", "--split-ratio", "0..8,0.1,0.1"], "C002", "--split-ratio 0.8,0.1,0.1"),
        (["train", "x", "--max-bad", "1.2.3%"], "C002", "--max-bad 0.01"),
        (["train", "x", "--save-every", "10min"], "C002", "--save-every 10m"),
        (["train", "x", "--patience", "never"], "C002", "--patience none"),
        (["eval", "x", "--split", "validation"], "U002", "--split val"),
        (["train", "--data", "x", "--epochs", "3"], "U001", "imgcls-fast train x --epochs 3"),
        (["export", "mine", "onnx"], "U002", "imgcls-fast export mine --onnx"),
        (["data", "."], "U001", "imgcls-fast data check ."),
        (["check", "x"], "U001", "imgcls-fast data check x"),
        (["train", ".", "--resume"], "U003", "imgcls-fast train --resume"),
        (["eval", "no-run"], "U003", "imgcls-fast runs list"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_wrong_word_is_one_error_with_a_hint_and_exit_code_2(
    words: list[str], code: str, hint: str, capsys: Capture
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error[{code}]: ")
    assert err.count("error[") == 1
    assert "Traceback" not in err
    assert hint in next(line for line in err.splitlines() if line.startswith("  try: "))


def test_what_a_setting_wants_is_said_in_words_of_people(capsys: Capture) -> None:
    for words, wanted in (
        (["-e", "ten"], "must be a whole number or 'auto', got 'ten'"),
        (["--split-ratio", "0.8"], "must be 3 numbers"),
        (["--class-weights", "x"], "must be one of 'none', 'auto' or 'effective' or a list of numbers or pairs NAME=NUMBER"),
    ):
        assert main(["train", "x", *words]) == 2
        assert wanted in capsys.readouterr().err
    assert main(["train", "x", "--img-size", "224", "224"]) == 2
    assert "an option takes one word" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["train", "x", "--opt", "adamw", "--opt", "adam"], ["doctor"]], ids=["option", "command"]
)
def test_a_hint_never_repeats_what_was_typed(
    words: list[str], doctor_does: Callable[..., None], capsys: Capture
) -> None:
    doctor_does(DataError("D001", "no such thing", try_="imgcls-fast doctor   (again)"))
    assert main(words) != 0
    assert f"  try:   imgcls-fast {words[0]} --help\n" in capsys.readouterr().err


@pytest.mark.parametrize("verb", LATER_VERBS)
def test_a_verb_of_later_says_not_in_this_version(verb: str, capsys: Capture) -> None:
    assert main([verb]) == 2
    assert f"{verb} is not in this version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--onnx", "--trt"], "--onnx and --trt exclude each other"),
        (["--int8", "--precision", "fp16"], "two precisions are asked for"),
        (["--precision", "int4"], "fp32"),
        (["--set", "train.epochs=3"], "train.epochs"),
        (["--max-drop", "0"], "export.max_drop"),
    ],
)
def test_an_export_that_contradicts_itself_is_refused_before_a_run_is_looked_for(
    words: list[str], text: str, capsys: Capture
) -> None:
    assert main(["export", "nowhere", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_path_instead_of_a_verb_is_led_to_train(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "photos").mkdir()
    assert main(["photos"]) == 2
    assert "imgcls-fast train photos" in capsys.readouterr().err


def test_an_option_of_another_verb_names_that_verb(capsys: Capture) -> None:
    assert main(["train", "--top-k", "3"]) == 2
    assert "it belongs to predict" in capsys.readouterr().err


def test_a_wrong_value_of_a_flag_is_shown_as_it_was_typed(capsys: Capture) -> None:
    assert main(["train", "-e", "many"]) == 2
    err = capsys.readouterr().err
    assert "train.epochs must be" in err
    assert "where: --epochs many" in err


# ---- help and version ----


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_help_that_names_its_options(verb: Any, capsys: Capture) -> None:
    assert main([*verb.name.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert verb.help in out
    assert f"imgcls-fast {verb.name}" in out
    for flag in flags_of(verb.name):
        assert all(name in out for name in flag.names)
        assert all(f" {alias}" not in out for alias in flag.aliases)
    for example in verb.examples:
        assert example in out
    assert max(map(len, out.splitlines())) <= 130


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_without_a_verb_lists_every_verb(words: list[str], capsys: Capture) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(verb.name in out and verb.help in out for verb in VERBS)


@pytest.mark.parametrize("group", ["data", "runs"])
def test_a_group_has_help(group: str, capsys: Capture) -> None:
    assert main([group, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb.help in out for verb in VERBS if verb.name.startswith(group))


def test_examples_of_the_help_can_be_parsed() -> None:
    import shlex

    for verb in VERBS:
        for example in verb.examples:
            request, notes = app.parse(shlex.split(example))
            assert (request.verb, notes) == (verb.name, [])


def test_version_is_the_version_of_the_package(capsys: Capture) -> None:
    import imgcls_fast

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"imgcls-fast {imgcls_fast.__version__}\n"
    assert main(["--version", "--json"]) == 0
    assert one_object(capsys)[0]["version"] == imgcls_fast.__version__


# ---- exit codes ----


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("U003", "no"), 2), (ConfigError("C004", "no"), 2), (DataError("D012", "no"), 3), (ModelError("M002", "no"), 2),
        (HardwareError("H002", "no"), 4), (ExportError("E001", "no"), 1), (GateFailed("E901", "no"), 5),
        (Interrupted("X130", "no"), 130), (ImgclsError("X001", "no"), 1),
    ],
    ids=lambda v: getattr(v, "code", ""),
)  # fmt: skip
def test_each_family_of_errors_has_its_exit_code(
    error: ImgclsError, code: int, doctor_does: Callable[..., None], capsys: Capture
) -> None:
    doctor_does(error)
    assert main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error[{error.code}]: no\n")
    assert main(["doctor", "--json"]) == code
    found, _ = one_object(capsys)
    assert found["error"]["code"] == error.code
    assert found["error"]["exit_code"] == code


def test_an_unexpected_exception_is_x001_with_its_place_and_no_traceback(
    doctor_does: Callable[..., None], capsys: Capture
) -> None:
    doctor_does(ZeroDivisionError("by zero"))
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "error[X001]: ZeroDivisionError: by zero" in err
    assert "test_cli.py, line" in err
    assert "imgcls-fast doctor --debug" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), DataError("D002", "none")])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    error: Exception, doctor_does: Callable[..., None], capsys: Capture
) -> None:
    doctor_does(error)
    code = main(["doctor"])
    capsys.readouterr()
    assert main(["doctor", "--debug"]) == code
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.rstrip().splitlines()[-1].startswith(("error[", "  "))


def test_ctrl_c_is_130(doctor_does: Callable[..., None], capsys: Capture) -> None:
    doctor_does(KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert "error[X130]" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(
    doctor_does: Callable[..., None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor_does(BrokenPipeError())
    monkeypatch.setattr(app.os, "dup2", lambda *_: None)
    assert main(["doctor"]) == 141
    assert capsys.readouterr() == ("", "")


# ---- JSON, quiet and people ----


def test_json_is_one_object_though_libraries_print_and_warn(doctor_does: Callable[..., None], capsys: Capture) -> None:
    def noisy() -> dict[str, Any]:
        sys.stdout.write("a library prints\n")
        return MACHINE

    doctor_does(noisy)
    assert main(["doctor", "--json"]) == 0
    found, err = one_object(capsys)
    assert found["sections"][0]["items"][0] == {"item": "python", "value": "3.11", "ok": True, "hint": ""}
    assert found["warnings"] == []
    assert "a library prints" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("a/b"), "\ud800 \n ü"])
def test_json_holds_what_json_can_hold(value: Any, doctor_does: Callable[..., None], capsys: Capture) -> None:
    doctor_does({"sections": [("here", [("it", value, True, "")])]})
    assert main(["doctor", "--json"]) == 0
    found = one_object(capsys)[0]["sections"][0]["items"][0]["value"]
    assert found == (None if isinstance(value, float) else str(value))


def test_a_usage_error_is_json_as_well(capsys: Capture) -> None:
    assert main(["trian", "--json"]) == 2
    found, err = one_object(capsys)
    assert found["error"] == {
        "code": "U001", "message": "unknown command trian", "where": "", "why": "", "try": "imgcls-fast train", "exit_code": 2,
    }  # fmt: skip
    assert err.startswith("error[U001]")


def test_people_see_a_list_and_quiet_people_a_line(doctor_does: Callable[..., None], capsys: Capture) -> None:
    doctor_does(MACHINE)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "python" in shown
    assert "buy one" in shown
    assert "\x1b" not in shown
    assert main(["doctor", "-q"]) == 0
    assert capsys.readouterr() == ("missing: gpu\n", "")


def test_our_warnings_are_said_and_repeated_at_the_end(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import warnings

    def fake() -> dict[str, Any]:
        for _ in range(2):
            warnings.warn_explicit("look here", UserWarning, api.__file__, 1)
        warnings.warn_explicit("a library's", UserWarning, "/elsewhere/lib.py", 1)
        return MACHINE

    monkeypatch.setattr(api, "doctor", fake)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == "warning: look here\n1 warning:\n  look here\n"
    assert main(["doctor", "--json"]) == 0
    assert one_object(capsys)[0]["warnings"] == ["look here"]


# ---- configuration ----


def test_dump_config_prints_what_reads_back_to_the_same(tmp_path: Path, capsys: Capture) -> None:
    words = [
        "train",
        "flowers",
        "--preset",
        "medical",
        "-e",
        "7",
        "--class-weights",
        "cat=1,dog=2.5",
        "--set",
        "optim.lr=0.5",
    ]
    assert main([*words, "--dump-config"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(out, "utf-8")
    changes = {
        "data.source": "flowers",
        "train.epochs": 7,
        "loss.class_weights": {"cat": 1, "dog": 2.5},
        "optim.lr": 0.5,
    }
    assert build_config(file=tmp_path / "run.yaml") == build_config(changes, preset="medical")
    assert main(["train", "-c", "run.yaml", "--dump-config"]) == 0
    assert capsys.readouterr().out == out
    assert main([*words, "--dump-config", "--json"]) == 0
    assert build_config({f"{s}.{k}": v for s, fields in one_object(capsys)[0]["config"].items() if isinstance(fields, dict)
                         for k, v in fields.items()}) == build_config(changes, preset="medical")  # fmt: skip


def test_a_config_error_names_the_line_of_the_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  seed: 1\n  epochs: -1\n")
    assert main(["train", "x", "-c", "run.yaml"]) == 2
    assert "run.yaml, line 3" in capsys.readouterr().err


def test_settings_are_judged_without_torch(tmp_path: Path) -> None:
    text = (
        "import sys; from imgcls_fast.cli.app import main\n"
        "codes = [main(['train', 'x', '-e', '0']), main(['train', 'x', '-c', 'no.yaml']), main(['train', '--dump-config', '-q'])]\n"
        "print(codes, sorted({'torch', 'numpy', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[2, 2, 0] []", done.stderr


# ---- verbs on real folders ----


def test_no_runs_are_said_and_are_an_empty_list_in_json(capsys: Capture) -> None:
    assert main(["runs", "list"]) == 0
    assert "no runs yet" in capsys.readouterr().out
    assert main(["runs", "list", "--json"]) == 0
    assert one_object(capsys)[0] == {"runs": [], "warnings": []}
    for words in (["runs", "show"], ["runs", "show", "x"], ["eval"], ["report"], ["export"], ["train", "--resume"]):
        assert main([*words, "--json"]) == 2
        assert one_object(capsys)[0]["error"]["code"] == "U003", words


@pytest.mark.parametrize("verb", [["data", "check"], ["data", "split"], ["data", "stats"], ["train"]])
def test_missing_data_is_exit_code_3(verb: list[str], capsys: Capture) -> None:
    assert main([*verb, "no-such-folder", "--json"]) == 3
    found, err = one_object(capsys)
    assert found["error"]["code"] == "D001"
    assert "no-such-folder" in found["error"]["message"]
    assert "Traceback" not in err


def test_a_name_that_is_not_text_is_shown_and_not_a_crash(capsys: Capture) -> None:
    assert main(["data", "check", "no-\udcff-folder"]) == 3
    assert "no-\\udcff-folder" in capsys.readouterr().err


def test_data_check_lists_exactly_the_bad_files(shared_data: Path, tmp_path: Path, capsys: Capture) -> None:
    import csv

    with open(shared_data / "photos_messy" / "MANIFEST.csv", encoding="utf-8", newline="") as file:
        bad = {row["path"] for row in csv.DictReader(file) if row["expect"] == "error"}
    with tarfile.open(shared_data / "photos_messy" / "messy.tar") as archive:
        archive.extractall(tmp_path / "messy", filter="data")
    for source in (shared_data / "photos_messy" / "messy.tar", tmp_path / "messy"):
        assert main(["data", "check", str(source), "--json"]) == 0
        found, _ = one_object(capsys)
        assert {file["path"] for file in found["quarantine"]} == bad
        assert len(found["quarantine"]) == len(bad)
        assert all(file["reason"] for file in found["quarantine"])
        assert found["ok"] is True
        assert any("empty_class" in notice for notice in found["notices"])
    assert main(["data", "check", str(tmp_path / "messy")]) == 0
    out = capsys.readouterr().out
    assert all(path in out for path in bad)
    assert "\x1b" not in out


@pytest.mark.parametrize("kind", ["one class", "no images", "only bad"])
def test_data_that_cannot_be_trained_on_is_exit_code_3(kind: str, tmp_path: Path, capsys: Capture) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(6):
            if kind == "only bad":
                (tmp_path / "photos" / name / f"{k}.jpg").write_bytes(b"<html>")
            elif kind == "one class" and name == "cat":
                Image.new("RGB", (20, 20), (40 * k, 9, 9)).save(tmp_path / "photos" / name / f"{k}.png")
    assert main(["data", "check", "photos"]) == 3
    out, err = capsys.readouterr()
    assert any(code in out + err for code in ("D002", "D003", "D005", "D013"))
    assert main(["data", "check", "photos", "--json"]) == 3
    found, _ = one_object(capsys)
    assert "error" in found or (found["ok"] is False and found["problems"])


def test_data_split_writes_a_table_that_data_check_reads(shared_data: Path, tmp_path: Path, capsys: Capture) -> None:
    source = str(shared_data / "photos_messy" / "messy.tar")
    assert main(["data", "split", source, "-o", "split.csv", "--split-ratio", ".6,.2,.2", "--json"]) == 0
    found, _ = one_object(capsys)
    assert found["path"] == "split.csv"
    assert sum(found["splits"].values()) == found["images"]
    assert len((tmp_path / "split.csv").read_text("utf-8").splitlines()) == found["images"] + 1


# ---- a real process ----


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imgcls_fast", "trian", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "U001"
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_ends_the_program_quietly() -> None:
    program = [sys.executable, "-m", "imgcls_fast", "--help"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(120) == 141


def test_one_class_only_says_what_a_class_is_and_leads_nowhere_else(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "one" / "cat").mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (9, 9), (k, 90, 0)).save(tmp_path / "one" / "cat" / f"{k}.png")
    assert main(["data", "check", "one", "-q"]) == 3
    out = capsys.readouterr().out
    assert "has 1 class ('cat'), and a classifier needs at least 2" in out
    assert "each class is a folder of its own" in out
    assert "one/cat" not in out
