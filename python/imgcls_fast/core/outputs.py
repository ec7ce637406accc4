"""Files and folders that a user names as output: only an earlier output of the same kind is replaced, and never an input.

A verb claims its output before it begins to work, so that a wrong name costs no hour. Standard library only.
"""

from __future__ import annotations

import csv
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .errors import UsageError
from .files import explained_write, parse_json, read_json, read_start, sha256_file
from .places import BENCH_TITLE, RUN_NAMES, is_run_folder, others_files
from .targets import TARGETS
from .text import command, quoted

_HEAD_BYTES = 1 << 16
_OF_FILES = frozenset((".csv", ".htm", ".html", ".json", ".jsonl", ".parquet", ".png", ".tsv", ".txt", ".xlsx", ".yaml", ".yml"))
_JUDGED_BY_TRAINING = ("val", "test", "baseline")
_ANSWER = re.compile(r"(.*: )?(label|labels|confidence|probabilities)(_\d+)?")  # a column, perhaps of one of several tasks
_ANSWERED = ({"error"}, {"label", "confidence", "top"}, {"labels", "top"}, {"tasks"})
_MANIFEST = re.compile(rb"# (kserve|k8s) manifest for [^\n]*, written by imgcls-fast\.\n")


class Kind(NamedTuple):
    """One kind of output.

    Attributes:
        what: its name in messages, with an article.
        endings: the endings it may have, the usual one first; empty: any.
        ours: whether the file or folder at a path is an earlier output of this kind.
    """

    what: str
    endings: tuple[str, ...]
    ours: Callable[[Path], bool]


def claim_file(path: Path, kind: Kind, *, force: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """Raise unless a file may be written at `path`; return it.

    Args:
        path: as the user named it.
        kind: what is to be written.
        force: replace a file that is not an earlier output of this kind.
        inputs: files that the command reads; they are never replaced, by whatever name or link they are reached.

    Raises:
        UsageError: U002 for another ending, a folder, a device, an input, a file of a run, or somebody else's file.
        HardwareError: H003 when the folder is missing or closed.
    """
    if os.path.isdir(path):
        name = f"{path.name or 'output'}{kind.endings[0] if kind.endings else ''}"
        raise UsageError("U002", f"--out names a file here, and {path} is a folder", try_=f"--out {quoted(str(path / name))}")
    if kind.endings and path.suffix.lower() not in kind.endings:
        legal = " or ".join(kind.endings)
        better = quoted(str(path.with_suffix(kind.endings[0])))
        raise UsageError("U002", f"{kind.what} is written with the ending {legal}, got {path}", try_=f"--out {better}")
    demand_open(path, path.parent)
    if os.path.lexists(path):
        _demand_free(path, inputs)
        if not force and not _empty(path) and not kind.ours(path):
            raise _taken(f"{path} exists, and is not {kind.what} that imgcls-fast has written")
    return path


def claim_folder(
    folder: Path, names: Iterable[str], kind: Kind, *, force: bool = False, inputs: Iterable[Path] = ()
) -> Path:
    """Raise unless files of these names may be written in `folder`, which need not exist; return it.

    Args:
        folder: as the user named it.
        names: names of the files that will be written, relative to it; the user has not typed these.
        kind, force, inputs: as in `claim_file`.

    Raises:
        UsageError: U002, naming the files.
        HardwareError: H003 when the folder cannot be made or is closed.
    """
    if not os.path.lexists(folder) and folder.suffix.lower() in _OF_FILES:
        raise UsageError("U002", f"--out names a folder here, got {folder}", try_=f"--out {quoted(str(folder.with_suffix('')))}")
    demand_room(folder)
    inputs = list(inputs)
    demand_outside(folder, inputs)
    taken = sorted(name for name in names if os.path.lexists(folder / name))
    for name in taken:
        _demand_free(folder / name, inputs)
    if taken and not force and not kind.ours(folder):
        raise _taken(f"{folder} already holds {', '.join(taken)}, which would be replaced, and is not {kind.what} of imgcls-fast")
    return folder


def demand_outside(folder: Path, inputs: Iterable[Path]) -> None:
    """Raise where a folder of output is one of the folders of images that are read, or is inside one: pictures would become data.

    A run that lies there is passed over as a whole, so what is written into it is none.

    Raises:
        UsageError: U002.
    """
    place = folder.resolve()
    for given in inputs:
        images = given.resolve()
        if not images.is_dir() or images not in (place, *place.parents):
            continue
        between = (place, *place.parents)[: len(place.parts) - len(images.parts) + 1]
        if not any(is_run_folder(inner) for inner in between):
            raise UsageError(
                "U002",
                f"{folder} lies in the images that are read ({given}), and what is written there would become data",
                try_="choose another place with --out",
            )


def demand_new(path: Path, kind: Kind) -> Path:
    """Raise where there is a file at a place that the user has not named, whoever has written it; return the place.

    Raises:
        UsageError: U002.
        HardwareError: H003 when the folder is closed.
    """
    if os.path.lexists(path):
        replaces = f"--out {quoted(str(path))}   (replaces {kind.what} that imgcls-fast has written)"
        raise UsageError("U002", f"{path} exists, and no --out names it", try_=replaces)
    demand_open(path, path.parent)
    return path


def demand_ours(path: Path, kind: Kind, *, force: bool = False) -> None:
    """Raise where a file that the user has not named, and that we always write at this place, is somebody else's.

    Raises:
        UsageError: U002.
    """
    if os.path.lexists(path) and not force and not _empty(path) and not kind.ours(path):
        raise UsageError(
            "U002", f"{path} is not {kind.what} that imgcls-fast has written, and would be replaced", try_="move it, or add --force"
        )  # fmt: skip


def _taken(message: str) -> UsageError:
    return UsageError("U002", message, try_="choose another place with --out, or add --force")


def demand_room(folder: Path) -> None:
    """Go on only where a folder can be made, or is there and can be written in.

    Raises:
        HardwareError: H003.
    """
    demand_open(folder, next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)))


def demand_open(path: Path, folder: Path) -> None:
    """Go on only where `folder` is one that can be written in.

    Raises:
        HardwareError: H003, before hours of work instead of after them.
    """
    with explained_write(path):
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _demand_free(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse what no `force` may replace: an input, a file of a run, and what is no file.

    Raises:
        UsageError: U002.
    """
    try:
        found = os.stat(path)
    except OSError:
        found = os.lstat(path)  # a link that leads nowhere
    for given in inputs:
        try:
            same = os.path.samestat(found, os.stat(given))
        except OSError:
            continue
        if same and not stat.S_ISDIR(found.st_mode):
            also = "" if path == given else f" ({given})"
            raise UsageError(
                "U002", f"{path} is read by this command{also}, and an input is never replaced", try_="choose another place with --out"
            )  # fmt: skip
    if (run := _run_that_owns(path)) is not None:
        raise UsageError(
            "U002", f"{path} belongs to the run {run}, and is not replaced by hand", try_="choose another place with --out"
        )  # fmt: skip
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        raise UsageError("U002", f"{path} is a device or a pipe, not a file", try_="choose another place with --out")


def _run_that_owns(path: Path) -> Path | None:
    """The run that wrote `path` and still needs it."""
    place = path.parent.resolve() / path.name
    for folder in place.parents:
        inside = place.relative_to(folder).parts
        if inside[0] not in RUN_NAMES or not is_run_folder(folder):
            continue
        if inside[0] != "eval" or len(inside) < 2 or inside[1] in _JUDGED_BY_TRAINING:
            return folder
    return None


def _empty(path: Path) -> bool:
    """Whether there is nothing to lose: `mktemp` makes such files."""
    return os.path.isfile(path) and path.stat().st_size == 0


# ---------------------------------------------------------------- what earlier outputs look like


def _head(path: Path) -> bytes:
    try:
        return read_start(path, _HEAD_BYTES)
    except (OSError, ValueError):
        return b""


def _first_line(path: Path) -> str:
    return _head(path).split(b"\n", 1)[0].decode("utf-8", "replace")


def _object_with(*keys: str) -> Callable[[Path], bool]:
    def ours(path: Path) -> bool:
        try:
            value = read_json(path)
        except (OSError, ValueError):
            return False
        return isinstance(value, dict) and set(keys) <= value.keys()

    return ours


def _split_table(path: Path) -> bool:
    return _first_line(path) == "path,label,group,split"


def _answers(path: Path) -> bool:
    line = _first_line(path)
    if path.suffix.lower() == ".csv":
        head = next(csv.reader([line]), [])
        inner = head[1:-1]
        ours = [head[:1], head[-1:]] == [["path"], ["error"]] and all(map(_ANSWER.fullmatch, inner))
        return ours and any(name.endswith(("confidence", "probabilities")) for name in inner)
    try:
        value = parse_json(line)
    except ValueError:
        return False
    return isinstance(value, dict) and "path" in value and any(keys <= value.keys() for keys in _ANSWERED)


def _judged_folder(folder: Path) -> bool:
    return _object_with("labels", "fingerprint", "has_targets")(folder / "predictions.json")


def _bench_page(folder: Path) -> bool:
    return BENCH_TITLE in _head(folder / "bench.html")


def exported_model(exports: Path, target: str) -> Kind:
    """The kind of the copy that `export --out` makes of a target: our ONNX files, and whatever is in this folder of exports."""

    def ours(path: Path) -> bool:
        if b"imgcls-fast" in _head(path)[:64]:  # the producer, which ONNX keeps in front
            return True
        try:
            digest = sha256_file(path)
        except OSError:
            return False
        for meta in exports.glob("*/meta.json"):
            try:
                if read_json(meta).get("sha256") == digest:
                    return True
            except (OSError, ValueError, AttributeError):
                continue
        return False

    return Kind(f"an export for {target}", TARGETS[target].endings if target in TARGETS else (), ours)


SPLIT = Kind("a table of splits", (".csv",), _split_table)
ANSWERS = Kind("a table of answers", (".csv", ".jsonl"), _answers)
COMPARED = Kind("a comparison of runtimes", (".json",), _object_with("images", "pixels", "scores", "failures"))
TIMES = Kind("a result of bench", (".json",), _object_with("schema", "engines", "machine", "method"))
CHANGES = Kind("a comparison of benchmarks", (".json",), _object_with("rows", "flagged", "only_before", "only_after"))
SERVICE = Kind("a manifest", (".yaml", ".yml"), lambda path: _MANIFEST.match(_head(path)) is not None)
REPORT = Kind("a report", (".html",), lambda path: b"imgcls-fast report</title>" in _head(path))
JUDGED = Kind("an evaluation", (), _judged_folder)
BENCH_PAGE = Kind("a page of benchmarks", (), _bench_page)
JUDGED_NAMES = (
    "confusion.csv",
    "metrics.json",
    "per_class.csv",
    "plots",
    "predictions.csv",
    "predictions.json",
    "scores.npy",
    "targets.npy",
)


def demand_vacant(directory: Path) -> None:
    """Raise where no new run can be made; makes nothing.

    Raises:
        UsageError: U002 when the directory already holds a run (a whole one: one that was killed at birth may be
            overwritten), or files of somebody else's that a run would replace.
        HardwareError: H003 when nothing can be written there.
    """
    with explained_write(directory):
        whole, taken = is_run_folder(directory), others_files(directory)
    if whole:
        try_ = f"{command('train', directory, '--resume')}   (or another --out)"
        raise UsageError("U002", f"{directory} already holds a run", try_=try_)
    if taken:
        raise UsageError(
            "U002",
            f"{directory} is not a run, and holds files that a run would replace: {', '.join(taken)}",
            try_="choose an empty or new directory with --out",
        )
    demand_room(directory)
