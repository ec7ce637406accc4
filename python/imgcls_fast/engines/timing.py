"""How long an engine takes: latency and throughput of one, and the ratio of two that is fair on a busy machine.

`measure` follows trtexec: a warm-up of at least 200 ms, then at least 3 s and at least 10 calls, one call at a time; the
percentiles and the warnings are trtexec's (NVIDIA/TensorRT, samples/common/sampleReporting.cpp). `interleave` and
`ratio_interval` are for comparing several: within one process the calls alternate in random order, and the interval comes
from the variation between processes. A test within one process is far too sure of itself: an engine against itself, in
sequential blocks, was called different in 8 of 12 runs, and interleaved in 3 of 12.
"""

from __future__ import annotations

import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ImgclsError
from .base import Bound, Engine

UNSTEADY = 2.5  # per cent of variation above which trtexec warns
ENQUEUE_SHARE = 0.8  # of the computing time, above which trtexec calls a run bound by enqueueing
PAUSE_S = 0.002  # between calls of several runtimes: the thread pools of the others have stopped spinning by then
DRIFT = 0.01  # of a log ratio between runs: 0.0095 is the likeliest value for 81 ratios of two runs of our suite on one machine
_LARGEST_SWEPT = 256


@dataclass(frozen=True)
class Latency:
    """Milliseconds of many calls.

    Args:
        cov: standard deviation over mean, per cent.
    """

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    least_ms: float
    greatest_ms: float
    cov: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Of at least one duration.

        Raises:
            ValueError: there is none.
        """
        if not len(seconds):
            raise ValueError("there is nothing to summarise: no call was timed")
        ordered = sorted(1e3 * s for s in seconds)
        mean = statistics.fmean(ordered)
        cov = 100 * statistics.pstdev(ordered) / mean if mean > 0 else 0.0
        middle = statistics.median(ordered)
        return cls(len(ordered), mean, middle, percentile(ordered, 90), percentile(ordered, 99), ordered[0], ordered[-1], cov)  # fmt: skip

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Timing:
    """What `measure` found.

    Args:
        end_to_end: `scores()`: pixels on the host in, scores on the host out.
        device: the work alone, on buffers in place; None where the engine has no `bind`.
        images_per_s: end to end, over the whole duration.
        cpu_ms: CPU time of all threads of this process, per call.
        peak_bytes: largest resident memory of the process meanwhile.
        device_peak_bytes: largest amount that torch's allocator held on the GPU; None on a CPU.
        warnings: why the figures may not be what they seem.
        method: how it was measured.
    """

    runtime: str
    precision: str
    batch: int
    end_to_end: Latency
    device: Latency | None
    images_per_s: float
    cpu_ms: float
    peak_bytes: int
    device_peak_bytes: int | None
    warnings: tuple[str, ...]
    method: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        rounded = {"images_per_s": round(self.images_per_s, 2), "cpu_ms": round(self.cpu_ms, 4)}
        both = {
            "end_to_end": self.end_to_end.to_dict(),
            "device": self.device.to_dict() if self.device else None,
        }
        return {**asdict(self), **both, **rounded, "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Sweep:
    """Timings of growing batches, and the best: the smallest whose rate is within 2 % of the highest.

    Args:
        ended: why there are no more: "done" (all sizes), "rate" (it has fallen), "memory" or "time".
    """

    timings: tuple[Timing, ...]
    best: Timing
    ended: str = "done"


@dataclass(frozen=True)
class Prepared:
    """A call that needs something made first, outside the clock.

    Args:
        make: makes it, and returns what is timed.
    """

    make: Callable[[], Callable[[], Any]]


Call = Callable[[], Any] | Prepared


def ready(call: Call) -> Callable[[], Any]:
    """What is timed of a call; what it needs is made now."""
    return call.make() if isinstance(call, Prepared) else call


Timer = Callable[[Callable[[], Any]], tuple[float, float]]


@dataclass(frozen=True)
class Rounds:
    """What `interleave` found in one process: (rounds,) seconds of each call, on the wall's clock and of CPU time."""

    wall_s: dict[str, np.ndarray]
    cpu_s: dict[str, np.ndarray]

    def log_ratio(self, a: str, b: str, *, cpu: bool = False) -> float:
        """The median over the rounds of ln(a / b); of times too short for their clock, NaN."""
        seconds = self.cpu_s if cpu else self.wall_s
        known = (seconds[a] > 0) & (seconds[b] > 0)
        return float(np.median(np.log(seconds[a][known] / seconds[b][known]))) if known.any() else math.nan


@dataclass(frozen=True)
class Ratio:
    """A ratio of times over several processes, with the interval in which it would fall again."""

    ratio: float
    low: float
    high: float
    processes: int
    confidence: float


@dataclass
class _Calls:
    """One timed pass."""

    seconds: list[float] = field(default_factory=list)
    enqueue_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0


def measure(
    engine: Engine | Callable[[], Any],
    batch: int,
    *,
    warmup_s: float = 0.2,
    duration_s: float = 3.0,
    min_iterations: int = 10,
) -> Timing:
    """Time one batch size, end to end and on the device alone.

    Args:
        engine: an Engine, which gets random pixels; or a function without arguments that handles `batch` images.
        warmup_s: at least so long, and at least once.
        duration_s: least length of each of the two passes.
        min_iterations: calls in each pass, at least.
    """
    reset_peak()
    if isinstance(engine, Engine):
        pixels = random_pixels(engine, batch)
        whole = _timed(lambda: engine.scores(pixels), warmup_s, duration_s, min_iterations)
        alone, gpu = _device_pass(engine, batch, pixels, warmup_s, duration_s, min_iterations)
        name, precision = engine.runtime, engine.precision
    else:
        whole, alone, gpu = _timed(engine, warmup_s, duration_s, min_iterations), None, False
        name, precision = getattr(engine, "__name__", "function"), ""
    end_to_end = Latency.of(whole.seconds)
    device = Latency.of(alone.seconds) if alone else None
    return Timing(
        name,
        precision,
        batch,
        end_to_end,
        device,
        len(whole.seconds) * batch / whole.wall_s,
        1e3 * whole.cpu_s / len(whole.seconds),
        peak_bytes(),
        _gpu_peak() if gpu else None,
        warnings_of(end_to_end, device, alone.enqueue_s if alone else ()),
        _method(warmup_s, duration_s, min_iterations, gpu, alone is not None),
    )


def best_batch(
    engine: Engine, batches: Iterable[int] | None = None, *, budget_s: float = 60.0, falls: float = 2, **how: Any
) -> Sweep:
    """Time growing batch sizes until the rate has fallen twice, memory or time is out, or the largest is done.

    Args:
        batches: sizes; None: powers of two up to the engine's `max_batch`, at most 256.
        budget_s: no further size is begun after so many seconds.
        falls: how often in a row the rate must have fallen; infinity: each size is timed.
        how: for `measure`.
    """
    most = min(engine.max_batch, _LARGEST_SWEPT)
    sizes = list(batches) if batches is not None else [1 << k for k in range(most.bit_length())]
    began, timings, fallen, ended = time.perf_counter(), list[Timing](), 0, "done"
    for size in sizes:
        if timings and (fallen == falls or time.perf_counter() - began > budget_s):
            ended = "rate" if fallen == falls else "time"
            break
        try:
            found = measure(engine, size, **how)
        except (ImgclsError, RuntimeError, MemoryError) as error:
            if not timings or not out_of_memory(error):
                raise
            ended = "memory"
            break
        fallen = fallen + 1 if timings and found.images_per_s < timings[-1].images_per_s else 0
        timings.append(found)
    return Sweep(tuple(timings), best_of(timings), ended)


def best_of(timings: Sequence[Timing]) -> Timing:
    """The smallest batch whose rate is within 2 % of the highest."""
    highest = max(timing.images_per_s for timing in timings)
    return min((t for t in timings if t.images_per_s >= 0.98 * highest), key=lambda t: t.batch)


def wall_and_cpu(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call, and the CPU time that all threads of this process took for it."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    wall = time.perf_counter() - wall
    return wall, time.process_time() - cpu


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    seed: int | None = None,
    warmups: int = 2,
    timer: Timer = wall_and_cpu,
    pause_s: float = 0.0,
) -> Rounds:
    """Call all of them once in each round, in random order.

    Args:
        rounds: those that count.
        seed: seed of the order; None: another one each time.
        warmups: rounds before them that do not.
        timer: gives wall and CPU seconds of a call.
        pause_s: before each call, so that threads which still spin for the last one have gone to sleep.
    """
    order = random.Random(seed)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(warmups + rounds):
        for name in order.sample(list(calls), len(calls)):
            call = ready(calls[name])
            if pause_s:
                time.sleep(pause_s)
            found[name].append(timer(call))
    seconds = {name: np.array(spent[warmups:], np.float64).reshape(-1, 2) for name, spent in found.items()}
    return Rounds({n: both[:, 0] for n, both in seconds.items()}, {n: both[:, 1] for n, both in seconds.items()})


def ratio_interval(per_process: Sequence[float], confidence: float = 0.95, drift: float = DRIFT) -> Ratio:
    """Combine the median log ratios of several processes.

    The ratio is the exponential of their median. The interval is where the ratio of a second run with as many processes
    falls with that confidence: the median -+ t sqrt(2 (c s^2 / n + d^2)), with Student's t of n - 1 degrees of freedom, the
    standard deviation s between processes, 2 because both runs vary, c = pi / 2, the variance of a median relative to that
    of a mean (an upper bound for few normal values), and the drift d, by which a whole run is off and which no number of
    processes in it shows. It is wider than a confidence interval of the ratio itself.

    Args:
        per_process: median ln(a / b) of each process.
        drift: standard deviation of the logarithm of a ratio between runs.

    Raises:
        ValueError: fewer than two processes.
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    n = len(per_process)
    if n < 2:
        raise ValueError(f"an interval needs at least two processes, got {n}")
    middle, deviation = statistics.median(per_process), statistics.stdev(per_process)
    variance = 2 * (math.pi / 2 * deviation**2 / n + drift**2)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(variance)
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), n, confidence)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that `percent` of the sorted values do not exceed, as trtexec picks it: one of them, never between two."""
    exclude = math.floor((1 - percent / 100) * len(ordered) + 1e-9)
    return ordered[max(len(ordered) - 1 - exclude, 0)]


def warnings_of(end_to_end: Latency, device: Latency | None, enqueue_s: Sequence[float] = ()) -> tuple[str, ...]:
    """What trtexec would warn of.

    Args:
        enqueue_s: how long each `replay` took to return, on a GPU; empty elsewhere.
    """
    found = []
    for name, latency in (("end to end", end_to_end), ("on the device", device)):
        if latency and latency.cov > UNSTEADY:
            found.append(
                f"unsteady {name}: the times vary by {latency.cov:.1f} % (more than {UNSTEADY} %): lock the clocks, quieten the machine"
            )  # fmt: skip
    if device and len(enqueue_s):
        enqueue = 1e3 * statistics.median(enqueue_s)
        if enqueue > ENQUEUE_SHARE * device.p50_ms:
            found.append(
                f"bound by enqueueing: handing over the work takes {enqueue:.3f} ms, the work {device.p50_ms:.3f} ms; "
                "use CUDA graphs or larger batches"
            )
        if end_to_end.p50_ms >= 2 * device.p50_ms:
            found.append(
                f"bound by transfers: {end_to_end.p50_ms:.3f} ms end to end, of which {device.p50_ms:.3f} ms compute"
            )
    return tuple(found)


def random_pixels(engine: Engine, batch: int) -> np.ndarray:
    """(batch, S, S, C) uint8 noise, the same each time: black images would spare a processor some power."""
    size = (batch, engine.pixels.size, engine.pixels.size, engine.pixels.channels)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def fill(buffer: Any, pixels: np.ndarray) -> None:
    """Copy pixels into the input of a `Bound`, wherever that is."""
    if isinstance(buffer, np.ndarray):
        np.copyto(buffer, pixels)
    else:
        import torch

        buffer.copy_(torch.from_numpy(pixels))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is out."""
    said = str(error).lower()  # torch on a CPU and ONNX Runtime: "can't allocate memory", "Failed to allocate memory"
    says_so = any(words in said for words in ("out of memory", "allocate memory", "bad_alloc"))
    return getattr(error, "code", "") == "H002" or isinstance(error, MemoryError) or says_so


def reset_peak() -> None:
    """Let the counters of the largest memory begin anew."""
    with suppress(OSError):  # Linux; elsewhere, and where it is forbidden, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    torch = _torch_with_gpu()
    if torch:
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The largest resident memory of this process since `reset_peak`."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _gpu_peak() -> int | None:
    torch = _torch_with_gpu()
    return int(torch.cuda.max_memory_allocated()) if torch else None


def _torch_with_gpu() -> Any:
    """torch if it is loaded and uses a GPU already: asking must not load or start anything."""
    import sys

    torch: Any = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _timed(call: Callable[[], Any], warmup_s: float, duration_s: float, min_iterations: int) -> _Calls:
    _warm(call, warmup_s)
    calls = _Calls()
    cpu, began = time.process_time(), time.perf_counter()
    while len(calls.seconds) < min_iterations or time.perf_counter() - began < duration_s:
        start = time.perf_counter()
        call()
        calls.seconds.append(time.perf_counter() - start)
    calls.wall_s, calls.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return calls


def _warm(call: Callable[[], Any], warmup_s: float) -> None:
    began = time.perf_counter()
    call()
    while time.perf_counter() - began < warmup_s:
        call()


def _device_pass(
    engine: Engine, batch: int, pixels: np.ndarray, warmup_s: float, duration_s: float, min_iterations: int
) -> tuple[_Calls | None, bool]:
    """The pass on buffers in place, and whether they are a GPU's."""
    bind = getattr(engine, "bind", None)
    if bind is None:
        return None, False
    bound: Bound = bind(batch)
    fill(bound.input, pixels)

    def replay() -> None:
        bound.replay()
        bound.wait()

    if not getattr(bound.input, "is_cuda", False):
        return _timed(replay, warmup_s, duration_s, min_iterations), False
    _warm(replay, warmup_s)
    return _cuda_timed(bound, duration_s, min_iterations), True


def _cuda_timed(bound: Bound, duration_s: float, min_iterations: int) -> _Calls:
    """CUDA events around each replay, on the stream that it works on; the host's part of it is timed beside them."""
    import torch

    stream = getattr(bound, "stream", None) or torch.cuda.current_stream()
    calls, began = _Calls(), time.perf_counter()
    while len(calls.seconds) < min_iterations or time.perf_counter() - began < duration_s:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record(stream)
        start = time.perf_counter()
        bound.replay()
        calls.enqueue_s.append(time.perf_counter() - start)
        last.record(stream)
        last.synchronize()
        calls.seconds.append(first.elapsed_time(last) / 1e3)
    calls.wall_s = time.perf_counter() - began
    return calls


def _method(warmup_s: float, duration_s: float, min_iterations: int, gpu: bool, bound: bool) -> dict[str, Any]:
    device = "CUDA events around each replay of bound buffers" if gpu else "call time of each replay of bound buffers"
    return {
        "like": "trtexec",
        "warmup_s": warmup_s,
        "duration_s": duration_s,
        "min_iterations": min_iterations,
        "queries_in_flight": 1,
        "end_to_end": "scores(): copies to and from the device included",
        "device": device if bound else "not measured: the engine has no bind",
    }
