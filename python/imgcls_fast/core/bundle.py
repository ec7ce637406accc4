"""A judged model as it leaves training: weights, labels, pixels, provenance. Written once, never changed."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ModelError
from .files import explained_write, read_sealed, sha256_file, sync_directory, write_sealed, write_whole
from .labels import LabelSpace
from .pixels import Pixels

SCHEMA = 2  # 1 is still written where it suffices: one-label models of torch
KINDS = {"torch": "weights.safetensors"}  # kind of model -> the file that carries it


@dataclass(frozen=True)
class Bundle:
    """What is needed to score images, and where it came from.

    Args:
        directory: bundle.json and the file of `KINDS` lie here.
        arch: the architecture and its arguments, as `models.build.ModelSpec.to_dict()` gives them.
        labels: what each score means.
        pixels: how a file becomes input.
        temperatures: one per task; scores are softmax or sigmoid of logits / temperature. Fitted on validation rows.
        provenance: run, data fingerprint, versions, metrics.
        digests: SHA-256 of each other file of the bundle. bundle.json holds one of itself (`files.write_sealed`);
            those written before it did are read without that check.
        kind: one of `KINDS`.
        thresholds: least score with which each column's class holds, fitted on validation rows; one_of columns are ignored. None
            where no task is any_of, or none were fitted (0.5).

    Raises:
        ValueError: not one temperature above 0 per task, or not one threshold in 0..1 per column.
    """

    directory: Path
    arch: dict[str, Any]
    labels: LabelSpace
    pixels: Pixels
    temperatures: tuple[float, ...]
    provenance: dict[str, Any]
    digests: dict[str, str]
    kind: str = "torch"
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        tasks, columns = len(self.labels.tasks), self.labels.size
        if len(self.temperatures) != tasks or not all(0 < heat < math.inf for heat in self.temperatures):
            raise ValueError(f"{tasks} tasks need as many temperatures above 0, got {self.temperatures}")
        if self.thresholds is not None and (len(self.thresholds) != columns or not all(0 <= t <= 1 for t in self.thresholds)):
            raise ValueError(f"{columns} classes need as many thresholds in 0..1, got {self.thresholds}")

    @property
    def temperature(self) -> float:
        """The temperature of a model with one task.

        Raises:
            ValueError: there are several tasks.
        """
        if len(self.temperatures) > 1:
            raise ValueError(f"the model has {len(self.temperatures)} tasks, and one temperature for each")
        return self.temperatures[0]

    @property
    def weights(self) -> Path:
        """The file that carries the model."""
        return self.directory / KINDS[self.kind]

    @property
    def digest(self) -> str:
        """SHA-256 of `weights`: the identity of the model."""
        return self.digests[KINDS[self.kind]]

    def scaling(self) -> dict[str, Any]:
        """What lies between logits and answers, as files record it: temperature (one-label), else temperatures and thresholds."""
        if self.labels.is_single:
            return {"temperature": self.temperature}
        least = {} if self.thresholds is None else {"thresholds": list(self.thresholds)}
        return {"temperatures": list(self.temperatures), **least}

    def to_dict(self) -> dict[str, Any]:
        plain = self.labels.is_single and self.kind == "torch"  # as the versions before write and read it
        return {
            "schema": 1 if plain else SCHEMA,
            **({} if self.kind == "torch" else {"kind": self.kind}),
            "arch": self.arch,
            "labels": self.labels.to_dict(),
            "pixels": self.pixels.to_dict(),
            **self.scaling(),
            "provenance": self.provenance,
            "digests": self.digests,
        }


def write_bundle(
    directory: Path,
    write_weights: Callable[[BinaryIO], None],
    *,
    arch: dict[str, Any],
    labels: LabelSpace,
    pixels: Pixels,
    temperature: float | Sequence[float],
    provenance: dict[str, Any],
    kind: str = "torch",
    thresholds: Sequence[float] | None = None,
) -> Bundle:
    """Write a new bundle; the directory appears whole.

    Args:
        write_weights: writes the model (kind "torch": as safetensors) into the open file that it is given.
        temperature: one for all tasks, or one per task.
        kind: one of `KINDS`.
        thresholds: see `Bundle`.

    Raises:
        ValueError: as `Bundle`.
        ModelError: M004 when the directory already holds a bundle: bundles are never rewritten.
        HardwareError: H003 when the disk refuses.
    """
    several = [temperature] * len(labels.tasks) if isinstance(temperature, int | float) else temperature
    least = None if thresholds is None else tuple(float(t) for t in thresholds)
    bundle = Bundle(directory, arch, labels, pixels, tuple(several), provenance, {}, kind, least)
    if directory.exists():
        raise ModelError(
            "M004", f"{directory} already exists, and a bundle is never rewritten", try_="choose another run directory"
        )
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    with explained_write(directory):
        for left in directory.parent.glob(f".{directory.name}.*.tmp"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write_whole(temporary / KINDS[kind], write_weights)
            bundle = replace(bundle, digests={KINDS[kind]: sha256_file(temporary / KINDS[kind])})
            write_sealed(temporary / "bundle.json", bundle.to_dict())
            sync_directory(temporary)
            os.rename(temporary, directory)
            sync_directory(directory.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return bundle


def bundle_around(weights: Path) -> Path | None:
    """The folder of the bundle that a weights file belongs to; None for a file on its own."""
    folder = weights.parent
    return folder if weights.name in KINDS.values() and os.path.isfile(folder / "bundle.json") else None


def read_bundle(directory: Path, *, verify: bool = True) -> Bundle:
    """Open a bundle; by default every digest is checked first.

    Raises:
        ModelError: M004 when something is missing, damaged, or written by a newer version.
    """
    try:
        meta = read_sealed(directory / "bundle.json")
        kind = meta.get("kind", "torch")
        if meta["schema"] > SCHEMA or kind not in KINDS:
            what = f"kind {kind}, this one reads {', '.join(KINDS)}"
            if meta["schema"] > SCHEMA:
                what = f"schema {meta['schema']}, this one reads {SCHEMA}"
            raise ModelError(
                "M004",
                f"{directory} was written by a newer imgcls-fast ({what})",
                try_="read it with the version that wrote it, or a newer one",
            )
        bundle = Bundle(
            directory,
            meta["arch"],
            LabelSpace.from_dict(meta["labels"]),
            Pixels.from_dict(meta["pixels"]),
            tuple(meta["temperatures"]) if "temperatures" in meta else (meta["temperature"],),
            meta["provenance"],
            meta["digests"],
            kind,
            tuple(meta["thresholds"]) if meta.get("thresholds") is not None else None,
        )
        for name, digest in bundle.digests.items() if verify else ():
            if sha256_file(directory / name) != digest:
                raise ModelError(
                    "M004",
                    f"{directory / name} is damaged: its SHA-256 is not the one in bundle.json",
                    try_="restore the file from a copy",
                )
        return bundle
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "M004", f"{directory} is not a readable bundle: {error}", try_="imgcls-fast runs list"
        ) from error
