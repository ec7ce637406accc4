"""What one waits for before anything happens: cold processes, their files already in the page cache.

A call is a whole process, so the rounds of a duel start processes themselves. `imgcls-fast --help` beside an interpreter that
does nothing, which is the limit, and beside Hugging Face's command line. What takes seconds stands alone, without a rival in
pairs: the first answer about one photo, and what importing torch alone costs of that.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from duels import Contender, Contest, Disagree, Pair, Setup

CONTESTS = [Contest("startup", "command line", "command_lines")]
PYTHON = [sys.executable, "-W", "ignore"]
MODULE = [*PYTHON, "-m", "imgcls_fast"]


@pytest.mark.parametrize("contest", CONTESTS, ids=str)
def bench_startup(duel: Callable[[Contest], list[dict[str, Any]]], contest: Contest) -> None:
    first = duel(contest)[0]
    assert first["cases"] or first["slow"], first["absent"]


def command_lines(work: Path, device: str, full: bool = False) -> Setup:
    """Help and a typing mistake, from the shell to the exit code."""
    case = "cold process (promised: 300 ms for help and mistakes)"
    commands = {
        "imgcls-fast --help": ([*MODULE, "--help"], 0, "first steps"),
        "imgcls-fast trian (a typing mistake)": ([*MODULE, "trian"], 2, "imgcls-fast train"),
        "python -c pass": ([*PYTHON, "-c", "pass"], 0, ""),
        "import imgcls_fast": ([*PYTHON, "-c", "import imgcls_fast"], 0, ""),
    }

    def check(name: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
        code, text = outputs[name]
        _, wanted, said = commands[name]
        if code != wanted or said not in text:
            raise Disagree(f"{name} ended with {code} and said {text[-200:]!r}")
        return {"exit_code": code}

    rival = "python -c pass"
    return Setup(
        {name: partial(_open, case, command) for name, (command, _, _) in commands.items()},
        [Pair(name, rival) for name in commands if name != rival], check, clock="cpu",
    )  # fmt: skip


def _open(case: str, command: list[str]) -> Contender:
    done = subprocess.run(command, capture_output=True, text=True)
    return Contender(
        {case: partial(subprocess.run, command, capture_output=True)}, (done.returncode, done.stdout + done.stderr)
    )


ALONE = {"import torch": [*PYTHON, "-c", "import torch"]}


@pytest.mark.parametrize(
    "name", [*ALONE, "predict one photo", "predict one photo, ONNX Runtime", "torchvision by hand"]
)
def bench_cold_start(solo: Callable[..., None], trained: Path, name: str) -> None:
    """Processes that take seconds: three of each, of which the middle one counts; the first may fill the page cache."""
    photo = next((trained / "photos").iterdir())
    commands = ALONE | {
        "predict one photo": [*MODULE, "predict", str(trained / "run"), str(photo), "--json"],
        "predict one photo, ONNX Runtime": [
            *MODULE,
            "predict",
            str(trained / "run"),
            str(photo),
            "--json",
            "--runtime",
            "onnx",
        ],
        "torchvision by hand": [*PYTHON, "-c", BY_HAND, str(photo)],
    }

    def call() -> None:
        done = subprocess.run(commands[name], capture_output=True, text=True, cwd=trained)
        assert done.returncode == 0, done.stderr

    case = "import" if name in ALONE else "from a command line to the class of one photo"
    solo("startup", case, name, call, rounds=3)


BY_HAND = """
import sys, torch
from PIL import Image
from torchvision import models, transforms as t
model = models.resnet18(num_classes=10).eval()
look = t.Compose([t.Resize(32), t.CenterCrop(32), t.ToTensor(), t.Normalize((0.5,) * 3, (0.25,) * 3)])
with torch.inference_mode():
    print(int(model(look(Image.open(sys.argv[1]).convert("RGB"))[None]).softmax(1).argmax()))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on the embedded digits, its ONNX export, and a few photos."""
    from imgcls_fast.core.env import cache_dir
    from imgcls_fast.data.digits import write_digits

    folder = tmp_path_factory.mktemp("startup")
    photos = folder / "photos"
    photos.mkdir()
    for k, path in enumerate(sorted((write_digits(cache_dir()) / "test").rglob("*.png"))[:3]):
        (photos / f"{k}.png").write_bytes(path.read_bytes())
    for words in (
        ["train", "-e", "1", "-o", str(folder / "run"), "--set", "train.baseline=false"],
        ["export", str(folder / "run"), "--onnx"],
    ):
        done = subprocess.run([*MODULE, *words, "--quiet"], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder
