"""Whose native code an export holds. Opening an AOTInductor package or a TensorRT engine runs code out of it, so each export is
signed when it is made, with a key that only this user has; others are opened only when they are named and trusted.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import env
from .errors import ExportError
from .files import sha256_json
from .targets import TARGETS
from .text import command

KEY = "exports.key"
SIGNATURE = "signature"  # in meta.json, over everything else in it, the digest of the file among it
NATIVE = tuple(name for name, target in TARGETS.items() if target.native)
_BYTES = 32


def signed(meta: dict[str, Any]) -> dict[str, Any]:
    """The same facts with this user's signature; without one where no key can be kept."""
    key = _key(make=True)
    if key is None and meta.get("target") in NATIVE:
        folder = env.config_dir() or "(no home folder)"
        warnings.warn(f"no private key can be kept in {folder}: this export will be opened with --trust only", stacklevel=2)
    return meta if key is None else {**meta, SIGNATURE: _signature(key, meta)}


def is_own(meta: Mapping[str, Any]) -> bool:
    """Whether this user's key signed these facts (the file is compared with its digest elsewhere)."""
    key, given = _key(make=False), meta.get(SIGNATURE)
    return key is not None and isinstance(given, str) and hmac.compare_digest(given, _signature(key, meta))


def demand_own_code(path: Path, meta: Mapping[str, Any], *, trust: bool) -> None:
    """Go on only with native code that this user made, or that somebody vouches for.

    Args:
        path: the file, for the message.
        meta: content of its meta.json.
        trust: whether the user has named this export and vouched for its maker.

    Raises:
        ExportError: E006.
    """
    target = str(meta.get("target"))
    if target not in NATIVE or is_own(meta):
        return
    if not trust:
        run = path.parents[2] if len(path.parents) > 2 and path.parents[1].name == "exports" else "RUN"
        raise ExportError(
            "E006",
            f"{path} holds native code, and it was not exported by this user with the key in {env.config_dir() or 'no place'}",
            why=f"opening it runs that code; if you know who made it: --runtime {target} --trust",
            try_=command("export", run, f"--{target}"),
        )
    warnings.warn(f"native code of unknown origin runs, because it was trusted: {path}", stacklevel=2)


def _signature(key: bytes, meta: Mapping[str, Any]) -> str:
    facts = json.loads(json.dumps({name: value for name, value in meta.items() if name != SIGNATURE}, default=str))
    return hmac.new(key, f"imgcls-fast export {sha256_json(facts)}".encode("ascii"), "sha256").hexdigest()


def _key(*, make: bool) -> bytes | None:
    """The key of this user; None where there is none, or where others can read or write it."""
    folder = env.config_dir()
    if folder is None:
        return None
    found = _read(folder / KEY)
    if found is None and make and not os.path.lexists(folder / KEY):
        return _make(folder)
    return found


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        private = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
        key = os.read(descriptor, _BYTES + 1) if private else b""
    finally:
        os.close(descriptor)
    return key if len(key) == _BYTES else None


def _make(folder: Path) -> bytes | None:
    """A new key, or that of a process that was faster."""
    temporary = folder / f".{KEY}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(temporary, folder / KEY)  # unlike a rename it never replaces the key of another process
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    except OSError:
        return None  # a read-only home: the exports of this user are then opened with --trust
    return _read(folder / KEY)
