"""The number of threads beside other processes: measured before training where the cores are busy, watched while training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core import cpus, env
from imgcls_fast.core.errors import Interrupted
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.training import crowding, estimate, session
from imgcls_fast.training.crowding import Crowd
from imgcls_fast.training.defaults import Machine, Notes

HERE = Machine(cpus=2, measures=True)
SPEC = {"arch": "small-cnn", "attention": []}
Rates = dict[int, float]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, list[str]]]:
    """The threads that are planned where other processes leave `free` cores, why, and the notices."""

    def plan(
        free: float | None, rates: Rates, machine: Machine = HERE, device: str = "cpu", asked: int | str = "auto"
    ) -> tuple[int, str, list[str]]:
        notes, notices = Notes(build_config({"train.threads": asked})), []
        monkeypatch.setattr(cpus, "free_cores", lambda: free)
        monkeypatch.setattr(
            crowding, "time_threads", lambda spec, config, counts, layout: {n: rates[n] for n in counts}
        )
        monkeypatch.setattr(env, "cpus", lambda: cpus.Cpus(machine.cpus, machine.cpus))
        crowding.choose_threads(notes, machine, device, SPEC, "channels-last", notices.append)
        ((name, value, reason),) = notes.rows
        assert name == "train.threads"
        return int(value), reason, notices

    return plan


def test_on_busy_cores_fewer_threads_are_taken_where_they_are_faster(beside: Any) -> None:
    threads, reason, notices = beside(0.0, {1: 96.0, 2: 40.0})
    assert (threads, reason) == (1, "other processes leave 0.0 of 2 cores idle; measured 96 images/s, and 40 with 2")
    assert notices == ["other processes leave 0.0 of 2 cores idle: timing 1 and 2 threads"]


def test_on_busy_cores_all_threads_stay_where_fewer_gain_little(beside: Any) -> None:
    threads, reason, _ = beside(1.2, {1: 41.0, 2: 40.0})
    assert threads == 2
    assert (
        reason == "all usable cores; other processes leave 1.2 of 2 cores idle, yet measured 40 images/s, and 41 with 1"
    )


@pytest.mark.parametrize(
    ("free", "counts"), [(0.0, [1, 8, 16]), (5.9, [6, 8, 16]), (15.0, [8, 15, 16]), (7.9, [8, 16])]
)
def test_what_others_leave_is_a_candidate(free: float, counts: list[int], beside: Any) -> None:
    tried: dict[int, float] = {}

    class Rates(dict[int, float]):
        def __missing__(self, count: int) -> float:
            tried[count] = 1.0
            return 1.0

    assert beside(free, Rates(), replace(HERE, cpus=16))[0] == 16
    assert sorted(tried) == counts


@pytest.mark.parametrize(
    "how",
    [
        {"free": 2.0}, {"free": 1.7}, {"free": None}, {"free": 0.0, "device": "cuda"}, {"free": 0.0, "asked": 2},
        {"free": 0.0, "machine": replace(HERE, measures=False)},
    ],
)  # fmt: skip
def test_idle_cores_and_a_number_that_was_asked_for_are_never_timed_so_the_plan_stays_the_same(
    how: dict[str, Any], beside: Any
) -> None:
    threads, reason, notices = beside(rates={}, **how)
    assert (threads, notices) == (2, [])
    assert reason == ("as asked" if "asked" in how else "all usable cores")


def test_a_quota_is_the_reason_that_stays(beside: Any) -> None:
    why = "the CPU quota of the container: 1 of 8 cores"
    assert beside(0.0, {}, Machine(cpus=1, why_cpus=why, measures=True))[:2] == (1, why)


def test_timing_threads_leaves_threads_and_random_numbers_as_they_were(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    config = build_config({"train.micro_batch": 4, "train.precision": "fp32", "model.kernels": "off"})
    before = torch.get_rng_state(), torch.get_num_threads()
    rates = crowding.time_threads(bundle.arch, config, [1, 2], "channels-last")
    assert set(rates) == {1, 2} and min(rates.values()) > 0
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]


def test_the_system_tells_idle_cores_and_time_in_line() -> None:
    if cpus.idle_s() is None or cpus.queued_s() is None:
        pytest.skip("this system tells neither")
    free = cpus.free_cores(0.05)
    assert free is not None and 0 <= free <= env.cpus().affinity + 0.5
    assert cpus.spent_s(os.getpid()) > 0 and cpus.spent_s(2**30) == 0


# ---------------------------------------------------------------- while training


class Kernel:
    """Clocks of the system, which a test sets: seconds gone, in line for a core, of idle cores, of our own."""

    gone = queued = idle = own = 0.0

    def pass_by(self, seconds: float, queued: float, idle: float, own: float) -> None:
        """Let time go by; queued, idle and own are shares of it."""
        self.gone += seconds
        self.queued += queued * seconds
        self.idle += idle * seconds
        self.own += own * seconds


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    clocks = Kernel()
    monkeypatch.setattr(crowding.time, "monotonic", lambda: clocks.gone)
    monkeypatch.setattr(cpus, "queued_s", lambda: clocks.queued)
    monkeypatch.setattr(cpus, "idle_s", lambda: clocks.idle)
    monkeypatch.setattr(crowding, "_own_s", lambda: clocks.own)
    monkeypatch.setattr(env, "cpus", lambda: cpus.Cpus(2, 2))
    yield clocks


def test_threads_that_wait_for_a_core_are_told_once_with_figures_and_the_way_out(kernel: Kernel) -> None:
    crowd = Crowd("cpu", 2, "imgcls-fast train runs/a --resume")
    assert crowd.look(0) is None
    kernel.pass_by(10, queued=0.6, idle=0, own=0.5)
    assert crowd.look(400) is None  # too short to tell
    kernel.pass_by(12, queued=0.6, idle=0, own=0.5)
    said = crowd.look(880)
    assert said is not None
    for part in ("other processes use 1.5 of 2 cores", "60% of the last 22 s", "(40 images/s)", "its 2 threads",
                 "imgcls-fast train runs/a --resume --set train.threads=1"):  # fmt: skip
        assert part in said
    kernel.pass_by(60, queued=0.9, idle=0, own=0.1)
    assert crowd.look(2000) is None


@pytest.mark.parametrize(
    ("device", "threads", "queued", "idle", "own"),
    [
        ("cpu", 2, 0.0, 0.2, 1.7),  # nobody else
        ("cpu", 2, 0.5, 0.0, 2.0),  # our own loader takes the cores
        ("cpu", 2, 0.05, 0.0, 1.2),  # others take little from us
        ("cpu", 1, 0.9, 0.0, 0.1),  # nothing to gain
        ("cuda", 2, 0.9, 0.0, 0.1),
    ],
)
def test_nothing_is_said_where_fewer_threads_would_not_help(
    device: str, threads: int, queued: float, idle: float, own: float, kernel: Kernel
) -> None:
    crowd = Crowd(device, threads, "resume")
    for _ in range(3):
        assert crowd.look(0) is None
        kernel.pass_by(30, queued, idle, own)


def test_a_system_that_does_not_tell_is_not_asked_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "queued_s", lambda: None)
    crowd = Crowd("cpu", 2, "resume")
    assert crowd.look(0) is None and crowd._silent


@pytest.mark.usefixtures("no_judging")
def test_a_crowded_run_says_so_as_a_warning(configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crowd, "look", lambda self, images: f"crowded after {images}" if images == 16 else None)
    events: list[dict[str, Any]] = []
    session.start(configure({"train.epochs": 1, "train.log_every": 0}), [events.append])
    assert [event["text"] for event in events if event["event"] == "warning"] == ["crowded after 16"]


def test_a_dry_run_estimates_with_the_threads_that_it_plans(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    measured = estimate.time.perf_counter

    def clock() -> float:
        seen.append(torch.get_num_threads())
        return measured()

    monkeypatch.setattr(estimate.time, "perf_counter", clock)
    estimate.dry_run(configure({"train.threads": 3}))
    assert seen and set(seen) == {3}


@pytest.mark.usefixtures("no_judging")
def test_a_resumed_run_keeps_its_number_of_threads_whatever_the_load_is_then(
    configure: Callable[..., Any], stop_at: Any, same_result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "look_at_machine", lambda: HERE)
    monkeypatch.setattr(cpus, "free_cores", lambda: 0.0)
    monkeypatch.setattr(crowding, "time_threads", lambda spec, config, counts, layout: {1: 96.0, 2: 40.0})
    whole = session.start(configure({"train.threads": "auto"}))
    assert whole.config.train.threads == 1
    stop_at(7)
    config = configure({"train.threads": "auto"})
    with pytest.raises(Interrupted):
        session.start(config)
    monkeypatch.setattr(cpus, "free_cores", lambda: 2.0)  # of a machine that is quiet now
    run = session.resume(Run(Path(config.out)), {})
    assert run.config.train.threads == 1
    same_result(whole, run)


def test_the_pauses_of_a_quota_are_not_taken_for_other_processes(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cpus", lambda: cpus.Cpus(8, 8, quota=2.0))
    crowd = Crowd("cpu", 2, "resume")
    for _ in range(2):
        assert crowd.look(0) is None
        kernel.pass_by(30, queued=0.9, idle=0, own=1.0)
