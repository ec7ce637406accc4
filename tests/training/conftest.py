"""A tiny data set, tiny settings, and ways to stop a training run where a test wants it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.config import RunConfig
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config

TINY: dict[str, Any] = {
    "model.arch": "small-cnn", "model.args": {"width": 8}, "model.drop_rate": 0.2, "pixels.size": 32, "train.epochs": 2,
    "train.batch_size": 8, "train.threads": 1, "train.workers": 0, "train.loader": "torch", "train.baseline": False,
    "train.precision": "fp32", "train.device": "cpu", "train.compile": False, "evaluate.bootstrap": 20, "optim.ema": 0.9,
    "train.log_every": 1e6,
}  # fmt: skip


def _write_images(folder: Path, counts: dict[str, int]) -> Path:
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for k in range(count):
            kind = k % 3
            image = draw.integers(0, 140, (32, 40, 3))
            image[..., kind] += 80
            place = folder / split / "abc"[kind]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(place / f"{k:03}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in colour: 42 images to train, 14 to validate, 9 to test. Not to be changed."""
    return _write_images(tmp_path_factory.mktemp("tiny") / "data", {"train": 42, "val": 14, "test": 9})


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """The same, for a test that changes files."""
    return _write_images(tmp_path / "data", {"train": 42, "val": 14, "test": 9})


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and caches of a test stay in its folder."""
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def configure(tiny_data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Tiny settings with changes (dotted names): every run gets its own directory."""
    made = []

    def make(changes: dict[str, Any] | None = None, data: Path = tiny_data) -> RunConfig:
        made.append(1)
        out = str(tmp_path / f"run{len(made)}")
        return build_config({**TINY, "data.source": str(data), "out": out, **(changes or {})})

    return make


@pytest.fixture
def no_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out bundle, plots and report, which such a test does not look at."""
    from imgcls_fast.training import session

    monkeypatch.setattr(session, "_finish", lambda stage, baseline: None)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send this process a real signal after optimizer step `step` (counted over the whole run), once."""
    from imgcls_fast.training.fit import Fit

    def arrange(step: int, number: int = signal.SIGTERM, where: str = "step") -> None:
        method = {"step": "_learn", "validate": "_validate"}[where]
        original = getattr(Fit, method)
        sent: list[int] = []

        def stopping(self: Fit, *arguments: Any) -> Any:
            answer = original(self, *arguments) if where == "step" else None
            if self.progress.step >= step and not sent:
                sent.append(1)
                os.kill(os.getpid(), number)
            return answer if where == "step" else original(self, *arguments)

        monkeypatch.setattr(Fit, method, stopping)

    return arrange


TIMINGS = ("seconds", "images_per_s", "data_share", "memory_mb", "spent")


def _final(run: Run) -> dict[str, Any]:
    from imgcls_fast.training.checkpoint import read_checkpoint

    last, best = read_checkpoint(run.checkpoints / "last"), read_checkpoint(run.checkpoints / "best")
    facts = {k: v for k, v in vars(last.progress).items() if k not in TIMINGS} | last.parts
    facts["history"] = [{k: v for k, v in line.items() if k not in TIMINGS} for line in last.progress.history]
    rows = [{k: v for k, v in line.items() if k not in TIMINGS} for line in run.epochs]
    return {"tensors": last.tensors, "best": best.tensors, "progress": facts, "metrics.csv": rows}


@pytest.fixture
def same_result() -> Callable[[Run, Run], None]:
    """Asserts that two runs ended in the same bits: weights, averages, optimizer, random state, history, metrics.csv."""

    def compare(one: Run, other: Run) -> None:
        import torch

        a, b = _final(one), _final(other)
        assert a["progress"] == b["progress"]
        assert a["metrics.csv"] == b["metrics.csv"]
        for part in ("tensors", "best"):
            assert a[part].keys() == b[part].keys()
            differing = [name for name in a[part] if not torch.equal(a[part][name], b[part][name])]
            assert not differing, f"{part}: {len(differing)} of {len(a[part])} differ: {differing[:5]}"

    return compare


@pytest.fixture
def make_fit(configure: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A `Fit` that has not begun, with `events` that it emitted, for settings that differ from TINY."""
    import torch

    from imgcls_fast.data.prepare import prepare
    from imgcls_fast.training.fit import Fit
    from imgcls_fast.training.plan import Machine, make_plan

    made = []

    def make(changes: dict[str, Any] | None = None, **more: Any) -> Any:
        config = configure(changes, **more)
        prepared = prepare(config, tmp_path / "cache")
        plan = make_plan(config, prepared.manifest, Machine(cpus=1))
        events: list[dict[str, Any]] = []
        fit = Fit(plan, prepared.manifest, Run.create(Path(config.out or "")), events.append)
        fit.events = events  # type: ignore[attr-defined]
        made.append(fit)
        return fit

    yield make
    for fit in made:
        fit.loaders.close()
        fit.run_.unlock()
    torch.use_deterministic_algorithms(False)
