"""Loaders as citizens: no global generator, no process or thread left behind."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from imgcls_fast.core.errors import HardwareError
from imgcls_fast.loading import torch_loader
from imgcls_fast.loading.loader import dali_missing

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
BACKENDS = pytest.mark.parametrize(
    ("backend", "workers"),
    [("torch", 0), ("torch", 2), pytest.param("dali-cpu", 2, marks=needs_dali)],
    ids=["torch-0", "torch-2", "dali-cpu"],
)


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


def children() -> set[int]:
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found |= {int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float) -> bool:
    """Whether the condition came true; the limit only keeps a failure from hanging."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@BACKENDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_global_generator_is_drawn_from_or_seeded(kit, album_manifest, backend, workers, training):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    kit.run(kit.sampler(album_manifest, 8, kit.strong if training else None), backend, workers, epochs=(0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@BACKENDS
def test_the_generators_of_the_process_do_not_shape_the_batches(kit, album_manifest, backend, workers):
    sampler = kit.sampler(album_manifest, 8, kit.strong)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        one = kit.run(sampler, backend, workers)
        torch.manual_seed(2)
        kit.assert_same(kit.run(sampler, backend, workers), one)
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("drained", [True, False])
def test_close_ends_the_workers_also_in_the_middle_of_an_epoch(kit, album_manifest, drained):
    before = children()
    loader = kit.open(kit.sampler(album_manifest, 4, kit.strong), "torch", 2)
    batches = loader.epoch(0)
    next(batches)
    workers = children() - before
    assert len(workers) >= 2
    if drained:
        list(batches)
    loader.close()
    assert wait_for(lambda: not any(is_running(pid) for pid in workers), 30)
    loader.close()  # a second time does nothing


@needs_dali
def test_closing_a_dali_loader_frees_its_threads_and_files(kit, album_manifest):
    sampler = kit.sampler(album_manifest, 4, kit.strong)

    def once() -> None:
        loader = kit.open(sampler, "dali-cpu", 3)
        next(iter(loader.epoch(0)))
        loader.close()
        loader.close()
        gc.collect()

    once()  # DALI keeps some threads for the life of the process
    files, threads = len(os.listdir("/proc/self/fd")), threads_of_this_process()
    for _ in range(3):
        once()
    assert wait_for(lambda: threads_of_this_process() <= threads, 30)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() >= 1


@needs_dali
def test_a_forked_worker_does_not_collect_a_pipeline_of_its_parent(kit, album_manifest):
    """It waited for ever, for the end of threads that are not copied by a fork."""
    sampler = kit.sampler(album_manifest, 8)
    loader = kit.open(sampler, "dali-cpu", 2)
    next(iter(loader.epoch(0)))
    ring = [loader._pipeline]
    ring.append(ring)
    kit.open(sampler, "torch", 1).close()
    gc.disable()  # of this process: the pipeline stays as garbage until the fork
    try:
        loader.close()
        del ring
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
    finally:
        gc.enable()
    ended = wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] == child, 30)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended


@needs_dali
def test_nothing_is_collected_in_a_worker_before_the_garbage_of_its_parent_is_frozen(kit, album_manifest):
    """Callbacks that others have registered for a fork run first, and may make the collector run."""
    armed = [True]
    os.register_at_fork(after_in_child=lambda: armed and gc.isenabled() and gc.collect())
    sampler = kit.sampler(album_manifest, 8)
    loader = kit.open(sampler, "dali-cpu", 2)
    next(iter(loader.epoch(0)))
    ring = [loader._pipeline]
    ring.append(ring)
    kit.open(sampler, "torch", 1).close()
    loader.close()
    del ring
    child = os.fork()
    if child == 0:
        os._exit(0)
    armed.clear()
    ended = wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] == child, 30)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended and gc.isenabled()


_PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from images import Kit
manifest = Kit.manifest(Path({root!r}), {names!r})
loader = Kit.open(Kit.sampler(manifest, 2, Kit.strong), "torch", 2)
batches = loader.epoch(0)
next(batches), next(batches)  # one from each worker: both have begun
print(*[worker.pid for worker in loader._loader._iterator._workers], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_workers_die_with_their_parent(tmp_path, kit, photo, number):
    names = [f"{k}.jpg" for k in range(12)]
    for k, name in enumerate(names):
        photo(k).save(tmp_path / name)
    program = _PARENT.format(tests=str(Path(__file__).parents[1] / "shared"), root=str(tmp_path), names=names)
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(is_running(pid) for pid in workers)
        parent.send_signal(number)
        parent.wait(60)
        assert wait_for(lambda: not any(is_running(pid) for pid in workers), 60)
    finally:
        parent.kill()
        parent.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_stops_the_parent_only(tmp_path, photo, number):
    names = [f"{k}.jpg" for k in range(12)]
    for k, name in enumerate(names):
        photo(k).save(tmp_path / name)
    program = _PARENT.format(tests=str(Path(__file__).parents[1] / "shared"), root=str(tmp_path), names=names)
    program = program.replace("sys.stdin.read()", "sys.stdin.readline(); print(2 + len(list(batches)), flush=True)")
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdin is not None and parent.stdout is not None
        for pid in map(int, parent.stdout.readline().split()):
            os.kill(pid, number)
        assert parent.communicate("\n", timeout=120)[0].strip() == "6"
    finally:
        parent.kill()
        parent.communicate()


class Murderer:
    """Decodes as the loader does, but the worker that meets the file `bad` ends by a signal."""

    def __init__(self, real, times: Path | None = None) -> None:
        self.real, self.times = real, times

    def __call__(self, sampler, request, **more):
        rows = request.rows.tolist()
        met = any("bad" in sampler.manifest.paths[row] for row in rows if row >= 0)
        if met and (self.times is None or not self.times.exists()):
            if self.times is not None:
                self.times.touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.real(sampler, request, **more)


@pytest.fixture
def photos_with_a_killer(tmp_path, photo):
    names = [f"{k}.jpg" for k in range(11)] + ["bad.jpg"]
    for k, name in enumerate(names):
        photo(k).save(tmp_path / name)
    return tmp_path, names


@pytest.mark.slow
def test_a_worker_killed_by_a_file_is_survived_and_the_file_named(kit, photos_with_a_killer, monkeypatch):
    root, names = photos_with_a_killer
    manifest = kit.manifest(root, names)
    sampler = kit.sampler(manifest, 3, kit.strong)
    expected = kit.run(sampler, "torch", 0, bad={11: "known"})
    (root / "bad.jpg").write_bytes((root / "bad.jpg").read_bytes()[:300])  # a child's verdict: truncated
    monkeypatch.setattr(torch_loader, "decode_batch", Murderer(torch_loader.decode_batch))
    told: list[tuple[int, str, int]] = []
    loader = kit.open(sampler, "torch", 2, on_bad=lambda *what: told.append(what))
    batches = kit.epochs(loader, 0)
    loader.close()
    assert [(row, epoch) for row, _, epoch in told] == [(11, 0)] and told[0][1].startswith("truncated")
    kit.assert_same(batches, expected)


def test_culprits_are_looked_for_in_as_many_children_as_there_were_workers(kit, photos_with_a_killer, monkeypatch):
    root, names = photos_with_a_killer
    asked = []
    real = torch_loader.examine_isolated
    monkeypatch.setattr(torch_loader, "examine_isolated", lambda *a, **k: asked.append(k["workers"]) or real(*a, **k))
    loader = kit.open(kit.sampler(kit.manifest(root, names), 3), "torch", 2)
    assert not loader._find_culprits(0, 0) and asked == [2]
    loader.close()


@pytest.mark.slow
def test_a_worker_killed_by_something_else_is_replaced_and_no_bit_changes(
    kit, photos_with_a_killer, monkeypatch, tmp_path, caplog
):
    root, names = photos_with_a_killer
    sampler = kit.sampler(kit.manifest(root, names), 3, kit.strong)
    expected = kit.run(sampler, "torch", 0, epochs=(0, 1))
    monkeypatch.setattr(torch_loader, "decode_batch", Murderer(torch_loader.decode_batch, tmp_path / "once"))
    loader = kit.open(sampler, "torch", 2)
    batches = kit.epochs(loader, 0, 1)
    loader.close()
    assert loader.bad == {} and "a decoding process died" in caplog.text
    kit.assert_same(batches, expected)


@pytest.mark.slow
def test_workers_that_always_die_end_the_epoch_with_h002(kit, photos_with_a_killer, monkeypatch):
    root, names = photos_with_a_killer
    sampler = kit.sampler(kit.manifest(root, names), 3, kit.strong)
    monkeypatch.setattr(torch_loader, "decode_batch", Murderer(torch_loader.decode_batch))
    monkeypatch.setattr(torch_loader, "_PATIENCE", 1)
    loader = kit.open(sampler, "torch", 1)
    with pytest.raises(HardwareError) as caught:
        kit.epochs(loader, 0)
    assert caught.value.code == "H002"
    loader.close()
