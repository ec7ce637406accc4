"""Predictions made from plain arrays, sets of scores in which something is odd, and results of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.measuring.results import Area, Contender, Machine, Method, Missing, Row

Make = Callable[..., Predictions]


def _make(
    scores: np.ndarray,
    truth: Sequence[int] | np.ndarray | None,
    classes: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
) -> Predictions:
    n, size = scores.shape
    names = tuple(classes or (f"class {k}" for k in range(size)))
    targets = None if truth is None else np.eye(size, dtype=np.float32)[np.asarray(truth, np.int64)]
    rows = np.arange(n, dtype=np.int64) * 2 + 1
    return Predictions(rows, scores, targets, LabelSpace.single(names), tuple(paths or (f"{k}.jpg" for k in range(n))))


def _drawn(n: int, size: int, seed: int = 0, skill: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """(scores (n, K) float32, truth (n,)) of a model that is right more often than chance."""
    draw = np.random.default_rng([n, size, seed])
    truth = draw.integers(0, size, n)
    logits = draw.normal(size=(n, size))
    logits[np.arange(n), truth] += skill
    return softmaxed(logits), truth


def softmaxed(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True), np.float32)


@pytest.fixture(scope="session")
def predictions_of() -> Make:
    """`predictions_of(scores, truth, classes=None, paths=None)`; rows are 1, 3, 5, ..."""
    return _make


@pytest.fixture(scope="session")
def drawn() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """`drawn(n, K, seed=0, skill=1.5)` -> (scores, truth)."""
    return _drawn


def _bench_area(
    ratios: Sequence[tuple[str, str, str, float]] = (("plain", "kernel", "formula", 0.5),),
    *,
    area: str = "ops",
    machine: str = "two-cores",
    spread: float = 0.05,
    clocks: Sequence[str] = ("wall",),
    goals: Mapping[str, float] | None = None,
    alone: Mapping[tuple[str, str], float] | None = None,
    missing: Sequence[tuple[str, str, str, str]] = (),
    more: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Area:
    rows, contenders = [], {}
    for k, (case, name, rival, ratio) in enumerate(ratios):
        goal = (goals or {}).get(name)
        rows.append(
            Row(
                case=case, contender=name, rival=rival, clock=clocks[k % len(clocks)], ratio=ratio, low=ratio * math.exp(-spread),
                high=ratio * math.exp(spread), log_ratios=[math.log(ratio) - spread / 3, math.log(ratio) + spread / 3],
                cpu_ratio=1.1 * ratio, agreement={"max_diff": 4.5e-06}, goal=goal, holds=None if goal is None else ratio <= goal,
            )
        )  # fmt: skip
        contenders |= {(case, rival): 10.0, **contenders} | (
            {} if (case, name) in contenders else {(case, name): 10 * ratio}
        )
    found = [
        Contender(
            case=case, name=name, p50_ms=ms, p90_ms=1.1 * ms, p99_ms=1.5 * ms, calls=75, cpu_ms=2 * ms, images_per_s=1e3 / ms,
            memory_mb=140, **(more or {}).get(name, {}),
        )
        for (case, name), ms in (contenders | dict(alone or {})).items()
    ]  # fmt: skip
    return Area(
        area=area,
        about="one call of an operator",
        created="2026-07-30T12:34:56+00:00",
        seconds=300,
        machine=Machine(
            name=machine,
            fingerprint={"cpu": "AMD EPYC 9B14", "cpus": 2, "gpu": None},
            versions={"torch": "2.14.1", "tensorrt": None},
            facts={"load": 0.12},
        ),
        method=Method(processes=5, pairs=15, cell_s=10, threads=2),
        contenders=found,
        rows=rows,
        missing=[Missing(case=c, contender=n, kind=kind, why=why) for c, n, kind, why in missing],
        **fields,
    )


@pytest.fixture(scope="session")
def bench_area() -> Callable[..., Area]:
    """`bench_area(ratios)`: results with a row for each (case, contender, rival, ratio); rivals take 10 ms.

    Also: goals and more by contender (`more` are fields of Contender), alone {(case, name): ms} without a rival, missing
    (case, contender, kind, why), clocks that take turns, and fields of Area.
    """
    return _bench_area
