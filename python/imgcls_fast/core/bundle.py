"""A judged model as it leaves training: weights, labels, pixels, provenance. Written once, never changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ModelError
from .files import explained_write, read_sealed, sha256_file, sync_directory, write_sealed, write_whole
from .manifest import LabelSpace
from .pixels import Pixels

SCHEMA = 1
KINDS = {"torch": "weights.safetensors"}  # kind of model -> the file that carries it


@dataclass(frozen=True)
class Bundle:
    """What is needed to score images, and where it came from.

    Args:
        directory: bundle.json and the file of `KINDS` lie here.
        arch: the architecture and its arguments, as `models.build.ModelSpec.to_dict()` gives them.
        labels: what each score means.
        pixels: how a file becomes input.
        temperature: scores are softmax(logits / temperature); fitted on validation rows.
        provenance: run, data fingerprint, versions, metrics.
        digests: SHA-256 of each other file of the bundle. bundle.json holds one of itself (`files.write_sealed`);
            those written before it did are read without that check.
        kind: one of `KINDS`.
    """

    directory: Path
    arch: dict[str, Any]
    labels: LabelSpace
    pixels: Pixels
    temperature: float
    provenance: dict[str, Any]
    digests: dict[str, str]
    kind: str = "torch"

    @property
    def weights(self) -> Path:
        """The file that carries the model."""
        return self.directory / KINDS[self.kind]

    @property
    def digest(self) -> str:
        """SHA-256 of `weights`: the identity of the model."""
        return self.digests[KINDS[self.kind]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **({} if self.kind == "torch" else {"kind": self.kind}),
            "arch": self.arch,
            "labels": self.labels.to_dict(),
            "pixels": self.pixels.to_dict(),
            "temperature": self.temperature,
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
    temperature: float,
    provenance: dict[str, Any],
    kind: str = "torch",
) -> Bundle:
    """Write a new bundle; the directory appears whole.

    Args:
        write_weights: writes the model (kind "torch": as safetensors) into the open file that it is given.
        kind: one of `KINDS`.

    Raises:
        ModelError: M004 when the directory already holds a bundle: bundles are never rewritten.
        HardwareError: H003 when the disk refuses.
    """
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
            digests = {KINDS[kind]: sha256_file(temporary / KINDS[kind])}
            bundle = Bundle(directory, arch, labels, pixels, temperature, provenance, digests, kind)
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
            meta["temperature"],
            meta["provenance"],
            meta["digests"],
            kind,
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
