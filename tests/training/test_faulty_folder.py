"""One system call on the run folder fails once, as network file systems let it: a clear error or none, and nothing is lost."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.errors import ImgclsError
from imgcls_fast.core.run import Run
from imgcls_fast.training import session

FAULTS = (errno.EIO, errno.ESTALE, errno.EXDEV, errno.ENOTEMPTY, errno.ENOSPC)
CALLS = ("rename", "replace", "fsync", "link", "mkdir", "open", "unlink", "rmdir", "symlink", "scandir", "stat")


@contextmanager
def one_fault(folder: Path, place: int, number: int) -> Iterator[list[str]]:
    """Let the `place`-th call on something in `folder` fail; gives the names of the calls that were made."""
    made: list[str] = []
    originals: list[tuple[Any, str, Any]] = []

    def concerns(arguments: tuple[Any, ...]) -> bool:
        for argument in arguments[:2]:
            if isinstance(argument, int) and not isinstance(argument, bool):
                try:
                    argument = os.readlink(f"/proc/self/fd/{argument}")
                except OSError:
                    continue
            if isinstance(argument, str | os.PathLike) and os.fspath(argument).startswith(str(folder)):
                return True
        return False

    def failing(name: str, original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            if concerns(arguments):
                made.append(name)
                if len(made) == place:
                    raise OSError(number, os.strerror(number), str(folder))
            return original(*arguments, **more)

        return call

    for module, names in ((os, CALLS), (builtins, ("open",))):
        for name in names:
            originals.append((module, name, getattr(module, name)))
            setattr(module, name, failing(name, getattr(module, name)))
    try:
        yield made
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def litter(run: Run) -> list[str]:
    """Half-written files; the lock is none."""
    found = [path for path in run.directory.rglob(".*") if path.name != ".lock"]
    return [str(path.relative_to(run.directory)) for path in found]


def go_through(places: Iterator[int], configure: Callable[..., Any], same_result: Any, *, most: int) -> tuple[int, int]:
    """Runs with a fault at each place: how many there were, and how many ended in an error."""
    straight = session.start(configure())
    runs = errors = 0
    for place in places:
        config = configure()
        folder = Path(config.out)
        number = FAULTS[place % len(FAULTS)]
        what = f"{errno.errorcode[number]} at call {place}"
        with one_fault(folder, place, number) as made:
            try:
                session.start(config)
            except ImgclsError as error:
                errors += 1
                assert error.code in ("H003", "H005", "M005", "D009", "D016"), what
        if place > len(made):
            break
        runs += 1
        run = Run(folder)
        if run.config_path.exists() and run.manifest_path.exists() and run.read_json("plan.json"):
            session.resume(run, {})
            same_result(straight, run)
            assert not litter(run), what
        else:  # it failed at birth, and may be begun again
            again = session.start(config)
            same_result(straight, again)
        assert runs <= most
    return runs, errors


@pytest.mark.slow
@pytest.mark.usefixtures("no_judging")
def test_a_fault_at_any_tenth_place_of_a_run_loses_nothing(configure: Callable[..., Any], same_result: Any) -> None:
    runs, _ = go_through(iter(range(3, 10_000, 10)), configure, same_result, most=200)
    assert runs > 5


@pytest.mark.usefixtures("no_judging")
def test_a_fault_at_one_of_three_places_of_a_run_loses_nothing(configure: Callable[..., Any], same_result: Any) -> None:
    runs, _ = go_through(iter((12, 61, 115)), configure, same_result, most=3)
    assert runs == 3
