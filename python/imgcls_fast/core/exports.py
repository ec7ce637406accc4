"""The folder of a run's exports: what was derived from the bundle, for which runtime, and which one to use.

    exports/
      index.json                      {"onnx": "onnx-fp32-0a1b2c3d", "onnx-fp32": ..., "trt": ..., "trt-int8": ...}
      <target>-<precision>-<key8>/    model.onnx | model.plan | model.pt2 | ..., meta.json, gate.json

A folder appears whole. While it is being made it is called `.<name>.<random>`, and its maker holds a lock on it, so that what a
killed process left is distinguished from what another process is making.

The three JSON files hold digests of themselves (`files.write_sealed`), meta.json also that of the model's file. Exports of
versions that did not seal are read as before: their model's file is covered, their JSON is not.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .errors import ConfigError, ExportError, near
from .files import explained_write, move_folder, read_sealed, sha256_file, sha256_json, sync_directory, write_sealed
from .locks import lock_descriptor
from .targets import PRECISIONS, TARGETS, Way
from .text import command, quoted
from .trust import NATIVE, demand_own_code, is_own, signed

INDEX = "index.json"
META = "meta.json"
GATE = "gate.json"
_ABANDONED_S = 86400.0  # since anything was made in a folder, where no lock shows whether its maker lives
_UNFINISHED = re.compile(rf"\.(old-)?({'|'.join(TARGETS)})-[a-z0-9]+-[^.]+\.[0-9a-f]{{8}}")


@dataclass(frozen=True)
class Export:
    """One derived model.

    Args:
        folder: its place.
        meta: content of meta.json: target, precision, file, sha256, bytes, bundle, temperature (or temperatures and thresholds), classes,
            pixels, versions, and what the target adds.
    """

    folder: Path
    meta: dict[str, Any]

    @property
    def path(self) -> Path:
        """The model's file (or folder, of a Triton repository)."""
        return self.folder / str(self.meta["file"])

    def to_dict(self) -> dict[str, Any]:
        """path, everything of meta.json, and gate."""
        return {"path": str(self.path), **self.meta, "gate": self.gate}

    @property
    def gate(self) -> dict[str, Any] | None:
        """Content of gate.json; None where nothing was judged.

        Raises:
            ExportError: E001 when it is damaged.
        """
        try:
            return read_sealed(self.folder / GATE)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ExportError(
                "E001", f"{self.folder / GATE} cannot be read: {error}", try_=f"rm -r {quoted(str(self.folder))}   (and export again)"
            ) from error

    def write_gate(self, report: dict[str, Any]) -> None:
        """Write gate.json.

        Raises:
            HardwareError: H003 when the disk refuses.
        """
        write_sealed(self.folder / GATE, report)


def way_of(target: str, precision: str | None = None) -> Way:
    """How a target is made in a precision; the only place that reads the two words.

    Args:
        target: one of `TARGETS`.
        precision: one of `PRECISIONS`; None: the target's usual one.

    Raises:
        ConfigError: C003 for an unknown word, C004 for a precision that the target does not have.
    """
    _demand_known("target", target, TARGETS, command("export", "RUN", f"--{near(target, tuple(TARGETS)) or 'onnx'}"))
    found = TARGETS[target]
    precision = precision or found.usual
    _demand_known("precision", precision, PRECISIONS, f"--precision {near(precision, PRECISIONS) or found.usual}")
    if precision not in found.ways:
        others = [name for name, other in TARGETS.items() if precision in other.ways]
        raise ConfigError(
            "C004",
            f"--{target} has no {precision}, only {', '.join(found.ways)}; {precision} leaves through {', '.join(others)}",
            try_=command("export", f"--{others[0]}", "--precision", precision),
        )
    return found.ways[precision]._replace(target=target, precision=precision)


def _demand_known(what: str, name: str, known: Iterable[str], try_: str) -> None:
    if name not in known:
        legal = ", ".join(repr(word) for word in known)
        raise ConfigError("C003", f"{what} must be one of {legal}, got {name!r}", try_=try_)


def export_key(bundle: Bundle, **facts: Any) -> str:
    """Eight hex digits that change with the weights, the temperatures and everything else that shapes the file."""
    return sha256_json({"bundle": bundle.digest, **_inside(bundle.scaling()), **facts})[:8]


def _inside(scaling: dict[str, Any]) -> dict[str, Any]:
    """The part of `Bundle.scaling` that is inside an exported graph; thresholds are applied to its scores."""
    return {name: value for name, value in scaling.items() if name != "thresholds"}


def is_of(meta: dict[str, Any], bundle: Bundle) -> bool:
    """Whether an export was made of exactly this model."""
    inside = _inside(bundle.scaling())
    return meta.get("bundle") == bundle.digest and {name: meta.get(name) for name in inside} == inside


def export_folder(path: Path) -> Path | None:
    """The folder of an export, named itself or by the model's file in it; None where `path` is neither."""
    folder = path if os.path.isdir(path) else path.parent
    return folder if os.path.exists(path) and os.path.isfile(folder / META) else None


def common_meta(bundle: Bundle) -> dict[str, Any]:
    """What every meta.json records about the model itself."""
    return {
        "bundle": bundle.digest,
        **bundle.scaling(),
        "classes": list(bundle.labels.classes),
        "labels": bundle.labels.to_dict(),
        "pixels": bundle.pixels.to_dict(),
    }


@contextmanager
def new_export(exports: Path, target: str, precision: str, key: str) -> Iterator[Path]:
    """A private folder to make an export in; give it to `finish` at the end, else it is removed, whatever happens.

    Raises:
        HardwareError: H003 when the disk refuses.
    """
    with explained_write(exports):
        exports.mkdir(parents=True, exist_ok=True)
        with _turn(exports):
            _remove_stale(exports)
            temporary = _new_folder(exports, f".{target}-{precision}-{key}")
            lock, _ = _lock(temporary, wait=False)
    try:
        with explained_write(exports):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def finish(temporary: Path, bundle: Bundle, target: str, precision: str, file: str, meta: dict[str, Any]) -> Export:
    """Write meta.json, and rename the private folder to its place; a folder of that name (same key) is replaced.

    Args:
        temporary: the folder of `new_export`, holding `file`.
        meta: what the target adds to `common_meta`.

    Raises:
        HardwareError: H003 when the disk refuses.
    """
    exports = temporary.parent
    folder = exports / temporary.name[1:].rpartition(".")[0]
    path = temporary / file
    whole = {
        "target": target,
        "precision": precision,
        "file": file,
        "sha256": sha256_file(path) if path.is_file() else _digest_of_folder(path),
        "bytes": sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()),
        **common_meta(bundle),
        **meta,
    }
    whole = signed(whole)
    with explained_write(exports):
        write_sealed(temporary / META, whole)
        for inner in temporary.rglob("*"):
            if inner.is_file():
                _sync_file(inner)
        sync_directory(temporary)
        with _turn(exports):
            if folder.exists():
                aside = _new_folder(exports, f".old-{folder.name}")
                move_folder(folder, aside / folder.name)
                os.rename(temporary, folder)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.rename(temporary, folder)
            sync_directory(exports)
    return Export(folder, whole)


def choose(export: Export, *, default: bool = True) -> None:
    """Name an export in index.json: for its target with its precision, and with `default` for its target."""
    exports = export.folder.parent
    target, precision, name = export.meta["target"], export.meta["precision"], export.folder.name
    with explained_write(exports), _turn(exports):
        write_sealed(
            exports / INDEX,
            {**_old_index(exports), f"{target}-{precision}": name, **({target: name} if default else {})},
        )


def find_export(exports: Path, bundle: Bundle, target: str, precision: str | None = None) -> Export:
    """The export that index.json names, checked against the bundle and its own digest.

    Args:
        precision: fp32, fp16, bf16 or int8; None: the chosen one.

    Raises:
        ExportError: E001 when there is none, or it is damaged or of another model; with the command that makes it.
    """
    again = command("export", exports.parent, f"--{target}", *(("--precision", precision) if precision else ()))
    name = f"{target}-{precision}" if precision else target
    try:
        found = read_export(exports / _plain_name(_read_index(exports)[name]))
    except (FileNotFoundError, KeyError) as error:
        raise ExportError("E001", f"{exports.parent} has no {name} export", try_=again) from error
    except (OSError, ValueError) as error:
        raise ExportError("E001", f"the {name} export of {exports.parent} cannot be read: {error}", try_=again) from error
    demand_own(found, bundle, again)
    return found


def demand_own(export: Export, bundle: Bundle, again: str) -> None:
    """Raise unless the export belongs to this model and its file is intact.

    Args:
        again: the command that makes it again.

    Raises:
        ExportError: E001 when it is damaged, or of another model.
    """
    if not is_of(export.meta, bundle) or not _intact(export):
        raise ExportError(
            "E001", f"{export.folder / str(export.meta.get('file'))} is damaged, or was made from another model", try_=again
        )  # fmt: skip


def demand_trusted(export: Export, *, trust: bool = False) -> None:
    """Raise unless the file may be opened: one with native code must be whole and this user's, or be vouched for.

    Raises:
        ExportError: E001 when it is damaged, E006 when somebody else made it.
    """
    if export.meta.get("target") in NATIVE and not _intact(export):  # the signature covers the digest, not the file
        raise ExportError(
            "E001", f"{export.path} is damaged", try_=command("export", export.folder.parent.parent, f"--{export.meta['target']}")
        )  # fmt: skip
    demand_own_code(export.path, export.meta, trust=trust)


def find_key(exports: Path, bundle: Bundle, target: str, precision: str, key: str) -> Export | None:
    """The export with this key, if it is there and whole; None when it has to be made."""
    try:
        found = read_export(exports / f"{target}-{precision}-{key}")
    except (OSError, ValueError):
        return None
    if not is_own(found.meta):  # a stranger's is made again, not built upon nor handed over as if it were ours
        return None
    return found if found.meta.get("bundle") == bundle.digest and _intact(found) and _judged_whole(found) else None


def read_export(folder: Path) -> Export:
    """Read an export's meta.json; the model's file is not checked.

    Raises:
        OSError, ValueError: meta.json is missing, no JSON object, damaged, or names a file outside the folder.
    """
    meta = read_sealed(folder / META)
    _plain_name(meta.get("file", META))
    return Export(folder, meta)


def _plain_name(name: Any) -> str:
    """The name of a file or folder right here; a stranger's index or meta.json must not lead elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in this folder")
    return name


def list_exports(exports: Path) -> list[Export]:
    """Everything readable in the folder, by name; the hidden folders of work in progress are left out."""
    found = []
    for folder in sorted(exports.glob("[!.]*/")) if os.path.isdir(exports) else ():
        try:
            found.append(read_export(folder))
        except (OSError, ValueError):
            continue
    return found


def remove_stale(exports: Path) -> list[str]:
    """Remove what killed processes left; a folder whose maker lives is locked and stays. Returns the names."""
    if not os.path.isdir(exports):
        return []
    with _turn(exports):
        return _remove_stale(exports)


def _remove_stale(exports: Path) -> list[str]:
    removed = []
    for folder in exports.glob(".*.*/"):
        if not _UNFINISHED.fullmatch(folder.name):  # somebody else's
            continue
        try:
            lock, known = _lock(folder, wait=False)
        except OSError:  # its maker lives
            continue
        try:
            # without locks only its age shows that nobody works in it any more
            if known or time.time() - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
        finally:
            os.close(lock)
    return removed


def _intact(export: Export) -> bool:
    path = export.path
    if path.is_dir():
        return _digest_of_folder(path) == export.meta.get("sha256")
    return path.is_file() and sha256_file(path) == export.meta.get("sha256")


def _judged_whole(export: Export) -> bool:
    try:
        export.gate  # noqa: B018 - reading it checks it
    except ExportError:
        return False
    return True


def _digest_of_folder(folder: Path) -> str:
    return sha256_json({str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()})


def _read_index(exports: Path) -> dict[str, Any]:
    try:
        return read_sealed(exports / INDEX)
    except FileNotFoundError:
        return {}


def _old_index(exports: Path) -> dict[str, Any]:
    """The index before it is written again; empty where it is damaged."""
    try:
        return _read_index(exports)
    except (OSError, ValueError):
        return {}


def _new_folder(exports: Path, stem: str) -> Path:
    """`<stem>.<random>`, with the rights that the user's mask gives: servers of other users read exports."""
    folder = exports / f"{stem}.{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def _lock(folder: Path, *, wait: bool) -> tuple[int, bool]:
    """A descriptor of the folder that holds its lock until it is closed, and whether the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return descriptor, lock_descriptor(descriptor, wait=wait)
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def _turn(exports: Path) -> Iterator[None]:
    """One process at a time renames folders and writes index.json."""
    descriptor, _ = _lock(exports, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
