"""Write a hint for whoever reads it: hints are kept as commands, and a caller in Python is shown the call that does the same.

`imgcls-fast eval runs/a --split val` becomes `ic.evaluate('runs/a', split='val')`, and `--lr 0.1   (or --clip 1.0)` becomes
`lr=0.1   (or clip=1.0)`: the tables of `flags` hold which function, keyword and setting stands for which word.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence

from .options import FLAGS, flags_of
from .targets import PRECISIONS, TARGETS
from .verbs import VERBS, Flag

_PROGRAM = "imgcls-fast"
# verb -> function of the package
_CALLS = {
    "train": "train",
    "eval": "evaluate",
    "predict": "predict",
    "export": "export",
    "verify": "verify",
    "deploy render": "deploy",
    "bench": "benchmark",
    "bench report": "bench_report",
    "bench compare": "bench_compare",
    "report": "report",
    "data check": "check_data",
    "data split": "split_data",
    "data stats": "data_stats",
    "runs list": "list_runs",
    "runs show": "show_run",
    "models list": "list_models",
    "demo": "demo",
    "doctor": "doctor",
}
_RENAMED = {
    "engine_precision": "precision",
    ("bench", "runtime"): "runtimes",
    ("bench", "batch_size"): "batches",
    ("bench", "duration"): "duration_s",
}
_SILENT = ("json", "quiet", "debug")  # how the command line talks; a call has no such thing
_SETTINGS = {"true": "True", "false": "False", "null": "None", "none": "None"}  # values after --set, as YAML reads them
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\$'(?:[^'\\]|\\.)*'|[^\s'"])+""")
_OPENING, _CLOSING = "(`", ",.;:)`"
_PLACEHOLDER = re.compile(r"[A-Z]+(\.\.\.)?")
_for_a_shell = False


@contextlib.contextmanager
def for_a_shell() -> Iterator[None]:
    """While the command line runs, hints stay commands."""
    global _for_a_shell
    before, _for_a_shell = _for_a_shell, True
    try:
        yield
    finally:
        _for_a_shell = before


def worded(hint: str) -> str:
    """A hint in the words of whoever reads it: as it is on the command line, as calls in Python."""
    if _for_a_shell:
        return hint
    try:
        return in_python(hint)
    except (ValueError, IndexError):  # a hint that is no command line must not hide the error that it belongs to
        return hint


def in_python(hint: str) -> str:
    """The same hint with calls for commands and keywords for flags; what has no counterpart stays."""
    words = list(_WORD.finditer(hint))
    made: list[str] = []
    done = k = 0
    keyword_ends = -1  # where the last `keyword=value` ended, so that two in a row get a comma
    while k < len(words):
        call = _call(hint, words[k:])
        keyword = None if call else _keyword(hint, words[k:])
        used, text = call or keyword or (1, None)
        if text is not None:
            between = hint[done : words[k].start()]
            made += [", " if keyword and keyword_ends == done and between == " " else between, text]
            done = words[k + used - 1].end()
            keyword_ends = done if keyword else -1
        k += used
    text = "".join([*made, hint[done:]])
    return text.replace("the same command", "the same call").replace("repeat the command", "repeat the call")


def _call(hint: str, words: Sequence[re.Match[str]]) -> tuple[int, str | None] | None:
    """(words used, the call, or None to leave them as they are) where a command begins here."""
    before, first, after = _bare(words[0].group())
    if first != _PROGRAM:
        return None
    line: list[tuple[str, str]] = []
    while len(line) + 1 < len(words) and not after and _follows(hint, words[len(line)], words[len(line) + 1]):
        _, word, after = _bare(words[len(line) + 1].group())
        line.append((word, after))
    parts = [word for word, _ in line]
    verb = next((name for name in (" ".join(parts[:2]), " ".join(parts[:1])) if name in _CALLS), None)
    if verb is None or ">" in parts or any("$'" in word for word in parts):
        return 1 + len(line), None
    start = len(verb.split())
    used, call = _written_call(verb, parts[start:])
    after = line[start + used - 1][1] if start + used else after
    return 1 + start + used, None if call is None else f"{before}{call}{after}"


def _written_call(verb: str, words: Sequence[str]) -> tuple[int, str | None]:
    """How many words belong to the command, and the call; None where one of them has no counterpart."""
    function = _CALLS[verb]
    flags = {name: flag for flag in flags_of(verb) for name in flag.all_names}
    most = next(known.most for known in VERBS if known.name == verb)
    things: list[str] = []
    keywords: dict[str, str] = {}
    k = 0
    while k < len(words):
        name, equals, value = _unquoted(words[k]).partition("=")
        if not name.startswith("-") or name == "-":
            if most is not None and len(things) == most:
                break  # the sentence goes on
            things.append(_value(name + equals + value))
        elif name == "--help":
            return k + 1, f"help(ic.{function})"
        elif name not in flags:
            return len(words), None
        else:
            if flags[name].kind in ("value", "numbers", "many") and not equals:
                k += 1
                value = _unquoted(words[k]) if k < len(words) else ""
            _take(verb, flags[name], name, value, keywords)
        k += 1
    if keywords.pop("dump_config", ""):
        return k, "ic.RunConfig()"
    if keywords.pop("dry_run", ""):
        function = "plan"
    if keywords.pop("resume", ""):
        keywords, things = {"resume": things[0] if things else "'last'", **keywords}, []
    given = [*_placed(verb, things), *(f"{name}={value}" for name, value in keywords.items())]
    return min(k, len(words)), f"ic.{function}({', '.join(given)})"


def _unquoted(word: str) -> str:
    return (shlex.split(word) or [""])[0]


def _placed(verb: str, things: list[str]) -> list[str]:
    if verb == "predict" and things:  # the run may be left out, the images not
        return things[:1] if len(things) == 1 else [things[0], things[1] if len(things) == 2 else f"[{', '.join(things[1:])}]"]
    if verb == "deploy render":
        return [*things[1:2], f"kind={things[0]}"] if things else []
    if verb == "bench report" and len(things) > 1:
        return [f"[{', '.join(things)}]"]
    return things


def _take(verb: str, flag: Flag, name: str, value: str, keywords: dict[str, str]) -> None:
    """Write one flag of a command as a keyword."""
    keyword = _RENAMED.get((verb, flag.keyword)) or _RENAMED.get(flag.keyword) or flag.keyword
    if flag.keyword in _SILENT:
        return
    if keyword == "set":
        setting, _, text = value.partition("=")
        before = keywords.get("overrides", "{}")[1:-1]
        keywords["overrides"] = f"{{{before + ', ' if before else ''}{setting!r}: {_SETTINGS.get(text) or _value(text)}}}"
    elif keyword in TARGETS:
        keywords["target"] = repr(keyword)
    elif keyword in PRECISIONS:
        keywords["precision"] = repr(keyword)
    elif flag.kind == "many":
        before = keywords.get(keyword, "[]")[1:-1]
        keywords[keyword] = f"[{before + ', ' if before else ''}{_value(value)}]"
    elif keyword == "duration_s":
        keywords[keyword] = re.sub(r"[^\d.]", "", value) or "3"
    else:
        keywords[keyword] = _flag_value(flag, name, value)


def _keyword(hint: str, words: Sequence[re.Match[str]]) -> tuple[int, str] | None:
    """(words used, `keyword=value`) where a flag of ours stands outside of a command."""
    before, word, after = _bare(words[0].group())
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return None
    flag = next((flag for flag in FLAGS if name in flag.all_names), None)
    if flag is None or (equals and flag.kind in ("bool", "switch")):
        return None
    keyword = _RENAMED.get(flag.keyword) or flag.keyword
    if keyword in TARGETS or keyword in PRECISIONS:
        return 1, f"{before}{keyword!r}{after}"
    used = 1
    if flag.kind in ("value", "numbers", "many"):
        if not equals and not after and len(words) > 1 and _follows(hint, words[0], words[1]) and not _is_prose(words[1].group()):
            _, value, after = _bare(words[1].group())
            used, equals = 2, "="
        if not equals:
            return 1, f"{before}{'overrides' if keyword == 'set' else keyword}{after}"
        if value.startswith("$'"):  # bytes that are no text: a shell's word alone
            return None
        value = _unquoted(value)
        if keyword == "set":
            setting, _, text = value.partition("=")
            return used, f"{before}overrides={{{setting!r}: {_SETTINGS.get(text) or _value(text)}}}{after}"
        if flag.kind == "many":
            return used, f"{before}{keyword}=[{_value(value)}]{after}"
    return used, f"{before}{keyword}={_flag_value(flag, name, value)}{after}"


def _flag_value(flag: Flag, name: str, value: str) -> str:
    if flag.kind in ("bool", "switch"):
        return str(not name.startswith("--no-"))
    if value in dict(flag.values) and dict(flag.values)[value] is None:
        return "None"
    if flag.kind == "numbers" and "," in value:
        return f"({', '.join(part.strip() for part in value.split(','))})"
    return _value(value)


def _value(text: str) -> str:
    """A word as Python writes it: a number, a name that stands for something, or text."""
    if _PLACEHOLDER.fullmatch(text):
        return text.rstrip(".").lower()
    try:
        float(text)
    except ValueError:
        return repr(text)
    return text


def _bare(word: str) -> tuple[str, str, str]:
    """A word of a sentence without the marks before and behind it: "(`--lr`)," is "(`", "--lr", "`),"."""
    inner = word.lstrip(_OPENING)
    before = word[: len(word) - len(inner)]
    closing = _CLOSING if before or inner.count("(") < inner.count(")") else _CLOSING.replace(")", "")
    bare = inner.rstrip(closing) if not inner.endswith("...") else inner
    return before, bare, inner[len(bare) :]


def _follows(hint: str, word: re.Match[str], after: re.Match[str]) -> bool:
    """Whether the next word belongs to the same command: one space between them, and no parenthesis opens."""
    return hint[word.end() : after.start()] == " " and not after.group().startswith("(")


def _is_prose(word: str) -> bool:
    """Whether a word goes on with the sentence and is no value of the flag before it."""
    return word.startswith("-") or _bare(word)[1] in ("or", "and", "with", "for", "then", "once", "to", "names", "takes", "which")
