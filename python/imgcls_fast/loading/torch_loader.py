"""Loads images everywhere: with Pillow in worker processes, one whole batch per task."""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as KeySampler

from ..core.batch import Batch
from ..core.errors import DataError, HardwareError
from ..data import reach
from ..data.quarantine import examine_isolated
from . import handover
from .backend import OnBad, decode_batch, make_batch, report
from .sampler import Sampler

_PATIENCE = 3  # deaths of workers in a row that no file explains
_DEATH = re.compile(r"DataLoader worker \(pid")
_log = logging.getLogger("imgcls_fast")


class _Batches(Dataset):
    """Key (epoch, index, bad rows) -> a finished batch, the error that ends the epoch, or why it cannot be handed over.

    Lives in the workers.
    """

    def __init__(self, sampler: Sampler, called_off: Any, way: handover.Way, threads: int) -> None:
        self.sampler, self._called_off = sampler, called_off
        self._way, self._threads = way, threads
        self._patience: reach.Patience | None = None  # of this process: its lock stays in it

    def __getitem__(self, key: tuple[int, int, frozenset[int]]) -> tuple[Batch, dict[int, str]] | dict[str, str] | str:
        request = self.sampler.request(*key)
        self._patience = self._patience or reach.Patience(self._called_off)
        try:
            pixels, delivered, failed = decode_batch(
                self.sampler, request, threads=self._threads, patience=self._patience
            )
        except DataError as error:  # as plain values: an exception would cross the process border as mere text
            return error.to_dict()
        batch = handover.hand_over(make_batch(self.sampler.manifest, delivered, pixels), self._way)
        return batch if isinstance(batch, str) else (batch, failed)


class _Keys(KeySampler):
    """The keys of the epoch that was asked for, made while the DataLoader hands out the work."""

    def __init__(self, sampler: Sampler, bad: dict[int, str]) -> None:
        self._sampler, self._bad = sampler, bad
        self.epoch, self.steps = 0, range(0)

    def __iter__(self) -> Iterator[Any]:
        for index in self.steps:
            # workers remember nothing: a row that was found bad stays bad, also when its file is repaired meanwhile
            in_batch = self._sampler.rows_of(self.epoch, index) if self._bad else ()
            yield self.epoch, index, frozenset(int(row) for row in in_batch if int(row) in self._bad)

    def __len__(self) -> int:
        return len(self.steps)


class TorchLoader:
    """Loader that decodes with Pillow in `workers` processes, which live as long as it does. See `backend.Loader`.

    A worker that dies, of an image or otherwise, is survived: the files of the batches in flight are examined one by
    one in a child, what is bad is named, and new workers go on at the batch that was not delivered.

    Where shared memory is too small for the batches, before or during an epoch, they come through pipes, and where there
    can be no workers, images are decoded in threads; a warning names the reason. No bit depends on it.
    """

    def __init__(
        self, sampler: Sampler, workers: int, bad: dict[int, str], on_bad: OnBad | None, *, pin: bool = False
    ) -> None:
        self.sampler, self.bad, self._on_bad = sampler, bad, on_bad
        self._workers, self._pin = workers, pin
        pixels = sampler.pixels
        self._way, reason = handover.choose_way(sampler.batch_size, pixels.size, pixels.channels, workers)
        if reason:
            _warn(handover.consequence(self._way, reason))
        self._keys = _Keys(sampler, bad)
        self._called_off, self._room = handover.shared_values(self._way)
        self._loader: Any = self._open()
        # also at the end of the process, before multiprocessing waits for its children
        self._stop = weakref.finalize(self, _stop_workers, self._loader)

    def _open(self) -> Any:
        workers = self._workers if self._way != "threads" else 0
        if workers:
            _spare_children()
        return DataLoader(
            _Batches(self.sampler, self._called_off, self._way, 1 if workers else max(1, self._workers)),
            batch_size=None,
            sampler=self._keys,
            num_workers=workers,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            prefetch_factor=handover.AHEAD if workers else None,
            pin_memory=self._pin and self._way != "pipes",  # those are pinned when they have become tensors
            worker_init_fn=functools.partial(_start_worker, room=self._room),
            generator=torch.Generator().manual_seed(0),  # else the global generator would be drawn from each epoch
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        index, deaths = start, 0
        while index < self.sampler.steps:
            self._keys.epoch, self._keys.steps = epoch, range(index, self.sampler.steps)
            made = self._made()
            while True:
                try:
                    item = next(made, None)
                except (RuntimeError, OSError) as error:
                    if self._changed_way(error):
                        break
                    if not _DEATH.search(str(error)):
                        raise
                    deaths = 0 if self._find_culprits(epoch, index) else deaths + 1
                    self._restart(error, deaths)
                    break
                if item is None:
                    return
                if isinstance(item, str):
                    self._go_by("pipes", item)
                    break
                yield self._received(item, epoch)
                index, deaths = index + 1, 0

    def _changed_way(self, error: Exception) -> bool:
        """Whether an error means that batches cannot come as they did; from now on they come in another way."""
        text = handover.reason_left(self._room) or str(error)
        workers = getattr(getattr(self._loader, "_iterator", None), "_workers", ())
        if any(worker.exitcode == -signal.SIGBUS for worker in workers):
            text = "a decoding process died of a bus error, as it does when shared memory runs out"
        if self._way != "shared" or not handover.is_failed_sharing(text):
            return False
        self._go_by("pipes", handover.shortened(text))
        return True

    def _go_by(self, way: handover.Way, reason: str) -> None:
        _warn(handover.consequence(way, reason))
        self._stop()
        self._way = way
        self._loader = self._open()
        self._stop = weakref.finalize(self, _stop_workers, self._loader)

    def _made(self) -> Iterator[Any]:
        """Return the DataLoader's iterator, without its signal handler.

        That would raise the death of a worker wherever the main thread stands; `next` finds it as well, in order.
        """
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main else None
        try:
            made = iter(self._loader)
        except OSError as error:
            if self._way == "threads":
                raise
            self._go_by("threads", handover.no_processes(error))
            made = iter(self._loader)
        if main and before is not None:
            signal.signal(signal.SIGCHLD, before)
        return made

    def _received(self, made: Any, epoch: int) -> Batch:
        if isinstance(made, dict):
            raise DataError(made["code"], made["message"], where=made["where"], why=made["why"], try_=made["try"])
        batch, failed = made
        report(failed, epoch, self.bad, self._on_bad)
        return handover.received(batch, self._way, pin=self._pin)

    def _find_culprits(self, epoch: int, index: int) -> bool:
        """Examine the files that the workers may have been at; return whether one was found bad.

        Raises:
            DataError: D015 when a file cannot be reached.
        """
        last = min(self.sampler.steps, index + self._workers * handover.AHEAD)
        rows = {int(row) for at in range(index, last) for row in self.sampler.rows_of(epoch, at)} - self.bad.keys()
        store, root = self.sampler.store, self.sampler.manifest.root
        names = self.sampler.manifest.paths[sorted(rows)]
        limit, at_once = self.sampler.pixels.max_megapixels, max(1, self._workers)
        verdicts = examine_isolated(names, root=root, max_megapixels=limit, workers=at_once)
        for name, verdict in zip(names, verdicts, strict=True):
            if verdict.unreachable:
                raise reach.unreachable(store.where(name), OSError(verdict.reason))
        found = {row: verdict.reason for row, verdict in zip(sorted(rows), verdicts, strict=True) if not verdict.ok}
        report(found, epoch, self.bad, self._on_bad)
        return bool(found)

    def _restart(self, error: Exception, deaths: int) -> None:
        """Start new workers.

        Raises:
            HardwareError: H002 after the third death in a row that no file explains.
        """
        self._stop()
        if deaths >= _PATIENCE:
            raise HardwareError(
                "H002",
                f"decoding processes die again and again: {' '.join(str(error).split())}",
                why="no image explains it; the system ends processes when memory or shared memory (/dev/shm) runs out",
                try_="--workers 0",
            ) from error
        _log.warning("a decoding process died (%s): starting new ones", " ".join(str(error).split()))
        self._loader = self._open()
        self._stop = weakref.finalize(self, _stop_workers, self._loader)

    def hurry(self) -> None:
        self._called_off.value = 1

    def close(self) -> None:
        self.hurry()
        self._stop()
        self._loader = None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _stop_workers(loader: Any) -> None:
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


@functools.cache
def _spare_children() -> None:
    """Forked processes collect no garbage of this one.

    A DALI pipeline without a reference may wait here for the collector. Collected in a worker, it waits for ever for the end of
    threads that a fork does not copy. What others do in a worker before it freezes the garbage may collect as well, so the
    collector stands still from before the fork.
    """
    enabled = [True]

    def before() -> None:
        enabled[0] = gc.isenabled()
        gc.disable()

    def after() -> None:
        if enabled[0]:
            gc.enable()

    def in_child() -> None:
        gc.freeze()
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=in_child)


def _start_worker(worker: int, room: Any) -> None:
    """A worker decodes on one thread and leaves signals to the main process.

    Service managers send SIGTERM to the whole group; a worker that dies of it makes the main process fail wherever it
    stands, instead of saving at the next step. Workers end when the loader is closed, or when their parent is gone.
    """
    torch.set_num_threads(1)
    handover.end_when_feeding_fails(room)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item
