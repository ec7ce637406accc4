"""`export`, `verify` and `deploy render`: how a model leaves, and whether it is still the same model there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, UsageError
from ..core.targets import PRECISIONS, TARGETS
from ..core.text import command
from .answer import Answer, Request, Session
from .judge import run_and_rest, trusted
from .settings import settings_of
from .show import block, facts, say, table

_POINTS = (
    "verdict",
    "rows",
    "agreement",
    "accuracy",
    "reference_accuracy",
    "lost",
    "gained",
    "drop_pp",
    "bound_pp",
    "max_drop_pp",
    "rows_needed",
    "simulated",
)


def export(request: Request, session: Session) -> Answer:
    """Make one export; it has been compared and judged when this returns."""
    target, precision = _target(request), _precision(request)
    config, arguments = settings_of(request)
    from ..core.settings import flatten

    named = _asked(arguments)
    asked = {name: value for name, value in flatten(config).items() if name in named}
    run, _ = run_and_rest(request.things, data=False)
    from ..api import export as api

    made = api.export(
        run,
        target,
        precision=precision,
        overrides=asked,
        out=request.get("out"),
        say=session.note,
        progress=_progress(session),
        force=bool(request.get("force")),
    ).to_dict()
    if request.get("out"):
        made["copy"] = request.get("out")

    def show(console: Any) -> None:
        say(console, str(made["path"]), "bold")
        facts(
            console,
            {name: made[name] for name in ("target", "precision", "opset", "bytes", "copy") if made.get(name)},
            2,
        )
        _show_comparison(console, made)
        _show_gate(console, made.get("gate"))
        _show_latency(console, made.get("latency"))

    return Answer(made, show, str(made["path"]))


def verify(request: Request, session: Session) -> Answer:
    """Compare pixels between loaders and scores between runtimes."""
    run, _ = run_and_rest(request.things, data=False)
    from ..api import export as api

    found = api.verify(
        run, out=request.get("out"), trust=trusted(request, run or ""), force=bool(request.get("force"))
    )

    line = f"{found['images']:,} images: every loader and runtime that is here gives the same"
    for notice in found["notices"]:
        session.warn(notice)

    def show(console: Any) -> None:
        table(console, ["what", "of", "difference", "same answers", "verdict"], found["table"])
        say(console, line, "bold")

    return Answer(found, show, line)


def deploy(request: Request, session: Session) -> Answer:
    """Write a manifest for Kubernetes or KServe."""
    kind, *rest = request.things
    run, _ = run_and_rest(rest, data=False)
    out = request.get("out")
    if out:
        from ..core.outputs import SERVICE, claim_file

        claim_file(Path(out), SERVICE, force=bool(request.get("force")))
    from ..api import export as api

    named = {name: request.get(name) for name in ("name", "image", "storage") if request.get(name)}
    text = api.deploy(run, kind, **named)
    if out:
        from ..core.files import write_text

        write_text(Path(out), text)
    return Answer(
        {"kind": kind, "manifest": text, "out": out}, lambda console: block(console, out or text), out or text
    )


def _target(request: Request) -> str:
    named = [name for name in TARGETS if request.get(name)]
    if len(named) > 1:
        both = " and ".join(f"--{name}" for name in named)
        raise UsageError(
            "U002", f"{both} exclude each other: one export at a time", try_=command("export", f"--{named[0]}")
        )
    return named[0] if named else "onnx"


def _precision(request: Request) -> str | None:
    given = [request.get("precision")] if request.get("precision") else []
    given += [name for name in PRECISIONS if request.get(name) and name not in given]
    if len(given) > 1:
        raise UsageError(
            "U002",
            f"two precisions are asked for: {' and '.join(given)}",
            try_=command("export", "--precision", given[0]),
        )
    return given[0] if given else None


def _progress(session: Session) -> Callable[[str, float], None] | None:
    """A line a phase of a build that takes minutes; nothing where nobody looks."""
    if session.json or session.quiet:
        return None
    last = [""]

    def told(phase: str, done: float) -> None:
        if phase != last[0]:
            last[0] = phase
            session.note(f"TensorRT {done:.0%}: {phase}")

    return told


def _asked(arguments: dict[str, Any]) -> set[str]:
    """Names of the settings that the command line sets.

    Raises:
        ConfigError: C004 for one that an export does not obey.
    """
    named = set(arguments["overrides"]) | {text.partition("=")[0].strip() for text in arguments["sets"]}
    foreign = sorted(name for name in named if not name.startswith("export."))
    if foreign:
        raise ConfigError("C004", f"{foreign[0]} does not shape an export", try_="imgcls-fast export --help")
    return named


def _show_comparison(console: Any, made: dict[str, Any]) -> None:
    found = made.get("comparison")
    if found:
        tasks = (made.get("labels") or {}).get("tasks", ())
        one_label = len(tasks) < 2 and all(task["kind"] == "one_of" for task in tasks)
        same = "class" if one_label else "answers"
        line = f"same {same} as torch on {found['same_top1']:,} of {found['images']:,} images, "
        say(console, f"  {line}largest score difference {found['max_score_diff']:.1e}")
    elif made.get("verified"):
        say(console, f"  verified: {made['verified']}")


def _show_gate(console: Any, gate: dict[str, Any] | None) -> None:
    if not gate:
        return
    say(console, f"gate: {gate['statement']}", "bold")
    facts(console, {name: gate[name] for name in _POINTS if gate.get(name) is not None}, 2)
    if mean := gate.get("per_label"):
        say(console, "  accuracy is that of whole images (exact match); per label:")
        facts(console, {name: mean[name] for name in _POINTS if mean.get(name) is not None}, 4)


def _show_latency(console: Any, latency: dict[str, Any] | None) -> None:
    if not latency:
        return
    rows = [
        [
            str(t["batch"]),
            *(f"{t['end_to_end'][name]:.3g}" for name in ("p50_ms", "p90_ms", "p99_ms")),
            f"{t['images_per_s']:,.0f}",
        ]
        for t in {row["batch"]: row for row in (latency["one"], latency["best"])}.values()
    ]
    table(console, ["batch", "p50 ms", "p90 ms", "p99 ms", "images/s"], rows, numbers=range(5))
