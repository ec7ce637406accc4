"""What a section of settings is made of: its base class, the texts that people write for values, and the declaration of a flag."""

from __future__ import annotations

import re
from collections.abc import Collection
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from .verbs import Group, Kind

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
FREE: dict[str, Any] = {"resume": "free"}
BITS: dict[str, Any] = {"resume": "bits"}  # may change, and the result then differs in its last bits

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
_OUTSIDE_BRACKETS = re.compile(r",(?![^()]*\))")


def parse_seconds(value: Any) -> Any:
    """Turn "90", "90s", "10m" or "2h" into seconds; anything else is left for the schema to refuse."""
    if isinstance(value, str):
        text = value.strip().lower()
        unit = _UNITS_S.get(text[-1:], 0)
        number = text[:-1] if unit else text
        try:
            return float(number) * (unit or 1)
        except ValueError:
            return value
    return value


def listed(value: Any) -> Any:
    """Accept "0.8,0.1,0.1" for lists and "cat=1,dog=2.5" for tables, as a command line writes them."""
    if isinstance(value, dict):  # in YAML the classes of digits are numbers
        return {str(key) if type(key) is int else key: inner for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if "=" in value:
        return {key.strip(): number for key, _, number in (part.partition("=") for part in parts)}
    return parts if len(parts) > 1 else value


def several(value: Any) -> Any:
    """Accept "a@x, b(k=1, l=2)@y" for a list: commas between brackets do not separate."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        return value
    parts = [part.strip() for text in value for part in _OUTSIDE_BRACKETS.split(text)]
    return [part for part in parts if part]


def _named(text: str) -> str:
    if not text:
        raise ValueError("must be a name, got ''")
    return text


# an empty name is a mistake in a script; a length in the schema would refuse file names that are not UTF-8
Text = Annotated[str, AfterValidator(_named)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0)]


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    flag_group: ClassVar[Group] = "optimisation"  # the heading of its flags in --help
    flag_verbs: ClassVar[tuple[str, ...]] = ("train",)  # the verbs that know them


def flag(
    *names: str,
    metavar: str = "",
    group: Group | None = None,
    kind: Kind | None = None,
    values: dict[str, Any] | None = None,
    aliases: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Declare the flag of a setting, for `json_schema_extra` of its field. Help and choices are those of the field.

    Args:
        names: "--epochs", or "-e" before it.
        metavar: what --help shows for the value.
        group: another heading than that of the section.
        kind: another than what the type of the field asks for.
        values: text of the command line -> value of the setting, where the two differ.
        aliases: further names, which --help does not show.
    """
    given = {"names": names, "metavar": metavar, "group": group, "kind": kind, "values": values, "aliases": aliases}
    return {"flag": {key: value for key, value in given.items() if value}}


def extras(field: FieldInfo) -> dict[str, Any]:
    """What a field declares besides its range: "resume" and "flag"."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def flag_row(setting: str, field: FieldInfo, section: type[Section]) -> dict[str, Any] | None:
    """The flag of a setting as keywords of `verbs.Flag`; None where it has none."""
    declared = extras(field).get("flag")
    if not isinstance(declared, dict):
        return None
    parts = _parts(field.annotation)
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    texts = {value: text for text, value in declared.get("values", {}).items()}
    values = dict(declared.get("values", {}))
    if NoneType in parts and str not in parts:  # a column may be called none
        values["none"] = None
    kind = declared.get("kind") or _kind(parts)
    alone = parts if len(parts) == 1 else []
    if alone and get_origin(alone[0]) is tuple and get_origin(get_args(alone[0])[0]) is Literal:  # any of some words
        alone, words = [get_args(alone[0])[0]], list(get_args(get_args(alone[0])[0]))
    choices = tuple(texts.get(word, word) for word in words) if alone and get_origin(alone[0]) is Literal else ()
    row = {
        "names": declared["names"],
        "help": _help(
            field.description or "",
            kind,
            () if choices else (*words, *(text for text, value in values.items() if value is None)),
        ),
        "setting": setting,
        "verbs": section.flag_verbs,
        "metavar": declared.get("metavar") or ("NAME" if choices else ""),
        "kind": kind,
        "group": declared.get("group") or section.flag_group,
        "choices": choices,
        "values": tuple(values.items()),
        "aliases": declared.get("aliases"),
    }
    return {key: value for key, value in row.items() if value}


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, without what only narrows them."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]


def _kind(parts: list[Any]) -> Kind:
    lists = [get_args(part)[0] for part in parts if get_origin(part) is tuple]
    if bool in parts:
        return "bool"
    if any(part is str or get_origin(part) is Literal for part in lists):
        return "many"
    return "numbers" if lists else "value"


def _help(text: str, kind: Kind, words: Collection[str]) -> str:
    """The description, and which words may stand for a number, where it does not name them."""
    more = [word for word in words if not re.search(rf"\b{word}\b", text)]
    if kind == "many":
        return f"{text}; may be repeated"
    return f"{text}, or {' or '.join(more)}" if more and kind != "bool" else text
