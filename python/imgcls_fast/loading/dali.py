"""Loads images with NVIDIA DALI: the sampler draws every crop, DALI only decodes, resizes and flips.

`reading.py` gives it files that it decodes as Pillow does, `dali_graph.py` holds what it does to them. What it refuses
nevertheless goes to Pillow as well: the pipeline is rebuilt at the next undelivered batch, which needs no saved state
because the sampler is a pure function.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..core.batch import Batch
from ..data.decode import Undecodable
from .backend import OnBad, fill, make_batch, report
from .dali_graph import Graph
from .reading import Reader, Work
from .sampler import Request, Sampler


class DaliLoader:
    """Loader on DALI (see `backend.Loader`). `dali-cpu` decodes on `workers` threads; `dali-gpu` on the GPU, and delivers there."""

    def __init__(
        self,
        sampler: Sampler,
        backend: str,
        workers: int,
        bad: dict[int, str],
        on_bad: OnBad | None,
        *,
        device: str,
        once: bool,
    ) -> None:
        self.sampler, self.bad, self._on_bad = sampler, bad, on_bad
        self._gpu = backend == "dali-gpu"
        threads = max(1, workers)
        self._graph = Graph(sampler, threads, _gpu_index(device) if self._gpu else None)
        self._reader = Reader(sampler, threads, bad.keys(), once=once)
        self._ahead: deque[Work] = deque()  # at DALI, not yet delivered
        self._pipeline: Any = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, self.sampler.steps):
            yield self._batch(epoch, index)

    def hurry(self) -> None:
        self._reader.patience.call_off()

    def close(self) -> None:
        self.hurry()  # else the threads go on waiting for files
        self._stop()
        self._reader.close()

    def _stop(self) -> None:
        """Forget the pipeline and everything that is on its way."""
        self._pipeline = None
        self._reader.forget()
        self._ahead.clear()

    def _build(self, place: tuple[int, int]) -> None:
        self._stop()
        self._pipeline = self._graph.pipeline(self._source)
        self._reader.start(place)

    def _source(self) -> list[list[np.ndarray]]:
        work = self._reader.take()
        if work is None:
            raise StopIteration
        encoded = work.encoded()
        self._ahead.append(work)
        return self._graph.arguments(work.request, encoded)

    # delivery
    def _batch(self, epoch: int, index: int) -> Batch:
        """Return one batch; rebuild the pipeline when it stands elsewhere, and after each failure of DALI's."""
        place = (epoch if self.sampler.training else 0, index)
        asked, again = time.monotonic(), False
        for _ in range(self.sampler.batch_size + 3):  # each round but the last finds at least one row for Pillow
            if self._pipeline is None or not self._ahead or self._ahead[0].place != place:
                self._build(place)
            try:
                outputs = self._pipeline.run()
            except RuntimeError as error:
                in_flight = [work.request for work in self._ahead]
                self._stop()
                self._find_refused(in_flight, str(error))
                continue
            work = self._ahead.popleft()
            if work.error is None:
                if again:
                    self._reader.patience.over()
                return self._deliver(work, outputs, epoch)
            self._stop()
            if again or work.given_up >= asked:
                raise work.error
            again = True  # it was read ahead, perhaps long ago, behind the end of the epoch before
        raise RuntimeError(f"DALI failed again and again at epoch {epoch}, batch {index}")

    def _deliver(self, work: Work, outputs: Any, epoch: int) -> Batch:
        pixels: Any = _on_gpu(outputs[0]) if self._gpu else outputs[0].as_array()
        for position, made in work.made.items():
            pixels[position] = _like(made, pixels)
        rows = work.request.rows
        failed = {int(rows[position]): reason for position, reason in work.failed.items()}
        report(failed, epoch, self.bad, self._on_bad)
        # a row that was found bad meanwhile stays bad, also when its file was repaired before this batch read it
        bad = np.fromiter((row in self.bad for row in rows.tolist()), bool, len(rows))
        request = work.request.refilled(bad)
        return make_batch(self.sampler.manifest, request, fill(pixels, request))

    # recovery
    def _find_refused(self, requests: list[Request], message: str) -> None:
        """Find the rows of the batches in flight that made DALI fail: from now on they are Pillow's.

        Raises:
            DataError: D015 when a file cannot be reached.
            RuntimeError: no row is to blame, so the failure is not about a file.
        """
        rows = np.unique(np.concatenate([request.rows for request in requests] or [np.zeros(0, np.int64)]))
        reader, pipeline = self._reader, None
        before = len(reader.refused)
        for row in rows[rows >= 0].tolist():
            try:
                content = reader.content(row)
            except Undecodable:
                continue  # found again when its batch is read again
            if not reader.is_for_dali(row, content):
                continue
            pipeline = pipeline or self._graph.single()
            pipeline.feed_input("file", [np.frombuffer(content, np.uint8)])
            try:
                pipeline.run()
            except RuntimeError:
                pipeline = None  # DALI does not go on after an error
                reader.refused.add(row)
        if len(reader.refused) == before:
            raise RuntimeError(f"DALI failed, and every file of the batch is readable: {message}")


def _gpu_index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _on_gpu(images: Any) -> Any:
    import torch

    return torch.from_dlpack(images.as_tensor()).clone()  # DALI reuses the buffer


def _like(made: np.ndarray, pixels: Any) -> Any:
    if isinstance(pixels, np.ndarray):
        return made
    import torch

    return torch.from_numpy(made).to(pixels.device)
