"""Checkpoints that survive kill -9, a full disk and bit rot.

A checkpoint is a directory: tensors.safetensors, state.json and manifest.json with the SHA-256 of both. It is written
under another name, synced, and renamed; the one before it stays as `previous` until the next is complete. Formats load
without complaint after a flipped bit (measured: 200 of 200), so only the digests show whether a checkpoint is intact.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..core.bounds import JSON_BYTES, STATE_BYTES
from ..core.errors import ModelError
from ..core.files import (
    explained_write,
    move_folder,
    parse_json,
    read_bounded,
    sha256_file,
    sync_directory,
    write_json,
    write_whole,
)
from ..core.run import Run
from ..core.tensorfiles import check_safetensors
from .progress import Progress

SCHEMA = 2
_ONCE_PROGRESS = ("micro_batch", "images", "schedule", "scaler")  # of the part "step"; schema 1 kept them with the progress
TENSORS, STATE, DIGESTS = "tensors.safetensors", "state.json", "manifest.json"
_LARGEST = {DIGESTS: JSON_BYTES, STATE: STATE_BYTES}  # bytes that are read of a file
_NAMES = ("last", "previous", "best")  # the newest first
_LEFT = re.compile(r"\.(new|best|copy|old\.(last|previous|best))\.\d+")
_PATIENCE_S = 5.0  # for a reader between the two renames of a writer


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run continues from, each part under its own name."""

    tensors: dict[str, Tensor]  # "model.NAME", "ema.NAME", "optim.PARAMETER.WHAT", "rng.DEVICE", "sum.WHAT"
    progress: Progress
    environment: dict[str, Any]  # where and by what it was computed, and what shapes the weights
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> what it returned as its state, for JSON


def save_checkpoint(folder: Path, found: Checkpoint, *, best: bool) -> Path:
    """Write `folder`/last, keeping the former one as `folder`/previous; with `best`, also as `folder`/best.

    Raises:
        HardwareError: H003; the former checkpoint is intact.
    """
    temporary = folder / f".new.{os.getpid()}"
    state = {
        "schema": SCHEMA,
        "progress": asdict(found.progress),
        "parts": found.parts,
        "environment": found.environment,
    }
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        try:
            # dense copies: the file knows no strides, and a shared or permuted tensor would be refused
            blob = save({name: value.detach().cpu().contiguous() for name, value in found.tensors.items()})
            write_whole(temporary / TENSORS, lambda file: file.write(blob))
            write_json(temporary / STATE, state)
            write_json(temporary / DIGESTS, {name: sha256_file(temporary / name) for name in (TENSORS, STATE)})
            sync_directory(temporary)
            if best:
                _put(_linked(temporary, folder), folder / "best", folder)
            _rotate(temporary, folder)
        except BaseException:
            with suppress(OSError):
                _sweep(folder)
            raise
    return folder / "last"


def _sweep(folder: Path) -> None:
    """Clear what a process left that was killed while it saved; a directory that it had set aside goes back."""
    ours = [left for left in folder.glob(".*") if _LEFT.fullmatch(left.name)]  # a stranger's link may have led us to other folders
    for name in _NAMES:
        for aside in ours:
            if aside.name.startswith(f".old.{name}.") and not (folder / name / DIGESTS).exists():
                if (folder / name).exists() and (aside / DIGESTS).exists():  # killed while `move_folder` removed it
                    shutil.rmtree(folder / name)
                if not (folder / name).exists():
                    move_folder(aside, folder / name, DIGESTS)
    last = folder / "last"
    if last.is_dir() and not (last / DIGESTS).exists() and (folder / "previous" / DIGESTS).exists():
        shutil.rmtree(last)  # killed while `move_folder` removed it; the next save would put it over the one that is whole
    for left in ours:
        shutil.rmtree(left, ignore_errors=True)


def _linked(temporary: Path, folder: Path) -> Path:
    """Make a second directory with the same files: hard links where possible, else copies."""
    twin = folder / f".best.{os.getpid()}"
    twin.mkdir()
    for name in (TENSORS, STATE, DIGESTS):
        try:
            os.link(temporary / name, twin / name)
        except OSError:
            shutil.copy2(temporary / name, twin / name)
    sync_directory(twin)
    return twin


def _rotate(temporary: Path, folder: Path) -> None:
    last, previous = folder / "last", folder / "previous"
    if last.exists():
        _put(last, previous, folder)
    os.rename(temporary, last)
    sync_directory(folder)


def _put(source: Path, target: Path, folder: Path) -> None:
    """Rename a directory over another one. Between the two renames `target` is absent, never half."""
    old = folder / f".old.{target.name}.{os.getpid()}"
    if target.exists():
        move_folder(target, old, DIGESTS)
    move_folder(source, target, DIGESTS)
    sync_directory(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, after its digests have been checked.

    May be called while another process saves: each of the three files is then of the same checkpoint, old or new.

    Raises:
        ModelError: M005 when it is missing, damaged, or of another schema.
    """
    try:
        files = _read_files(path)
        digests = parse_json(files[DIGESTS])
        for name in (TENSORS, STATE):
            if hashlib.sha256(files[name]).hexdigest() != digests[name]:
                raise ModelError("M005", f"{path / name} is damaged: its SHA-256 is not the one that was written")
        state = parse_json(files[STATE])
        if state["schema"] not in (1, SCHEMA):
            raise ModelError("M005", f"{path} has checkpoint schema {state['schema']}, this version reads 1 and {SCHEMA}")
        if state["schema"] == 1:
            state["parts"] = {"step": {name: state["progress"].pop(name) for name in _ONCE_PROGRESS}}
        check_safetensors(io.BytesIO(files[TENSORS]))
        return Checkpoint(load(files[TENSORS]), Progress(**state["progress"]), state["environment"], state["parts"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError("M005", f"{path} is not a readable checkpoint: {error}") from error


def _read_files(path: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint, all from one directory, although a writer may put another one in its place meanwhile."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        number = None
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                number = os.fstat(folder).st_ino
                return {name: _read_in(folder, name) for name in (DIGESTS, STATE, TENSORS)}
            finally:
                os.close(folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            vanished: OSError = error
        except OSError as error:
            if error.errno != errno.ESTALE:  # on NFS, a directory that has been removed
                raise
            vanished = error
        if not _is_being_replaced(path, number) or time.monotonic() > give_up:
            raise vanished
        time.sleep(0.002)


def _read_in(folder: int, name: str) -> bytes:
    return read_bounded(name, _LARGEST.get(name, sys.maxsize - 1), folder)


def _is_being_replaced(path: Path, number: int | None) -> bool:
    """Return whether another directory than the one with inode `number` is at `path` by now, or soon will be."""
    try:
        return path.stat().st_ino != number
    except OSError:
        saving = any(path.parent.glob(".old.*")) or any(path.parent.glob(".new.*"))
        return saving or path.exists()  # looked at last: it may have come while we looked for the others


def has_checkpoint(folder: Path) -> bool:
    """Return whether anything was saved, intact or not.

    Raises:
        HardwareError: H003 when the disk does not answer.
    """
    return bool(_present(folder))


def _present(folder: Path) -> list[str]:
    """Return the names that are there, the newest first, after clearing leftovers."""
    with explained_write(folder):
        if folder.is_dir():
            _sweep(folder)
        return [name for name in _NAMES if (folder / name).exists()]


def find_checkpoint(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """Return the newest intact checkpoint, with what is wrong with newer ones; None where none was written.

    Raises:
        ModelError: M005 when checkpoints exist and none of them is intact.
    """
    wrong: list[str] = []
    for name in _present(folder):
        try:
            return folder / name, read_checkpoint(folder / name), wrong
        except ModelError as error:
            wrong.append(error.message)
    if wrong:
        raise ModelError(
            "M005",
            f"no intact checkpoint in {folder}: " + "; ".join(wrong),
            try_="imgcls-fast train DATA   (start again)",
        )
    return None


def final_state(run: Run) -> tuple[dict[str, Tensor], Progress]:
    """Return the weights that a run is judged by: of its best epoch, averaged ones where averaging is on.

    Raises:
        ModelError: M005 when there is no intact best checkpoint.
    """
    found = read_checkpoint(run.checkpoints / "best")
    prefix = "ema." if any(name.startswith("ema.") for name in found.tensors) else "model."
    weights = {name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)}
    return weights, found.progress


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors: "optim.<parameter>.<what>"."""
    return {
        f"optim.{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Any, str], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took, with the memory format of each parameter."""
    parameters = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        if not full.startswith("optim."):
            continue
        name, _, key = full.removeprefix("optim.").rpartition(".")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            restored = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:  # AdamW's step counter: on the device only when the optimizer is fused
            fused = optimizer.defaults.get("fused")
            restored = value.to(parameter.device) if fused else value.clone()
        optimizer.state[parameter][key] = restored


def random_states() -> dict[str, Tensor]:
    """Return the state of torch's generators as tensors."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random_states(tensors: dict[str, Tensor]) -> None:
    """Put back what `random_states` took; GPUs that are gone are ignored."""
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"rng.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
