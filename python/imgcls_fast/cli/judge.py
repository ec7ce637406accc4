"""`eval`, `predict` and `report`: ask a finished run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError, near
from ..core.files import write_text
from ..core.labels import JOINT
from ..core.outputs import ANSWERS, claim_file
from ..core.text import command, quoted, to_csv, to_json
from .answer import Answer, Request, Session, plain
from .figures import headline, show_judged
from .settings import whole_number
from .show import say, table


def evaluate(request: Request, session: Session) -> Answer:
    """Judge a run on its own rows or on other labelled images."""
    batch_size = whole_number(request, "batch_size")
    run, rest = run_and_rest(request.things)
    if len(rest) > 1:
        raise UsageError("U003", f"{request.things[0]} is not a run", try_="imgcls-fast runs list")
    from ..api import judge as api
    from ..tracking.lines import counted

    split, runtime = request.get("split", "test"), request.get("runtime", "torch")
    precision = request.get("engine_precision")
    found = api.evaluate(
        run,
        rest[0] if rest else None,
        split=split,
        runtime=runtime,
        precision=precision,
        batch_size=batch_size,
        out=request.get("out"),
        trust=trusted(request, runtime),
        include_train=bool(request.get("include_train")),
        force=bool(request.get("force")),
    )
    metrics = plain(found)
    line = f"{rest[0] if rest else split} {headline(metrics)} on {counted(metrics['n'], 'image')}"
    return Answer({"run": run or "last", "data": rest[0] if rest else None, "split": split, "runtime": runtime, "metrics": metrics},
                  lambda console: show_judged(console, line, metrics, session.warnings), line)  # fmt: skip


def predict(request: Request, session: Session) -> Answer:
    """Name the class of images; exit code 3 only if none could be read."""
    top_k, batch_size = whole_number(request, "top_k") or 1, whole_number(request, "batch_size")
    out = Path(request.get("out")) if request.get("out") else None
    if out is not None:
        claim_file(out, ANSWERS, force=bool(request.get("force")), inputs=map(Path, request.things))
    run, images = run_and_rest(request.things)
    if not images:
        raise UsageError(
            "U002", f"{run} is a run; predict needs images as well", try_=command("predict", run, "IMAGES...")
        )
    from ..api import judge as api
    from ..tracking.lines import counted

    asked = api.gather_images(images)
    if asked.passed_over:
        session.warn(asked.note())
    answers = plain(
        api.predict(
            run,
            asked.images,
            runtime=request.get("runtime", "torch"),
            precision=request.get("engine_precision"),
            top_k=top_k,
            batch_size=batch_size,
            trust=trusted(request, request.get("runtime", "")),
        )
    )
    bad = [answer for answer in answers if answer.get("error")]
    known = max((len(part.get("top") or ()) for answer in answers for _, part in _parts(answer)), default=0)
    if 0 < known < top_k:
        session.note(f"the model has {known:,} classes, so each image gets {known:,} answers, not {top_k:,}")
        top_k = known
    if out is not None:
        rows = [_heads(answers, top_k), *_rows(answers, top_k)]
        write_text(out, to_csv(rows) if out.suffix.lower() == ".csv" else "".join(f"{to_json(answer)}\n" for answer in answers))
    value = {"run": run or "last", "predictions": answers, "failed": len(bad), "out": str(out) if out else None,
             "passed_over": len(asked.passed_over)}  # fmt: skip
    line = f"{counted(len(answers) - len(bad), 'image')} answered, {len(bad):,} could not be read" + (
        f" -> {out}" if out else ""
    )

    def show(console: Any) -> None:
        if out is None:
            table(console, _heads(answers, top_k), _rows(answers, top_k), limit=None)
        if out is not None or bad:
            say(console, line)

    failed = bool(answers) and len(bad) == len(answers)
    return Answer(value, show, line, exit_code=3 if failed else 0, result=show if out is None else None)


def report(request: Request, session: Session) -> Answer:
    """Write report.html again."""
    run, _ = run_and_rest(request.things, data=False)
    from ..api import judge as api

    path = str(api.report(run, force=bool(request.get("force"))))
    return Answer({"run": run or "last", "report": path}, lambda console: say(console, path), path)


def trusted(request: Request, named: str) -> bool:
    """Whether `--trust` is given, which goes with something that is named: a runtime that opens native code, or a run.

    Raises:
        UsageError: U002 where nothing is named.
    """
    if not request.get("trust"):
        return False
    if named in ("", "auto", "torch", "compile"):
        what = "RUN" if request.verb == "verify" else "RUN --runtime aoti"
        raise UsageError(
            "U002", "--trust goes with what is to be trusted, named", try_=f"imgcls-fast {request.verb} {what} --trust"
        )
    return True


def run_and_rest(things: Sequence[str], *, data: bool = True) -> tuple[str | None, list[str]]:
    """The run (None: the last one) and the images or data after it.

    The first word is a run if it names one; else it is data, if it exists. A word that is neither is most probably a
    mistyped run.

    Raises:
        UsageError: U003 with the nearest run.
        DataError: D001 when the last word of a longer list does not exist either.
    """
    from ..core.runs import find_run

    if not things:
        return None, []
    first, rest = things[0], list(things[1:])
    try:
        find_run(first)
    except UsageError:
        if not data or not (os.path.exists(Path(first)) or first.startswith(("http:", "https:"))):
            if data and _is_a_file(first, alone=not rest):
                raise _no_such_file(first) from None
            raise
        run, rest = None, list(things)
    else:
        run = first
    missing = [thing for thing in rest if not os.path.exists(Path(thing))]
    if missing and len(missing) == len(rest):
        raise _no_such_file(missing[0], f", nor do {len(missing) - 1} more" if len(missing) > 1 else "")
    return run, rest


def _is_a_file(word: str, *, alone: bool) -> bool:
    """Whether a word that names nothing here was meant as images or data, and not as a run."""
    return bool(re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]{1,5}", Path(word).suffix)) or (alone and word.endswith(os.sep))


def _no_such_file(word: str, more: str = "") -> DataError:
    """D001, with the name in the same folder that is spelled most like it."""
    path = Path(word)
    folder = path.parent
    if not os.path.isdir(folder):
        return DataError("D001", f"{word} does not exist{more}", why=f"there is no folder {folder}")
    guess = near(path.name, sorted(os.listdir(folder)))
    return DataError("D001", f"{word} does not exist{more}", try_=quoted(str(folder / guess)) if guess else "")


def _parts(answer: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The answers to each task of a model, and what stands before the names of their columns."""
    if "tasks" in answer:
        return [(f"{name}: ", part) for name, part in answer["tasks"].items()]
    return [("", answer)]


def _heads(answers: Sequence[dict[str, Any]], top_k: int) -> list[str]:
    """Columns of `predict`: per task the answer, then the K most probable classes."""
    first = next((answer for answer in answers if not answer.get("error")), {})
    heads = ["path"]
    for before, part in _parts(first):
        several = "labels" in part  # none, one or many may hold, so that the most probable one is no answer by itself
        ranks = range(1, top_k + 1) if several and top_k > 1 else range(2, top_k + 1)
        names = ["labels", "probabilities"] if several else ["label", "confidence"]
        heads += [before + name for name in (*names, *(name for k in ranks for name in (f"label_{k}", f"confidence_{k}")))]
    return [*heads, "error"]


def _rows(answers: Sequence[dict[str, Any]], top_k: int) -> list[list[str]]:
    width = len(_heads(answers, top_k)) - 2
    rows = []
    for answer in answers:
        if answer.get("error"):
            rows.append([answer["path"], *[""] * width, str(answer["error"])])
            continue
        cells: list[str] = []
        for _, part in _parts(answer):
            ranked = list(part.get("top") or [])[:top_k]
            if "labels" in part:
                cells += [JOINT.join(str(name) for name, _ in part["labels"]), JOINT.join(f"{p:.6f}" for _, p in part["labels"])]
                ranks = top_k if top_k > 1 else 0
            else:
                cells += [str(part["label"]), f"{part['confidence']:.6f}"]
                ranked, ranks = ranked[1:], top_k - 1
            more = [cell for label, confidence in ranked[:ranks] for cell in (str(label), f"{confidence:.6f}")]
            cells += more + [""] * (2 * ranks - len(more))
        rows.append([answer["path"], *cells, ""])
    return rows
