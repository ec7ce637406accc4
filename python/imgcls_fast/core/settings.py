"""From presets, YAML files, flags and `--set` to one checked RunConfig, or one clear error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .bounds import YAML_BYTES, YAML_DEPTH
from .config import RunConfig, setting_names
from .errors import ConfigError, near, shortened
from .files import write_text
from .other_names import not_needed, setting_meant
from .text import to_yaml as as_yaml


def build_config(
    overrides: dict[str, Any] | None = None,
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: tuple[str, ...] | list[str] = (),
) -> RunConfig:
    """Merge preset < file < overrides (flags or Python arguments) < `--set`, and check the result once.

    Args:
        overrides: dotted names to values, e.g. {"train.epochs": 3}.
        preset: name of a file in `presets/`.
        file: YAML with the sections of RunConfig.
        sets: "section.field=value", the value read as YAML.

    Raises:
        ConfigError: C001 unknown setting (with the nearest name), C002 or C003 a wrong value, C005 an unreadable file.
    """
    given = _Given()
    if preset:
        given.merge(*_read_yaml(_preset_text(preset), f"preset {preset}"))
    if file is not None:
        given.merge(*_read_yaml(_file_text(file), str(file)))
    for name, value in (overrides or {}).items():
        given.put(name, value, "")
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError("C002", f"a setting is written section.field=value, got {text!r}", try_="--set train.epochs=30")
        given.put(name.strip(), _scalar(value), f"--set {text}")
    try:
        config = RunConfig.model_validate(given.merged)
    except ValidationError as error:
        given.faults += _explain(error, given.origin)
        raise _together(given.faults) from error
    if given.faults:
        raise _together(given.faults)
    return config


def from_sets(sets: Sequence[str]) -> dict[str, Any]:
    """Dotted names to values of "section.field=value" strings, checked."""
    changed = flatten(build_config(sets=tuple(sets)))
    return {name: changed[name] for name in (text.partition("=")[0].strip() for text in sets)}


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    folder = resources.files("imgcls_fast") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def to_yaml(config: RunConfig) -> str:
    """The configuration as a YAML file that `build_config(file=...)` reads back to an equal object."""
    return as_yaml(config.model_dump(mode="json"))


def save_config(config: RunConfig, path: Path) -> None:
    """Write `to_yaml`, whole."""
    write_text(path, to_yaml(config))


def read_config(path: Path) -> RunConfig:
    """What `save_config` wrote.

    Raises:
        ConfigError: as `build_config`.
    """
    return build_config(file=path)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted names to values."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": inner for key, inner in value.items()}
        else:
            flat[section] = value
    return flat


def replace_settings(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The same configuration with some dotted names changed, checked again."""
    return build_config({**flatten(config), **changes})


def _written(name: str, value: str, in_file: bool) -> str:
    """How a setting is written: in a YAML file, or with --set."""
    section, _, key = name.partition(".")
    if in_file and key:
        return f"write {key}: in the section {section}:"
    return f"write {name}:" if in_file else f"--set {name}={value or '...'}"


class _Given:
    """What was given so far: the tree of values, where each came from, and the faults that are known before the check."""

    def __init__(self) -> None:
        self.merged: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.faults: list[ConfigError] = []

    def put(self, name: str, value: Any, where: str) -> None:
        """Set one dotted name; an unknown one is a fault."""
        if name not in setting_names():
            self.faults.append(_unknown(name, where))
            return
        section, _, key = name.partition(".")
        if key:
            self.merged.setdefault(section, {})[key] = value
        else:
            self.merged[section] = value
        self.origin[name] = where

    def merge(self, tree: Any, lines: dict[str, str], source: str) -> None:
        """Add the settings of a file."""
        if tree is None:
            return
        if not isinstance(tree, dict):
            raise ConfigError(
                "C005", f"{source} must hold sections (data:, train:, ...), got {type(tree).__name__}", where=source
            )
        sections = {name.partition(".")[0] for name in setting_names() if "." in name}
        for section, value in tree.items():
            where = lines.get(str(section), source)
            if section in sections and isinstance(value, dict):
                for key, inner in value.items():
                    self.put(f"{section}.{key}", inner, lines.get(f"{section}.{key}", source))
            elif section in sections and value is None:
                continue
            elif section in sections:
                text = f"{section} must be a section with settings, got {shortened(repr(value))}"
                self.faults.append(ConfigError("C002", text, where=where))
            else:
                self.put(str(section), value, where)


def _together(faults: Sequence[ConfigError]) -> ConfigError:
    """One error for all faults: each in full, in a line of its own, with what to do about it."""
    first = faults[0]
    if len(faults) == 1:
        return first
    faults = sorted(faults, key=lambda f: _line_of(f.where))
    details = [f"{f.where}: {f.message}" if f.where else f.message for f in faults]
    details = [f"{line}   ({f.try_})" if f.try_ else line for line, f in zip(details, faults, strict=True)]
    return ConfigError(
        first.code, f"{len(faults)} settings are wrong", details=details, try_="imgcls-fast train --dump-config   (lists every setting)"
    )  # fmt: skip


def _unknown(name: str, where: str) -> ConfigError:
    known = setting_names()
    section = near(name, sorted({k.partition(".")[0] for k in known if "." in k}))
    meant = setting_meant(name)
    if meant not in known:
        meant = ""
    if not meant and section and section != name and "." not in name:
        return ConfigError("C001", f"unknown section {shortened(name)}", where=where, try_=f"rename it to {section}")
    in_file = ", line " in where and not where.startswith("--set ")
    last = name.split(".")[-1]
    same = [k for k in known if k.endswith(f".{last}")]  # the right field in the wrong section
    guess = meant or same[0] if meant or len(same) == 1 else near(name, known) or near(last, [k.split(".")[-1] for k in known])
    full = guess if guess in known else next((k for k in known if guess and k.endswith("." + guess)), "")
    value = where.partition("=")[2] if where.startswith("--set ") else ""
    return ConfigError(
        "C001",
        f"unknown setting {shortened(name)}",
        where=where,
        why=not_needed(name),
        try_=_written(full, value, in_file) if full else "imgcls-fast train --dump-config   (lists every setting)",
    )


def _line_of(where: str) -> int:
    found = re.search(r", line (\d+)", where)
    return int(found[1]) if found else 0


def _explain(error: ValidationError, origin: dict[str, str]) -> list[ConfigError]:
    """Each wrong setting in our words, in the order of the schema."""
    problems: dict[str, list[Any]] = {}
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        name = ".".join(place[:2]) if len(place) > 1 and ".".join(place[:2]) in setting_names() else ".".join(place[:1])
        problems.setdefault(name, []).append(item)
    return [_explained(name, items, origin) for name, items in problems.items()]


def _explained(name: str, items: list[Any], origin: dict[str, str]) -> ConfigError:
    item = items[0]
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        if name in setting_names() and name not in message:  # a rule that several settings share
            message = f"{name} {message}"
    else:
        wanted = " or ".join(dict.fromkeys(_wanted(i) for i in items))
        if item["type"] == "missing":
            wanted = f"{1 + max(i['loc'][-1] for i in items if isinstance(i['loc'][-1], int))} numbers"
        message = f"{name} must be {wanted}, got {shortened(repr(item['input']))}"
    if item["type"] == "value_error" and name not in setting_names():  # a rule about several settings of a section
        return ConfigError("C004", message, where=_where(name, origin))
    range_error = any(i["type"].startswith(("greater", "less", "literal", "finite", "value_error")) for i in items)
    return ConfigError("C003" if range_error else "C002", message, where=_where(name, origin))


def _where(name: str, origin: dict[str, str]) -> str:
    """Where a setting came from; for a rule about a whole section, where any setting of it did."""
    return origin.get(name) or next(
        (place for key, place in origin.items() if key.startswith(f"{name}.") and place), ""
    )


_PLAIN = {  # what pydantic calls a type, and what people do
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "tuple": "a list of numbers",
    "dictionary": "pairs NAME=NUMBER",
    "boolean": "true or false",
    "list": "a list",
}


def _wanted(item: Any) -> str:
    context = item.get("ctx") or {}
    if "expected" in context and item["type"] == "literal_error":
        names = str(context["expected"])
        return f"one of {names}" if "," in names or " or " in names else names
    if item["type"] == "missing":
        return "a longer list"
    text = item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return _PLAIN.get(text.split(", unable to parse")[0], text.split(", unable to parse")[0])


def _scalar(text: str) -> Any:
    try:
        return _parse(text)[0]
    except (yaml.YAMLError, ValueError, RecursionError, _Refused):  # ValueError: 2001-99-99 looks like a date and is none
        return text


def _preset_text(name: str) -> str:
    if name not in preset_names():
        guess = near(name, preset_names())
        raise ConfigError(
            "C003",
            f"unknown preset {name!r}, expected one of {', '.join(preset_names())}",
            try_=f"--preset {guess or preset_names()[0]}",
        )
    return (resources.files("imgcls_fast") / "presets" / f"{name}.yaml").read_text("utf-8")


def _file_text(path: Path) -> str:
    """The text of a file or a pipe, of which no more is read than a configuration may have."""
    try:
        with open(path, "rb") as file:
            content = file.read(YAML_BYTES + 1)
        if len(content) > YAML_BYTES:
            raise ConfigError("C005", f"{path} is larger than the {YAML_BYTES:,} bytes of a configuration", where=str(path))
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "C005", f"cannot read the configuration {path}: {error}", try_="imgcls-fast train --dump-config > run.yaml"
        ) from error


class _Refused(Exception):
    """YAML that parses, but is not allowed here: (what the file does, mark)."""


def _read_yaml(text: str, source: str) -> tuple[Any, dict[str, str], str]:
    """The tree, and for each dotted name the file and line where it stands."""
    try:
        tree, node = _parse(text)
    except _Refused as error:
        what, mark = error.args
        raise ConfigError("C005", f"{source} {what}", where=_at(source, mark)) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99 looks like a date and is none
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError("C005", f"{source} is not valid YAML: {problem}", where=_at(source, mark)) from error
    lines: dict[str, str] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[f"{key.value}"] = f"{source}, line {key.start_mark.line + 1}"
            for inner, _ in value.value if isinstance(value, yaml.MappingNode) else ():
                lines[f"{key.value}.{inner.value}"] = f"{source}, line {inner.start_mark.line + 1}"
    return tree, lines, source


def _at(source: str, mark: Any) -> str:
    return f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source


def _parse(text: str) -> tuple[Any, Any]:
    """The tree and its node.

    Anchors, tags, merges and repeated keys are refused, and so is nesting beyond `bounds.YAML_DEPTH`, while scanning:
    the parser's time grows with the square of the depth, and an alias copies what it names.

    Raises:
        _Refused, yaml.YAMLError, ValueError, RecursionError
    """
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise _Refused("uses YAML anchors, which are not allowed", token.start_mark)
        if isinstance(token, yaml.TagToken | yaml.DirectiveToken):
            raise _Refused("uses YAML tags or directives, which are not allowed", token.start_mark)
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > YAML_DEPTH:
            raise _Refused(f"is nested more than {YAML_DEPTH} levels deep", token.start_mark)
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _demand_unique(node)
        return None if node is None else loader.construct_document(node), node
    finally:
        loader.dispose()


_OPENING = (
    yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken, yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken
)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def _demand_unique(node: Any, prefix: str = "") -> None:
    """Refuse a key that stands twice in one mapping, at any depth, and the merge key."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _demand_unique(item, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = f"{prefix}{key.value if isinstance(key, yaml.ScalarNode) else '?'}"
        if key.tag == "tag:yaml.org,2002:merge":
            raise _Refused("merges mappings with <<, which is not allowed", key.start_mark)
        if name in lines:
            raise _Refused(f"sets {shortened(name)} twice: it is set in line {lines[name]} already", key.start_mark)
        lines[name] = key.start_mark.line + 1
        _demand_unique(value, f"{name}.")
