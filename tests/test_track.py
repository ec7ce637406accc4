"""What training says: to a person at a terminal, into a pipe, into the files of a run, and to nobody when a sink fails."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.run import Run
from imgcls_fast.tracking.console import ConsoleSink, make_console
from imgcls_fast.tracking.events import Warned, event_of
from imgcls_fast.tracking.lines import clock, counted, done_facts, done_line, epoch_line, plain_lines, short, size
from imgcls_fast.tracking.sinks import LogSink, Sinks

Event = dict[str, Any]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7]|4[0-7])(?:;\d+)*m")

DATA: Event = {
    "event": "data", "images": 3670, "classes": ["daisy", "roses", "tulips"], "smallest": 633, "quarantined": 9, "duplicates_removed": 2,
    "splits": {"train": 2936, "val": 367, "test": 367}, "notices": ["class folder 'empty' is empty"],
}  # fmt: skip
PLAN: Event = {
    "event": "plan", "parameters": 11_180_000, "memory_mb": 7270.0, "device": "cpu", "run": "runs/1",
    "rows": [("model.arch", "resnet18", "the default for this size"), ("optim.lr", 0.0010000001, "because [of] :smile: " + "words " * 30),
             ("train.seed", 0, "")],
}  # fmt: skip
BASELINE: Event = {"event": "baseline", "features": "resnet18", "accuracy": 0.85312, "ci": [0.81, 0.89], "seconds": 4.2,
                   "train_rows": 5213, "train_of": 5213, "limit": ""}  # fmt: skip
START: Event = {"event": "start", "epoch": 1, "epochs": 30, "steps_per_epoch": 92, "resumed": False, "monitor": "val/accuracy",
                "patience": 5}  # fmt: skip
PROGRESS: Event = {"event": "progress", "epoch": 3, "epochs": 30, "step": 40, "steps": 92, "loss": 0.5, "images_per_s": 1204.0,
                   "data_share": 0.031, "eta_s": 250.0}  # fmt: skip
VALIDATE: Event = {"event": "validate", "epoch": 3, "done": 10, "total": 367}
EPOCH: Event = {
    "event": "epoch", "epoch": 3, "epochs": 30, "train_loss": 0.4123, "val_loss": 0.5121, "val_accuracy": 0.9034,
    "val_macro_f1": 0.8991, "delta": 0.0121,
    "images_per_s": 1204.4, "data_share": 0.031, "memory_mb": 7270.0, "eta_s": 250.0, "best": True,
}  # fmt: skip
STOPPED: Event = {
    "event": "stopped_early", "epoch": 12, "epochs": 30, "monitor": "val/loss", "best_epoch": 7, "best": 0.5121, "patience": 5,
    "early": True,
}  # fmt: skip
WARNING: Event = {"event": "warning", "text": "the learning rate is odd [bold]"}
QUARANTINE: Event = {"event": "quarantine", "path": "daisy/[red]1.jpg", "reason": "truncated", "epoch": 1, "row": 7}
CHECKPOINT: Event = {"event": "checkpoint", "path": "runs/1/checkpoints/last", "epoch": 1, "step": 5}
INTERRUPTED: Event = {
    "event": "interrupted",
    "command": "imgcls-fast train runs/1 --resume",
    "path": "runs/1/checkpoints/last",
}
DONE: Event = {
    "event": "done", "split": "test", "n": 1367, "accuracy": 0.9123, "ci": [0.88, 0.94], "baseline": 0.85312, "macro_f1": 0.9011,
    "ece": 0.0213, "against": {"rows": 1367, "verdict": "better", "gain": 0.05918, "low": 0.041, "high": 0.078},
    "worst": [("roses", 0.8112, 64), ("daisy", 0.9, 1)], "seconds": 3725.0, "run": "runs/1", "report": "runs/1/report.html",
    "notes": ["a note"], "commands": [("predict", "imgcls-fast predict runs/1 IMAGES")],
}  # fmt: skip
UNKNOWN: Event = {"event": "of a later version", "x": 1}
ALL = [
    DATA,
    PLAN,
    BASELINE,
    START,
    PROGRESS,
    EPOCH,
    VALIDATE,
    STOPPED,
    WARNING,
    QUARANTINE,
    CHECKPOINT,
    UNKNOWN,
    DONE,
    INTERRUPTED,
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def shown(stream: io.StringIO, events: list[Event], **options: Any) -> str:
    sink = ConsoleSink(stream, **options)
    for event in events:
        sink(event)
    sink.close()
    return stream.getvalue()


# ---- the lines ----


def test_the_data_line_counts_what_was_found_and_taken_out() -> None:
    assert plain_lines(DATA) == [
        "3,670 images, 3 classes, smallest 633, 9 quarantined, 2 duplicates across splits removed",
        "  train 2,936  val 367  test 367",
        "  class folder 'empty' is empty",
    ]


def test_nothing_quarantined_is_not_mentioned() -> None:
    assert (
        plain_lines(DATA | {"quarantined": 0, "duplicates_removed": 0, "notices": []})[0]
        == "3,670 images, 3 classes, smallest 633"
    )


def test_one_of_a_kind_is_singular() -> None:
    line = plain_lines(DATA | {"images": 1, "classes": ["a"], "smallest": 1, "duplicates_removed": 1})[0]
    assert line == "1 image, 1 class, smallest 1, 9 quarantined, 1 duplicate across splits removed"
    assert plain_lines(START | {"epochs": 1, "steps_per_epoch": 1})[0] == "training for 1 epoch of 1 step"
    assert plain_lines(START)[0] == "training for 30 epochs of 92 steps"
    assert "on 1 image ->" in done_line(DONE | {"n": 1})
    assert "on 1,367 images ->" in done_line(DONE)
    assert dict(done_facts(DONE))["worst"] == "roses F1 0.811 (64 images)\ndaisy F1 0.900 (1 image)"
    assert [counted(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]


def test_the_baseline_line_says_what_must_be_beaten() -> None:
    assert plain_lines(BASELINE) == [
        "linear probe on resnet18: 0.853 (95% interval [0.81, 0.89]) in 4 s",
        "  your model must beat this; fitted to 5,213 training images",
    ]
    assert "in 0.2 s" in plain_lines(BASELINE | {"seconds": 0.2})[0]
    some = {"train_rows": 5213, "train_of": 50_000, "limit": "20 s of reading"}
    assert plain_lines(BASELINE | some)[1] == (
        "  your model must beat this; fitted to 5,213 of 50,000 training images (no more in 20 s of reading)"
    )
    assert plain_lines({k: v for k, v in BASELINE.items() if k in ("event", "features", "accuracy")}) == [
        "linear probe on resnet18: 0.853",
        "  your model must beat this",
    ]


def test_a_notice_of_the_baseline_has_a_line_of_its_own() -> None:
    event = BASELINE | {"train_rows": 900, "limit": "20 s of reading"}
    lines = shown(io.StringIO(), [event]).splitlines()
    assert len(lines) == len(plain_lines(event)) > 1
    assert not any("\\n" in line for line in lines)


def test_the_epoch_line_says_every_number() -> None:
    assert epoch_line(EPOCH) == (
        "ep  3/30  loss .412  val acc .903 (+.012) f1 .899  1,204 img/s  data 3%  mem 7.1G  eta 4:10  *best"
    )
    assert "(-.012)" in epoch_line(EPOCH | {"delta": -0.0121, "best": False})
    assert "best" not in epoch_line(EPOCH | {"best": False})
    assert "(" not in epoch_line(EPOCH | {"delta": None})


@pytest.mark.parametrize(
    ("monitor", "shown", "goal"),
    [
        ("val/accuracy", "val acc .903 (+.012) f1 .899", "highest val acc"),
        ("val/macro_f1", "val acc .903 f1 .899 (+.012)", "highest f1"),
        ("val/balanced_accuracy", "val acc .903 f1 .899 balanced acc .887 (+.012)", "highest balanced acc"),
        ("val/loss", "val loss .512 (+.012) val acc .903 f1 .899", "lowest val loss"),
    ],
)
def test_the_figure_that_picks_the_best_epoch_is_on_its_line_with_its_change(monitor: str, shown: str, goal: str) -> None:
    event = EPOCH | {"monitor": monitor, "val_balanced_accuracy": 0.887}
    assert f"  {shown}  " in epoch_line(event)
    assert shown in epoch_line(event, 70)
    told = plain_lines(START | {"monitor": monitor})
    assert f"*best: {goal} so far" in told[1]
    assert "change against the best before" in told[1]
    assert told[2] == "  stops early after 5 epochs without a better one"


def test_a_lower_loss_is_good_news_and_a_lower_accuracy_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = {}
    for monitor in ("val/loss", "val/accuracy"):
        monkeypatch.setenv("COLUMNS", "200")
        text = shown(Terminal(), [EPOCH | {"monitor": monitor, "delta": -0.012}])
        colours[monitor] = re.search(r"\x1b\[(\d+)m\(-\.012\)", text)[1]  # type: ignore[index]
    assert colours == {"val/loss": "32", "val/accuracy": "31"}


def test_early_stopping_is_told_with_epoch_figure_patience_and_best_epoch() -> None:
    when, why, best = plain_lines(STOPPED)
    assert when == "stopped early after epoch 12 of 30"
    assert why == "  val loss has not improved for 5 epochs (patience 5)"
    assert best == "  best: epoch 7 with lowest val loss, 0.512"
    assert "\n".join((when, why, best)) in shown(io.StringIO(), ALL)
    told = dict(done_facts(DONE | {"ended": STOPPED}))["stopped"]
    assert told == "after epoch 12 of 30: val loss has not improved for 5 epochs (patience 5); best: epoch 7 with lowest val loss, 0.512"
    whole = STOPPED | {"early": False, "epoch": 30}
    assert dict(done_facts(DONE | {"ended": whole}))["best"] == "epoch 7 with lowest val loss, 0.512, of 30 epochs"


def test_a_resumed_run_counts_batches_of_the_epoch_and_steps_of_the_run() -> None:
    event = START | {"resumed": True, "epoch": 5, "step": 94, "batch": 14, "steps_per_epoch": 20}
    assert plain_lines(event)[0] == "resumed in epoch 5/30 after batch 14 of 20, 94 steps in all"


@pytest.mark.parametrize("width", [50, 60, 70, 80, 100, 120])
def test_an_epoch_line_fits_its_terminal_and_keeps_what_matters(width: int) -> None:
    line = epoch_line(EPOCH, width)
    assert len(line) <= max(width, 57)
    assert all(part in line for part in ("ep  3/30", "val acc .903 (+.012)", "f1 .899", "*best"))
    assert ("mem 7.1G" in line) == (width >= 100)


def test_numbers_that_are_missing_are_dashes() -> None:
    line = epoch_line(
        EPOCH | {"train_loss": float("nan"), "val_accuracy": None, "images_per_s": None, "eta_s": float("inf")}
    )
    assert all(part in line for part in ("loss -", "val acc -", "- img/s", "eta -"))


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (("better", 0.059, 0.041, 0.078), "so 0.059 better: [+0.041, +0.078] on the same 1,367 images"),
        (("worse", -0.038, -0.06, -0.02), "so 0.038 worse: [-0.060, -0.020] on the same 1,367 images"),
        (("even", 0.012, -0.004, 0.03), "cannot be told apart: +0.012 [-0.004, +0.030] on the same 1,367 images"),
        (("better", 0.059, None, None), "so 0.059 better: on the same 1,367 images"),
        (None, "a difference of +0.059"),
    ],
)
def test_the_model_is_held_against_its_baseline_on_the_same_images(against: Any, said: str) -> None:
    names = ("verdict", "gain", "low", "high")
    event = DONE | {"against": {"rows": 1367, **dict(zip(names, against, strict=True))} if against else None}
    assert dict(done_facts(event))["baseline"] == f"0.853, {said}"


def against_of(verdict: str, gain: float, balanced: str = "even", balanced_gain: float = 0.0) -> dict[str, Any]:
    changed = round(76 * abs(gain)) + 4
    return {
        "rows": 76, "verdict": verdict, "gain": gain, "low": gain - 0.1, "high": gain + 0.1, "lost": changed if gain else 0,
        "gained": 4 if gain else 0, "balanced_verdict": balanced, "balanced_gain": balanced_gain,
    }  # fmt: skip


def test_on_imbalanced_data_the_largest_class_must_be_beaten_and_balanced_accuracy_is_shown() -> None:
    """Solar cells: 0.447 was called no worse than a baseline of 0.579 that always gives the same answer."""
    unequal = DONE | {
        "n": 76, "accuracy": 0.447, "baseline": 0.579, "imbalanced": True, "balanced_accuracy": 0.25, "baseline_balanced": 0.34,
        "majority": {"class": "functional", "accuracy": 0.579, "against": against_of("worse", -0.132)},
        "against": against_of("even", -0.132, "worse", -0.09),
    }  # fmt: skip
    facts = dict(done_facts(unequal))
    assert facts["baseline"] == "0.579, no better: -0.132 [-0.232, -0.032] on the same 76 images"
    assert facts["largest class"].startswith("0.579 by always answering functional, so 0.132 worse: [-0.232")
    assert facts["balanced"].endswith("baseline 0.340, so 0.090 worse") and facts["balanced"].startswith("accuracy 0.250")
    assert done_line(unequal).startswith("test accuracy 0.447 (95% interval [0.88, 0.94]), balanced 0.250, on 76 images")
    same = {"class": "functional", "accuracy": 0.579, "against": against_of("even", 0.0)}
    assert "no better: right about the same images" in dict(done_facts(unequal | {"majority": same}))["largest class"]
    probe = BASELINE | {"imbalanced": True, "balanced_accuracy": 0.34, "majority": same}
    assert plain_lines(probe)[-1] == "  always answering functional gives 0.579; balanced accuracy of the probe 0.340"
    assert {"largest class", "balanced"}.isdisjoint(dict(done_facts(DONE)))


def test_no_baseline_is_not_mentioned() -> None:
    assert "baseline" not in dict(done_facts(DONE | {"baseline": None}))


def test_the_result_is_one_line() -> None:
    assert done_line(DONE) == "test accuracy 0.912 (95% interval [0.88, 0.94]) on 1,367 images -> runs/1"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.4123, ".412"),
        (1.5, "1.500"),
        (0.9999, "1.000"),
        (0.0, ".000"),
        (10.25, "10.250"),
        (-0.5, "-.500"),
        (None, "-"),
    ],
)
def test_short_numbers(number: float | None, text: str) -> None:
    assert short(number) == text


def test_times_and_sizes() -> None:
    assert [clock(s) for s in (0, 59.6, 250, 3599.7, 3725, None, float("inf"))] == [
        "0:00",
        "1:00",
        "4:10",
        "1:00:00",
        "1:02:05",
        "-",
        "-",
    ]
    assert [size(m) for m in (812, 7270)] == ["812M", "7.1G"]


# ---- the console ----


def test_a_pipe_gets_every_fact_and_no_escape_codes() -> None:
    text = shown(io.StringIO(), ALL)
    assert "\x1b" not in text
    assert "\r" not in text
    for event in (DATA, BASELINE, START, EPOCH, WARNING, QUARANTINE, INTERRUPTED):
        for line in plain_lines(event):
            assert line in text
    assert "ep 3/30" not in text  # no live bar
    assert "plan: 11.2 M parameters, about 7.1G of memory, cpu -> runs/1" in text
    assert "because [of] :smile: words" in text  # neither markup nor emoji
    assert "0.001 " in text
    assert "train.seed" not in text  # it has no reason


def test_plan_and_box_are_not_wrapped_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = DONE | {"worst": [("a long name " * 12, 0.5, 3)]}
    lines = shown(io.StringIO(), [PLAN, long]).splitlines()
    reason = next(line for line in lines if line.startswith("  model.arch"))
    assert reason.split() == ["model.arch", "resnet18", "the", "default", "for", "this", "size"]
    assert any(line.startswith("  optim.lr ") and line.count("words") == 30 for line in lines)
    assert any("a long name " * 12 in line and "F1 0.500 (3 images)" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_lines_that_fit(width: int, colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    text = shown(Terminal(), [event for event in ALL if event not in (PROGRESS, VALIDATE)])
    assert bool(COLOUR.search(text)) == colour
    lines = ESCAPE.sub("", text).splitlines()
    kept = [
        line for line in lines if line not in plain_lines(DATA)
    ]  # the first is longer than 80 columns and is never cut
    assert max(map(len, kept)) <= width, max(kept, key=len)
    assert max(len(line) for line in lines if line.startswith(("╭", "│", "╰"))) <= 100
    for fact in (
        " test: 1,367 images ",
        "0.912 (95% interval [0.88, 0.94])",
        "0.853, so 0.059 better",
        "0.901",
        "0.021",
        "roses F1 0.811 (64 images)",
        "1:02:05",
    ):
        assert any(fact in line for line in lines), fact
    assert any(line == epoch_line(EPOCH, width) for line in lines)


def test_the_live_bar_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    sink = ConsoleSink(stream)
    sink(PROGRESS)
    sink(VALIDATE)
    sink(EPOCH)
    seen = ESCAPE.sub("", stream.getvalue())
    assert "ep 3/30" in seen
    assert epoch_line(EPOCH, 100) in seen
    sink(PROGRESS)
    sink.close()
    sink.close()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")  # the cursor is back


def test_a_dumb_terminal_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert shown(Terminal(), [PROGRESS, VALIDATE]) == ""


def test_quiet_says_only_warnings_and_the_result() -> None:
    text = shown(io.StringIO(), ALL[:-1], quiet=True)
    assert text.splitlines() == [
        f"warning: {WARNING['text']}",
        f"warning: {plain_lines(QUARANTINE)[0]}",
        done_line(DONE),
    ]


def test_warnings_are_kept_for_the_end() -> None:
    sink = ConsoleSink(io.StringIO())
    sink(WARNING)
    sink(QUARANTINE)
    assert sink.warnings == [WARNING["text"], plain_lines(QUARANTINE)[0]]


def test_long_paths_and_commands_are_never_cut() -> None:
    path = "runs/" + "very-long-" * 30
    text = shown(
        io.StringIO(),
        [INTERRUPTED | {"command": f"imgcls-fast train {path} --resume"}, DONE | {"report": f"{path}/report.html"}],
    )
    assert f"continue with: imgcls-fast train {path} --resume\n" in text
    assert f"report   {path}/report.html\n" in text


def test_with_json_stdout_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(json=True)
    for event in ALL:
        sink(event)
    sink.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert epoch_line(EPOCH) in err


def test_a_console_takes_every_text_as_it_is() -> None:
    stream = io.StringIO()
    make_console(stream).print("[red]x[/red] :smile: 1.5 ü", soft_wrap=True)
    assert stream.getvalue() == "[red]x[/red] :smile: 1.5 ü\n"


# ---- the files of a run ----


def test_the_log_holds_every_event_but_the_live_ones(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    sink = LogSink(run)
    try:
        for event in ALL:
            sink(event)
        sink.close()
    finally:
        run.unlock()
    stored = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    kept = [event for event in ALL if event["event"] not in ("progress", "validate")]
    assert [{k: v for k, v in event.items() if k != "time"} for event in stored] == json.loads(json.dumps(kept))
    assert [event["time"] for event in stored] == sorted(event["time"] for event in stored)
    log = (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()
    assert [line[21:] for line in log] == [line for event in kept for line in plain_lines(event)]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in log)


# ---- several sinks ----


class Failing:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, event: Event) -> None:
        self.calls += 1
        raise OSError("disk full")

    def close(self) -> None:
        raise OSError("still full")


def test_a_failing_sink_is_told_once_and_the_others_go_on() -> None:
    failing, before, after = Failing(), [], []
    sinks = Sinks([before.append, failing, after.append])
    for event in (DATA, EPOCH, DONE):
        sinks(event)
    sinks.close()
    text = "Failing failed and may miss events: OSError: disk full"
    for heard in (before, after):
        assert [event for event in heard if event["event"] == "warning"] == [{"event": "warning", "text": text}]
        assert [event for event in heard if event["event"] != "warning"] == [DATA, EPOCH, DONE]
    assert failing.calls == 3  # it may recover


def test_sinks_that_all_fail_stop_nothing() -> None:
    sinks = Sinks([Failing(), Failing()])
    sinks(DATA)
    sinks(DONE)
    sinks.close()


def test_an_interrupt_inside_a_sink_is_not_swallowed() -> None:
    def pressed(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([pressed])(DATA)


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_shown_can_be_exported_as_text_and_as_a_picture(width: int) -> None:
    from rich.console import Console

    console = Console(
        file=io.StringIO(), record=True, width=width, markup=False, highlight=False, emoji=False, force_terminal=True
    )
    shown(io.StringIO(), [DATA, PLAN, BASELINE, START, EPOCH, WARNING, DONE], console=console)
    text = console.export_text(clear=False)
    assert "\x1b" not in text
    for fact in (
        *plain_lines(BASELINE),
        epoch_line(EPOCH, width),
        "╭─  test: 1,367 images  ─",
        "predict  imgcls-fast predict runs/1 IMAGES",
    ):
        assert fact in text, fact
    picture = console.export_svg(title="imgcls-fast train")
    assert picture.startswith("<svg")
    assert "your&#160;model&#160;must&#160;beat&#160;this" in picture


def test_an_event_with_an_unknown_or_missing_key_is_refused() -> None:
    assert event_of(Warned, {"event": "warning", "text": "x"}) == {"event": "warning", "text": "x"}
    with pytest.raises(TypeError, match=r"Warned: unknown or missing: txt$"):
        event_of(Warned, {"event": "warning", "text": "x", "txt": "y"})
    with pytest.raises(TypeError, match=r"Warned: unknown or missing: text$"):
        event_of(Warned, {"event": "warning"})


# ---------------------------------------------------------------- labels of other kinds

TASKS = [
    {"name": "color", "kind": "one_of", "classes": 3, "n": 96, "accuracy": 0.99, "macro_ap": 0.999, "macro_f1": 0.989, "ece": 0.1},
    {"name": "marks", "kind": "any_of", "classes": 5, "n": 89, "accuracy": 0.948, "macro_ap": 0.905, "macro_f1": 0.838, "ece": 0.1},
]  # fmt: skip


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([{"name": "label", "kind": "any_of", "counts": {"a": 9}, "unknown": {}}], "3 classes, any number per image, smallest"),
        ([{"name": "label", "kind": "any_of", "counts": {"a": 9}, "unknown": {"a": 7}}], "any number per image, unknown in 7,"),
        (
            [
                {"name": "color", "kind": "one_of", "counts": {"a": 9, "b": 8}, "unknown": {"a": 1200, "b": 1200}},
                {"name": "marks", "kind": "any_of", "counts": {"c": 1}, "unknown": {}},
            ],
            "2 tasks (color: one of 2, unknown in 1,200; marks: any of 1), smallest",
        ),
    ],
)
def test_the_data_line_tells_what_is_asked_about_an_image(tasks: list[dict[str, Any]], words: str) -> None:
    assert words in plain_lines({**DATA, "tasks": tasks})[0]


def test_the_result_of_several_tasks_has_their_means_and_a_line_for_each() -> None:
    more = {"exact_match": 0.805, "exact_match_ci": [0.72, 0.87], "macro_ap": 0.952, "macro_ap_ci": [None, None], "tasks": TASKS}
    event = {**DONE, **more}
    line, *facts = plain_lines(event)
    assert ", average precision 0.952, exact match 0.805 on" in line
    text = "\n".join(facts)
    assert "exact match: 0.805 (95% interval [0.72, 0.87])" in text and "calibration" not in text
    assert "marks: accuracy 0.948, average precision 0.905, F1 0.838 (any of 5, 89 images)" in text
    alone = "\n".join(plain_lines({**event, "tasks": TASKS[1:]}))
    assert "marks:" not in alone and "average precision: 0.952" in alone
    assert "0.853 (95% interval [0.81, 0.89]), average precision 0.700 in 4 s" in plain_lines({**BASELINE, "macro_ap": 0.7})[0]
    assert "f1 .899  mAP" not in epoch_line(EPOCH) and "mAP .812" in epoch_line({**EPOCH, "val_macro_ap": 0.8123})
