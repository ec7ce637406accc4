"""Keeps the bad rows of a run: in quarantine.csv from the moment they are found, and never more than data.max_bad allows."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import cached_property

import numpy as np

from ..core.errors import DataError
from ..core.manifest import SPLITS, Manifest
from ..core.run import Run
from ..data.quarantine import BadFile, append_quarantine, read_quarantine, write_quarantine
from ..data.store import open_store


class Quarantined:
    """Holds the rows of the manifest that turned out to be undecodable after the scan, with reasons.

    Args:
        run: holds quarantine.csv.
        manifest: images and splits.
        max_bad: most bad images, those of the scan included: a fraction below 1, else a count.
    """

    def __init__(self, run: Run, manifest: Manifest, max_bad: float) -> None:
        self._run, self._manifest, self._max_bad = run, manifest, max_bad
        self._path = run.directory / "quarantine.csv"
        self._appendable = False  # the file is as this process wrote it

    @cached_property
    def _files(self) -> dict[str, BadFile]:
        """Read every file ever quarantined in this run by its path, those that the scan found first; nobody else adds to it."""
        return {file.path: file for file in read_quarantine(self._path)}

    @cached_property
    def _scanned(self) -> int:
        return sum(file.found == "scan" for file in self._files.values())

    def rows(self) -> dict[int, str]:
        """Return row and reason of the files that were found after the scan."""
        found = {file.path: file.reason for file in self._files.values() if file.found != "scan"}
        if not found:
            return {}
        return {row: found[path] for row, path in enumerate(self._manifest.paths) if path in found}

    def add(self, row: int, reason: str, found: str) -> None:
        """Record one row at once: whatever happens next, resume must not take it for a changed file.

        Args:
            found: when, e.g. "epoch 3".

        Raises:
            DataError: D013 when there are too many bad images now.
        """
        manifest, files = self._manifest, self._files
        path = manifest.paths[row]
        if path not in files:
            size = 0
            with suppress(OSError):
                size = open_store(manifest.root).size(path)
            label = manifest.labels.words(manifest.targets(np.array([row]))[0])
            bad = BadFile(path, reason, SPLITS[manifest.split[row]], label, size, found)
            self._write(bad)
            files[path] = bad
        self.require_few()

    def _write(self, bad: BadFile) -> None:
        """Write the file whole the first time and after a failure, so that it ends with a line; then line by line."""
        appendable, self._appendable = self._appendable, False
        if appendable:
            append_quarantine(self._path, bad)
        else:
            write_quarantine(self._path, [*self._files.values(), bad])
        self._appendable = True

    def require_few(self) -> None:
        """Raise when there are too many bad images.

        Raises:
            DataError: D013, as the scan does.
        """
        files = self._files
        total = len(self._manifest) + self._scanned
        allowed = self._max_bad * total if self._max_bad < 1 else self._max_bad
        if len(files) == self._scanned or len(files) <= allowed:
            return
        late = [file for file in files.values() if file.found != "scan"]
        reasons = Counter(file.reason.split(":")[0] for file in late).most_common(4)
        share = " of all" if self._max_bad < 1 else ""
        raise DataError(
            "D013",
            f"{len(files):,} of {total:,} images cannot be decoded, {len(late):,} of them found since the scan: "
            + ", ".join(f"{count:,} x {reason}" for reason, count in reasons),
            where=late[-1].path,
            why=f"at most {self._max_bad:g}{share} may be bad (--max-bad)",
            try_=f"look at {self._path}; to go on without these images: {self._run.resume_command} --max-bad N",
        )


def require_same_validation(run: Run, manifest: Manifest, row: int, reason: str) -> None:
    """Raise when a row that has just turned out to be undecodable is one that epochs have been compared by.

    Raises:
        DataError: D010 for a validation image.
    """
    if SPLITS[manifest.split[row]] != "val":
        return
    raise DataError(
        "D010",
        f"the validation image {manifest.paths[row]} cannot be decoded any more: {reason}",
        where=str(manifest.path(row)),
        why="the best epoch so far was chosen with it, and leaving it out now would compare different images",
        try_=f"restore the file, then {run.resume_command}",
    )
