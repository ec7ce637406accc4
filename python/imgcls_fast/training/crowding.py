"""Finds out how many threads a training step is worth beside other processes, and whether it still is while training.

The threads of a step wait for each other hundreds of times, and one that has lost its core to another process holds up all
the others: beside eight other busy processes on two cores, a step of small-cnn (32 images of 96 pixels) took 0.75 s with two
threads and 0.32 s with one. So where the cores are not idle both are timed before the number is decided; on an idle machine
nothing is, and a run there is the same each time. Once training has begun the number stays, because the bits depend on it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core import cpus as cores
from ..core import env
from ..core.config import RunConfig
from ..core.settings import replace_settings
from .defaults import Machine, Notes
from .layout import built, step_s

_BUDGET_S = 1.0  # for timing; a large network takes two short steps of each
_LONG_S = 5.0  # a network whose first steps take longer is not asked again
_GAIN = 1.1  # fewer threads must be this much faster
_IMAGES, _FEW = 16, 4  # in a step; of a large network
_WINDOW_S = 20.0  # of one look while training
_WAITED = 0.2  # share of the time in which training stood in line for a core


def choose_threads(
    notes: Notes, machine: Machine, device: str, spec: dict[str, Any], memory_format: str, notice: Callable[[str], None]
) -> None:
    """Choose all that may be used, or fewer where other processes have the cores and fewer are faster.

    Args:
        memory_format: in which the network can be trained.
        notice: receives that a measurement begins.
    """
    name, most = "train.threads", machine.cpus
    asked = notes.config.train.threads != "auto"
    free = None if asked or device != "cpu" or not machine.measures or most < 2 else cores.free_cores()
    if free is None or free > most - cores.BUSY:
        notes.decide(name, most, machine.why_cpus)
        return
    left = f"other processes leave {free:.1f} of {env.cpus().affinity} cores idle"
    counts = sorted({most, most // 2, min(most, max(1, math.floor(free + 0.2)))})
    notice(f"{left}: timing {' and '.join(map(str, counts))} threads")
    rates = time_threads(spec, replace_settings(notes.config, notes.changes), counts, memory_format)
    best = max(counts, key=lambda count: rates[count])
    chosen = most if rates[best] < _GAIN * rates[most] else best
    other = best if best != chosen else max((count for count in counts if count != chosen), key=lambda c: rates[c])
    measured = f"measured {rates[chosen]:.3g} images/s, and {rates[other]:.3g} with {other}"
    notes.decide(
        name, chosen, f"{machine.why_cpus}; {left}, yet {measured}" if chosen == most else f"{left}; {measured}"
    )


def time_threads(
    spec: dict[str, Any], config: RunConfig, counts: Sequence[int], memory_format: str
) -> dict[int, float]:
    """Measure images per second of forward and backward passes with each number of threads, in turns, for about a second.

    Args:
        spec: `Plan.spec`.
        config: with precision, kernels and micro-batch resolved.
        counts: numbers of threads.
    """
    images = min(int(config.train.micro_batch), _IMAGES)
    spent: dict[int, list[float]] = {count: [] for count in counts}
    with built(spec, images, config.model.kernels) as (model, pixels):

        def one(count: int) -> float:
            torch.set_num_threads(count)
            return step_s(model, memory_format, pixels[:images], str(config.train.precision))

        images = min(images, _FEW)
        first = {count: one(count) for count in counts}  # starts threads and takes memory
        if sum(first.values()) < _BUDGET_S:
            images = len(pixels)
            while len(spent[counts[0]]) < 2 or sum(map(sum, spent.values())) < _BUDGET_S:
                for count in counts:
                    spent[count].append(one(count))
        elif sum(first.values()) < _LONG_S:  # a large network: one more look at each
            spent = {count: [one(count)] for count in counts}
        else:
            spent = {count: [seconds] for count, seconds in first.items()}
    return {count: images * len(times) / sum(times) for count, times in spent.items()}


class Crowd:
    """Watches, while a network is trained on a CPU, whether other processes make its threads wait for each other.

    Args:
        device: that the network is trained on.
        threads: those that training uses.
        resume: the command that goes on with the run.
        window_s: seconds that one look takes in.
    """

    def __init__(self, device: str, threads: int, resume: str, window_s: float = _WINDOW_S) -> None:
        self._threads, self._resume, self._window_s = threads, resume, window_s
        self._before: tuple[int, float, float | None, float | None, float] | None = None
        found = env.cpus()
        throttled = found.quota is not None and found.quota < found.affinity  # a share's pauses look like others' work
        self._silent = device != "cpu" or threads < 2 or throttled

    def look(self, images: int) -> str | None:
        """Return what the user should know, once in a run; called between two steps, now and then.

        Args:
            images: trained on since the run began.
        """
        if self._silent:
            return None
        now = images, time.monotonic(), cores.queued_s(), cores.idle_s(), _own_s()
        before = self._before = self._before or now
        if now[2] is None or now[3] is None or before[2] is None or before[3] is None:
            self._silent = True  # the system does not tell
            return None
        passed_s = now[1] - before[1]
        if passed_s < self._window_s or passed_s == 0:
            return None
        self._before = now
        rate, waited = (images - before[0]) / passed_s, (now[2] - before[2]) / passed_s
        total = env.cpus().affinity
        others = total - (now[3] - before[3]) / passed_s - max(0.0, now[4] - before[4]) / passed_s
        if waited < _WAITED or others < cores.BUSY:
            return None
        self._silent = True
        return (
            f"other processes use {others:.1f} of {total} cores: training waited for a core {min(1, waited):.0%} of the last "
            f"{passed_s:.0f} s ({rate:.3g} images/s), and its {self._threads} threads wait for each other; one is often faster "
            f"then: Ctrl-C, {self._resume} --set train.threads=1   (not bit for bit the same run)"
        )


def _own_s() -> float:
    """Return the CPU time of this process, of its ended children and of the loader's workers."""
    spent = os.times()
    workers = (child.pid for child in multiprocessing.active_children())
    return sum(spent[:4]) + sum(cores.spent_s(pid) for pid in workers if pid)
