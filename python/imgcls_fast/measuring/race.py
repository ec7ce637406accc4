"""Races engines against torch, in turns, in fresh processes; one process is too sure of itself (`engines/timing.py`).

race TASK        one process (`core/child.py` starts it); TASK is JSON
"""

from __future__ import annotations

import json
import math
import random
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import child
from ..core.bundle import Bundle, read_bundle
from ..engines.timing import PAUSE_S, interleave, random_pixels, ratio_interval
from .contenders import REFERENCE, Contender

PROCESSES, PAIRS = 5, 15
START_S = 4.0  # about what a process takes until its engines are open


def ratios(
    contenders: Sequence[Contender], bundle: Bundle, device: str, threads: int
) -> tuple[dict[str, dict[str, Any]], str]:
    """The time of each engine over that of torch, at batch 1.

    Args:
        contenders: torch among them.
        threads: CPU threads per batch.

    Returns:
        name -> ratio, low, high, confidence, processes, pairs, per_process, cpu_ratio; and why they are missing, if they are.
    """
    task = {
        "bundle": str(bundle.directory),
        "device": device,
        "threads": threads,
        "pairs": PAIRS,
        "contenders": [contender.to_task() for contender in contenders],
    }
    runs: list[dict[str, list[float]]] = []
    for _ in range(PROCESSES):
        ended = child.run("measuring.race", json.dumps(task), options=("-W", "ignore"))
        out, errors = (stream.decode("utf-8", "replace") for stream in (ended.stdout, ended.stderr))
        if ended.returncode:
            return {}, f"the process that compares failed: {_ending(ended.returncode, errors)}"
        runs.append(json.loads(out.strip().splitlines()[-1]))
    return {name: summed([run[name] for run in runs]) for name in runs[0]}, ""


def summed(runs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of one engine, over all processes.

    Args:
        runs: (ln of the ratio of wall times, the same of CPU times) of each process; CPU times too short for their clock are NaN.
    """
    wall, cpu = np.array(runs, np.float64).T
    known = cpu[np.isfinite(cpu)]
    return {
        **asdict(ratio_interval(wall.tolist())),
        "pairs": PAIRS,
        "per_process": np.exp(wall).tolist(),
        "cpu_ratio": math.exp(float(np.median(known))) if len(known) else None,
    }


def _ending(code: int, stderr: str) -> str:
    """Why a process ended: a signal's name, or the line of its traceback that names the error."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in stderr.splitlines() if line.strip()] or [f"exit code {code}"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*Error\b", line)), lines[-1])


def race(task: dict[str, Any]) -> dict[str, list[float]]:
    """In a fresh process: median ln(time / time of torch) of each engine at batch 1, of wall times and of CPU times.

    Args:
        task: bundle, device, threads, pairs, contenders (`Contender.to_task`).
    """
    torch.set_num_threads(task["threads"])
    bundle = read_bundle(Path(task["bundle"]), verify=False)
    listed = [Contender.from_task(entry) for entry in task["contenders"]]
    engines = {c.name: c.open(bundle, task["device"], task["threads"]) for c in random.sample(listed, len(listed))}
    calls = {name: partial(engine.scores, random_pixels(engine, 1)) for name, engine in engines.items()}
    rounds = interleave(calls, task["pairs"], pause_s=PAUSE_S)
    others = [name for name in calls if name != REFERENCE]
    return {name: [rounds.log_ratio(name, REFERENCE, cpu=cpu) for cpu in (False, True)] for name in others}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(race(json.loads(sys.argv[1]))) + "\n")
