"""A run directory: who may write it, and where everything in it lies."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import locks
from .bounds import TEXT_BYTES
from .config import RunConfig
from .errors import DataError, HardwareError, UsageError
from .files import explained_write, parse_json, read_bounded, read_end, read_json, write_json, write_text
from .manifest import Manifest
from .outputs import demand_room
from .places import demand_no_links, is_run_folder, others_files
from .predictions import Predictions
from .record import record_of
from .settings import build_config, save_config
from .text import command, printable, quoted

EFFICIENCY_SCHEMA = 1  # of bench/efficiency.json
# everything that training, judging, exporting and timing write into the directory of a run
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)  # of `files.write_whole`


class Run:
    """One directory. A single process writes it; files appear whole.

    Attributes are paths and readers; nothing is cached, so a Run can be used while another process writes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._lock: locks.Lock | None = None

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
        """The resolved configuration, without "auto"."""
        return build_config(file=self.config_path)

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.manifest_path)

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
            text = read_bounded(self.directory / "metrics.csv", TEXT_BYTES).decode("utf-8", "surrogateescape")
            lines = csv.DictReader(io.StringIO(text, newline=""))
            return [{k: _number(v) for k, v in line.items() if k is not None} for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, csv.Error) as error:
            raise self._unreadable("metrics.csv", error) from error

    def metrics(self, split: str) -> dict[str, Any] | None:
        """metrics.json of one judged split."""
        return _object(self.read_json(f"eval/{split}/metrics.json")) or None

    def predictions(self, split: str = "test") -> Predictions:
        """The stored scores of one judged split, aligned with file names."""
        return Predictions.load(self.evaluation(split))

    def brief(self) -> dict[str, Any]:
        """One line of the list of runs: name, data, model, epochs, accuracy, split, created, finished, state.

        A run with a damaged file is listed all the same, with the error's code in place of its data.
        """
        line: dict[str, Any] = dict.fromkeys(("name", "data", "model", "epochs", "accuracy", "split"))
        try:
            data, model = _object(self.read_json("data.json")), _object(self.read_json("model.json"))
            split = next((name for name in ("test", "val") if self.metrics(name)), None)
            metrics = self.metrics(split) if split else None
            line |= {
                "data": data.get("source"),
                "model": _object(model.get("spec")).get("arch"),
                "epochs": len(self.epochs),
                "accuracy": metrics.get("accuracy") if metrics else None,
                "split": split,
            }
        except DataError as error:
            line["data"] = f"unreadable ({error.code})"
        return {**line, "name": self.name, "created": record_of(self.directory)["created"], "finished": self.finished, "state": self.state}

    @property
    def state(self) -> str:
        """finished, running, interrupted, failed, or stopped where its process ended without a word."""
        if self.finished:
            return "finished"
        if locks.is_taken(self.directory / ".lock"):
            return "running"
        end = str((self.last_end() or {}).get("event"))
        return end if end in ("interrupted", "failed") else "stopped"

    def _ended(self) -> str:
        """How work on this run ended last, in a few words; empty while it goes on, or where it ended without a word."""
        end = self.last_end() or {}
        message = end.get("message")
        return f"failed: {message}" if end.get("event") == "failed" and message else str(end.get("event", ""))

    def details(self) -> dict[str, Any]:
        """The brief, with settings, data, metrics of each split, epochs, efficiency and paths."""
        from .settings import flatten

        return {
            **self.brief(),
            "directory": str(self.directory),
            "ended": self._ended(),
            **{name: value for name, value in record_of(self.directory).items() if name in ("parent", "work")},
            "data_facts": self.read_json("data.json"),
            "settings": flatten(self.config),
            "baseline": self.read_json("baseline.json"),
            "metrics": {split: self.metrics(split) for split in ("val", "test") if self.metrics(split)},
            "efficiency": self.efficiency,
            "history": self.epochs,
            "report": str(self.report_path) if self.report_path.exists() else None,
        }

    @property
    def efficiency_path(self) -> Path:
        return self.directory / "bench" / "efficiency.json"

    @property
    def efficiency(self) -> dict[str, Any] | None:
        """What `bench` found; None where it has not been asked, or by another version."""
        found = self.read_json("bench/efficiency.json")
        return found if isinstance(found, dict) and found.get("schema") == EFFICIENCY_SCHEMA else None

    def last_end(self) -> dict[str, Any] | None:
        """The event with which work on this run ended last: done, interrupted or failed. None: it never did, or goes on."""
        ended = None
        for event in self._events():
            if event.get("event") in ("done", "interrupted", "failed"):
                ended = event
            elif event.get("event") in ("data", "plan", "start"):
                ended = None
        return ended

    @property
    def began_training(self) -> bool:
        """Whether the loop of training was entered."""
        return self.checkpoints.exists() or any(event.get("event") == "start" for event in self._events())

    def unexplained_end(self) -> str:
        """A sentence when this run ended by the death of its process, else an empty one; only for the holder of the lock."""
        events = self._events()
        if not any(event.get("event") == "plan" for event in events):
            return ""
        end = self.last_end()
        if end is None:
            return (
                f"{self.name} ended without a word the last time: its process, or the machine, was stopped from outside"
            )
        died = str(end.get("message", ""))
        return f"last time {died}" if end["event"] == "failed" and died.startswith("the training process died") else ""

    def _events(self) -> list[dict[str, Any]]:
        """events.jsonl, of a very long one the end; a line that a dying process left half is passed over."""
        try:
            content = read_end(self.directory / "events.jsonl", TEXT_BYTES)
        except (FileNotFoundError, ValueError):  # ValueError: a pipe
            return []
        found = []
        for line in content.splitlines():
            with suppress(ValueError):
                found.append(parse_json(line))
        return [event for event in found if isinstance(event, dict)]

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
            UsageError: U002 when the directory already holds a run (a whole one: one that was killed at birth may be
                overwritten), or files of somebody else's that a run would replace.
            HardwareError: H003 when it cannot be made.
        """
        run = cls(directory)
        run.demand_vacant()
        with explained_write(directory):
            run.directory.mkdir(parents=True, exist_ok=True)
        run.lock()
        return run

    def demand_vacant(self) -> None:
        """Raise where no new run can be made; makes nothing.

        Raises:
            UsageError, HardwareError: as `create`.
        """
        with explained_write(self.directory):
            whole, taken = is_run_folder(self.directory), others_files(self.directory)
        if whole:
            raise UsageError(
                "U002",
                f"{self.directory} already holds a run",
                try_=f"{self.resume_command}   (or another --out)",
            )
        if taken:
            raise UsageError(
                "U002",
                f"{self.directory} is not a run, and holds files that a run would replace: {', '.join(taken)}",
                try_="choose an empty or new directory with --out",
            )
        demand_room(self.directory)

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
        try:
            with explained_write(self.directory / ".lock", verb="delete" if to_delete else "write"):
                if to_delete and (self.directory / ".lock").is_symlink():
                    (self.directory / ".lock").unlink()
                self._lock = locks.take(self.directory / ".lock")
        except locks.Taken as owner:
            raise HardwareError(
                "H005",
                f"{self.directory} is being written by another process ({owner})",
                try_="wait for it, or train into another directory with --out",
            ) from owner

    @property
    def caution(self) -> str:
        """Why a second writer may go unnoticed; empty without a lock, and where the file system has locks."""
        return self._lock.caution if self._lock else ""

    def clear_leftovers(self) -> None:
        """Remove the half-written files of a process that was killed; only for the holder of the lock."""
        for folder in (self.directory, self.plots, *map(self.evaluation, ("val", "test", "baseline"))):
            if folder.resolve() != self.directory.resolve() / folder.relative_to(self.directory):
                continue  # a link leads elsewhere
            for left in folder.glob(".*.tmp"):
                if not _LEFTOVER.fullmatch(left.name):  # somebody else's
                    continue
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def save_config(self, config: RunConfig) -> None:
        save_config(config, self.config_path)

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.directory / name, value)

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add one line to events.jsonl."""
        with (
            explained_write(self.directory / "events.jsonl"),
            open(self.directory / "events.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps({"time": round(time.time(), 3), **event}, default=str) + "\n")

    def append_log(self, line: str) -> None:
        """Add one line to log.txt."""
        with (
            explained_write(self.directory / "log.txt"),
            open(self.directory / "log.txt", "a", encoding="utf-8") as file,
        ):
            file.write(printable(line) + "\n")

    def write_epochs(self, epochs: list[dict[str, Any]]) -> None:
        """Rewrite metrics.csv: one row an epoch, so that a resumed run has no row twice."""
        out = io.StringIO()
        names = list(dict.fromkeys(key for epoch in epochs for key in epoch))
        writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(epochs)
        write_text(self.directory / "metrics.csv", out.getvalue())




def _object(value: Any) -> dict[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _number(text: str | None) -> Any:
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
