"""The Engine protocol, and what engines share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..core.labels import LabelSpace
from ..core.pixels import Pixels

_WIDTH = ("int8", "fp16", "bf16", "tf32", "fp32")  # the wider wins where two are equally frequent


@runtime_checkable
class Engine(Protocol):
    """Pixels in, calibrated probabilities out.

    `scores` takes (N, H, W, C) uint8 (NumPy, or a torch tensor for torch runtimes) and gives (N, K) float32. `max_batch` is
    the most that one pass takes: larger inputs are split and fixed-size batches are padded; callers see neither. `precision` is what the
    runtime really computes in: fp32, tf32, fp16, bf16 or int8. Engines may offer two things more: `bind(batch) -> Bound`, and
    `facts() -> dict` with what `precision` was read from.
    """

    labels: LabelSpace
    pixels: Pixels
    max_batch: int
    thread_safe: bool
    runtime: str
    precision: str

    @property
    def thresholds(self) -> np.ndarray | None:
        """(K,) float32, least scores with which classes of any_of tasks hold; None: 0.5. See `LabelSpace.decide`."""
        ...

    def scores(self, pixels: Any) -> np.ndarray:
        """(N, K) float32 probabilities of (N, H, W, C) uint8 pixels."""
        ...

    def warmup(self, n: int) -> None:
        """Run once at batch size `n`, so that the first answer is not slower than the others."""
        ...

    def close(self) -> None:
        """Free what the runtime holds."""
        ...


class Bound(Protocol):
    """A batch size with its buffers in place, for timing the device alone.

    `input` (batch, H, W, C) uint8 and `output` (batch, K) float32 stay where they are: fill the first, `replay`, `wait`, read
    the second. On a GPU they lie in its memory, `replay` returns at once, and a `stream`, if there is one, is the
    `torch.cuda.Stream` that it works on (else the current one).
    """

    input: Any
    output: Any

    def replay(self) -> None:
        """Score what `input` holds into `output`."""
        ...

    def wait(self) -> None:
        """Return when the last `replay` is done."""
        ...


def score_in_parts(
    score: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, batch: int, columns: int, *, fixed: bool
) -> np.ndarray:
    """(N, K) float32 scores of any N, by a function that takes at most `batch` images, or exactly `batch`.

    Args:
        score: (n, H, W, C) uint8 -> (n, K).
        columns: K.
        fixed: fill the last part up to `batch` with copies of its last image; their scores are dropped.
    """
    parts = []
    for first in range(0, len(pixels), batch):
        part = pixels[first : first + batch]
        real = len(part)
        if fixed and real < batch:
            part = np.concatenate([part, np.repeat(part[-1:], batch - real, 0)])
        parts.append(np.asarray(score(np.ascontiguousarray(part)), np.float32)[:real])
    if not parts:
        return np.zeros((0, columns), np.float32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def least_scores(labels: LabelSpace, thresholds: Sequence[float] | None) -> np.ndarray | None:
    """(K,) float32 of an engine's thresholds; None where there are none.

    Raises:
        ValueError: not one per column.
    """
    if thresholds is None:
        return None
    least = np.asarray(thresholds, np.float32)
    if least.shape != (labels.size,):
        raise ValueError(f"{labels.size} classes need as many thresholds, got {least.shape}")
    return least


def blank(pixels: Pixels, n: int) -> np.ndarray:
    """(n, S, S, C) uint8 black images, for warming up."""
    return np.zeros((n, pixels.size, pixels.size, pixels.channels), np.uint8)


def closed(runtime: str) -> RuntimeError:
    """What an engine raises when it is asked after `close()`: a programmer's mistake."""
    return RuntimeError(f"this {runtime} engine is closed; open another one")


def dominant(counts: Counter[str]) -> str:
    """The precision that most of the multiplying operators run in; the wider one of equals; fp32 where there are none."""
    if not counts:
        return "fp32"
    return max(counts, key=lambda name: (counts[name], _WIDTH.index(name) if name in _WIDTH else len(_WIDTH)))
