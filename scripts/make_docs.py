#!/usr/bin/env python3
"""Writes what is a copy of tables in the code: core/setting_flags.py, docs/cli.md and docs/configuration.md.

    python scripts/make_docs.py            write them
    python scripts/make_docs.py --check    exit 1 when one is not current

A test runs the check, so a changed flag or setting cannot leave its page behind. A setting declares its flag in the schema
(`core/config.py`); setting_flags.py holds the rows without pydantic, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imgcls_fast.cli.old import OLD_NAMES, modernize
from imgcls_fast.core.config import RunConfig, bits_settings, flag_rows, free_settings
from imgcls_fast.core.env import runs_dir
from imgcls_fast.core.errors import UsageError
from imgcls_fast.core.options import LATER_FLAGS, flags_of, setting_flags
from imgcls_fast.core.schema import Section
from imgcls_fast.core.verbs import LATER_VERBS, VERBS, Flag, Verb

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTE = "<!-- written by scripts/make_docs.py; edit the table in the code instead -->"

# An example of each option of the codebase that this one replaces; what it becomes is computed, not written.
OLD_EXAMPLES: dict[str, str] = {
    "--exp": "first try",
    "--root": "data/",
    "--dataset_name": "flowers",
    "--aug": "True",
    "--image_size": "224",
    "--loss_weights": "1,2.5",
    "--model_name": "resnet50",
    "--attention_name": "cbam",
    "--attention_index": "4",
    "--train": "True",
    "--eval": "True",
    "--save": "True",
    "--learning_rate": "0.001",
    "--lr_scheduler": "cosine",
    "--early_stopping": "10",
    "--cross_validation": "True",
    "--num_splits": "5",
    "--printing": "False",
    "--overwrite": "False",
    "--split_ratio": "0.8,0.1,0.1",
    "--batch_size": "32",
}


EXIT_CODES = [
    ["0", "done"],
    ["1", "internal error, or an export that cannot be made"],
    ["2", "a mistake in the command line, a setting, a model name or weights"],
    ["3", "the data cannot be used as it is (`predict`: none of the images could be read)"],
    ["4", "hardware, disk, or an optional library that is not installed"],
    ["5", "made, judged and refused: the exported model disagrees with the original"],
    ["130", "interrupted after a checkpoint; the resume command is printed"],
]
ENVIRONMENT = [
    ["`IMGCLS_RUNS`", "the folder of runs (default `runs` in the working directory)"],
    ["`IMGCLS_CACHE`", "unpacked archives and the embedded digits (default: the user's cache folder)"],
    [
        "`IMGCLS_CUDA`, `IMGCLS_CUDA_ARCHS`",
        "read when the package is built: `auto`, `on` or `off`, and GPU architectures",
    ],
]


def prose(text: str) -> str:
    """One paragraph, however it is broken into lines here."""
    return " ".join(text.split())


def cell(text: object) -> str:
    """Text for one cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


# ---------------------------------------------------------------- command line


def _spelling(flag: Flag) -> str:
    names = [*flag.names, *([f"--no-{flag.long[2:]}"] if flag.kind == "bool" else [])]
    value = "" if flag.kind in ("switch", "bool") else f" {flag.metavar}"
    return ", ".join(f"`{name}`" for name in names) + (f" {cell(value.strip())}" if value else "")


def _meaning(flag: Flag) -> str:
    text = cell(flag.help)
    if flag.choices and flag.keyword != "channels":
        text += ": " + ", ".join(f"`{choice}`" for choice in flag.choices)
    if flag.aliases:
        text += f" (also {', '.join(f'`{name}`' for name in flag.aliases)})"
    return text


def _verb_section(verb: Verb) -> str:
    usage = f"imgcls-fast {verb.name} {verb.things + ' ' if verb.things else ''}[options]"
    parts = [f"## {verb.name}", verb.help[:1].upper() + verb.help[1:] + ".", f"```text\n{usage}\n```"]
    if verb.examples:
        parts.append("```sh\n" + "\n".join(f"imgcls-fast {example}" for example in verb.examples) + "\n```")
    groups: dict[str, list[Flag]] = {}
    for flag in flags_of(verb.name):
        groups.setdefault(flag.group, []).append(flag)
    rows = [
        [_spelling(flag), f"`{flag.setting}`" if flag.setting else "", _meaning(flag)]
        for flags in groups.values()
        for flag in flags
    ]
    parts.append(table(["option", "setting", "meaning"], rows))
    return "\n\n".join(parts)


def _old_rows() -> list[list[str]]:
    known = {name for flag in flags_of("train") for name in flag.all_names}
    rows = []
    for name in OLD_NAMES:
        try:
            _, notes = modernize([name, OLD_EXAMPLES[name]], known)
        except UsageError as refusal:
            notes = [f"refused: {refusal.message}"]
        said = "; ".join(notes).replace(f"{runs_dir()}/", "runs/") or "accepted as it is"
        rows.append([f"`{name}`", f"`{name} {OLD_EXAMPLES[name]}`", cell(said)])
    return rows


def cli_page() -> str:
    """docs/cli.md."""
    verbs = [
        [f"[`{v.name}`](#{v.name.replace(' ', '-')})", f"`{v.things}`" if v.things else "", cell(v.help)] for v in VERBS
    ]
    parts = [
        NOTE,
        "# Command line",
        prose("""
            `imgcls-fast VERB [THING] [options]`. RUN is a directory or a name in `runs/`; without it the last finished run is
            meant. Every verb has `--help`, `--json` (one JSON object on stdout, everything else on stderr), `--quiet`
            and `--debug`.
        """),
        table(["verb", "thing", "what it does"], verbs),
        prose("""
            A setting can be given four ways; the later wins: `--preset`, `-c FILE`, a flag,
            `--set section.field=value`. All settings are in [configuration.md](configuration.md). Options must be
            spelled out in full: there are no abbreviations.
        """),
        "## Exit codes",
        table(["code", "meaning"], EXIT_CODES),
        "Each error has a code and [a page](errors/README.md).",
        *(_verb_section(verb) for verb in VERBS),
        "## Words that are not there yet",
        "These are known and answered with a clear message instead of a guess. Verbs: "
        + ", ".join(f"`{v}`" for v in LATER_VERBS)
        + ". Options: "
        + ", ".join(f"`{f}`" for f in LATER_FLAGS)
        + ".",
        "## Old names",
        prose("""
            The option names of the codebase that this project replaces still work with `train`. The new name is shown
            once, on stderr.
        """),
        table(["old option", "for example", "what is said"], _old_rows()),
        prose("""
            A boolean is read as what it says: `False`, `no`, `off` and `0` are false (the old program took
            `--aug False` for true). `--root DIR --dataset_name NAME` become the first word, `DIR/NAME`.
            Cross-validation is refused, because this version has none. `--attention_name NAME --attention_index K` become
            `--attention NAME@K`, after stage K ([attention.md](attention.md)).
        """),
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- settings


def _number_range(schema: dict[str, Any]) -> str:
    words = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]:g}" for key, sign in words.items() if key in schema]
    kind = "whole number" if schema["type"] == "integer" else "number"
    return " ".join([kind, ", ".join(limits)]).strip()


def legal(schema: dict[str, Any]) -> str:
    """What a setting takes, in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(legal(option) for option in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _number_range(schema)
    if kind == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} " + legal(schema["prefixItems"][0]).replace("number", "numbers", 1)
        return "list of " + legal(schema["items"]).replace("number", "numbers", 1)
    if kind == "object":
        return "table of name to " + legal(schema["additionalProperties"])
    return {"boolean": "`true`, `false`", "null": "`null` (none)", "string": "text"}[str(kind)]


def _default(value: object) -> str:
    if isinstance(value, tuple | list):
        return "`[" + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) + "]`"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _section(name: str, kind: type[Section], schema: dict[str, Any]) -> str:
    free, bits, flags = free_settings(), bits_settings(), {flag.setting: flag.long for flag in setting_flags().values()}
    rows = []
    for key, field in kind.model_fields.items():
        full = f"{name}.{key}"
        rows.append(
            [
                f"`{full}`",
                legal(schema["properties"][key]).replace("|", "\\|"),
                _default(field.get_default(call_default_factory=True)),
                f"`{flags[full]}`" if full in flags else "",
                "yes" if full in free else "but for the last bits" if full in bits else "",
                cell(field.description or ""),
            ]
        )
    head = ["setting", "legal values", "default", "flag", "free", "meaning"]
    return f"## {name}\n\n{(kind.__doc__ or '').strip()}\n\n" + table(head, rows)


def configuration_page() -> str:
    """docs/configuration.md."""
    schemas = RunConfig.model_json_schema()["$defs"]
    sections = []
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            sections.append(_section(name, kind, schemas[kind.__name__]))
    parts = [
        NOTE,
        "# Configuration",
        prose("""
            One schema is the YAML file (`-c`), `--set section.field=value`, the flags and the Python API. An unknown
            name or an illegal value stops before anything heavy is imported, with the file and line and the nearest
            known name. `imgcls-fast train --dump-config` prints every setting as YAML; a run keeps its own as
            `config.yaml`, without any `auto` (but that of `data.label_kind`, by which other data are read, too).
        """),
        prose("""
            `auto` becomes a number once, in the plan, with a reason that is printed and stored
            ([training.md](training.md#the-plan)). *free*: may change when a run is resumed
            ([training.md](training.md#what-may-change)); every other setting shapes the weights, and changing it is
            refused ([M006](errors/M006.md)). Times take `90`, `90s`, `10m` or `2h`;
            lists take `0.8,0.1,0.1` on the command line.
        """),
        "```yaml\nmodel:\n  arch: resnet50\noptim:\n  lr: 0.001\ntrain:\n  epochs: 30\n```",
        *sections,
        "## out",
        "The run directory; default `runs/<data>-<model>-<time>` (flag `-o`, `--out`).",
        "## Environment",
        table(["variable", "meaning"], ENVIRONMENT),
        prose("""
            The package itself reads no other variable but `XDG_CACHE_HOME` (the user's cache folder); torch, timm and
            their hub have their own. No secret is a setting.
        """),
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- flags of settings


def setting_flags_module() -> str:
    """core/setting_flags.py."""
    lines = [
        '"""Flags of settings, as the fields of the schema declare them. Written by scripts/make_docs.py; edit core/config.py instead."""',
        "",
        "from typing import Any",
        "",
        "ROWS: tuple[dict[str, Any], ...] = (",
    ]
    for row in flag_rows():
        lines.append("    {")
        line = ""
        for item in (f"{_quoted(key)}: {_quoted(value)}," for key, value in row.items()):
            if line and len(line) + len(item) > 110:
                lines.append(line)
                line = ""
            line = f"{line} {item}" if line else f"        {item}"
        lines += [line, "    },"]
    return "\n".join([*lines, ")", ""])


def _quoted(value: object) -> str:
    """A value as Python source, texts in double quotes."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_quoted, value)) + (",)" if len(value) == 1 else ")")
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


WRITTEN: dict[Path, Callable[[], str]] = {
    ROOT / "python" / "imgcls_fast" / "core" / "setting_flags.py": setting_flags_module,
    DOCS / "cli.md": cli_page,
    DOCS / "configuration.md": configuration_page,
}


def main(arguments: list[str]) -> int:
    """Write the files, or with --check list those that are not current."""
    stale = [path for path, make in WRITTEN.items() if not path.exists() or path.read_text("utf-8") != make()]
    for path in stale if "--check" not in arguments else ():
        path.write_text(WRITTEN[path](), "utf-8")
        print(f"written: {path.relative_to(ROOT)}", flush=True)
        if path.suffix == ".py":  # the pages are made of it, and it is loaded already
            return subprocess.call([sys.executable, __file__, *arguments])
    if stale and "--check" in arguments:
        print("not current: " + ", ".join(str(path.relative_to(ROOT)) for path in stale))
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
