"""From a command line to an exit code: parse, hand over to one verb, print its answer or its error.

Nothing outside the standard library is imported before a verb starts, so that help, the version and a typing mistake
answer at once. Exit codes are in `core/errors.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

from ..core.env import calm_threads, distrust_folder, lend_home
from ..core.errors import HardwareError, ImgclsError, Interrupted, UsageError, near
from ..core.hints import for_a_shell
from ..core.options import flags_of
from ..core.other_names import setting_meant, value_meant, verb_meant
from ..core.phases import PhaseEvent, heard_by, phase
from ..core.text import command, printable
from ..core.verbs import LATER_VERBS, VERBS, Flag, Verb
from .answer import Answer, Request, Session
from .hints import check_count, check_options, check_words, verbs_with, without_repetition
from .old import is_old, modernize

PROGRAM = "imgcls-fast"
_NO_MEMORY = ("failed to map segment", "cannot allocate memory")  # of the dynamic linker, and of the system
_OWN_EVENTS = ("train", "demo")  # verbs that show what they do, on stdout


@for_a_shell()
def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; prints, never raises for a user's mistake.

    Args:
        argv: the words after the program's name; `sys.argv[1:]` if not given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    calm_threads()
    distrust_folder()
    _open_streams()
    _tolerate_any_name()
    session = Session(json="--json" in words, debug="--debug" in words, quiet=bool({"-q", "--quiet"} & set(words)))
    try:
        with _talking(session):
            found = _run(words, session)
        return session.answer(found)
    except ImgclsError as error:
        return _failed(session, without_repetition(error, words, _help_of(words)))
    except SystemExit as leaving:  # help and version
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        return _failed(session, Interrupted("X130", "interrupted before the work was done"))
    except BrokenPipeError:  # the reader went away, as in `imgcls-fast runs list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:  # noqa: BLE001 - one of the four places: what nobody foresaw gets a code too
        return _failed(session, _internal(error, words))


def parse(words: list[str]) -> tuple[Request, list[str]]:
    """A command line as a Request, and notes about old names.

    Raises:
        UsageError: U001 for an unknown verb or option, U002 for a missing or surplus word.
        SystemExit: 0, after printing help or the version.
    """
    verb, rest = _verb(words)
    flags = flags_of(verb.name)
    known = {name for flag in flags for name in flag.all_names} | {"-h", "--help"}
    rest, notes = modernize(rest, known)
    check_options(rest, known, verb)
    end = rest.index("--") if "--" in rest else len(rest)  # files that begin with a dash follow; argparse loses them
    given = vars(_parser(verb, flags).parse_intermixed_args(rest[:end]))
    things = (*(given.pop("things", None) or ()), *rest[end + 1 :])
    check_words(things, given, verb, rest)
    check_count(things, verb)
    _check_choices(given, flags)
    return Request(verb.name, things, given, tuple(words)), notes


def _run(words: list[str], session: Session) -> Answer:
    if not words or words[0] in ("-h", "--help"):
        return Answer({"help": overview()}, text=overview())
    if words[0] == "--version":
        from ..core.env import package_version

        version = package_version()
        return Answer({"version": version}, line=version, text=f"{PROGRAM} {version}")
    request, notes = parse(words)
    for note in dict.fromkeys(notes):
        session.note(note)
    session.quiet |= bool(request.get("quiet"))
    lend_home()
    module, function = next(verb.handler for verb in VERBS if verb.name == request.verb).split(":")
    with contextlib.nullcontext() if request.verb in _OWN_EVENTS else phase(request.verb):
        answer: Answer = getattr(import_module(f".{module}", __package__), function)(request, session)
    return answer


def _verb(words: list[str]) -> tuple[Verb, list[str]]:
    """The verb that a command line begins with, and the words after it."""
    table = {verb.name: verb for verb in VERBS}
    groups = {name.split()[0] for name in table if " " in name}
    first = words[0]
    if first in groups:
        members = [name.split()[1] for name in table if name.startswith(f"{first} ")]
        if len(words) > 1 and words[1] in members:
            return table[f"{first} {words[1]}"], words[2:]
        if first in table:  # a verb that is also a group: `bench RUN`, `bench compare`
            return table[first], words[1:]
        if len(words) > 1 and words[1] in ("-h", "--help"):
            _leave(_group_help(first))
        said = f"unknown command {first} {words[1]}" if len(words) > 1 else f"{first} needs one of {', '.join(members)}"
        guess = ""
        if len(words) > 1:
            meant = verb_meant(words[1])
            guess = meant.partition(" ")[2] if meant.startswith(f"{first} ") else near(words[1], members)
        there = words[1:] if not guess and len(words) > 1 and os.path.exists(words[1]) else []  # `data photos/`
        code = "U001" if len(words) > 1 else "U002"
        raise UsageError(code, said, try_=command(first, guess or members[0], *there))
    if first in table:
        return table[first], words[1:]
    if first in LATER_VERBS:
        raise UsageError("U001", f"{first} is not in this version", try_=f"{PROGRAM} --help")
    if first.startswith("-"):
        hint = f"{PROGRAM} train DATA {first} ..." if is_old(first) or verbs_with(first) or setting_meant(first) else f"{PROGRAM} --help"
        raise UsageError("U001", f"a command line begins with a verb, got {first}", try_=hint)
    if os.path.exists(first):
        raise UsageError(
            "U001",
            f"unknown command {first}",
            why="it is a path; a command line begins with a verb",
            try_=command("train", first),
        )
    guess = verb_meant(first) or near(first, tuple(sorted({name.split()[0] for name in table})))
    rest = words[1:] if verb_meant(first) in table else []
    try_ = command(*guess.split(), *rest) if guess else f"{PROGRAM} --help"
    raise UsageError("U001", f"unknown command {first}", try_=try_)


def _check_choices(given: dict[str, Any], flags: tuple[Flag, ...]) -> None:
    """Options of a verb itself; those that are settings are judged with the configuration."""
    for flag in flags:
        value = given.get(flag.keyword)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if flag.setting is None and flag.choices and (wrong := [word for word in values if word not in flag.choices]):
            value = wrong[0]
            guess = value_meant(value, flag.choices) or near(value, flag.choices) or flag.choices[0]
            legal = ", ".join(map(repr, flag.choices))
            raise UsageError("U002", f"{flag.long} must be one of {legal}, got {value!r}", try_=f"{flag.long} {guess}")


class _Parser(argparse.ArgumentParser):
    """argparse, with our errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("U002", message.removeprefix("argument "), try_=f"{self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        _leave(self.format_help())


def _parser(verb: Verb, flags: tuple[Flag, ...]) -> _Parser:
    examples = (
        "\n".join(["examples:", *(f"  {PROGRAM} {example}" for example in verb.examples)]) if verb.examples else ""
    )
    members = "\n".join(["see also:", *found]) if (found := _members(verb.name)) else ""
    parser = _Parser(
        prog=f"{PROGRAM} {verb.name}",
        usage=f"{PROGRAM} {verb.name} {verb.things + ' ' if verb.things else ''}[options]",
        description=verb.help,
        epilog="\n\n".join(part for part in (examples, members) if part),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("things", nargs="*", help=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        _add(groups[flag.group], flag)
    return parser


def _add(group: Any, flag: Flag) -> None:
    text = flag.help.replace("%", "%%")
    if flag.choices and flag.keyword != "channels":
        text += f": {', '.join(flag.choices)}"
    if flag.kind == "bool":
        group.add_argument(*flag.names, f"--no-{flag.long[2:]}", dest=flag.keyword, action=_OnOff, nargs=0, help=text)
    elif flag.kind == "switch":
        group.add_argument(*flag.names, dest=flag.keyword, action="store_true", help=text)
    else:
        action = "append" if flag.kind == "many" else "store"
        group.add_argument(*flag.names, dest=flag.keyword, action=action, metavar=flag.metavar, help=text)
        if flag.aliases:
            group.add_argument(*flag.aliases, dest=flag.keyword, action=action, help=argparse.SUPPRESS)


class _OnOff(argparse.Action):
    """--x and --no-x."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


def overview() -> str:
    """What `imgcls-fast --help` prints."""
    width = max(len(f"{verb.name} {verb.things}") for verb in VERBS) + 2
    lines = [f"usage: {PROGRAM} VERB [THING] [options]", "", "Train, judge and export image classifiers.", "", "verbs:"]
    lines += [f"  {f'{verb.name} {verb.things}'.rstrip():<{width}}{verb.help}" for verb in VERBS]
    lines += [
        "",
        "RUN is a directory or a name in runs/; without it the last finished run is meant. Every verb has --help and --json.",
        "",
    ]
    lines += ["first steps:", f"  {PROGRAM} demo", f"  {PROGRAM} train my-photos/", f"  {PROGRAM} predict photo.jpg"]
    return "\n".join(lines)


def _group_help(group: str) -> str:
    return "\n".join([f"usage: {PROGRAM} {group} VERB [THING] [options]", "", *_members(group)])


def _members(group: str) -> list[str]:
    """One line for each verb of a group."""
    found = [verb for verb in VERBS if verb.name.startswith(f"{group} ")]
    width = max((len(f"{verb.name} {verb.things}") for verb in found), default=0) + 2
    return [f"  {PROGRAM} {f'{verb.name} {verb.things}'.rstrip():<{width}}{verb.help}" for verb in found]


def _leave(text: str) -> NoReturn:
    print(text.rstrip("\n"), flush=True)
    raise SystemExit(0)


@contextlib.contextmanager
def _talking(session: Session) -> Iterator[None]:
    """Our warnings are counted, those inside libraries shown with --debug; with --json only the answer reaches stdout.

    What takes long gives a sign of life on stderr (`core/phases`); training shows its own events on stdout instead.
    """
    ours = os.path.dirname(os.path.dirname(__file__))

    def show(message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
        if filename.startswith(ours):
            session.warn(str(message).strip())
        elif session.debug:
            print(printable(f"{filename}: {category.__name__}: {message}", keep="\n"), file=sys.stderr)

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if session.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        warnings.showwarning = show
        stack.enter_context(heard_by(stack.enter_context(contextlib.closing(_Waiting(session)))))
        yield


class _Waiting:
    """Shows phases on stderr; the console is imported when the first one begins."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sink: Any = None

    def __call__(self, event: PhaseEvent) -> None:
        if self._sink is None:
            from ..tracking.console import ConsoleSink

            self._sink = ConsoleSink(sys.stderr, quiet=self._session.quiet)
        self._sink(event)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()


def _failed(session: Session, error: ImgclsError) -> int:
    if session.debug:
        print(printable(traceback.format_exc(), keep="\n"), file=sys.stderr)
    return session.fail(error)


def _help_of(words: list[str]) -> str:
    """The help of the verb that a command line begins with."""
    names = [verb.name for verb in VERBS if words[: len(verb.name.split())] == verb.name.split()]
    return command(*max(names, key=len, default="").split(), "--help")


def _internal(error: Exception, words: list[str]) -> ImgclsError:
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
        return HardwareError(
            "H002",
            f"memory ran out: {error or type(error).__name__}",
            why="libraries could not be loaded, or no more memory is given to this process",
            try_="ulimit -v unlimited   (or a container with more memory)",
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    return ImgclsError(
        "X001",
        f"{type(error).__name__}: {error}",
        where=f"{os.path.basename(last.filename)}, line {last.lineno}, in {last.name}",
        why="this is a mistake in imgcls-fast, not yours",
        try_=f"run again with --debug: {command(*words, '--debug')}",
    )


def _open_streams() -> None:
    """Let standard streams that were closed lead to nowhere: else their numbers would go to the next files that are opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest free number, in this order the one that was closed
            setattr(sys, name, open(handle, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - as long as the process


def _tolerate_any_name() -> None:
    """File names that are not UTF-8, or a terminal that is not, must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
