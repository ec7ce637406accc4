"""Checkpoints: whole or not at all, whatever fails while they are written."""

from __future__ import annotations

import errno
import os
import pickletools
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core.errors import HardwareError, ModelError
from imgcls_fast.training import checkpoint
from imgcls_fast.training.checkpoint import Checkpoint, find_checkpoint, read_checkpoint, save_checkpoint
from imgcls_fast.training.progress import Progress


def save(folder: Path, step: int, *, best: bool = False, size: int = 64) -> None:
    tensors = {"model.w": torch.full((size,), float(step)), "model.t": torch.arange(6.0).reshape(2, 3).T}
    save_checkpoint(folder, Checkpoint(tensors, Progress(step=step), {"cpu": "x"}), best=best)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def found_step(folder: Path) -> int:
    found = find_checkpoint(folder)
    assert found is not None
    saved = found[1]
    assert (saved.tensors["model.w"] == saved.progress.step).all()
    return saved.progress.step


def test_what_was_saved_is_read_back_with_its_history(tmp_path: Path) -> None:
    progress = Progress(
        epoch=3, index=2, step=77, best=0.5, quarantined={"4": "cut"}, history=[{"epoch": 1, "val_loss": 0.1 + 0.2}]
    )
    tensors = {
        "a": torch.randn(3, 4).T,
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last),
    }
    parts = {"step": {"micro_batch": 4, "scaler": {"scale": 65536.0}}, "another": {"name": "x"}}
    save_checkpoint(tmp_path, Checkpoint(tensors, progress, {"cpu": "x", "threads": 2}, parts), best=True)
    for name in ("last", "best"):
        read = read_checkpoint(tmp_path / name)
        assert read.progress == progress
        assert read.parts == parts
        assert read.environment == {"cpu": "x", "threads": 2}
        assert all(torch.equal(read.tensors[key], tensors[key]) for key in tensors)
    assert names(tmp_path) == {"last", "best"}


def test_last_previous_and_best_rotate_and_nothing_else_is_left(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, best=step == 3)
    steps = {name: read_checkpoint(tmp_path / name).progress.step for name in ("last", "previous", "best")}
    assert steps == {"last": 5, "previous": 4, "best": 3}
    assert names(tmp_path) == {"last", "previous", "best"}


class Crash(BaseException):
    """The process is gone: no handler runs."""


STEPS_OF_A_SAVE = ("rename", "replace", "fsync", "link")


def crash_at(patch: pytest.MonkeyPatch, call: int, error: Callable[[], BaseException], *, after: bool) -> list[str]:
    """Let the `call`-th system call of a save fail, before or after it has done its work."""
    seen: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            seen.append(name)
            if len(seen) == call and not after:
                raise error()
            answer = original(*arguments, **more)
            if len(seen) == call:
                raise error()
            return answer

        return wrapped

    for name in STEPS_OF_A_SAVE:
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    return seen


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_a_crash_at_any_step_of_a_save_leaves_a_checkpoint_no_older_than_the_one_before(
    best: bool, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save(folder, 1, best=True)
        save(folder, 2)
        crashed = False
        with monkeypatch.context() as patch:
            # a killed process cleans nothing up
            patch.setattr(checkpoint, "_sweep", lambda folder: None)
            patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)
            crash_at(patch, call, Crash, after=after)
            try:
                save(folder, 3, best=best)
            except Crash:
                crashed = True
        assert found_step(folder) in (2, 3)
        assert read_checkpoint(folder / "best").progress.step in ((1, 3) if best else (1,))
        save(folder, 4)
        assert found_step(folder) == 4
        assert names(folder) == {"last", "previous", "best"}
        if not crashed:
            assert call > 8  # the loop went through every step
            return
    pytest.fail("a save never came to its end")


@contextmanager
def lower_layer(folder: Path) -> Iterator[None]:
    """Let what is in `folder` now be of a lower layer of overlayfs: its folders cannot be renamed (EXDEV)."""
    held = [os.open(path, os.O_RDONLY) for path in folder.iterdir()]  # else new folders would get the numbers of removed ones
    lower, rename = {os.fstat(handle).st_ino for handle in held}, os.rename

    def overlaid(source: Any, target: Any) -> None:
        if os.stat(source).st_ino in lower:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", overlaid)
        yield
    for handle in held:
        os.close(handle)


def survive_kills_on_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, best: bool, calls: range) -> None:
    steps = ("rename", "replace", "fsync", "link", "unlink", "rmdir")
    for call in calls:
        folder = tmp_path / str(call)
        save(folder, 1, best=True)
        save(folder, 2)
        save(folder, 3)
        crashed, seen = False, 0
        with lower_layer(folder):

            def counted(original: Callable[..., Any], call: int = call) -> Callable[..., Any]:
                def step(*arguments: Any, **more: Any) -> Any:
                    nonlocal seen
                    seen += 1
                    if seen >= call:  # a killed process cleans nothing up
                        raise Crash
                    return original(*arguments, **more)

                return step

            with monkeypatch.context() as kill:
                for name in steps:
                    kill.setattr(os, name, counted(getattr(os, name)))
                try:
                    save(folder, 4, best=best)
                except Crash:
                    crashed = True
            assert found_step(folder) in (3, 4)
            assert read_checkpoint(folder / "best").progress.step in ((1, 4) if best else (1,))
            save(folder, 5)
            assert found_step(folder) == 5
            assert names(folder) == {"last", "previous", "best"}
        if not crashed:
            assert call > 20  # the loop went through all of it
            return
    pytest.fail("a save never came to its end")


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_checkpoints_of_a_container_image_survive_a_kill_at_any_step(
    best: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survive_kills_on_overlay(tmp_path, monkeypatch, best=best, calls=range(1, 300))


def test_checkpoints_of_a_container_image_survive_a_kill_at_one_of_ten_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survive_kills_on_overlay(tmp_path, monkeypatch, best=True, calls=range(2, 300, 10))


def test_an_error_at_any_step_of_a_save_is_told_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save(folder, 1, best=True)
        save(folder, 2)
        with monkeypatch.context() as patch:
            crash_at(patch, call, lambda: OSError(28, "No space left on device"), after=False)
            try:
                save(folder, 3, best=True)
            except HardwareError as error:
                assert error.code == "H003"
                assert "No space left" in error.message
            else:
                break
        assert found_step(folder) in (2, 3)
        assert names(folder) <= {"last", "previous", "best"}
        assert "best" in names(folder)
    assert call > 8


def test_a_full_disk_is_h003_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, best=True)
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from imgcls_fast.core.errors import HardwareError
from imgcls_fast.training.checkpoint import Checkpoint, save_checkpoint
from imgcls_fast.training.progress import Progress
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path({str(tmp_path)!r}), Checkpoint({{"w": torch.zeros(1_000_000)}}, Progress(step=2), {{}}), best=True)
except HardwareError as error:
    print(error.code, error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("H003"), done.stderr
    assert "too large" in done.stdout
    assert found_step(tmp_path) == 1
    assert names(tmp_path) == {"last", "best"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE, checkpoint.DIGESTS])
def test_every_flipped_bit_that_was_tried_is_detected(file: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "last" / file
    content = path.read_bytes()
    for position in range(0, 8 * len(content), max(1, 8 * len(content) // 60)):
        wrong = bytearray(content)
        wrong[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(wrong))
        try:
            progress = read_checkpoint(tmp_path / "last").progress
        except ModelError as error:
            assert error.code == "M005"
        else:  # only white space of the digest list may change without changing what it says
            assert file == checkpoint.DIGESTS
            assert progress.step == 1


def test_a_newer_schema_is_refused_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 99)
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "SCHEMA", 1)
    with pytest.raises(ModelError, match="schema 99"):
        read_checkpoint(tmp_path / "last")


def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    save(tmp_path, 1, best=True)
    assert found_step(tmp_path) == 1
    for path in (tmp_path / "last").iterdir():
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def test_optimizer_state_survives_with_names_and_layout(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2)).to(
            memory_format=torch.channels_last
        )

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        net(torch.randn(5, 3, 3, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    makers: list[Callable[[Any], torch.optim.Optimizer]] = [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
    ]
    for make in makers:
        net = model()
        optimizer = make(net.parameters())
        step(net, optimizer, 1)
        tensors = checkpoint.optimizer_tensors(optimizer, {p: n for n, p in net.named_parameters()})
        tensors |= {f"model.{k}": v for k, v in net.state_dict().items()}
        save_checkpoint(tmp_path, Checkpoint(tensors, Progress(), {}), best=False)
        read = read_checkpoint(tmp_path / "last").tensors
        twin = model()
        twin.load_state_dict({k.removeprefix("model."): v for k, v in read.items() if k.startswith("model.")})
        other = make(twin.parameters())
        checkpoint.restore_optimizer(other, {p: n for n, p in twin.named_parameters()}, read)
        step(net, optimizer, 2)
        step(twin, other, 2)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


WRITER = """
import sys, time
from pathlib import Path
import torch
from imgcls_fast.training.checkpoint import Checkpoint, save_checkpoint
from imgcls_fast.training.progress import Progress
end = time.monotonic() + float(sys.argv[2])
step = 0
while time.monotonic() < end:
    step += 1
    save_checkpoint(Path(sys.argv[1]), Checkpoint({"w": torch.full((20_000,), float(step))}, Progress(step=step), {}), best=True)
    print(step, flush=True)
"""


def test_a_reader_never_meets_a_damaged_checkpoint_while_another_process_saves(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), "2.5"], stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    writer.stdout.readline()
    read = 0
    while writer.poll() is None:
        for name in ("best", "last"):
            found = read_checkpoint(tmp_path / name)
            assert (found.tensors["w"] == found.progress.step).all()
            read += 1
    assert read > 20
    assert int(writer.stdout.read().split()[-1]) > 3


def test_a_checkpoint_that_is_not_there_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: pytest.fail("waited for it"))
    with pytest.raises(ModelError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "best")


def test_a_last_one_that_was_half_removed_is_not_put_over_the_whole_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "last" / checkpoint.DIGESTS).unlink()  # killed while `move_folder` removed it, after it was copied
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "last":
            raise Crash
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Crash):
            save(tmp_path, 3)
    assert found_step(tmp_path) == 1
