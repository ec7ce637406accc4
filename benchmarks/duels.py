"""Contenders and rivals, timed fairly: what a benchmark file declares, and the fresh process that measures it.

A benchmark file holds `CONTESTS`, a list of `Contest`. Each names a function of that file which opens contenders that must
give the same result (`Setup`). The parent (`conftest.py`) runs every contest of an area once in a fresh process, then all of
them again, at least five times: what the machine does in one minute falls on all. In the process (`measure`), the contenders
are opened in random order, compared, and then called in rounds, each once a round in random order. The ratio of a row is the
median over processes of the median over rounds of ln(contender / rival).

    python benchmarks/duels.py TASKS.json RESULTS.json       what the parent calls
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import resource
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgcls_fast.core.env import install_hint
from imgcls_fast.core.errors import ImgclsError
from imgcls_fast.engines.timing import (
    PAUSE_S,
    Call,
    Prepared,
    Timer,
    interleave,
    peak_bytes,
    ready,
    reset_peak,
    wall_and_cpu,
)

_CANNOT_RUN = (ImgclsError, ImportError, RuntimeError, ValueError, NotImplementedError, OSError)


class Disagree(ValueError):
    """Two contenders give different results, so their times must not be compared."""


@dataclass(frozen=True)
class Pair:
    """A contender, its rival, and the largest ratio that was promised: case -> ratio, "" for all cases."""

    contender: str
    rival: str
    goals: Mapping[str, float] = field(default_factory=dict)

    def goal(self, case: str) -> float | None:
        return self.goals.get(case, self.goals.get(""))


@dataclass(frozen=True)
class Contest:
    """What one fresh process measures.

    Args:
        area: file of results.
        name: shown by pytest.
        setup: name of a function in the benchmark file: (work folder, **params) -> Setup.
        params: its further arguments; plain JSON.
        prepare: name of a function that makes files for it once, before the clock of any process starts.
        devices: where it makes sense.
        small: belongs to the small set that CI compares.
        full: belongs to `--full` only.
        threads: of torch and of the runtimes; None: all cores.
    """

    area: str
    name: str
    setup: str
    params: dict[str, Any] = field(default_factory=dict)
    prepare: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    small: bool = False
    full: bool = False
    threads: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass
class Contender:
    """One that is open.

    Args:
        calls: case -> what is timed.
        output: what it gave on the common input, for `Setup.check`.
        precision: what it really computes in.
        facts: what else is known of it.
        device_call: case -> the work on buffers in place, without copies.
        worth: asked once: {"accuracy": ..., "accuracy_low": ..., "accuracy_high": ...}.
        close: frees what it holds.
    """

    calls: dict[str, Call]
    output: Any = None
    precision: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    device_call: dict[str, Callable[[], Any]] = field(default_factory=dict)
    worth: Callable[[], dict[str, float]] | None = None
    close: Callable[[], Any] = lambda: None


@dataclass
class Setup:
    """Contenders of equal result.

    Args:
        openers: name -> opens it. What it raises becomes the reason why the contender is absent.
        pairs: what is compared with what; a pair holds for every case that both have.
        check: (name, outputs of all) -> how far it is from what it should give.

            Raises:
                Disagree: too far.
        clock: wall, cpu (of all threads and child processes) or gpu (events around several calls).
        images: case -> images of one call, for rates.
        limits: case -> (name of the limit, measures the seconds that it needs).
        skipped: (case, contender, why) of what is left out from the beginning.
    """

    openers: dict[str, Callable[[], Contender]]
    pairs: Sequence[Pair]
    check: Callable[[str, Mapping[str, Any]], dict[str, Any]]
    clock: str = "wall"
    images: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, tuple[str, Callable[[], float]]] = field(default_factory=dict)
    skipped: Sequence[tuple[str, str, str]] = ()


# --- clocks -----------------------------------------------------------------------------------------------------------


def family_cpu_s() -> float:
    """CPU seconds of this process and of all its descendants, those that ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(_cpu_s(pid) for pid in _descendants(os.getpid()))


def _descendants(pid: int) -> Iterator[int]:
    for task in _listed(f"/proc/{pid}/task"):
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text("ascii").split():
                yield int(child)
                yield from _descendants(int(child))


def _cpu_s(pid: int) -> float:
    """Of all its threads, in nanoseconds of the scheduler: the ticks of /proc/PID/stat are 10 ms."""
    total = 0
    for task in _listed(f"/proc/{pid}/task"):
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text("ascii").split()[0])
    return total / 1e9


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # ended meanwhile
        return []


def family_bytes() -> int:
    """Memory of all descendants, pages that processes share divided among them."""
    total = 0
    for pid in _descendants(os.getpid()):
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
            total += 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))
    return total


def wall_and_family_cpu(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of one call, worker processes included."""
    cpu, wall = family_cpu_s(), time.perf_counter()
    call()
    wall = time.perf_counter() - wall
    return wall, family_cpu_s() - cpu


def gpu_events(call: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
    """Seconds of one call between CUDA events; the mean of a few, so that launches overlap."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cpu = time.process_time()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats, (time.process_time() - cpu) / repeats


TIMERS: dict[str, Timer] = {"wall": wall_and_cpu, "cpu": wall_and_family_cpu, "gpu": gpu_events}


def delayed(call: Call, share: float, clock: str) -> Call:
    """The same call, slower by `share` of its own time: what the alarm is tried with."""
    return Prepared(lambda: _slowed(ready(call), share, clock))


def _slowed(call: Callable[[], Any], share: float, clock: str) -> Callable[[], Any]:
    def run() -> None:
        wall, cpu = TIMERS["cpu" if clock == "cpu" else "wall"](call)
        now = time.process_time if clock == "cpu" else time.perf_counter
        end = now() + share * (cpu if clock == "cpu" else wall)
        while now() < end:
            pass

    return run


# --- one process ------------------------------------------------------------------------------------------------------


def measure(setup: Setup, task: Mapping[str, Any]) -> dict[str, Any]:
    """Open, compare, and time what fits.

    Args:
        task: pairs, processes, cell_s, delay, and kept: case -> contenders that the first process found to fit; None in
            the first process, which also asks what each is worth.

    Returns:
        opened, absent, agreement, cases (seconds of each contender), skipped, slow (contenders that do not fit into a
        cell, with the seconds that they would take), limits.

    Raises:
        Disagree: a contender gives another result than it should. A rival that does is listed as absent.
    """
    ours = {pair.contender for pair in setup.pairs} - {pair.rival for pair in setup.pairs}
    opened, absent = _open_all(setup, ours)
    outputs = {name: contender.output for name, contender, _ in opened}
    agreement: dict[str, Any] = {}
    for name in list(outputs):
        try:
            agreement[name] = setup.check(name, outputs)
        except Disagree as error:
            if name in ours:
                raise
            absent[name] = f"not timed: {error}"
    contenders = {name: contender for name, contender, _ in opened if name not in absent}
    result: dict[str, Any] = {
        "clock": setup.clock,
        "pairs": [[pair.contender, pair.rival, dict(pair.goals)] for pair in setup.pairs],
        "images": dict(setup.images),
        "opened": {name: facts for name, _, facts in opened if name not in absent},
        "absent": absent,
        "agreement": agreement,
        "cases": {},
        "skipped": [list(entry) for entry in setup.skipped],
        "slow": [],
        "limits": {case: [name, seconds()] for case, (name, seconds) in setup.limits.items()},
    }
    for case in dict.fromkeys(case for contender in contenders.values() for case in contender.calls):
        _time_case(setup, case, contenders, task, result)
    if task["kept"] is None:
        for name, contender in contenders.items():
            if contender.worth and any(name in found for found in result["cases"].values()):
                result["opened"][name]["worth"] = contender.worth()
    for contender in contenders.values():
        contender.close()
    return result


def _open_all(setup: Setup, ours: set[str]) -> tuple[list[tuple[str, Contender, dict[str, Any]]], dict[str, str]]:
    """Every contender that can run here, in random order, after its first call; and why the others cannot.

    Raises:
        Exception: one of ours fails for another reason than that something is not installed.
    """
    opened, absent = [], {}
    for name in random.sample(list(setup.openers), len(setup.openers)):
        reset_peak()
        before, began = peak_bytes() + family_bytes(), time.perf_counter()
        try:
            contender = setup.openers[name]()
            call = next(iter(contender.calls.values()))
            for _ in range(2):
                ready(call)()
        except _CANNOT_RUN as error:
            if name in ours and not isinstance(error, ImgclsError | ImportError):
                raise
            absent[name] = _reason(error)
            continue
        facts = {
            "open_s": time.perf_counter() - began,
            "memory": peak_bytes() + family_bytes() - before,
            "precision": contender.precision,
            "facts": contender.facts,
        }
        opened.append((name, contender, facts))
    return opened, absent


def _time_case(
    setup: Setup, case: str, contenders: Mapping[str, Contender], task: Mapping[str, Any], result: dict[str, Any]
) -> None:
    """The rounds of one case, without what does not fit into the time of a cell."""
    calls = {name: contender.calls[case] for name, contender in contenders.items() if case in contender.calls}
    timer = TIMERS[setup.clock]
    kept = _fitting(setup, case, calls, task, result)
    if not kept:
        return
    share = task.get("delay") or 0.0
    if share:
        challengers = {pair.contender for pair in setup.pairs}
        calls = {n: delayed(call, share, setup.clock) if n in challengers else call for n, call in calls.items()}
    found = interleave({name: calls[name] for name in kept}, task["pairs"], warmups=1, timer=timer, pause_s=PAUSE_S)
    result["cases"][case] = {
        name: {
            "wall_s": found.wall_s[name].tolist(),
            "cpu_s": found.cpu_s[name].tolist(),
            **_on_device(contenders[name], case),
        }
        for name in kept
    }


def _on_device(contender: Contender, case: str) -> dict[str, float]:
    call = contender.device_call.get(case)
    if call is None:
        return {}
    call()
    return {"device_s": statistics.median(wall_and_cpu(call)[0] for _ in range(7))}


def _fitting(
    setup: Setup, case: str, calls: Mapping[str, Call], task: Mapping[str, Any], result: dict[str, Any]
) -> list[str]:
    """The contenders whose calls fit into the time of a cell, over all processes; rivals only beside one that fits."""
    if task["kept"] is not None:
        return [name for name in calls if name in task["kept"].get(case, ())]
    count = task["processes"] * (task["pairs"] + 1)
    need = {name: _larger(setup, case, name, result) for name in calls}
    need |= {name: count * _spent(calls[name], 2 * task["cell_s"] / count) for name in calls if not need[name]}
    fit = {name for name in calls if need[name] <= task["cell_s"]}
    result["slow"] += [[case, name, need[name]] for name in calls if name not in fit]
    ours = {pair.contender for pair in setup.pairs if pair.contender in fit}
    beside = {pair.rival for pair in setup.pairs if pair.contender in ours and pair.rival in fit}
    return [name for name in calls if name in ours | beside]


def _larger(setup: Setup, case: str, name: str, result: Mapping[str, Any]) -> float:
    """Seconds of a cell by those of one with fewer images that was too long already; 0: there is none."""
    images = setup.images
    rates = [
        need / images[other]
        for other, slow, need in result["slow"]
        if slow == name and case in images and images.get(other, math.inf) < images[case]
    ]
    return min(rates, default=0.0) * images.get(case, 0)


def _spent(call: Call, enough_s: float) -> float:
    """Seconds of a call, what it prepares included; the lesser of two, unless the first says that it is too long anyway."""
    found = []
    while not found or (len(found) < 2 and found[0] < enough_s):
        began = time.perf_counter()
        ready(call)()
        found.append(time.perf_counter() - began)
    return min(found)


def _reason(error: BaseException) -> str:
    """Why something cannot run, on one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: {install_hint('bench')}"
    if isinstance(error, ImgclsError):
        return f"{error.message}{f'; try: {error.try_}' if error.try_ else ''}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def load_file(path: Path) -> Any:
    """A benchmark file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """What the parent calls: TASKS.json holds several, each of which gets a process of its own.

    They are forked from this one, in which nothing was computed yet, only modules were imported: importing takes longer than
    most measurements. RESULTS.json gets {"found" or "error", "seconds"} of each.
    """
    tasks, out = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
    import torch  # noqa: F401  # every one needs it

    modules = {task["file"]: load_file(Path(task["file"])) for task in tasks}
    results = []
    for k, task in enumerate(tasks):
        file, began = out.with_name(f"{k}-{out.name}"), time.perf_counter()
        child = os.fork()
        if not child:
            file.write_text(json.dumps(_run(modules[task["file"]], task)), "utf-8")
            return 0
        _, status = os.waitpid(child, 0)
        if file.exists():
            result = json.loads(file.read_text("utf-8"))
        else:
            result = {"error": f"the process ended with {_told(os.waitstatus_to_exitcode(status))}"}
        results.append({**result, "seconds": time.perf_counter() - began})
    out.write_text(json.dumps(results), "utf-8")
    return 0


def _run(module: Any, task: Mapping[str, Any]) -> dict[str, Any]:
    """{"found": ...}, or {"error": ...} with its traceback."""
    import torch

    try:
        torch.set_num_threads(task["threads"])
        work = Path(task["work"])
        if task.get("prepare"):
            getattr(module, task["prepare"])(work, **task["params"])
            return {"found": {}}
        return {"found": measure(getattr(module, task["setup"])(work, **task["params"]), task)}
    except Exception:  # noqa: BLE001  # told by the parent, whatever it is
        return {"error": traceback.format_exc()}


def _told(code: int) -> str:
    return f"code {code}" if code >= 0 else signal.Signals(-code).name


if __name__ == "__main__":
    sys.modules["duels"] = sys.modules["__main__"]  # the benchmark file imports this one
    sys.exit(main())
