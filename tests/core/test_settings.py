"""One configuration from presets, files, flags and `--set`, or one error that says what, where and what to do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from imgcls_fast.core import other_names
from imgcls_fast.core.config import RunConfig, describe, free_settings, setting_names
from imgcls_fast.core.config_verbs import ExportConfig
from imgcls_fast.core.errors import ConfigError
from imgcls_fast.core.options import FLAGS
from imgcls_fast.core.schema import parse_seconds
from imgcls_fast.core.settings import build_config, flatten, preset_names, replace_settings, save_config, to_yaml
from imgcls_fast.core.verbs import VERBS


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def refusal(*args: Any, **kwargs: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build_config(*args, **kwargs)
    return caught.value


# ---- who wins ----


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    """preset < file < flags < --set: each sets one value more than the layer above it leaves alone."""
    preset = yaml.safe_load((Path(__import__("imgcls_fast").__file__).parent / "presets" / "fast.yaml").read_text())
    file = written(tmp_path, "train:\n  epochs: 41\n  seed: 41\n  batch_size: 41\n")
    flags = {"train.seed": 42, "train.batch_size": 42}
    config = build_config(flags, preset="fast", file=file, sets=["train.batch_size=43"])
    assert config.pixels.size == preset["pixels"]["size"]
    assert preset["train"]["epochs"] != 41
    assert (config.train.epochs, config.train.seed, config.train.batch_size) == (41, 42, 43)


def test_of_two_sets_the_last_wins() -> None:
    assert build_config(sets=["train.seed=1", "train.seed=2"]).train.seed == 2


def test_a_layer_does_not_reset_the_rest_of_its_section(tmp_path: Path) -> None:
    config = build_config(
        {"train.seed": 3}, file=written(tmp_path, "train: {epochs: 5}\noptim:\n"), sets=["train.patience=2"]
    )
    assert (config.train.seed, config.train.epochs, config.train.patience) == (3, 5, 2)


def test_nothing_given_is_the_default() -> None:
    assert build_config() == RunConfig() == build_config({}, sets=())


# ---- mistyped names ----


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.epoch", "train.epochs"),
        ("trian.epochs", "train.epochs"),
        ("epochs", "train.epochs"),
        ("optim.learning_rate", ""),
        ("Train.Seed", "train.seed"),
        ("loss.class_weight", "loss.class_weights"),
        ("model.lr", "optim.lr"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(name: str, meant: str) -> None:
    for error in (refusal(sets=[f"{name}=3"]), refusal({name: 3})):
        assert error.code == "C001"
        assert name in error.message
        assert meant in error.try_
        assert error.try_


def test_a_mistyped_section_is_refused_with_its_line_and_the_nearest_section(tmp_path: Path) -> None:
    error = refusal(file=written(tmp_path, "data:\n  verify: full\ntrian:\n  epochs: 3\n"))
    assert (error.code, error.message, error.try_) == ("C001", "unknown section trian", "rename it to train")
    assert error.where.endswith("run.yaml, line 3")


def test_a_word_like_nothing_points_to_the_list_of_settings() -> None:
    assert "--dump-config" in refusal(sets=["zzz.qqq=1"]).try_


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    error = refusal(preset="smal-data")
    assert (error.code, error.try_) == ("C003", "--preset small-data")
    assert all(name in error.message for name in preset_names())


# ---- files ----


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("# a comment\n\ntrain:\n  seed: 1\n  # more\n\n  epochs: -3\n", "C003", 7),
        ("train:\n  seed: 1\n  epoch: 3\n", "C001", 3),
        ("optim:\n  lr: fast\n", "C003", 2),
        ("data:\n  max_bad: {}\n", "C002", 2),
        ("train:\n  seed: 1\n\n  seed: 2\n", "C005", 4),
        ("data: 3\n", "C002", 1),
        ("out: [1, 2]\n", "C002", 1),
        ("train:\n  seed: &a 1\n", "C005", 2),
        ("train:\n  seed: 1\n  epochs: *a\n", "C005", 3),
        ("train:\n  seed: !!python/object/apply:os.getcwd []\n", "C005", 2),
        ("train: !!python/object:os.system {}\n", "C005", 1),
        ("train:\n  seed: 1\n bad\n", "C005", 3),
        ("train: {}\n---\ntrain: {}\n", "C005", 2),
        ("? [1, 2]\n: 3\n", "C005", 1),
    ],
)
def test_an_error_in_a_file_names_the_file_and_the_line(tmp_path: Path, text: str, code: str, line: int) -> None:
    error = refusal(file=written(tmp_path, text))
    assert error.code == code, error
    assert error.where.startswith(f"{tmp_path / 'run.yaml'}, line {line}"), error


@pytest.mark.parametrize(
    "text",
    [
        "- 1\n- 2\n",
        "hello\n",
        "3\n",
        "[" * 1500,
        "data:\n  source: 2001-99-99\n",
        "train:\n  seed: 0x_\n",
        "a: \0",
        "{",
        "\t- x: [",
    ],
    ids=["list", "text", "number", "nesting", "date", "hex", "nul", "open", "tab"],
)
def test_a_file_that_is_no_mapping_or_no_yaml_is_one_clear_error(tmp_path: Path, text: str) -> None:
    error = refusal(file=written(tmp_path, text))
    assert error.code == "C005"
    assert "run.yaml" in error.message


def test_tags_never_construct_objects(tmp_path: Path) -> None:
    mark = tmp_path / "made"
    refusal(
        file=written(
            tmp_path, f"out: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]\n"
        )
    )
    assert not mark.exists()


def test_a_bomb_of_aliases_is_refused_before_it_grows(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))]
    assert "anchors" in refusal(file=written(tmp_path, "\n".join(lines))).message


@pytest.mark.parametrize("kind", ["missing", "folder", "latin"])
def test_a_file_that_cannot_be_read_is_c005(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "latin":
        path.write_bytes(b"out: \xff\xfe")
    error = refusal(file=path)
    assert error.code == "C005"
    assert str(path) in error.message


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "---\n"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert build_config(file=written(tmp_path, text)) == RunConfig()


# ---- --set ----


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("train.epochs=30", "train.epochs", 30),
        ("train.epochs = 30", "", None),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=auto", "optim.lr", "auto"),
        ("optim.clip=null", "optim.clip", None),
        ("optim.clip=", "optim.clip", None),
        ("train.compile=true", "train.compile", True),
        ("train.baseline=no", "train.baseline", False),
        ("data.split=[0.7, 0.2, 0.1]", "data.split", (0.7, 0.2, 0.1)),
        ("data.split=.7,.2,.1", "data.split", (0.7, 0.2, 0.1)),
        ("data.group_by=P_(\\d+)=x", "data.group_by", "P_(\\d+)=x"),
        ("model.args={width: 8}", "model.args", {"width": 8}),
        ("data.source=2001-99-99", "data.source", "2001-99-99"),
        ("data.group_by=[a-z", "data.group_by", "[a-z"),
        ("out=runs/x", "out", "runs/x"),
        ("train.save_every=10m", "train.save_every", 600.0),
        ("pixels.mean=.5,.4,.3", "pixels.mean", (0.5, 0.4, 0.3)),
    ],
)
def test_set_reads_its_value_as_yaml(text: str, name: str, value: Any) -> None:
    config = build_config(sets=[text])
    if name:
        section, _, key = name.partition(".")
        found = getattr(config, section)
        assert (getattr(found, key) if key else found) == value
    else:
        assert config.train.epochs == 30  # blanks around the equals sign are no part of the name


@pytest.mark.parametrize("text", ["train.epochs", "=3", "", " =3"])
def test_set_without_name_and_value_shows_how(text: str) -> None:
    error = refusal(sets=[text])
    assert (error.code, error.try_) == ("C002", "--set train.epochs=30")


def test_an_error_of_set_shows_the_whole_word() -> None:
    assert refusal({"train.seed": 1}, sets=["train.epochs=-1"]).where == "--set train.epochs=-1"


# ---- values ----


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("2h", 7200), ("90", 90), ("90s", 90), ("1.5h", 5400), (" 3 M ", 180), (45, 45), (0, 0)],
)
def test_durations_are_seconds(text: Any, seconds: float) -> None:
    assert build_config({"train.save_every": text}).train.save_every == seconds


@pytest.mark.parametrize("text", ["soon", "10x", "m", "", "-5m", "infh", "nan", [1]])
def test_other_durations_are_refused_by_name(text: Any) -> None:
    error = refusal({"train.save_every": text})
    assert error.code in ("C002", "C003")
    assert "train.save_every" in error.message


def test_parse_seconds_leaves_what_it_does_not_know() -> None:
    assert parse_seconds("soon") == "soon"
    assert parse_seconds(None) is None


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("cat=1,dog=2.5", {"cat": 1.0, "dog": 2.5}),
        (" cat = 1 , dog = 2.5 ", {"cat": 1.0, "dog": 2.5}),
        ("1,2.5", (1.0, 2.5)),
        ([1, 2.5], (1.0, 2.5)),
        ({"cat": 1}, {"cat": 1.0}),
        ({0: 1, 1: 2}, {"0": 1.0, "1": 2.0}),
        ("auto", "auto"),
        ("effective", "effective"),
        ("none", "none"),
    ],
)
def test_class_weights_are_a_rule_a_table_or_one_number_a_class(value: Any, found: Any) -> None:
    assert build_config({"loss.class_weights": value}).loss.class_weights == found


@pytest.mark.parametrize(
    "value", ["cat=-1", "1,-2", "cat=0", "0,1", "cat=x", "yes", "3", "cat=", [1, math.inf], "nan,1", {"a": -1.0}]
)
def test_class_weights_that_are_not_positive_numbers_are_refused(value: Any) -> None:
    error = refusal({"loss.class_weights": value})
    assert error.code in ("C002", "C003")
    assert error.message.startswith("loss.class_weights must be")


@pytest.mark.parametrize("value", [".8,.1,.2", [0.5, 0.2, 0.2], (1, 1, 1), [0.8, 0.1, 0.1001]])
def test_a_split_that_does_not_sum_to_one_is_c003_with_its_sum(value: Any) -> None:
    error = refusal({"data.split": value})
    total = sum(float(x) for x in (value.split(",") if isinstance(value, str) else value))
    assert error.code == "C003"
    assert error.message == f"data.split must sum to 1, got {total:g}"


@pytest.mark.parametrize("value", [".8,.2", "0.8", [1.2, -0.1, -0.1], [0.25] * 4, "a,b,c", [math.nan, 0.5, 0.5]])
def test_a_split_that_is_not_three_fractions_is_refused(value: Any) -> None:
    error = refusal({"data.split": value})
    assert error.code in ("C002", "C003")
    assert "data.split must be" in error.message
    assert "Field required" not in error.message


@pytest.mark.parametrize("value", ["0.8,0.1,0.1", (0.8, 0.2, 0), [1, 0, 0], (1 / 3, 1 / 3, 1 / 3)])
def test_a_split_may_leave_parts_empty(value: Any) -> None:
    assert sum(build_config({"data.split": value}).data.split) == pytest.approx(1)


def test_accum_and_micro_batch_contradict_each_other(tmp_path: Path) -> None:
    error = refusal({"train.accum": 2, "train.micro_batch": 4})
    assert error.code == "C004"
    assert "train.accum" in error.message
    assert "train.micro_batch" in error.message
    assert refusal({"train.accum": 2}, file=written(tmp_path, "train:\n  micro_batch: 4\n")).where.endswith(
        "run.yaml, line 2"
    )
    assert build_config({"train.accum": 2, "train.micro_batch": "auto"}).train.accum == 2


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("optim.lr", 0, "C003"), ("optim.lr", math.inf, "C003"), ("optim.lr", "nan", "C003"), ("train.epochs", 0, "C003"),
        ("train.epochs", 2.5, "C003"), ("pixels.size", 4, "C003"), ("pixels.size", 99999, "C003"), ("augment.hue", 0.6, "C003"),
        ("train.seed", -1, "C003"), ("train.seed", "x", "C002"), ("export.opset", 17, "C003"), ("augment.policy", "strong", "C003"),
        ("optim.ema", 1, "C003"), ("train.deterministic", "maybe", "C002"), ("model.arch", None, "C002"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_c003_and_a_wrong_type_c002(name: str, value: Any, code: str) -> None:
    error = refusal({name: value})
    assert error.code == code, error
    assert error.message.startswith(f"{name} must be ")
    assert repr(value) in error.message


def test_several_wrong_settings_are_all_told_in_full(tmp_path: Path) -> None:
    lines = str(refusal({"train.epochs": 0, "optim.lr": -1, "train.seed": -2})).splitlines()
    for text in ("train.epochs must be", "got 0", "optim.lr must be", "got -1", "train.seed must be", "got -2"):
        assert any(text in line for line in lines[1:4])
    path = tmp_path / "run.yaml"
    path.write_text(
        "trian:\n  epochs: 3\nlearning_rate: 0.1\ntrain:\n  epochs: -1\n  batchsize: 3\noptim: 3\nloss: {label_smoothing: 2}\n"
    )
    error = refusal(file=path)
    told = [(line.split(": ")[0].rpartition(" ")[2], line) for line in error.details]
    assert [number for number, _ in told] == ["1", "3", "5", "6", "7", "8"]
    for part, (_, line) in zip(
        ("rename it to train", "lr: in the section optim:", "got -1", "batch_size: in", "must be a section", "got 2"),
        told,
        strict=True,
    ):
        assert part in line


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rate", "optim.lr"), ("lr0", "optim.lr"), ("optim.learning_rate", "optim.lr"), ("imgsz", "pixels.size"),
        ("train.batch", "train.batch_size"), ("num_workers", "train.workers"), ("wd", "optim.weight_decay"),
        ("dropout", "model.drop_rate"), ("smoothing", "loss.label_smoothing"), ("momentum", "optim.momentum"),
    ],
)  # fmt: skip
def test_the_name_of_another_tool_is_answered_with_ours_and_its_value(name: str, meant: str) -> None:
    assert refusal(sets=[f"{name}=3"]).try_ == f"--set {meant}=3"


def test_the_names_of_other_tools_lead_to_settings_that_exist() -> None:
    assert set(other_names._SETTINGS) <= set(setting_names())
    flagged = {flag.setting for flag in FLAGS}
    own = [n for n in setting_names() if n.split(".")[0] != "export" and n not in flagged]
    assert all(n in own for n in other_names._OWN.split())
    verbs = {verb.name for verb in VERBS} | {"--help", "--version"}
    assert {ours for ours in other_names.VERBS_ELSEWHERE if ours.split()[0] != "runs"} <= verbs


# ---- the schema ----


def test_every_setting_has_a_description_that_fits_one_line() -> None:
    for name in setting_names():
        assert describe(name), name
        assert len(describe(name)) < 100, name
        assert "\n" not in describe(name), name


def test_free_settings_are_exactly_those_that_do_not_shape_the_weights() -> None:
    assert free_settings() == {
        "out", "data.max_bad", "train.workers", "train.baseline", "train.save_every", "train.log_every",
        "evaluate.top_k", "evaluate.bootstrap",
        "evaluate.batch_size", "evaluate.calibrate", "train.track", *(f"export.{name}" for name in ExportConfig.model_fields),
    }  # fmt: skip


def test_the_configuration_and_its_sections_are_frozen() -> None:
    config = build_config()
    with pytest.raises(ValidationError):
        config.out = "x"  # type: ignore[misc]
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        if isinstance(section, BaseModel):
            with pytest.raises(ValidationError):
                setattr(section, next(iter(type(section).model_fields)), "x")


def test_default_values_obey_their_own_rules() -> None:
    assert build_config(flatten(RunConfig())) == RunConfig()


def test_names_of_settings_are_listed_once() -> None:
    assert len(set(setting_names())) == len(setting_names()) == len(flatten(RunConfig()))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_changes_something(name: str) -> None:
    assert build_config(preset=name) != RunConfig()


def test_the_four_presets_ship() -> None:
    assert preset_names() == ["accurate", "fast", "medical", "small-data"]


# ---- there and back ----


def resolved() -> RunConfig:
    """No "auto" is left where a number can stand."""
    numbers = {"pixels.interpolation": "bicubic", "augment.scale": (0.3, 1), "augment.ratio": (0.75, 4 / 3), "train.compile": False,
               "pixels.mean": (0.485, 0.456, 0.406), "pixels.std": (0.229, 0.224, 0.225), "optim.lr": 1e-5, "pixels.size": 224,
               "pixels.bits": 12}  # fmt: skip
    changes: dict[str, Any] = {}
    for name, value in flatten(RunConfig()).items():
        section, _, key = name.partition(".")
        if value == "auto" and key and name != "model.init":
            literal = [
                x
                for x in get_args(type(getattr(RunConfig(), section)).model_fields[key].annotation)
                if isinstance(x, str)
            ]
            changes[name] = numbers.get(
                name, literal[-1] if literal else "x" if name == "model.arch" else 0.25 if section != "train" else 3
            )
    changes |= {"optim.warmup": 2.5, "evaluate.batch_size": 64}
    return build_config(changes)


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        resolved(),
        *(build_config(preset=name) for name in preset_names()),
        build_config({"loss.class_weights": {"yes": 1, "null": 2, "1": 3, "naïve: #x": 4, " ": 5, "a\nb": 6}}),
        build_config(
            {
                "data.source": "2001-01-01",
                "data.group_by": "P_(\\d+): *",
                "out": "~",
                "model.args": {"a": "1e3", "b": True},
            }
        ),
        build_config({"optim.lr": 1 / 3, "optim.min_lr": 1e-12, "optim.clip": 1e300}),
    ],
    ids=lambda _: "",
)
def test_yaml_reads_back_to_an_equal_configuration(tmp_path: Path, config: RunConfig) -> None:
    save_config(config, tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text("utf-8") == to_yaml(config)
    assert build_config(file=tmp_path / "run.yaml") == config


def test_the_resolved_configuration_of_these_tests_has_no_auto_left() -> None:
    assert [name for name, value in flatten(resolved()).items() if value == "auto"] == ["model.init"]


def test_replace_settings_checks_again_and_leaves_the_original() -> None:
    config = build_config({"train.seed": 5})
    assert replace_settings(config, {"train.epochs": 9}) == build_config({"train.seed": 5, "train.epochs": 9})
    assert config.train.epochs == "auto"
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        replace_settings(config, {"train.epochs": 0})
