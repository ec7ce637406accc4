"""benchmarks/new_user.py and scripts/make_readme.py: what they expect is checkable, and finds what is wrong."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(place: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(place).stem, ROOT / place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hour() -> ModuleType:
    return load("benchmarks/new_user.py")


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return load("scripts/make_readme.py")


def test_every_point_of_the_first_hour_has_a_step_with_an_expectation(hour):
    steps = hour.read_steps()
    assert {f"1.{k}" for k in range(1, 14)} <= {step.point for step in steps}
    for step in steps:
        assert not step.point or step.right or step.wrong, step.promise
        assert all(re.compile(line) for line in (*step.right, *step.wrong))
    assert 10 <= sum(step.short for step in steps) <= 40


def test_a_missing_line_a_forbidden_line_and_another_exit_code_break_a_step(hour):
    step = hour.Step("1.1", "p", "true", right=("^a",), wrong=("b$",), code=0)
    assert hour.judged(step, "x\na line\n", 0) == ()
    assert hour.judged(step, "no a\nbb\n", 1) == ("missing: ^a", "must not be there: b$", "exit code 1 instead of 0")
    assert hour.judged(step, "a\nUserWarning: x\n", 0) and hour.judged(
        step, "a\ntry: pip install 'imgcls-fast[trt]'", 0
    )


def test_commands_run_one_after_the_other_and_the_transcript_marks_lines_and_hides_paths(hour, tmp_path):
    steps = [hour.Step("", "make", "echo $PHOTOS/x > f"), hour.Step("1.1", "shown", "cat f; exit 3", right=("x$",), code=3),
             hour.Step("1.2", "never", "echo no >&2", right=("yes",))]  # fmt: skip
    found = hour.run_steps(steps, tmp_path, {"PHOTOS": str(tmp_path / "photos")})
    assert [bool(outcome.broken) for outcome in found] == [False, False, True]
    text = hour.transcript(found, {str(tmp_path): "WORK"})
    assert "> WORK/photos/x" in text and str(tmp_path) not in text and "| 1.2 | never | **no**: missing: yes |" in text


def test_the_drawn_data_have_the_four_forms(hour, tmp_path):
    data = hour.drawn_data(tmp_path)
    assert sorted(data) == ["BLOOD", "PHOTOS", "SOLAR", "THREE"]
    assert len(list(Path(data["THREE"]).rglob("*.png"))) == 15 and "RBC|WBC" in Path(data["BLOOD"]).read_text("utf-8")


def test_the_samples_and_pictures_of_the_readme_are_there(readme):
    assert readme.check(readme.README.read_text("utf-8")) == []


def test_a_readme_without_a_block_a_line_or_a_picture_is_refused(readme):
    text = readme.README.read_text("utf-8")
    assert "README.md has no block PARETO" in readme.check(text.replace("<!-- /PARETO -->", ""))
    assert any("test:" in fault for fault in readme.check(text.replace("╭─", "+-")))
    assert readme.check(text + "![x](docs/images/none.png)") == ["docs/images/none.png is missing"]


def test_a_sample_keeps_the_first_and_the_last_epochs_and_replaces_the_block_alone(readme):
    output = "\n".join(
        [
            "  scanning, 0:10",
            "plan: x ",
            "  ep 1/9: 20 of 39  loss 2  eta 6:33",
            *(f"ep {k}/9  loss 1" for k in range(1, 10)),
            "end",
        ]
    )
    lines = readme.sample(output).splitlines()
    assert lines[2:4] == ["plan: x", "ep 1/9  loss 1"]  # without signs of life
    assert [line for line in lines if line.startswith(("ep", "..."))] == [
        *(f"ep {k}/9  loss 1" for k in (1, 2, 3, 4)), "...", "ep 8/9  loss 1", "ep 9/9  loss 1"
    ]  # fmt: skip
    text = "a\n<!-- X: by hand -->\nold\n<!-- /X -->\nb\n"
    assert readme.put(text, "X", "\\1 new\n") == "a\n<!-- X: by hand -->\n\\1 new\n<!-- /X -->\nb\n"


@pytest.mark.slow
def test_the_short_hour_keeps_its_promises(hour, tmp_path):
    found = hour.run_steps(
        [step for step in hour.read_steps() if step.short], tmp_path, hour.drawn_data(tmp_path), limit_s=300
    )
    assert not [(outcome.step.point, outcome.step.promise, outcome.broken) for outcome in found if outcome.broken]
