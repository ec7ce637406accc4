"""What the parts of `gpu_check.py` share: rows that are on disk at once, facts of the card, timing by graph replay."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

CARD = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,memory.used"


class Journal:
    """Rows (part, name, value, promise, holds, data) of one part; each is written to `rows.jsonl` and flushed as it comes.

    Args:
        folder: of the results.
        part: its name.
        rehearse: everything runs on the CPU, and small.
        limit_s: what the part may take; it is killed then.
        warm: nothing is to be measured or written: the part runs so that its code is compiled.
    """

    def __init__(self, folder: Path, part: str, *, rehearse: bool, limit_s: float, warm: bool = False) -> None:
        self.folder, self.part, self.small, self.limit_s, self.warm = folder, part, rehearse, limit_s, warm
        self.device = "cpu" if rehearse else "cuda"
        self.began = time.monotonic()

    def row(self, name: str, value: Any, promise: str = "", holds: bool | None = None, **data: Any) -> None:
        """A row for people, printed and written; `data` is for programs."""
        self.write(name, value, promise, holds, **data)
        if not self.warm:
            mark = {True: "ok  ", False: "FAIL", None: "    "}[holds]
            print(f"{mark} {name}: {value}{f'  [{promise}]' if promise else ''}", flush=True)

    def write(self, name: str, value: Any, promise: str = "", holds: bool | None = None, **data: Any) -> None:
        """The same, not printed."""
        if self.warm:
            return
        record = {"part": self.part, "name": name, "value": value, "promise": promise, "holds": holds, "data": data}
        record["seconds"] = round(time.monotonic() - self.began, 1)
        with open(self.folder / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def left(self) -> float:
        """Seconds until this part is killed."""
        return self.limit_s - (time.monotonic() - self.began)


def card() -> dict[str, str]:
    """What nvidia-smi tells about the card now; nothing is set."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    first = (done.stdout.splitlines() or [""])[0]
    return dict(zip(CARD.split(","), (part.strip() for part in first.split(",")), strict=False)) if first else {}


def short(error: BaseException, length: int = 110) -> str:
    """Type and first line of an error."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:length]


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN fails every comparison."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def prepare_compiler() -> None:
    """Let a compiled graph be walked backwards more than once."""
    torch._functorch.config.donated_buffer = False


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- timing -----------------------------------------------------------------------------------------------------------


class Replay:
    """A call on each of several buffers, captured into one CUDA graph; on the CPU, or where capture fails, called directly.

    Args:
        calls: the same work on different memory, larger together than the second-level cache, so that none finds its
            inputs there. The first few are also the warm-up.
        stream: on which everything that the calls use was made.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], stream: Any, device: str) -> None:
        self.calls, self.stream, self.device = list(calls), stream, device
        self.how, self.graph, self.kept = "calls", None, []
        if device != "cuda":
            self.calls[0]()
            return
        with torch.cuda.stream(stream):
            for call in [self.calls[0], *self.calls, *self.calls]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.kept = [call() for call in self.calls]
            self.graph, self.how = graph, "graph"
            self._once()
        except RuntimeError as error:
            self.graph, self.kept, self.how = None, [], f"events, no graph: {short(error, 60)}"
            torch.cuda.synchronize()

    def _once(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()

    def seconds(self) -> float:
        """Of one call, on average over the buffers."""
        if self.device != "cuda":
            began = time.perf_counter()
            self.calls[0]()
            return time.perf_counter() - began
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            begin.record()
            self._once()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(self.calls)


def interleaved(replays: dict[str, Replay], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call for each contender, in rounds that begin with another one every time."""
    names, found = list(replays), {name: [] for name in replays}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            found[name].append(replays[name].seconds())
    return found


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, least and most in microseconds."""
    micro = sorted(1e6 * s for s in seconds)
    return {
        "us": round(statistics.median(micro), 2), "least": round(micro[0], 2), "most": round(micro[-1], 2), "repeats": len(micro)
    }  # fmt: skip


def copy_speed(device: str) -> float:
    """Bytes read and written in a second by a large copy, by events."""
    size = 1 << (24 if device == "cpu" else 30)
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    if device == "cpu":
        began = time.perf_counter()
        b.copy_(a)
        return 2 * size / (time.perf_counter() - began)
    found = []
    for k in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        if k >= 3:
            found.append(begin.elapsed_time(end) / 1e3)
    return 2 * size / statistics.median(found)


def buffers_for(size: int, device: str) -> int:
    """How many buffers of `size` bytes are three times the second-level cache; two at least, eight at most."""
    if device == "cpu":
        return 1
    cache = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20))
    return min(8, max(2, -(-3 * cache // size)))
