"""From what a person wrote for an option, or gave as a keyword in Python, to the value of a setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ConfigError, near
from .options import setting_flags
from .other_names import not_needed, setting_meant, value_meant
from .verbs import Flag


def setting_value(flag: Flag, value: Any, written: str) -> Any:
    """What the setting takes, from what a person wrote.

    Args:
        value: text of the command line, or any value from Python.
        written: how the person wrote it, for the message.

    Raises:
        ConfigError: C003 when the flag has listed choices and `value` is none of them.
    """
    table = dict(flag.values)
    given = [part for text in value for part in str(text).split(",")] if isinstance(value, list | tuple) else [value]
    wrong = [one for one in given if not isinstance(one, bool) and str(one).strip() not in (*flag.choices, *table.values())]
    if flag.choices and wrong:
        value = wrong[0]
        guess = value_meant(str(value), flag.choices) or near(str(value), flag.choices) or flag.choices[0]
        legal = ", ".join(repr(choice) for choice in flag.choices)
        raise ConfigError(
            "C003",
            f"{flag.setting or flag.long} must be one of {legal}, got {str(value)!r}",
            where=written,
            try_=f"{flag.long} {guess}",
        )
    if not isinstance(value, bool) and str(value) in table:
        return table[str(value)]
    if flag.kind == "numbers" and isinstance(value, str):
        parts = [part.strip() for part in value.strip("[]() ").split(",")]
        return parts if all(map(_is_number, parts)) else value
    return value


def overrides(given: Mapping[str, Any], flags: Iterable[Flag]) -> dict[str, Any]:
    """{"train.epochs": "3"} from {"epochs": "3"}; options that are no setting are left out.

    Raises:
        ConfigError: C003 for a value outside the listed choices.
    """
    known = {flag.keyword: flag for flag in flags if flag.setting}
    return {
        flag.setting: setting_value(flag, given[keyword], f"{flag.long} {_as_typed(given[keyword])}")
        for keyword, flag in known.items()
        if flag.setting and keyword in given
    }


def python_overrides(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the Python API to dotted settings: {"img_size": 224} -> {"pixels.size": 224}.

    Raises:
        ConfigError: C001 for an unknown keyword, with the nearest one; C003 for a value outside the listed choices.
    """
    known = setting_flags()
    changes: dict[str, Any] = {}
    for keyword, value in kwargs.items():
        if keyword not in known:
            meant = setting_meant(keyword)
            ours = next((flag.keyword for flag in known.values() if flag.setting == meant), "")
            guess = ours or near(keyword, sorted(known)) if ours or not meant else ""
            named = "leave it out" if not_needed(keyword) else f"overrides={{{meant or 'section.field'!r}: {value!r}}}"
            raise ConfigError(
                "C001",
                f"unknown setting {keyword}",
                where=f"{keyword}={value!r}",
                why=not_needed(keyword),
                try_=f"{guess}={value!r}" if guess else named,
            )
        flag = known[keyword]
        if flag.setting in changes:
            raise ConfigError(
                "C004", f"{flag.setting} is given twice", where=f"{keyword}={value!r}", try_=f"{flag.keyword}=..."
            )
        changes[str(flag.setting)] = setting_value(flag, value, f"{keyword}={value!r}")
    return changes


def _as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
