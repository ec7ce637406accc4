"""`train` and `demo`."""

from __future__ import annotations

import os
from typing import Any

from ..core.env import runs_dir
from ..core.errors import UsageError
from ..core.phases import heard_by, phase
from ..core.text import command
from .answer import Answer, Request, Session, plain
from .settings import settings_of
from .show import say


def train(request: Request, session: Session) -> Answer:
    """Train a new run, continue one, or say what would be done."""
    thing, resume = request.thing(), bool(request.get("resume"))
    if resume and (request.get("dry_run") or request.get("dump_config")):
        raise UsageError("U002", "--resume continues a run as it was planned; it goes with neither --dry-run nor --dump-config",
                         try_=command("train", thing, "--resume"))  # fmt: skip
    config, arguments = settings_of(request, None if resume else thing)
    if request.get("dump_config"):
        from ..core.settings import to_yaml

        text = to_yaml(config).rstrip("\n")
        return Answer({"config": config.model_dump(mode="json")}, line=text, text=text)
    (_refuse_data_to_resume if resume else _refuse_a_run_as_data)(thing)
    if request.get("dry_run"):
        return _plan(thing, arguments)
    from ..api import train as api

    sink = _sink(session)
    where: dict[str, Any] = {"data": None, "resume": thing or "last"} if resume else {"data": thing}
    try:
        with heard_by(sink), phase("starting"):
            run = api.train(**where, **arguments, sinks=[sink], command=["imgcls-fast", *request.words])
    finally:
        _finish(sink, session)
    return _trained(run)


def demo(request: Request, session: Session) -> Answer:
    """Train on the embedded digits."""
    from ..api import train as api

    sink = _sink(session)
    try:
        with heard_by(sink), phase("starting"):
            run = api.demo(out=request.get("out"), sinks=[sink])
    finally:
        _finish(sink, session)
    return _trained(run)


def _plan(source: str | None, arguments: dict[str, Any]) -> Answer:
    from ..api import train as api
    from ..tracking.lines import clock, plan_line, plan_rows

    with phase("planning"):
        plan = plain(api.plan(source, **arguments))

    def show(console: Any) -> None:
        say(console, plan_line({"device": "", **plan}), "bold")
        for line in plan_rows(plan["rows"]):
            say(console, line)
        say(console, f"about {clock(plan['seconds_per_epoch'])} per epoch, {clock(plan['seconds'])} for all {plan['epochs']:,}")
        say(console, f"  training and validation; not counted: {plan['left_out']}")
        say(console, "nothing was trained (--dry-run)")

    return Answer(plan, show, result=show)


def _refuse_a_run_as_data(thing: str | None) -> None:
    from pathlib import Path

    from ..core.runs import is_run_folder

    if thing and (is_run_folder(Path(thing)) or (not os.path.exists(Path(thing)) and is_run_folder(runs_dir() / thing))):
        raise UsageError("U002", f"{thing} is a run, not data", try_=command("train", thing, "--resume"))


def _refuse_data_to_resume(thing: str | None) -> None:
    """`train photos/ --resume` names the data, which the run knows already."""
    from pathlib import Path

    from ..core.runs import is_run_folder

    if not thing or not os.path.exists(Path(thing)) or os.path.exists(Path(thing) / "bundle.json") or thing == "last":
        return
    if not is_run_folder(Path(thing)) and not is_run_folder(runs_dir() / thing):
        raise UsageError("U003", f"{thing} is not a run", why="--resume takes a run, which knows its data",
                         try_="imgcls-fast train --resume   (the one begun last)")  # fmt: skip


def _sink(session: Session) -> Any:
    from ..tracking.console import ConsoleSink

    return ConsoleSink(quiet=session.quiet, json=session.json)


def _finish(sink: Any, session: Session) -> None:
    """The live bar goes, however training ended; its warnings are repeated at the end."""
    sink.close()
    session.warnings += [text for text in sink.warnings if text not in session.warnings]


def _trained(run: Any) -> Answer:
    """The console has shown the box already."""
    return Answer(
        {
            "run": str(run.directory),
            "name": run.name,
            "finished": run.finished,
            "val": run.metrics("val"),
            "test": run.metrics("test"),
            "report": str(run.report_path) if run.report_path.exists() else None,
        }
    )
