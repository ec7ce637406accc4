"""Measures how fast the engines of a run are on this machine, and what they are worth: `imgcls-fast bench`.

The result, also in bench/efficiency.json of the run; times in ms, rates in images per second, None where a figure is unknown:

    schema      1
    run         folder of the run
    model       arch, parameters, macs, flops (of one image; 1 MAC = 2 FLOPs), convention, input [S, S, C], classes, bundle_bytes
    engines     one dict for each, torch first:
        name, runtime, device, precision (what it computes in), file_precision, export (folder name), bytes, gate (verdict), facts
        latency         `engines.timing.Timing` at batch 1: end_to_end, device (p50_ms, p90_ms, p99_ms, ...), cpu_ms, warnings, ...
        sweep           timings (batch, images_per_s, p50_ms, p99_ms), ended (done, rate, memory, time)
        best            batch, images_per_s: the smallest batch within 2 % of the highest rate
        accuracy        accuracy, low, high, hits, rows, split; figure where it is not the accuracy but the exact match
        agreement       same_top1, rows, share, max_score_diff, images (the split, or noise): with torch
        ratio           ratio, low, high, cpu_ratio, per_process, processes, pairs, confidence: time of it over time of torch
        not_compared    why `ratio` is None
    data        loader, workers, batch, decode_images_per_s, engines (name, images_per_s, alone_images_per_s, limit: loader, model, both,
                contention), line
    absent      name, reason, remedy of what was not timed
    machine     cpu, cpus, gpu, slug, device, threads, date, load (runnable processes when it began), others (cores that
                other processes used meanwhile), libraries, ...
    method      how the times were taken
    notices     sentences that belong to the figures
    undecodable_files  path and reason of each image that could not be judged on
    tables      heads and rows, twice: the same for people, how fast and worth what
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import env
from ..core.bundle import Bundle, read_bundle
from ..core.errors import ConfigError, ExportError, HardwareError, ImgclsError, ModelError, near
from ..core.files import demand_writable, write_json
from ..core.run import EFFICIENCY_SCHEMA, Run
from ..core.text import command
from ..engines.as_found import as_found
from ..engines.base import Engine
from ..engines.timing import UNSTEADY, best_batch, best_of, measure, out_of_memory
from ..models.build import ModelSpec, build_model
from .contenders import KINDS, REFERENCE, Absent, Contender, contenders_of
from .quality import Sample, accuracy_of, agreement_of, sample_of, why_not
from .race import PAIRS, PROCESSES, START_S, ratios
from .tables import efficiency_tables
from .throughput import data_rates

_LARGEST = 256  # batch of a sweep
_SWEEP: dict[str, Any] = {"duration_s": 0.15, "warmup_s": 0.1, "min_iterations": 3}
_SWEEP_S = 8.0  # no larger batch is begun after so long; compiling takes its own time
_COMPILE_S = 300.0
_BUSY = 0.1  # share of the cores that others use
_Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Task:
    """What is the same for all engines."""

    run: Run
    bundle: Bundle
    device: str
    threads: int
    batches: tuple[int, ...]
    duration_s: float


@as_found()
def examine(
    run: Run,
    export: Path | None,
    *,
    runtimes: tuple[str, ...],
    batches: tuple[int, ...],
    duration_s: float,
    device: str,
    out: Path | None,
    say: Say,
    trust: bool = False,
) -> dict[str, Any]:
    """Time the engines of a run one after the other, compare each with torch, judge them, and write efficiency.json.

    Args:
        run: a finished one.
        export: folder of the one export that is timed beside torch; None: all.
        runtimes: only these; empty: all that are here, but compile.
        batches: sizes; empty: powers of two until the rate falls.
        duration_s: seconds per timing at batch 1 and at the given sizes, half end to end and half on the device alone.
        device: "cpu" or "cuda[:n]".
        out: also write the result there.
        say: called with sentences about what happens.
        trust: also open native code of others, where `export` or `runtimes` names it.

    Returns:
        See the top of this file.

    Raises:
        ConfigError: C003 for an unknown runtime, batch or duration, C004 for an export that the runtimes do not read.
        ModelError: M004, M005; ExportError: E001, E005, E006 of the one export; HardwareError: H001, H003.
    """
    _check(runtimes, batches, duration_s, device)
    if not run.finished:
        raise ModelError("M005", f"{run.directory} is not finished", try_=run.resume_command)
    run.demand_own_places()
    demand_writable(run.efficiency_path.parent)
    bundle, name = read_bundle(run.bundle_path), str(run.directory)
    contenders, absent = contenders_of(bundle, run.exports, run=name, runtimes=runtimes, only=export, trust=trust)
    if export is not None and len(contenders) == 1:
        raise _nothing_reads(export, absent, runtimes)
    task = _Task(run, bundle, device, torch.get_num_threads(), batches, duration_s)
    machine, method, others = _machine(task), _method(task), _Others()
    names = ", ".join(contender.name for contender in contenders)
    longer = "and much longer for compiling" if "compile" in runtimes else "longer for a slow model"
    say(f"timing {names}: about {_estimate_s(task, len(contenders)):.0f} s, {longer}")
    sample = sample_of(run, bundle)
    timed, missing = _all_timed(contenders, task, sample, strict=export is not None)
    rows = [row for _, row in timed]
    _compare([contender for contender, _ in timed], rows, task, say)
    fastest = max(timed, key=lambda pair: pair[1]["best"]["images_per_s"])
    machine["others"] = others.cores()
    data = data_rates(run, bundle, {c.name: (c, row) for c, row in (timed[0], fastest)}, device, task.threads)
    method["like"] = rows[0]["latency"]["method"]
    found: dict[str, Any] = {
        "schema": EFFICIENCY_SCHEMA,
        "run": name,
        "model": _model(bundle),
        "engines": rows,
        "data": data,
        "absent": [asdict(entry) for entry in [*absent, *missing]],
        "machine": machine,
        "method": method,
        "notices": _notices(rows, sample, machine),
        "tables": efficiency_tables(rows),
        "undecodable_files": sample.undecoded.to_list(),
    }
    found = _finite(found)
    for path in (run.efficiency_path, *([] if out is None else [out])):
        write_json(path, found)
    return found


# ---------------------------------------------------------------- what is asked for


def _check(runtimes: tuple[str, ...], batches: tuple[int, ...], duration_s: float, device: str) -> None:
    for runtime in runtimes:
        if runtime not in KINDS:
            legal, guess = ", ".join(map(repr, KINDS)), near(runtime, KINDS) or REFERENCE
            raise ConfigError("C003", f"runtime must be one of {legal}, got {runtime!r}", try_=f"--runtime {guess}")
    for size in batches:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError("C003", f"a batch must be a whole number >= 1, got {size!r}", try_="--batch-size 8")
    if not (duration_s > 0 and math.isfinite(duration_s)):
        raise ConfigError(
            "C003", f"the duration must be a number of seconds > 0, got {duration_s}", try_="--duration 3s"
        )
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError("C003", f"device must be 'cpu' or 'cuda', got {device!r}", try_="--device cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise HardwareError("H001", f"device is {device}, and no usable GPU was found", try_="--device cpu")


def _nothing_reads(export: Path, absent: list[Absent], runtimes: tuple[str, ...]) -> ImgclsError:
    if absent:
        return ExportError("E001", absent[0].reason, try_="imgcls-fast bench RUN")
    named = " and ".join(runtimes)
    return ConfigError("C004", f"{named} cannot read {export}", try_=command("bench", export))


def _estimate_s(task: _Task, engines: int) -> float:
    sweep = len(task.batches) * task.duration_s if task.batches else 4.0
    compared = PROCESSES * START_S if engines > 1 else 0.0
    return engines * (task.duration_s + sweep + 0.5) + compared + 8


# ---------------------------------------------------------------- one engine


class _EndToEnd:
    """An engine without `bind`: all that is timed is what a caller of `scores` waits for."""

    def __init__(self, engine: Engine) -> None:
        self.labels, self.pixels, self.max_batch = engine.labels, engine.pixels, engine.max_batch
        self.thread_safe, self.runtime, self.precision = engine.thread_safe, engine.runtime, engine.precision
        self.thresholds = engine.thresholds
        self.scores, self.warmup, self.close = engine.scores, engine.warmup, engine.close


def _all_timed(
    contenders: list[Contender], task: _Task, sample: Sample, *, strict: bool
) -> tuple[list[tuple[Contender, _Row]], list[Absent]]:
    """A row for each that can be opened, and why the others cannot.

    Args:
        strict: raise what keeps the last one from being timed.
    """
    timed: list[tuple[Contender, _Row]] = []
    missing: list[Absent] = []
    said: np.ndarray | None = None  # (N, K) scores of the reference
    for contender in contenders:
        try:
            row, scores = _timed(contender, task, sample, said)
        except (ImgclsError, RuntimeError, MemoryError) as error:
            known = isinstance(error, ImgclsError)
            if contender.runtime == REFERENCE or not (known or out_of_memory(error)):
                raise
            if strict and len(timed) == 1 and contender is contenders[-1]:
                raise
            why = error if isinstance(error, ImgclsError) else HardwareError("H002", "out of memory at batch 1")
            missing.append(Absent.of(contender.name, why))
            continue
        said = scores if said is None else said
        row["not_compared"] = why_not(contender, row, timed[0][1] if timed else None)
        timed.append((contender, row))
    return timed, missing


def _timed(contender: Contender, task: _Task, sample: Sample, said: np.ndarray | None) -> tuple[_Row, np.ndarray]:
    """Everything about one engine but its ratio, and its (N, K) scores of the sample.

    Args:
        said: the scores of the reference; None: it is the reference.
    """
    engine = contender.open(task.bundle, task.device, task.threads)
    try:
        # a file of one batch size binds no other
        one = measure(_EndToEnd(engine) if contender.fixed else engine, 1, duration_s=task.duration_s / 2)
        sweep = _sweep(contender, engine, task, one)
        scores = np.concatenate([engine.scores(part) for part in sample.pixels])
        export = contender.export
        return {
            "name": contender.name,
            "runtime": contender.runtime,
            "device": str(getattr(engine, "device", "cuda" if contender.runtime == "trt" else "cpu")),
            "precision": engine.precision,
            "file_precision": contender.file_precision,
            "export": export.folder.name if export else None,
            "bytes": export.meta.get("bytes") if export else task.bundle.weights.stat().st_size,
            "gate": (export.gate or {}).get("verdict") if export else None,
            "facts": engine.facts() if hasattr(engine, "facts") else {},
            "latency": one.to_dict(),
            **sweep,
            "accuracy": accuracy_of(scores, sample),
            "agreement": None if said is None else agreement_of(scores, said, sample),
            "ratio": None,
        }, scores
    finally:
        engine.close()


def _sweep(contender: Contender, engine: Engine, task: _Task, one: Any) -> dict[str, Any]:
    """The rates of the given batches, or of growing ones; `one` is the timing of a single image."""
    sizes = [size for size in dict.fromkeys(task.batches) if size != 1]
    how: dict[str, Any] = {"duration_s": task.duration_s, "budget_s": math.inf, "falls": math.inf}
    if not task.batches:
        most = min(engine.max_batch, _LARGEST)
        sizes = [contender.fixed] if contender.fixed else [1 << k for k in range(1, most.bit_length())]
        how = {**_SWEEP, "budget_s": _COMPILE_S if contender.runtime == "compile" else _SWEEP_S}
    timings, ended = [one] if 1 in task.batches or not task.batches else [], "done"
    try:
        if sizes:
            found = best_batch(_EndToEnd(engine), sizes, **how)
            timings, ended = [*timings, *found.timings], found.ended
    except (ImgclsError, RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        timings, ended = timings or [one], "memory"
    best = best_of(timings)
    listed = [
        {
            "batch": t.batch,
            "images_per_s": round(t.images_per_s, 2),
            "p50_ms": t.end_to_end.p50_ms,
            "p99_ms": t.end_to_end.p99_ms,
        }
        for t in timings
    ]
    return {
        "sweep": {"timings": listed, "ended": ended},
        "best": {"batch": best.batch, "images_per_s": round(best.images_per_s, 2)},
    }


# ---------------------------------------------------------------- against torch


def _compare(contenders: list[Contender], rows: list[_Row], task: _Task, say: Say) -> None:
    """Fill in the ratios."""
    kept = [contender for contender, row in zip(contenders, rows, strict=True) if not row["not_compared"]]
    if len(kept) < 2:
        return
    calls_s = sum(row["latency"]["end_to_end"]["p50_ms"] for row in rows) / 1e3 * (PAIRS + 2)
    if calls_s > 2:
        say(f"comparing in {PROCESSES} fresh processes: about {PROCESSES * (calls_s + START_S):.0f} s")
    found, failed = ratios(kept, task.bundle, task.device, task.threads)
    for row in rows:
        if not row["not_compared"] and row["name"] != REFERENCE:
            row["ratio"], row["not_compared"] = found.get(row["name"]), failed or None


# ---------------------------------------------------------------- facts


def _model(bundle: Bundle) -> dict[str, Any]:
    macs, parameters = counted(bundle)
    pixels = bundle.pixels
    return {
        "arch": bundle.arch.get("arch"),
        "parameters": parameters,
        "macs": macs,
        "flops": 2 * macs,
        "convention": "1 MAC = 2 FLOPs; convolutions, linear layers and attention of one image, nothing else",
        "input": [pixels.size, pixels.size, pixels.channels],
        "classes": bundle.labels.size,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.directory.rglob("*") if path.is_file()),
    }


def counted(bundle: Bundle) -> tuple[int, int]:
    """Multiply-accumulates of one image, and parameters."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(ModelSpec.from_dict(bundle.arch)).eval()  # without our kernels, which the counter does not know
    size, channels = bundle.pixels.size, bundle.pixels.channels
    # it does not know the fused attention of a CPU either, nor the fast path of nn.MultiheadAttention without gradients
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model(torch.zeros((1, size, size, channels), dtype=torch.uint8))
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters())


class _Others:
    """How much of the machine other processes use, from now on."""

    def __init__(self) -> None:
        self._before = self._now()

    def cores(self) -> float | None:
        """Cores, on average; None where the system does not report it."""
        wall, others = (after - before for after, before in zip(self._now(), self._before, strict=True))
        return round(max(others / wall, 0.0), 2) if math.isfinite(others) else None

    def _now(self) -> tuple[float, float]:
        busy = env.busy_s()
        return time.monotonic(), math.nan if busy is None else busy - sum(os.times()[:4])


def _machine(task: _Task) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(task.device) if task.device.startswith("cuda") else None
    facts = {"gpu": gpu, "slug": env.machine_slug(gpu), "device": task.device, "threads": task.threads}
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return env.machine_facts() | facts | {"load": round(os.getloadavg()[0], 2), "date": date}


def _method(task: _Task) -> dict[str, Any]:
    return {
        "latency": "one image at a time, each timing as in trtexec",
        "sweep": {"batches": list(task.batches) or "powers of two", **({} if task.batches else _SWEEP)},
        "ratio": f"all engines in turns, in random order, {PAIRS} rounds in each of {PROCESSES} fresh processes, batch 1",
        "interval": "where the ratio of a second such run falls with 95 % confidence",
    }


def _notices(rows: Iterable[_Row], sample: Sample, machine: dict[str, Any]) -> list[str]:
    rows, found = list(rows), [sample.undecoded.sentence()] if sample.undecoded else []
    if (machine["others"] or 0) > _BUSY * machine["cpus"]:
        found.append(
            f"the machine was busy: other processes used {machine['others']:.1f} of {machine['cpus']} cores meanwhile; time again on a "
            "quiet one"
        )
    unsteady = [row["name"] for row in rows if any(text.startswith("unsteady") for text in row["latency"]["warnings"])]
    if unsteady:
        found.append(
            f"times vary by more than {UNSTEADY} % ({', '.join(unsteady)}): quieten the machine, or lock its clocks; the intervals of "
            "the ratios hold that"
        )
    found += [
        f"{row['name']}: {text}"
        for row in rows
        for text in row["latency"]["warnings"]
        if not text.startswith("unsteady")
    ]
    found += [f"{row['name']} is not compared: {row['not_compared']}" for row in rows if row["not_compared"]]
    ends = {"memory": "no memory for more", "time": "no time for more"}
    found += [
        f"{row['name']}: the largest batch was {row['sweep']['timings'][-1]['batch']}, {ends[row['sweep']['ended']]}"
        for row in rows
        if row["sweep"]["ended"] in ends
    ]
    if sample.targets is None:
        found.append("no labelled test or val image can be read: accuracy is unknown, and agreement is that on noise")
    elif len(sample.targets) < sample.of:
        found.append(
            f"accuracy and agreement are those on {len(sample.targets):,} of {sample.of:,} {sample.split} images"
        )
    return found


def _finite(value: Any) -> Any:
    """The same value as JSON can hold it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
