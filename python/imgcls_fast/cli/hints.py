"""What a person most probably meant who typed an option, a verb or a pair that we do not have. Standard library only."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..core.errors import ImgclsError, UsageError, near
from ..core.options import LATER_FLAGS, flags_of, setting_flags
from ..core.other_names import not_needed, plain_name, setting_meant, value_meant
from ..core.targets import TARGETS
from ..core.text import command
from ..core.verbs import VERBS, Flag, Verb

_COUNTS = ("-e", "-b", "-k")  # short options whose value is a number
_TARGETS = {**{name: name for name in TARGETS}, "engine": "trt", "tensorrt": "trt"}
_VALUES = {  # what the value becomes, where another tool has a switch or a number of a device
    "multilabel": "any_of",
    "multi_label": "any_of",
    "pretrained": "pretrained",
    "finetune": "pretrained",
    "fine_tune": "pretrained",
    "amp": "auto",
    "half": "fp16",
    "fp16": "fp16",
    "bf16": "bf16",
    "gpu": "cuda",
    "gpu_id": "cuda",
    "gpu_ids": "cuda",
    "cuda": "cuda",
    "use_cuda": "cuda",
    "no_cuda": "cpu",
    "freeze_backbone": "backbone",
    "balanced": "auto",
    "weighted_loss": "auto",
    "class_weight": "auto",
    "early_stopping": "10",
    "early_stop": "10",
    "mixed_precision": "auto",
    "use_amp": "auto",
    "ema_decay": "0.999",
}

_OFF = {  # and where that switch is turned off; 0 is also a number of a device
    "train.precision": "fp32", "model.init": "scratch", "model.freeze": "none", "train.patience": "none", "optim.ema": "0",
}  # fmt: skip


def check_options(words: Sequence[str], known: Collection[str], verb: Verb) -> None:
    """Refuse an option that the verb does not have, with the one that was meant.

    Raises:
        UsageError: U001.
    """
    for k, word in enumerate(words):
        if word == "--":
            return
        name, equals, value = word.partition("=")
        _refuse_value(name, value if equals else words[k + 1] if k + 1 < len(words) else "", bool(equals), verb)
        if name in known or not word.startswith("-") or len(word) == 1 or is_number(word):
            continue
        if not equals and k + 1 < len(words) and (is_number(words[k + 1]) or not words[k + 1].startswith("-")):
            value = words[k + 1]
        if not word.startswith("--"):
            if word[:2] in known and not _one_dash_too_few(word, known):
                continue  # -e30
            name = f"-{name}"
        others = [other for j, other in enumerate(words) if j != k and (equals or j != k + 1)]
        _refuse(word.partition("=")[0], name, equals, value, known, verb, others)


def _refuse_value(name: str, value: str, joined: bool, verb: Verb) -> None:
    """Refuse `--resume=RUN` and `--compile true`: these options stand alone."""
    flag = next((flag for flag in flags_of(verb.name) if name in flag.all_names and flag.kind in ("switch", "bool")), None)
    truth = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
    if flag is None or not (joined or value.lower() in truth) or (not joined and os.path.exists(value)):
        return
    if name == "--resume" and value.lower() not in truth:
        try_ = command(*verb.name.split(), value, name)
    elif truth.get(value.lower(), True):
        try_ = f"leave {value} out"
    else:
        no = f"--no-{flag.long[2:]}"
        try_ = f"leave {name} out" if flag.kind != "bool" else flag.long if name == no else no
    raise UsageError("U002", f"{name} takes no value, got {value!r}", try_=try_)


def _one_dash_too_few(word: str, known: Collection[str]) -> bool:
    """Whether `-epochs` is a long option; `-e30` and `-oruns/a` are short ones with their value."""
    name = "-" + word.partition("=")[0]
    wordy = word[:2] in _COUNTS and not is_number(word[2:])
    if len(name) < 5:
        return wordy and bool(setting_meant(name))  # -bs 64
    return name in known or bool(setting_meant(name)) or (wordy and bool(_nearest(name, known)))


def _nearest(name: str, known: Collection[str]) -> str:
    """The option that is spelled most like this one; the dashes, which all have, do not count."""
    guess = near(name[2:], tuple(sorted(other[2:] for other in known if other.startswith("--"))), cutoff=0.7)
    return guess and f"--{guess}"


def _refuse(
    typed: str, name: str, equals: str, value: str, known: Collection[str], verb: Verb, others: Sequence[str]
) -> None:
    help_ = command(*verb.name.split(), "--help")
    if name in LATER_FLAGS:
        raise UsageError("U001", f"{name} is not in this version", try_=help_)
    said = f"unknown option {typed} of `{command(*verb.name.split())}`"
    if name in known:
        raise UsageError("U001", said, why="long options have two dashes", try_=_with_value(name, equals, value, verb))
    if not name.startswith("--") and len(name) == 2:
        name = f"-{name}"
    owned = setting_flags().get(plain_name(name))
    if plain_name(name) == "split" and is_number(value) and "--split-ratio" in known:
        raise UsageError("U001", said, why="here it is --split-ratio", try_=f"--split-ratio {_three(value, others)}")
    if setting := setting_meant(name) or (owned.setting or "" if owned and verb.name != "train" else ""):
        why = f"here it is {setting}" if verb.name == "train" else ""
        if owned and not why:
            why = f"it belongs to {', '.join(verbs_with(name))}"
        if setting == "data.source" and value:
            raise UsageError("U001", said, why=why, try_=command(*verb.name.split(), value, *others))
        raise UsageError("U001", said, why=why, try_=_ours(name, setting, value, known, verb))
    if reason := not_needed(name):
        raise UsageError("U001", said, why=reason, try_=f"leave {typed} out")
    target = _TARGETS.get(value.lower()) if verb.name == "export" and plain_name(name) in ("format", "target", "to") else None
    if target:
        raise UsageError("U001", said, try_=f"--{target}")
    guess = _nearest(name, known)
    owners = verbs_with(name)
    raise UsageError(
        "U001",
        said,
        why=f"it belongs to {', '.join(owners)}" if owners else "",
        try_=_with_value(guess, equals, value, verb) if guess else help_,
    )


def _three(value: str, others: Sequence[str]) -> str:
    """The value of --split-ratio for `0.8 0.1 0.1`, or one that is always right."""
    numbers = [value, *(word for word in others if is_number(word))]
    right = len(numbers) == 3 and "," not in "".join(numbers) and abs(sum(map(float, numbers)) - 1) < 1e-6
    return ",".join(numbers) if right else "0.8,0.1,0.1"


def _with_value(name: str, equals: str, value: str, verb: Verb) -> str:
    flag = next((flag for flag in flags_of(verb.name) if name in flag.all_names), None)
    if not equals and (flag is None or flag.kind in ("switch", "bool") or name in ("-h", "--help")):
        return name
    return f"{name}{equals or ' '}{value}".rstrip()


def _ours(name: str, setting: str, value: str, known: Collection[str], verb: Verb) -> str:
    """Our way to write an option of another tool."""
    words = verb.name.split()
    if setting == "data.source":
        return command(*words, value or ("IMAGES" if verb.name == "predict" else "DATA"))
    if setting in ("model.arch", "model.init") and verb.things.startswith("[RUN]"):
        return command(*words, "RUN") + verb.things.removeprefix("[RUN]")
    if plain_name(name) in _VALUES and setting in _OFF and value.lower() in ("false", "no", "off", "none", "0"):
        value = _OFF[setting]
    elif plain_name(name) in _VALUES and (value.lower() in ("", "true", "yes") or value.isdigit()):
        value = _VALUES[plain_name(name)]
    flag = next((flag for flag in setting_flags().values() if flag.setting == setting), None)
    if flag is None:
        return f"--set {setting}={value or 'VALUE'}" if "--set" in known else command(*verb.name.split(), "--help")
    written = f"{flag.long} {value_meant(value, flag.choices) or value or flag.metavar}"
    return written if flag.long in known else command(*words, "--help")


def verbs_with(name: str) -> list[str]:
    """The verbs that know an option."""
    return [verb.name for verb in VERBS if any(name in flag.all_names for flag in flags_of(verb.name))]


def check_words(things: Sequence[str], given: Mapping[str, Any], verb: Verb, words: Sequence[str]) -> None:
    """Refuse `epochs=3` and `--set optim.lr 0.1`, which other tools take.

    Raises:
        UsageError: U002, with our way to write it.
    """
    for text in given.get("set") or ():
        if "=" not in text and "." in text and things:
            after = words[k + 1] if text in words and (k := words.index(text)) + 1 < len(words) else "VALUE"
            value = after if after in things and not os.path.exists(after) else "VALUE"
            raise UsageError("U002", f"--set takes one word, SECTION.FIELD=VALUE, got {text!r}", try_=f"--set {text}={value}")
    target = [thing for thing in things if thing in _TARGETS and not os.path.exists(thing)] if verb.name == "export" else []
    if target:
        rest = [thing for thing in things if thing not in target]
        raise UsageError("U002", f"{target[0]} is no run", try_=command("export", *rest, f"--{_TARGETS[target[0]]}"))
    pairs = [thing for thing in things if _is_pair(thing, verb)]
    if pairs:
        raise UsageError(
            "U002",
            f"options are written --NAME VALUE, and what a command works on comes without a name; got {pairs[0]}",
            try_=command(*verb.name.split(), *_rewritten(things, pairs, verb)),
        )


def check_count(things: Sequence[str], verb: Verb) -> None:
    """Refuse more or fewer words than the verb takes.

    Raises:
        UsageError: U002.
    """
    if verb.least <= len(things) <= (verb.most if verb.most is not None else len(things)):
        return
    said = f"`{command(*verb.name.split())}` takes {verb.things or 'no positional words'}, got {' '.join(things) or 'nothing'}"
    number = any(is_number(thing) and not os.path.exists(thing) for thing in things)
    why = "an option takes one word: 0.8,0.1,0.1 and not 0.8 0.1 0.1" if number else ""
    raise UsageError("U002", said, why=why, try_=command(*verb.name.split(), "--help"))


def _is_pair(thing: str, verb: Verb) -> bool:
    name, equals, _ = thing.partition("=")
    known = {flag.keyword for flag in flags_of(verb.name)} | {"data", "model"}
    ours = name.isidentifier() and (name in known or setting_meant(name) or not_needed(name))
    return bool(equals and ours) and not os.path.exists(thing)


def _rewritten(things: Sequence[str], pairs: Sequence[str], verb: Verb) -> list[str]:
    """The words of a command line in which NAME=VALUE is written as here."""
    words = [thing for thing in things if thing not in pairs]
    options: list[str] = []
    for pair in pairs:
        name, _, value = pair.partition("=")
        setting = "data.source" if name == "data" else "model.arch" if name == "model" else setting_meant(name)
        if setting == "data.source":
            words.append(value)
        elif verb.things.startswith("[RUN") and setting in ("model.arch", "model.init"):
            words.insert(0, value)
        elif not not_needed(name):
            options += _option(name, value)
    return words + options


def _option(name: str, value: str = "") -> tuple[str, str]:
    """The option for a name of ours or of another tool, and its value."""
    setting = setting_meant(name)
    flags = setting_flags()
    flag: Flag | None = flags.get(name) or next((flag for flag in flags.values() if flag.setting == setting), None)
    if setting and flag is None:
        return "--set", f"{setting}={value}"
    return flag.long if flag else f"--{name.replace('_', '-')}", value


def without_repetition(error: ImgclsError, words: Sequence[str], help_: str) -> ImgclsError:
    """The same error; a hint that is nothing but what was typed is replaced by the way to the help."""
    hint = error.try_.partition("   (")[0]
    try:
        hinted = shlex.split(hint)
    except ValueError:
        return error
    typed = ["imgcls-fast", *words]
    apart = [part for word in typed for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if hinted and (_inside(hinted, typed) or _inside(hinted, apart)):
        error.try_ = help_
    return error


def _inside(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether `part` is all of a command line, or options that stand in it side by side."""
    if part[0] == "imgcls-fast":
        return list(part) == list(whole)
    return any(list(whole[k : k + len(part)]) == list(part) for k in range(len(whole) - len(part) + 1))


def is_number(text: str) -> bool:
    """Whether a word is a number, or begins a list of them."""
    try:
        float(text.split(",")[0])
    except ValueError:
        return False
    return True
