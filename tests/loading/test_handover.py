"""Batches come whole, in order and with the same bits, however little shared memory there is; no lost one is waited for."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import heap, queues
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core.batch import Batch
from imgcls_fast.loading import handover

FULL = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"


@pytest.fixture
def sampler(kit: Any, tmp_path: Path, photo: Any) -> Any:
    names = [f"{k}.jpg" for k in range(8)]
    for k, name in enumerate(names):
        photo(k).save(tmp_path / name)
    return kit.sampler(kit.manifest(tmp_path, names), 2, kit.strong)


def run(kit: Any, sampler: Any, workers: int = 2) -> tuple[list[Any], Any]:
    loader = kit.open(sampler, "torch", workers)
    try:
        return kit.epochs(loader, 0, 1), loader
    finally:
        loader.close()


def test_what_is_needed_counts_every_batch_that_may_be_ready() -> None:
    assert handover.bytes_needed(batch_size=128, size=224, channels=3, workers=4) == 128 * 224 * 224 * 3 * (4 * 2 + 2)


@pytest.mark.parametrize("free", [None, 10**9])
def test_room_enough_or_without_a_bound_is_used(free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "free_bytes", lambda: free)
    assert handover.choose_way(32, 224, 3, 4) == ("shared", "")


def test_too_little_shared_memory_is_found_before_and_batches_come_through_pipes(
    kit: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(kit, sampler, 0)
    monkeypatch.setattr(handover, "free_bytes", lambda: 1000)
    with pytest.warns(UserWarning, match=r"/dev/shm has 0 MB free.*pipes.*--shm-size") as told:
        batches, loader = run(kit, sampler)
    assert loader._way == "pipes" and len(told) == 1
    kit.assert_same(batches, expected)


def test_without_locks_and_shared_memory_images_are_decoded_in_threads(
    kit: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock() -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    expected, _ = run(kit, sampler, 0)
    monkeypatch.setattr(handover, "SHARED_MEMORY", Path("/nowhere/shm"))
    monkeypatch.setattr(multiprocessing, "Lock", no_lock)
    monkeypatch.setattr(heap.Arena, "_dir_candidates", ["/nowhere/shm"])
    monkeypatch.setattr(heap.BufferWrapper, "_heap", heap.Heap())
    with pytest.warns(UserWarning, match="there is no /nowhere/shm, not even for a lock.*threads of this process"):
        batches, loader = run(kit, sampler)
    assert loader._way == "threads"
    kit.assert_same(batches, expected)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOSPC], ids=errno.errorcode.get)
def test_where_no_process_can_be_started_images_are_decoded_in_threads(
    kit: Any, sampler: Any, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    expected, _ = run(kit, sampler, 0)
    monkeypatch.setattr(multiprocessing.context.ForkProcess, "_Popen", refused)
    with pytest.warns(UserWarning, match="threads of this process"):
        batches, loader = run(kit, sampler)
    assert loader._way == "threads"
    kit.assert_same(batches, expected)


def test_shared_memory_that_fills_up_meanwhile_changes_the_way_and_no_bit(
    kit: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(kit, sampler, 0)
    shared = torch.Tensor.share_memory_
    made: list[int] = []

    def filling(self: torch.Tensor) -> torch.Tensor:  # forked workers count for themselves
        made.append(1)
        if len(made) > 6:
            raise RuntimeError(FULL)
        return shared(self)

    monkeypatch.setattr(torch.Tensor, "share_memory_", filling)
    with pytest.warns(UserWarning, match=r"No space left.*batches go through pipes"):
        batches, loader = run(kit, sampler)
    assert loader._way == "pipes"
    kit.assert_same(batches, expected)


class Unsendable(Batch):
    """Fails in the thread that feeds the queue."""

    def __reduce__(self) -> Any:
        raise RuntimeError(FULL)


@pytest.mark.slow
def test_a_batch_that_is_lost_in_the_feeding_thread_ends_its_worker_and_is_not_waited_for(
    kit: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(kit, sampler, 0)
    real = handover.hand_over
    lose = lambda batch, way: Unsendable(*vars(batch).values()) if way == "shared" else real(batch, way)  # noqa: E731
    monkeypatch.setattr(handover, "hand_over", lose)
    with pytest.warns(UserWarning, match="No space left.*pipes"):
        batches, _ = run(kit, sampler)
    kit.assert_same(batches, expected)
    assert queues.Queue._on_queue_feeder_error.__module__ == "multiprocessing.queues"  # of this process: as it was


@pytest.mark.slow
def test_a_worker_that_dies_of_a_bus_error_changes_the_way(
    kit: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(kit, sampler, 0)
    real = handover.hand_over

    def dying(batch: Batch, way: handover.Way) -> Any:
        if way == "shared":
            os.kill(os.getpid(), signal.SIGBUS)
        return real(batch, way)

    monkeypatch.setattr(handover, "hand_over", dying)
    with pytest.warns(UserWarning, match="bus error.*pipes"):
        batches, _ = run(kit, sampler)
    kit.assert_same(batches, expected)


def test_the_way_out_is_that_of_what_is_short() -> None:
    assert "ulimit -n" in handover.consequence("threads", handover.no_processes(OSError(errno.EMFILE, "Too many open files")))
    assert "--shm-size" in handover.consequence("pipes", FULL)


def test_the_text_of_an_image_error_is_not_taken_for_shared_memory() -> None:
    assert handover.is_failed_sharing(FULL)
    assert handover.is_failed_sharing("received 0 items of ancdata")
    assert not handover.is_failed_sharing("Caught RuntimeError in DataLoader worker process 0.\nshared memory")
    assert not handover.is_failed_sharing("cannot identify image file")


CAUGHT = "Caught {} in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\n" + "  File x\n" * 40 + "{}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Pin memory thread exited unexpectedly"), "the thread that receives batches ended.*pipes.*ulimit -n"),
        (OSError(CAUGHT.format("OSError", "OSError: [Errno 24] Too many open files")), "^OSError: .*Too many open files: batches"),
        (RuntimeError(CAUGHT.format("RuntimeError", f"RuntimeError: {FULL}")), "^RuntimeError: .*No space left.*--shm-size"),
    ],
)  # fmt: skip
def test_a_failure_where_a_gpu_machine_receives_batches_changes_the_way(
    kit: Any, sampler: Any, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU a thread of torch's receives them, and gives such errors texts of its own."""
    expected, _ = run(kit, sampler, 0)
    loader = kit.open(sampler, "torch", 2)

    def failing() -> Any:
        monkeypatch.undo()
        raise error
        yield

    monkeypatch.setattr(loader, "_made", failing)
    try:
        with pytest.warns(UserWarning, match=told):
            batches = kit.epochs(loader, 0, 1)
    finally:
        loader.close()
    assert loader._way == "pipes"
    kit.assert_same(batches, expected)


def test_memory_of_the_gpu_that_is_short_in_that_thread_is_another_fault() -> None:
    assert not handover.is_failed_sharing(CAUGHT.format("AcceleratorError", "CUDA error: out of memory"))


SMALL = """
mount -t tmpfs -o size={size} tmpfs /dev/shm
exec timeout -s KILL 120 "$0" -c '
import sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from images import Kit
names = sorted(path.name for path in Path(sys.argv[2]).glob("*.jpg"))
loader = Kit.open(Kit.sampler(Kit.manifest(Path(sys.argv[2]), names), 4, pixels=Kit.pixels(160)), "torch", 2)
print(sum(len(batch) for batch in loader.epoch(0)), loader._way)
loader.close()
' "$1" "$2"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "way"), [("400k", "pipes"), ("4k", "threads")])
def test_a_small_dev_shm_of_a_container_never_hangs(tmp_path: Path, photo: Any, size: str, way: str) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    for k in range(8):
        photo(k).save(tmp_path / f"{k}.jpg")
    script = SMALL.format(size=size)
    words = ["unshare", "-m", "bash", "-c", script, sys.executable, str(Path(__file__).parents[1] / "shared"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["8", way], done.stderr
    assert "--shm-size" in done.stderr
