"""Timing: the arithmetic, with a clock that the test turns by hand. Nothing here looks at a real duration."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines import timing
from imgcls_fast.engines.timing import (
    Latency,
    Prepared,
    Ratio,
    Timing,
    best_batch,
    best_of,
    interleave,
    measure,
    out_of_memory,
    percentile,
    ratio_interval,
    warnings_of,
)


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu

    def spend(self, wall: float, cpu: float = 0.0) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


class FakeEngine:
    """Takes 3 ms a call and 1 ms an image, of which 2 ms an image on two cores; half of the call is not the device's."""

    thread_safe, runtime, precision, thresholds = True, "fake", "fp32", None
    labels = LabelSpace.single(["a", "b"])
    pixels = Pixels(4, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3)

    def __init__(self, clock: Clock, max_batch: int = 64, memory: int = 10**6) -> None:
        self.clock, self.max_batch, self.memory = clock, max_batch, memory
        self.sizes: list[int] = []

    def scores(self, pixels: Any) -> np.ndarray:
        n = len(pixels)
        if n > self.memory:
            raise HardwareError("H002", f"no memory for {n} images")
        self.sizes.append(n)
        self.clock.spend(0.003 + 0.001 * n, 0.002 * n)
        return np.zeros((n, 2), np.float32)

    def warmup(self, n: int) -> None: ...

    def close(self) -> None: ...


class BindingEngine(FakeEngine):
    def bind(self, batch: int) -> Any:
        engine = self

        class Bound:
            input, output = np.zeros((batch, 4, 4, 3), np.uint8), np.zeros((batch, 2), np.float32)

            def replay(self) -> None:
                assert self.input.max() > 200, "the bound input was never filled"
                engine.clock.spend(0.001 * batch)

            def wait(self) -> None:
                engine.clock.spend(0.001)

        return Bound()


def test_percentiles_are_values_that_were_seen_as_in_trtexec() -> None:
    ordered = [float(k) for k in range(1, 101)]
    assert [percentile(ordered, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([1.0, 2.0, 9.0], 99) == 9
    assert percentile([5.0], 90) == 5


def test_a_latency_sums_up_in_milliseconds() -> None:
    found = Latency.of([0.002, 0.001, 0.006, 0.003])
    assert (found.count, found.mean_ms, found.p50_ms, found.least_ms, found.greatest_ms) == (4, 3.0, 2.5, 1.0, 6.0)
    assert found.cov == pytest.approx(100 * math.sqrt(3.5) / 3)
    assert Latency.of([0.001] * 3).cov == 0
    with pytest.raises(ValueError, match="no call"):
        Latency.of([])


def test_the_warm_up_and_both_minima_are_kept(clock: Clock) -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(clock.wall)
        clock.spend(0.05, 0.02)

    found = measure(call, 8, warmup_s=0.2, duration_s=1.0, min_iterations=3)
    assert found.end_to_end.count == pytest.approx(20, abs=1)
    assert len(calls) - found.end_to_end.count == 4  # 200 ms of warm-up
    assert found.images_per_s == pytest.approx(160)
    assert found.cpu_ms == pytest.approx(20)
    assert (found.device, found.warnings, found.peak_bytes > 0) == (None, (), True)
    assert measure(call, 1, warmup_s=0, duration_s=0, min_iterations=12).end_to_end.count == 12


def test_an_engine_is_timed_end_to_end_and_on_its_own_buffers(clock: Clock) -> None:
    found = measure(BindingEngine(clock), 4, duration_s=0.1)
    assert found.end_to_end.p50_ms == pytest.approx(7)
    assert found.device is not None
    assert found.device.p50_ms == pytest.approx(5)
    assert (found.runtime, found.precision, found.batch) == ("fake", "fp32", 4)
    assert found.images_per_s == pytest.approx(4 / 0.007)
    assert "bound buffers" in found.to_dict()["method"]["device"]
    assert measure(FakeEngine(clock), 4, duration_s=0).to_dict()["device"] is None


def test_a_gpu_is_timed_by_events_on_the_stream_of_the_buffers(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    streams: list[Any] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            streams.append(stream)
            self.at = clock.wall

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Any) -> float:
            return 1e3 * (other.at - self.at)

    class Bound:
        input = SimpleNamespace(is_cuda=True, copy_=lambda pixels: None)
        stream = "the engine's stream"

        def replay(self) -> None:
            clock.spend(0.002)

        def wait(self) -> None: ...

    engine: Any = FakeEngine(clock)
    engine.bind = lambda batch: Bound()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = measure(engine, 1, duration_s=0.01)
    assert set(streams) == {"the engine's stream"}
    assert found.device is not None
    assert found.device.p50_ms == pytest.approx(2)
    assert any("enqueueing" in text for text in found.warnings)  # all of it is spent in replay()
    assert any("transfers" in text for text in found.warnings)  # 4 ms end to end


def test_warnings_are_those_of_trtexec() -> None:
    steady, unsteady = Latency.of([0.01] * 9), Latency.of([0.010, 0.011, 0.009])
    assert warnings_of(steady, steady, [0.001]) == ()
    assert "unsteady end to end" in warnings_of(unsteady, steady)[0]
    assert "unsteady on the device" in warnings_of(steady, unsteady)[0]
    assert "enqueueing" in warnings_of(steady, steady, [0.0081])[0]
    assert "transfers" in warnings_of(Latency.of([0.02] * 9), steady, [0.001])[0]


def timed(batch: int, rate: float) -> Timing:
    return Timing("r", "fp32", batch, Latency.of([batch / rate]), None, rate, 0, 0, None, ())


def test_the_best_batch_is_the_smallest_within_two_per_cent_of_the_highest_rate() -> None:
    assert best_of([timed(1, 50), timed(8, 99), timed(16, 100), timed(32, 97)]).batch == 8


def test_a_sweep_doubles_and_ends_at_the_largest_batch_or_where_memory_ends(clock: Clock) -> None:
    engine = FakeEngine(clock, max_batch=20)
    found = best_batch(engine, duration_s=0, warmup_s=0)
    assert [timing.batch for timing in found.timings] == [1, 2, 4, 8, 16]
    assert found.best.batch == 16
    short = best_batch(FakeEngine(clock, memory=4), duration_s=0)
    assert [timing.batch for timing in short.timings] == [1, 2, 4]
    with pytest.raises(HardwareError):
        best_batch(FakeEngine(clock, memory=0), duration_s=0)
    late = best_batch(FakeEngine(clock), budget_s=0.01, duration_s=0.02)
    assert len(late.timings) == 1
    assert (found.ended, short.ended, late.ended) == ("done", "memory", "time")


def test_a_sweep_ends_when_the_rate_has_fallen_twice(clock: Clock) -> None:
    engine = FakeEngine(clock)
    original = engine.scores

    def slower(pixels: Any) -> np.ndarray:
        clock.spend(0.001 * max(0, len(pixels) - 4) ** 2)
        return original(pixels)

    engine.scores = slower  # type: ignore[method-assign]
    found = best_batch(engine, duration_s=0, warmup_s=0)
    assert [timing.batch for timing in found.timings] == [1, 2, 4, 8, 16]
    assert (found.best.batch, found.ended) == (4, "rate")
    every = best_batch(engine, [1, 8, 16, 32, 64], falls=math.inf, duration_s=0, warmup_s=0)
    assert [timing.batch for timing in every.timings] == [1, 8, 16, 32, 64]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), HardwareError("H002", ""), RuntimeError("CUDA out of memory"), RuntimeError("std::bad_alloc"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_every_runtime_s_words_for_memory_that_is_out_are_known(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes differ"))


def test_rounds_call_each_once_in_an_order_that_changes(clock: Clock) -> None:
    order: list[str] = []

    def a() -> None:
        order.append("a")
        clock.spend(0.02, 0.04)

    def b() -> None:
        order.append("b")
        clock.spend(0.01, 0.01)

    def c() -> Callable[[], None]:
        clock.spend(5, 5)  # what comes before the clock starts is not counted
        return lambda: clock.spend(0.01, 0)

    found = interleave({"a": a, "b": b, "c": Prepared(c)}, 40, seed=1, warmups=3)
    pairs = ["".join(order[k : k + 2]) for k in range(0, len(order), 2)]
    assert len(pairs) == 43
    assert set(pairs) == {"ab", "ba"}
    assert 10 < pairs.count("ab") < 33
    assert found.wall_s["a"].shape == (40,)
    assert found.log_ratio("a", "b") == pytest.approx(math.log(2))
    assert found.log_ratio("a", "b", cpu=True) == pytest.approx(math.log(4))
    assert found.log_ratio("c", "b") == pytest.approx(0)
    assert math.isnan(found.log_ratio("c", "b", cpu=True))


def test_the_interval_comes_from_the_variation_between_processes() -> None:
    same = ratio_interval([math.log(1.3)] * 5, drift=0)
    assert (same.ratio, same.low, same.high, same.processes) == pytest.approx((1.3, 1.3, 1.3, 5))
    two = ratio_interval([-0.1, 0.1], drift=0)  # Student's t of one degree of freedom: 12.706
    assert two.ratio == 1
    assert math.log(two.high) == pytest.approx(12.7062 * math.sqrt(0.02) * math.sqrt(math.pi / 2), rel=1e-4)
    assert two.low == pytest.approx(1 / two.high)
    five = ratio_interval([0.00, 0.01, 0.02, 0.03, 0.09], drift=0)  # t = 2.776, s = 0.03536
    assert math.log(five.ratio) == pytest.approx(0.02)
    assert math.log(five.high) == pytest.approx(0.02 + 2.7764 * 0.0353553 * math.sqrt(math.pi / 5), rel=1e-4)
    drifting = ratio_interval([0.02] * 5, drift=0.03)
    assert math.log(drifting.high) == pytest.approx(0.02 + 2.7764 * math.sqrt(2) * 0.03, rel=1e-4)
    with pytest.raises(ValueError, match="two processes"):
        ratio_interval([0.1])


def test_the_interval_also_holds_where_the_run_itself_is_off() -> None:
    """Processes of a run agree to 0.3 %, runs only to 1 %: without the drift, half of the repetitions would be outside."""
    draw = np.random.default_rng(0)

    def run(drift: float) -> Ratio:
        return ratio_interval(list(draw.normal(draw.normal(0.05, 0.01), 0.003, 5)), drift=drift)

    held = {
        drift: sum(a.low <= run(drift).ratio <= a.high for a in (run(drift) for _ in range(500))) for drift in (0, 0.01)
    }
    assert held[0] < 300 and held[0.01] > 475


@pytest.mark.parametrize("processes", [5, 8])
def test_the_interval_holds_the_ratio_of_a_second_run_as_often_as_it_says(processes: int) -> None:
    """Processes that differ by more than their rounds do: of 1,000 repetitions 94 to 98.5 % fall into the first interval."""
    draw = np.random.default_rng(0)

    def run() -> Ratio:
        centres = draw.normal(0.05, 0.03, processes)
        return ratio_interval([float(np.median(draw.normal(centre, 0.005, 15))) for centre in centres], drift=0)

    pairs = [(run(), run()) for _ in range(1000)]
    assert 940 <= sum(a.low <= b.ratio <= a.high for a, b in pairs) <= 985
    assert all(abs(a.ratio - b.ratio) <= 2 * (a.high - a.low) for a, b in pairs)
