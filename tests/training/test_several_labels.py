"""Training on labels of every kind: several tasks with missing answers, several classes per image, probabilities."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import flatten
from imgcls_fast.training import session
from imgcls_fast.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("no_judging")
Configure = Callable[..., Any]


def table(path: Path, images: Path, head: Iterable[str], answers: Callable[[str], Iterable[str]]) -> Path:
    """A label file of the tiny images; `answers` gets the true class of each."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "split", *head])
        for image in sorted(images.rglob("*.jpg")):
            out.writerow([image, image.parts[-3], *answers(image.parts[-2])])
    return path


@pytest.fixture
def two_tasks(tiny_data: Path, tmp_path: Path) -> Path:
    """One class of `color`, any of `marks`; a fifth of the answers is missing."""
    draw = random.Random(0)

    def answers(truth: str) -> tuple[str, str]:
        marks = "|".join(name for name in "xyz" if draw.random() < 0.5) if draw.random() > 0.2 else ""
        return truth if not marks or draw.random() > 0.2 else "", marks

    return table(tmp_path / "two.csv", tiny_data, ("color", "marks"), answers)


TWO = {"data.label_col": "color,marks", "loss.class_weights": "auto", "train.monitor": "val/macro_ap"}


def test_two_tasks_with_missing_answers_train_and_record_means_over_tasks(two_tasks: Path, configure: Configure) -> None:
    heard: list[dict[str, Any]] = []
    run = session.start(configure(TWO, data=two_tasks), [heard.append])
    assert [task.kind for task in run.manifest.labels.tasks] == ["one_of", "any_of"]
    best = max(run.epochs, key=lambda epoch: (epoch["val_macro_ap"], -epoch["val_loss"]))
    assert best["best"]
    assert all(0 < epoch["train_loss"] < 2 for epoch in run.epochs)
    assert [event["monitor"] for event in heard if event["event"] == "epoch"] == ["val/macro_ap"] * 2


def test_a_stopped_run_of_two_tasks_goes_on_with_the_same_bits(
    two_tasks: Path, configure: Configure, stop_at: Any, same_result: Any
) -> None:
    from imgcls_fast.core.errors import Interrupted

    asked = TWO | {"train.micro_batch": 3}
    straight = session.start(configure(asked, data=two_tasks))
    stop_at(3)
    config = configure(asked, data=two_tasks)
    with pytest.raises(Interrupted):
        session.start(config)
    broken = Run(Path(config.out))
    assert read_checkpoint(broken.checkpoints / "last").tensors["sum.weight"].shape == (2,)
    session.resume(broken, {})
    same_result(straight, broken)


def test_probabilities_of_0_and_1_train_to_the_bits_of_plain_labels(
    tiny_data: Path, tmp_path: Path, configure: Configure
) -> None:
    plain = table(tmp_path / "plain.csv", tiny_data, ("label",), lambda truth: [truth])
    soft = table(
        tmp_path / "soft.csv", tiny_data, "abc", lambda truth: [f"{float(name == truth)}" for name in "abc"]
    )
    one, other = (
        read_checkpoint(session.start(configure(changes, data=data)).checkpoints / "last").tensors
        for changes, data in (({}, plain), ({"data.label_cols": "a,b,c"}, soft))
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.training import checkpoint, session
from imgcls_fast.training.step import Step

session._finish = lambda stage, baseline: None
settings = json.loads(sys.argv[1])
take, rotate = Step.take, checkpoint._rotate

def part(number, where):  # a process of its own that SIGKILL ends in the middle of a step, or of the save after it
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    def step(self, batch, at):
        return die() if where == "step" and at == number else take(self, batch, at)
    def save(temporary, folder):
        state = json.loads((temporary / checkpoint.STATE).read_text())
        return die() if where == "save" and state["progress"]["step"] == number else rotate(temporary, folder)
    Step.take, checkpoint._rotate = step, save
    run = Run(Path(settings["out"]))
    if (run.directory / "manifest.npz").exists():
        session.resume(run, {})
    else:
        session.start(build_config(settings))

ends = []
for number, where in json.loads(sys.argv[2]):
    child = os.fork()
    if not child:
        part(number, where)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_six_kills_of_a_run_of_two_tasks_change_no_bit(
    two_tasks: Path, configure: Configure, same_result: Any
) -> None:
    straight = session.start(configure(TWO, data=two_tasks))
    config = configure({**TWO, "train.save_every": 0.0}, data=two_tasks)
    places = [(1, "step"), (2, "save"), (4, "step"), (6, "save"), (7, "step"), (9, "save"), (-1, "never")]
    words = [sys.executable, "-c", KILLED, json.dumps(flatten(config)), json.dumps(places)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-9] * 6 + [0], done.stderr
    same_result(straight, Run(Path(config.out)))
