"""The table of flags agrees with the schema, and the options of the old program still mean what they said."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from imgcls_fast.cli.app import main, parse
from imgcls_fast.cli.old import OLD_NAMES
from imgcls_fast.core.config import RunConfig, describe, flag_rows, setting_names
from imgcls_fast.core.errors import ConfigError, ImgclsError, UsageError
from imgcls_fast.core.flags import overrides, python_overrides
from imgcls_fast.core.options import FLAGS, LATER_FLAGS, flags_of, setting_flags
from imgcls_fast.core.settings import build_config, preset_names
from imgcls_fast.core.verbs import LATER_VERBS, VERBS, Flag


def field_of(name: str) -> Any:
    section, _, key = name.partition(".")
    field = RunConfig.model_fields[section]
    return field.annotation.model_fields[key] if key else field  # type: ignore[union-attr]


def literals(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(literals(part) for part in get_args(annotation)))


def settings(*words: str) -> dict[str, Any]:
    """The settings that `train` reads from a command line."""
    request, _ = parse(["train", *words])
    return overrides(request.options, flags_of("train"))


# ---- the table ----


def test_every_flag_writes_a_setting_of_the_schema() -> None:
    assert {flag.setting for flag in FLAGS if flag.setting} <= set(setting_names())


def test_flags_of_settings_are_those_that_the_schema_declares() -> None:
    declared = [Flag(**row) for row in flag_rows()]
    assert sorted(flag for flag in FLAGS if flag.setting) == sorted(declared), "run python scripts/make_docs.py"
    for flag in declared:
        assert flag.help.startswith(describe(str(flag.setting))), flag.long


def test_no_setting_has_two_flags() -> None:
    named = [flag.setting for flag in FLAGS if flag.setting]
    assert len(named) == len(set(named))


def test_choices_of_a_flag_are_exactly_the_literals_of_the_schema() -> None:
    for flag in FLAGS:
        if flag.setting and flag.choices:
            table = dict(flag.values)
            assert {table.get(choice, choice) for choice in flag.choices} == literals(
                field_of(flag.setting).annotation
            ), flag.long


def test_a_setting_that_is_only_words_has_a_flag_that_lists_them() -> None:
    for flag in FLAGS:
        if flag.setting and get_origin(field_of(flag.setting).annotation) is Literal:
            assert flag.choices, flag.long


def test_values_of_a_flag_are_legal_settings() -> None:
    for flag in FLAGS:
        for text, value in flag.values:
            assert flag.setting
            assert build_config(overrides({flag.keyword: text}, [flag])) == build_config({flag.setting: value})


def test_no_verb_has_two_flags_of_one_name() -> None:
    for verb in VERBS:
        names = [name for flag in flags_of(verb.name) for name in flag.all_names]
        assert len(names) == len(set(names)), verb.name
        keywords = [flag.keyword for flag in flags_of(verb.name)]
        assert len(keywords) == len(set(keywords)), verb.name


def test_every_flag_belongs_to_known_verbs_and_says_what_it_does() -> None:
    for flag in FLAGS:
        assert set(flag.verbs) <= {verb.name for verb in VERBS}, flag.long
        assert flag.help, flag.long
        assert "\n" not in flag.help, flag.long


def test_what_is_announced_for_later_is_not_there_now() -> None:
    assert not set(LATER_VERBS) & {verb.name for verb in VERBS}
    assert not set(LATER_FLAGS) & {name for flag in FLAGS for name in flag.all_names}


def test_the_help_of_preset_lists_what_ships() -> None:
    text = next(flag.help for flag in FLAGS if flag.long == "--preset")
    assert text.endswith(", ".join(preset_names()))


def test_a_bool_flag_has_its_opposite() -> None:
    assert settings("--compile", "--no-near-duplicates") == {"train.compile": True, "data.near_duplicates": False}
    assert settings("--no-compile") == {"train.compile": False}


def test_every_verb_names_a_function_that_exists() -> None:
    from importlib import import_module

    for verb in VERBS:
        module, function = verb.handler.split(":")
        assert callable(getattr(import_module(f"imgcls_fast.cli.{module}"), function)), verb.name


# ---- command line and Python ----


def test_python_keywords_are_the_names_of_the_flags() -> None:
    given = {"model": "resnet50", "epochs": 3, "batch_size": 16, "img_size": 224, "lr": 0.1, "opt": "sgd", "class_weights": [1, 2],
             "split_ratio": (0.7, 0.2, 0.1), "channels": 1, "patience": None, "accum": 2, "compile": False}  # fmt: skip
    changes = python_overrides(given)
    assert changes == {
        "model.arch": "resnet50", "train.epochs": 3, "train.batch_size": 16, "pixels.size": 224, "optim.lr": 0.1, "optim.opt": "sgd",
        "loss.class_weights": [1, 2], "data.split": (0.7, 0.2, 0.1), "pixels.color": "gray", "train.patience": None, "train.accum": 2,
        "train.compile": False,
    }  # fmt: skip
    assert build_config(changes).pixels.color == "gray"


def test_python_and_command_line_make_the_same_configuration() -> None:
    words = ["-m", "resnet18", "-e3", "-b", "8", "--img-size=64", "--lr", "1e-3", "--split-ratio", ".7,.2,.1", "--channels", "4",
             "--patience", "none", "--clip", "1", "--save-every", "10m", "--class-weights", "cat=1,dog=2"]  # fmt: skip
    keywords = {"model": "resnet18", "epochs": 3, "batch_size": 8, "img_size": 64, "lr": 1e-3, "split_ratio": [0.7, 0.2, 0.1],
                "channels": 4, "patience": None, "clip": 1, "save_every": "10m", "class_weights": {"cat": 1, "dog": 2}}  # fmt: skip
    assert build_config(settings(*words)) == build_config(python_overrides(keywords))


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [("epoch", "epochs"), ("batchsize", "batch_size"), ("image_size", "img_size"), ("modle", "model")],
)
def test_an_unknown_keyword_is_c001_with_the_nearest_one(keyword: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        python_overrides({keyword: 3})
    assert caught.value.code == "C001"
    assert caught.value.try_ == f"{meant}=3"


def test_two_names_of_one_setting_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        python_overrides({"batch_size": 8, "effective_batch": 16})
    assert caught.value.code == "C004"


def test_a_word_outside_the_choices_is_refused_with_the_nearest_one() -> None:
    for call in (lambda: settings("--opt", "adam"), lambda: python_overrides({"opt": "adam"})):
        with pytest.raises(ConfigError) as caught:
            call()
        assert (caught.value.code, caught.value.try_) == ("C003", "--opt adamw")
        assert "optim.opt must be one of 'auto', 'sgd', 'adamw'" in caught.value.message


def test_every_setting_flag_can_be_asked_for_in_python() -> None:
    for keyword, flag in setting_flags().items():
        assert keyword.isidentifier(), flag.long


# ---- the old program ----

OLD: list[tuple[list[str], dict[str, Any]]] = [
    (["--learning_rate", "0.01"], {"optim.lr": "0.01"}),
    (["--learning_rate=0.01"], {"optim.lr": "0.01"}),
    (["--model_name", "resnet18"], {"model.arch": "resnet18"}),
    (["--image_size", "96"], {"pixels.size": "96"}),
    (["--batch_size", "7"], {"train.batch_size": "7"}),
    (["--split_ratio", "0.7,0.2,0.1"], {"data.split": ["0.7", "0.2", "0.1"]}),
    (["--loss_weights", "1,2.5"], {"loss.class_weights": "1,2.5"}),
    (["--loss_weights", "[1, 2.5]"], {"loss.class_weights": "1,2.5"}),
    (["--loss_weights", "True"], {"loss.class_weights": "auto"}),
    (["--loss_weights", "False"], {"loss.class_weights": "none"}),
    (["--early_stopping", "5"], {"train.patience": "5"}),
    (["--early_stopping", "1"], {"train.patience": "1"}),
    (["--early_stopping", "False"], {"train.patience": None}),
    (["--early_stopping", "True"], {"train.patience": "10"}),
    (["--lr_scheduler", "StepLR"], {"optim.sched": "step"}),
    (["--lr_scheduler", "CosineAnnealingLR"], {"optim.sched": "cosine"}),
    (["--lr_scheduler", "reduce_lr_on_plateau"], {"optim.sched": "plateau"}),
    (["--lr_scheduler", "False"], {"optim.sched": "none"}),
    (["--aug", "True"], {"augment.policy": "light"}),
    (["--aug"], {"augment.policy": "light"}),
    (["--aug", "False"], {"augment.policy": "none"}),
    (["--aug=false"], {"augment.policy": "none"}),
    (["--aug", "0"], {"augment.policy": "none"}),
    (["--exp", "my try"], {"out": "runs/my-try"}),
    (["--cross_validation", "False"], {}),
    (["--cross_validation", "False", "--num_splits", "5"], {}),
    (["--save", "False"], {}),
    (["--save", "True"], {}),
    (["--train", "True"], {}),
    (["--eval", "False"], {}),
    (["--attention_name", "none", "--attention_index", "4"], {}),
    (["--attention_index", "4"], {}),
    (["--attention_name", "CBAM"], {"model.attention": ["CBAM@4"]}),
    (["--attention_name", "SE", "--attention_index", "2"], {"model.attention": ["SE@2"]}),
    (["--printing", "True"], {}),
    (["--overwrite", "False"], {}),
]


@pytest.mark.parametrize(("words", "found"), OLD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_an_old_option_means_what_it_said(
    words: list[str], found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMGCLS_RUNS", raising=False)
    assert settings(*words) == found
    build_config(found)


def test_every_old_option_is_tried_here() -> None:
    tried = {word.partition("=")[0] for words, _ in OLD for word in words if word.startswith("--")}
    assert set(OLD_NAMES) - tried == {"--root", "--dataset_name"}


def test_false_of_an_old_boolean_is_false() -> None:
    """The old program read these texts with `type=bool`, so that "False" was true (regression 10)."""
    assert build_config(settings("--aug", "False")).augment.policy == "none"
    assert build_config(settings("--aug", "True")).augment.policy != "none"
    request, notes = parse(["train", "photos", "--cross_validation", "False", "--save", "False", "--printing", "False"])
    assert request.things == ("photos",)
    assert request.get("quiet") is True
    assert any("--save False has no effect" in note for note in notes)
    with pytest.raises(UsageError, match="True or False"):
        parse(["train", "--aug", "maybe"])


def test_root_and_dataset_name_become_the_data() -> None:
    assert parse(["train", "--root", "data", "--dataset_name", "flowers", "-e", "3"])[0].things == ("data/flowers",)
    assert parse(["train", "--root", "data"])[0].things == ("data",)
    assert parse(["train", "--dataset_name=flowers"])[0].things == ("flowers",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cross_validation", "True"], "cross-validation"),
        (["--cross_validation", "True", "--num_splits", "5"], "cross-validation"),
        (["--num_splits", "5"], "cross-validation"),
        (["--train", "False"], "eval RUN"),
        (["--lr_scheduler", "ExponentialLR"], "optim.sched must be one of"),
    ],
)
def test_an_old_option_that_cannot_be_obeyed_says_so(words: list[str], said: str) -> None:
    with pytest.raises(ImgclsError) as caught:
        settings(*words)
    assert caught.value.exit_code == 2
    assert said in f"{caught.value} {caught.value.try_}"
    assert caught.value.try_


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["--learning_rate", "0.1"], "--lr"), (["--model_name", "resnet18"], "--model"), (["--image_size", "64"], "--img-size"),
        (["--batch_size", "8"], "--batch-size"), (["--aug", "False"], "--augment none"), (["--loss_weights", "1,2"], "--class-weights 1,2"),
        (["--early_stopping", "5"], "--patience 5"), (["--split_ratio", ".8,.1,.1"], "--split-ratio"), (["--exp", "x"], "--out"),
        (["--lr_scheduler", "StepLR"], "--sched step"), (["--attention_index", "3", "--attention_name", "eca"], "--attention eca@3"),
        (["--root", "a", "--dataset_name", "b"], "imgcls-fast train a/b"),
    ],
)  # fmt: skip
def test_the_new_name_is_shown_once_on_stderr(
    words: list[str], new: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", *words, *words, "--dump-config"]) == 0
    out, err = capsys.readouterr()
    assert "note:" not in out
    lines = [line for line in err.splitlines() if new in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("note: ")
    assert words[0] in lines[0]


def test_new_names_cause_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--lr", "0.1", "--dump-config"]) == 0
    assert capsys.readouterr().err == ""
