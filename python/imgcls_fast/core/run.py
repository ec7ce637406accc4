"""A run directory: who may write it, and where everything in it is."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import locks
from .config import RunConfig
from .diary import last_end, read_epochs, write_epochs
from .errors import DataError, HardwareError
from .files import explained_write, read_json, write_json
from .manifest import Manifest
from .outputs import demand_vacant
from .places import demand_no_links
from .predictions import Predictions
from .settings import read_config, save_config
from .text import command, quoted

EFFICIENCY_SCHEMA = 1  # of bench/efficiency.json
PLAN = "plan.json"
_OLDER_PLAN = "model.json"  # the name that earlier versions gave it
T = TypeVar("T")


class Kept(Generic[T]):
    """What a file holds, read again only when it is another file, or has changed: a list of a million images takes a second."""

    def __init__(self, read: Callable[[Path], T]) -> None:
        self._read = read
        self._known: tuple[tuple[int, int, int], T] | None = None

    def __call__(self, path: Path) -> T:
        try:
            facts = path.stat()
        except OSError:
            return self._read(path)  # which raises what is wrong with it
        mark = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if self._known is None or self._known[0] != mark:
            self._known = (mark, self._read(path))
        return self._known[1]


class Run:
    """One directory. A single process writes it; files appear whole.

    Attributes are paths and readers; what is kept in memory is read again when its file has changed, so a Run can be used while
    another process writes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._lock: locks.Lock | None = None
        self._config = Kept(read_config)
        self._manifest = Kept(Manifest.load)

    def __repr__(self) -> str:
        done = os.path.exists(self.bundle_path / "bundle.json")  # raises nothing, whatever the disk does
        return f"Run({str(self.directory)!r}, {'finished' if done else 'not finished'})"

    # where things lie
    @property
    def config_path(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def manifest_path(self) -> Path:
        return self.directory / "manifest.npz"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def bundle_path(self) -> Path:
        return self.directory / "bundle"

    @property
    def exports(self) -> Path:
        return self.directory / "exports"

    @property
    def plots(self) -> Path:
        return self.directory / "plots"

    @property
    def report_path(self) -> Path:
        return self.directory / "report.html"

    def evaluation(self, split: str) -> Path:
        """The folder of one judged split."""
        return self.directory / "eval" / split

    @property
    def resume_command(self) -> str:
        """The command line that continues this run."""
        return command("train", self.directory, "--resume")

    # readers
    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def config(self) -> RunConfig:
        """The resolved configuration, without "auto"; read again when the file has changed."""
        return self._config(self.config_path)

    @property
    def manifest(self) -> Manifest:
        """The images, labels and splits; read again when the file has changed."""
        return self._manifest(self.manifest_path)

    def read_json(self, name: str) -> Any:
        """A JSON file of the run, or None where it is not there (yet), or half.

        Raises:
            DataError: D016 when it is larger than `bounds.JSON_BYTES`, nested too deeply, or cannot be read.
        """
        try:
            return read_json(self.directory / name)
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error

    @property
    def plan_facts(self) -> dict[str, Any] | None:
        """plan.json, of a run of an earlier version model.json; None where there is none (yet)."""
        found = self.read_json(PLAN) or self.read_json(_OLDER_PLAN)
        return found if isinstance(found, dict) else None

    def _unreadable(self, name: str, error: Exception) -> DataError:
        # a file that the disk does not hand out may be whole: it must not be thrown away
        remedy = "look at the disk, then repeat the command" if isinstance(error, OSError) else f"rm {quoted(str(self.directory / name))}"
        return DataError("D016", f"{name} of the run {self.directory} cannot be read: {error}", try_=remedy)

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """One dict per epoch, from metrics.csv.

        Raises:
            DataError: D016 when it is larger than `bounds.TEXT_BYTES`, or no table.
        """
        try:
            return read_epochs(self.directory)
        except (OSError, ValueError, csv.Error) as error:
            raise self._unreadable("metrics.csv", error) from error

    def metrics(self, split: str) -> dict[str, Any] | None:
        """metrics.json of one judged split."""
        found = self.read_json(f"eval/{split}/metrics.json")
        return found if found and isinstance(found, dict) else None

    def predictions(self, split: str = "test") -> Predictions:
        """The stored scores of one judged split, aligned with file names."""
        return Predictions.load(self.evaluation(split))

    @property
    def state(self) -> str:
        """finished, running, interrupted, failed, or stopped where its process ended without a word."""
        if self.finished:
            return "finished"
        if locks.is_taken(self.directory / ".lock"):
            return "running"
        end = str((last_end(self.directory) or {}).get("event"))
        return end if end in ("interrupted", "failed") else "stopped"

    @property
    def efficiency_path(self) -> Path:
        return self.directory / "bench" / "efficiency.json"

    @property
    def efficiency(self) -> dict[str, Any] | None:
        """What `bench` found; None where it has not been asked, or by another version."""
        found = self.read_json("bench/efficiency.json")
        return found if isinstance(found, dict) and found.get("schema") == EFFICIENCY_SCHEMA else None

    @property
    def finished(self) -> bool:
        """Whether training ended and the bundle was written.

        Raises:
            HardwareError: H003 when the disk does not answer.
        """
        with explained_write(self.bundle_path):
            return (self.bundle_path / "bundle.json").exists()

    # writers
    @classmethod
    def create(cls, directory: Path) -> Run:
        """Make a new, empty run directory and lock it.

        Raises:
            UsageError, HardwareError: as `outputs.demand_vacant`, and H003 when it cannot be made.
        """
        run = cls(directory)
        demand_vacant(directory)
        with explained_write(directory):
            run.directory.mkdir(parents=True, exist_ok=True)
        run.lock()
        return run

    def demand_own_places(self) -> None:
        """`places.demand_no_links` of this run."""
        with explained_write(self.directory):
            demand_no_links(self.directory)

    def lock(self, *, to_delete: bool = False) -> None:
        """Become the single writer until `unlock` or the end of the process, however it ends.

        Args:
            to_delete: the run is going to be removed, and links in it with it: nothing is written through them.

        Raises:
            HardwareError: H005 when another process writes here; H003 when a link in it leads elsewhere.
        """
        if not to_delete:
            self.demand_own_places()
        self._lock = _locked(self.directory, to_delete)

    @property
    def caution(self) -> str:
        """Why a second writer may go unnoticed; empty without a lock, and where the file system has locks."""
        return self._lock.caution if self._lock else ""

    def unlock(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def save_config(self, config: RunConfig) -> None:
        save_config(config, self.config_path)

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.directory / name, value)

    def write_epochs(self, epochs: list[dict[str, Any]]) -> None:
        """Rewrite metrics.csv: one row per epoch, so that a resumed run has no row twice."""
        write_epochs(self.directory, epochs)


def _locked(directory: Path, to_delete: bool) -> locks.Lock:
    path = directory / ".lock"
    try:
        with explained_write(path, verb="delete" if to_delete else "write"):
            if to_delete and path.is_symlink():
                path.unlink()
            return locks.take(path)
    except locks.Taken as owner:
        raise HardwareError(
            "H005",
            f"{directory} is being written by another process ({owner})",
            try_="wait for it, or train into another directory with --out",
        ) from owner
