"""From a parsed command line to checked settings: pydantic is imported here, torch is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, UsageError
from ..core.flags import overrides
from ..core.options import flags_of
from .answer import Request

if TYPE_CHECKING:
    from ..core.config import RunConfig

_NUMBER = r"[0-9]*\.?[0-9]+"  # what float() takes; [0-9.]+ would also fit 0..8


def settings_of(request: Request, source: str | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration that a command line asks for, and the arguments that ask the API for the same.

    A typing mistake ends here, before the first slow import.

    Args:
        source: the data, where the verb names it.

    Returns:
        The merged RunConfig; keyword arguments config, preset, sets and overrides.

    Raises:
        ConfigError: C001 to C005.
    """
    from ..core.settings import build_config

    flags = flags_of(request.verb)
    changes = overrides(request.options, flags)
    config = Path(request.get("config")) if request.get("config") else None
    arguments = {
        "config": config,
        "preset": request.get("preset"),
        "sets": tuple(request.get("set") or ()),
        "overrides": changes,
    }
    named = {"data.source": source} if source else {}
    try:
        merged = build_config({**changes, **named}, preset=arguments["preset"], file=config, sets=arguments["sets"])
    except ConfigError as error:
        raise _placed(error, request) from error
    return merged, arguments


def whole_number(request: Request, keyword: str, least: int = 1) -> int | None:
    """An option that is a count, or None if it was not given.

    Raises:
        UsageError: U002 when it is not a whole number of at least `least`.
    """
    text = request.get(keyword)
    if text is None:
        return None
    flag = next(flag for flag in flags_of(request.verb) if flag.keyword == keyword)
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(
            "U002", f"{flag.long} must be a whole number >= {least}, got {text!r}", try_=f"{flag.long} {least}"
        )
    return number


def _instead(setting: str, typed: str, message: str) -> str:
    """The value that was probably meant, or one that is always right; empty where there is none."""
    if setting == "pixels.size" and (sides := re.fullmatch(r"(\d+)\s*[xX,]\s*\1", typed)):
        return sides[1]  # 224x224: the input is square
    if setting == "data.split":
        percent = [float(part) for part in typed.split(",")] if re.fullmatch(rf"{_NUMBER}(,{_NUMBER}){{2}}", typed) else []
        return ",".join(f"{part / 100:g}" for part in percent) if sum(percent) == 100 else "0.8,0.1,0.1"
    if setting == "train.save_every":
        return "10m"
    if setting == "data.max_bad":
        share = re.fullmatch(rf"({_NUMBER})\s*%", typed)
        return f"{float(share[1]) / 100:g}" if share else "0.01"
    if setting == "train.patience":
        return "none" if typed.lower() in ("never", "no", "false", "off") else "10"
    if setting == "model.freeze":
        return "backbone"
    return "auto" if "'auto'" in message else ""


def _placed(error: ConfigError, request: Request) -> ConfigError:
    """The same error with the flags that it came from, where only the command line can know."""
    flags = [flag for flag in flags_of(request.verb) if flag.setting and flag.keyword in request.options]
    for flag in flags:
        typed = f"{flag.long} {request.get(flag.keyword)}"
        if not error.where and str(flag.setting) in error.message:
            error.where = typed
            if not error.try_ and (value := _instead(str(flag.setting), str(request.get(flag.keyword)), error.message)):
                error.try_ = f"{flag.long} {value}"
        error.details = tuple(f"{typed}: {line}" if line.startswith(f"{flag.setting} ") else line for line in error.details)
    return error
