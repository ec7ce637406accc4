"""Hints are kept as commands; whoever calls from Python is shown the call and the keywords that do the same."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import imgcls_fast as ic
from imgcls_fast.cli.app import main
from imgcls_fast.core.errors import ConfigError, DataError, UsageError, near
from imgcls_fast.core.hints import for_a_shell, in_python, worded
from imgcls_fast.core.options import setting_flags
from imgcls_fast.core.verbs import VERBS

PACKAGE = Path(__file__).parents[2] / "python" / "imgcls_fast"


@pytest.mark.parametrize(
    ("hint", "call"),
    [
        ("imgcls-fast eval runs/a --split val", "ic.evaluate('runs/a', split='val')"),
        ("--lr 0.1   (or --clip 1.0, or --precision fp32)", "lr=0.1   (or clip=1.0, or precision='fp32')"),
        ("--img-size 160   (or a smaller --model)", "img_size=160   (or a smaller model)"),
        ("--model resnet50 --init FILE", "model='resnet50', init=file"),
        ("--accum none   (or --freeze none)", "accum=None   (or freeze='none')"),
        ("--set train.memory_format=contiguous", "overrides={'train.memory_format': 'contiguous'}"),
        ("imgcls-fast train DATA   (start again)", "ic.train(data)   (start again)"),
        ("put it back, or: imgcls-fast train 'my photos' --init 'runs/my run'",
         "put it back, or: ic.train('my photos', init='runs/my run')"),
        ("free memory, then imgcls-fast train runs/a --resume   (or a smaller --batch-size)",
         "free memory, then ic.train(resume='runs/a')   (or a smaller batch_size)"),
        ("repeat the command (goes on by: imgcls-fast train --resume)", "repeat the call (goes on by: ic.train(resume='last'))"),
        ("imgcls-fast train d -e 3 --dry-run --json", "ic.plan('d', epochs=3)"),
        ("imgcls-fast train --dump-config   (lists every setting)", "ic.RunConfig()   (lists every setting)"),
        ("imgcls-fast export --onnx --precision int8, then --runtime openvino",
         "ic.export(target='onnx', precision='int8'), then runtime='openvino'"),
        ("imgcls-fast export r --trt --set export.trt_refit=false", "ic.export('r', target='trt', overrides={'export.trt_refit': False})"),
        ("imgcls-fast predict RUN IMAGES...", "ic.predict(run, images)"),
        ("imgcls-fast predict photo.jpg -k 3", "ic.predict('photo.jpg', top_k=3)"),
        ("imgcls-fast bench r --runtime onnx --runtime torch -b 1 --duration 3s",
         "ic.benchmark('r', runtimes=['onnx', 'torch'], batches=[1], duration_s=3)"),
        ("imgcls-fast deploy render kserve runs/a", "ic.deploy('runs/a', kind='kserve')"),
        ("imgcls-fast data split d --split-ratio 0.8,0.2,0", "ic.split_data('d', split_ratio=(0.8, 0.2, 0))"),
        ("one of those that imgcls-fast models list 'vit_*' lists", "one of those that ic.list_models('vit_*') lists"),
        ("imgcls-fast export --help", "help(ic.export)"),
        ("--no-compile", "compile=False"),
    ],
)  # fmt: skip
def test_a_hint_becomes_the_call_that_does_the_same(hint: str, call: str) -> None:
    assert in_python(hint) == call
    assert in_python(call) == call


@pytest.mark.parametrize(
    "hint",
    ["pip install --force-reinstall --no-deps x", "trtexec --onnx=model.onnx --noTF32", "imgcls-fast train --dump-config > run.yaml",
     "imgcls-fast train $'a\\303' --resume", "imgcls-fast --help", "the model's own, or nothing", "", "--against before/"],
)  # fmt: skip
def test_what_has_no_counterpart_stays_as_it_is(hint: str) -> None:
    assert in_python(hint) == hint


def _hints() -> list[tuple[str, str]]:
    """(file, text) of every hint that is written as a text or a formatted text; what is filled in is X1."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "try_":
                for part in ast.walk(node.value):
                    if isinstance(part, ast.JoinedStr):
                        found.append((path.name, "".join(p.value if isinstance(p, ast.Constant) else "X1" for p in part.values)))
                    elif isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                        found.append((path.name, part.value))
    return found


def test_no_hint_of_the_library_shows_flags_or_commands_in_python() -> None:
    """Formatted texts are taken apart by the syntax tree too: fragments with a lone flag are hints as well."""
    stays = ("--dump-config > ", "pytest benchmarks")
    hints = _hints()
    assert len(hints) > 60
    left = [(name, in_python(hint)) for name, hint in hints if not any(word in hint for word in stays)]
    assert not [pair for pair in left if re.search(r"(?<!\S)--[a-z]|imgcls-fast (?!\[)", pair[1])]


def test_every_call_is_one_that_exists_with_these_keywords() -> None:
    """The examples of the help, which cover every verb that has a function."""
    settings = setting_flags()
    seen = set()
    for verb in VERBS:
        for example in verb.examples:
            call = in_python(f"imgcls-fast {example}")
            if call.startswith("imgcls-fast"):
                continue
            made: Any = ast.parse(call).body[0]
            function = getattr(ic, made.value.func.attr)
            known = inspect.signature(function).parameters
            for keyword in made.value.keywords:
                assert keyword.arg in known or keyword.arg in settings or keyword.arg == "images", (call, keyword.arg)
            seen.add(verb.name)
    assert {"train", "eval", "predict", "export", "verify", "bench", "data check", "data split", "models list"} <= seen


def test_the_command_line_prints_commands_and_python_raises_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ic.train(str(tmp_path), opt="adamm")
    assert "  try:   opt='adamw'" in str(caught.value) and "--" not in str(caught.value)
    assert caught.value.try_ == "--opt adamw"
    assert main(["train", str(tmp_path), "--opt", "adamm"]) == 2
    assert "--opt adamw" in capsys.readouterr().err
    assert worded("--lr 1") == "lr=1"  # the command line leaves it as it was
    with for_a_shell():
        assert worded("--lr 1") == "--lr 1"


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: ic.train("no-such-folder"), ""),
        (lambda: ic.predict("no-such-run", [b"no image"]), "ic.list_runs()"),
        (lambda: ic.train(None, model="vit_tiny"), "model='vit_tiny_patch16_224'   (or one of the"),
        (lambda: ic.train(None, epochs=0), ""),
        (lambda: ic.train(None, learning_rate=1), "lr=1"),
        (lambda: ic.train(None, sets=["train.epoch=3"]), "where: overrides={'train.epoch': 3}"),
        (lambda: ic.train(None, sets=["train.epochs"]), "overrides={'train.epochs': 30}"),
        (lambda: ic.export("no-such-run"), "ic.list_runs()"),
    ],
    ids=["data", "run", "model", "range", "keyword", "setting", "written", "export"],
)  # fmt: skip
def test_what_python_functions_often_raise_has_hints_in_pythons_form(
    call: Any, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path))
    with pytest.raises(ic.ImgclsError) as caught:
        call()
    text = str(caught.value)
    assert hint in text and not re.search(r"(?<!\S)--[a-z]|imgcls-fast ", text)


def test_a_hint_with_a_path_of_several_words_stays_one_argument() -> None:
    error = DataError("D001", "x", try_="imgcls-fast data check '/my photos/it is'")
    assert "ic.check_data('/my photos/it is')" in str(error)


@pytest.mark.parametrize("hint", ["imgcls-fast train data\\", "--set data.source=D:\\photos\\", "--out $'a\\012b'"])
def test_a_hint_that_is_no_command_line_is_shown_as_it_is(hint: str) -> None:
    assert worded(hint) == hint
    assert hint in str(UsageError("U001", "wrong", try_=hint))


def test_a_command_without_its_things_becomes_a_call_without_arguments() -> None:
    assert worded("imgcls-fast predict") == "ic.predict()"


def test_a_misspelt_name_among_many_thousand_is_compared_with_those_that_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    import difflib

    compared: list[int] = []
    whole = difflib.get_close_matches

    def close(word: str, known: list[str], **options: Any) -> list[str]:
        compared.append(len(known))
        return whole(word, known, **options)

    monkeypatch.setattr(difflib, "get_close_matches", close)
    names = [f"img_{k:05}.jpg" for k in range(20_000)]
    assert near("img_12345.jpeg", names) == "img_12345.jpg"
    assert near("IMG_12345.JPG", names) == "img_12345.jpg"
    near("zebra", names)
    assert len(compared) == 3 and max(compared) <= 3_000
