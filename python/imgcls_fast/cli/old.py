"""Command lines of the codebase that this project replaces: its names still work, and the new name is shown once.

`--train` and `--eval` need no answer here: training is the verb, and every training ends with an evaluation. Their
"False", and that of `--save`, cannot be obeyed by `train`; it is said instead of being taken for "True".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from ..core.errors import UsageError, near
from ..core.text import command

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "")
_SCHEDULES = {"steplr": "step", "cosineannealinglr": "cosine", "cosineannealing": "cosine", "reducelronplateau": "plateau",
              "onecyclelr": "onecycle", "false": "none", "constant": "none"}  # fmt: skip


_ATTENTION_PLACE = "4"  # the old program's default index; today it names stage 4


class _Reading:
    """What was collected on the way through one old command line."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.notes: list[str] = []
        self.root = ""
        self.dataset = ""
        self.folds: bool | None = None
        self.splits = ""
        self.attention = "none"
        self.attention_place = ""

    def new(self, old: str, *words: str) -> None:
        """Replace an old option, and say how it is written now."""
        self.words += words
        self.notes.append(f"{old} is now {' '.join(words)}" if words else f"{old} is not needed any more")


def modernize(words: list[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Translate old options of `train`.

    Args:
        words: the command line after the verb.
        known: the options that the verb has today; they are left alone.

    Returns:
        The command line of today, and one note for each option that changed.

    Raises:
        UsageError: U001 for what this version does not have, U002 for a value that is neither true nor false.
    """
    reading = _Reading()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            reading.words += [word, *rest]
            break
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        if name in known or not name.startswith("--"):
            reading.words.append(word)
        elif name in _OLD:
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
            _OLD[name](reading, name, value)
        elif dashed in known:
            reading.words.append(dashed + equals + value)
            reading.notes.append(f"{name} is now {dashed}")
        else:
            reading.words.append(word)
    return _finish(reading), reading.notes


def truth(name: str, value: str) -> bool:
    """What the text of an old boolean means; the old program took "False" for true.

    Raises:
        UsageError: U002 when it means neither.
    """
    if value.strip().lower() in TRUE:
        return True
    if value.strip().lower() in FALSE:
        return False
    raise UsageError("U002", f"{name} must be True or False, got {value!r}", try_=f"{name} True")


def _finish(reading: _Reading) -> list[str]:
    _attention(reading)
    if reading.folds or (reading.splits and reading.folds is None and reading.splits.strip().lower() not in FALSE):
        raise UsageError(
            "U001",
            "cross-validation (--folds) is not in this version",
            where="--cross_validation",
            try_="imgcls-fast train DATA",
        )
    if reading.root or reading.dataset:
        place = os.path.join(reading.root, reading.dataset) if reading.dataset else reading.root
        reading.notes.append(f"--root and --dataset_name are now the first word: {command('train', place)}")
        return [place, *reading.words]
    return reading.words


def _attention(reading: _Reading) -> None:
    name, place = reading.attention.strip(), reading.attention_place.strip()
    if name.lower() not in FALSE:
        text = f"{name}@{place or _ATTENTION_PLACE}"
        reading.words = ["--attention", text, *reading.words]
        reading.notes.append(f"--attention_name and --attention_index are now --attention {text}")
    elif place:
        reading.notes.append(f"--attention_index {place} has no effect without --attention_name")


def _augment(reading: _Reading, name: str, value: str) -> None:
    reading.new(f"{name} {value}", "--augment", "light" if truth(name, value) else "none")


def _patience(reading: _Reading, name: str, value: str) -> None:
    number = value.strip()
    if number.isdigit() and int(number) > 0:  # a count; 1 is a count as well
        reading.new(f"{name} {value}", "--patience", number)
    else:
        reading.new(f"{name} {value}", "--patience", "10" if truth(name, value) else "none")


def _weights(reading: _Reading, name: str, value: str) -> None:
    text = value.strip().strip("[]()").replace(" ", "")
    kind = {**dict.fromkeys(("true", "yes", "on"), "auto"), **dict.fromkeys(("false", "no", "off", "none", ""), "none")}
    reading.new(f"{name} {value}", "--class-weights", kind.get(text.lower(), text))


def _schedule(reading: _Reading, name: str, value: str) -> None:
    key = value.strip().lower().replace("_", "")
    reading.new(f"{name} {value}", "--sched", _SCHEDULES.get(key, value.lower()))


def _experiment(reading: _Reading, name: str, value: str) -> None:
    from ..core.env import runs_dir

    reading.new(f"{name} {value}", "--out", str(runs_dir() / value.strip().replace(" ", "-").replace("/", "-")))


def _renamed(new: str) -> Callable[[_Reading, str, str], None]:
    def rename(reading: _Reading, name: str, value: str) -> None:
        reading.words += [new, value]
        reading.notes.append(f"{name} is now {new}")

    return rename


def _place(field: str) -> Callable[[_Reading, str, str], None]:
    return lambda reading, name, value: setattr(reading, field, value)


def _folds(reading: _Reading, name: str, value: str) -> None:
    reading.folds = truth(name, value)
    if not reading.folds:
        reading.new(f"{name} {value}")


def _train(reading: _Reading, name: str, value: str) -> None:
    if not truth(name, value):
        raise UsageError(
            "U002",
            "`imgcls-fast train` trains; --train False asks for another verb",
            where=f"{name} {value}",
            try_="imgcls-fast eval RUN",
        )
    reading.new(f"{name} {value}")


def _always(what: str) -> Callable[[_Reading, str, str], None]:
    def say(reading: _Reading, name: str, value: str) -> None:
        reading.notes.append(
            f"{name} {value} is not needed any more" if truth(name, value) else f"{name} {value} has no effect: {what}"
        )

    return say


def _printing(reading: _Reading, name: str, value: str) -> None:
    reading.new(f"{name} {value}", *(() if truth(name, value) else ("--quiet",)))


def _overwrite(reading: _Reading, name: str, value: str) -> None:
    what = "a run is never overwritten; choose another directory with --out"
    reading.notes.append(
        f"{name} {value} has no effect: {what}" if truth(name, value) else f"{name} {value} is not needed any more"
    )


_OLD: dict[str, Callable[[_Reading, str, str], None]] = {
    "--exp": _experiment,
    "--root": _place("root"),
    "--dataset_name": _place("dataset"),
    "--aug": _augment,
    "--image_size": _renamed("--img-size"),
    "--loss_weights": _weights,
    "--model_name": _renamed("--model"),
    "--attention_name": _place("attention"),
    "--attention_index": _place("attention_place"),
    "--train": _train,
    "--eval": _always("a training run is always judged"),
    "--save": _always("a training run is always saved; delete its directory if you do not want it"),
    "--learning_rate": _renamed("--lr"),
    "--lr_scheduler": _schedule,
    "--early_stopping": _patience,
    "--cross_validation": _folds,
    "--num_splits": _place("splits"),
    "--printing": _printing,
    "--overwrite": _overwrite,
}
OLD_NAMES = (*_OLD, "--split_ratio", "--batch_size")  # the last two only lost their underscore


def is_old(word: str) -> bool:
    """Whether a word is an option of the old program (which had no verbs)."""
    return word.partition("=")[0] in OLD_NAMES or bool(near(word, OLD_NAMES) and "_" in word)
