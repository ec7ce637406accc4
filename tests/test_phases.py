"""Whatever takes long tells that it goes on: a line every ten seconds in a pipe, a bar on a terminal, an event for sinks."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core import phases
from imgcls_fast.core.phases import counted_off, heard_by, phase
from imgcls_fast.core.run import Run
from imgcls_fast.tracking import console
from imgcls_fast.tracking.beat import Beat, Doing
from imgcls_fast.tracking.console import ConsoleSink
from imgcls_fast.tracking.sinks import LogSink

Event = dict[str, Any]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_phase_tells_begin_progress_and_end_to_whoever_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_EVERY_S", 0.0)
    events: list[Event] = []
    with heard_by(events.append), phase("reading", 3, "images") as current:
        assert list(counted_off("ab", current)) == ["a", "b"]
        with phase("deeper"):
            pass
    told = [(event["what"], event["state"], event["done"], event["total"]) for event in events]
    assert told == [
        ("reading", "begin", 0, 3), ("reading", "going", 1, 3), ("reading", "going", 2, 3), ("deeper", "begin", 0, None),
        ("deeper", "end", 0, None), ("reading", "end", 2, 3),
    ]  # fmt: skip
    with phase("unheard") as current:
        current.to(1)
    assert len(events) == 6


def test_an_error_ends_the_phase_and_a_listener_is_of_its_thread_alone() -> None:
    events: list[Event] = []
    with heard_by(events.append):
        with pytest.raises(ValueError, match="x"), phase("failing"):
            raise ValueError("x")
        thread = threading.Thread(target=lambda: phase("elsewhere").__enter__())
        thread.start()
        thread.join()
    assert [event["state"] for event in events] == ["begin", "end"]


def test_in_a_pipe_silence_is_broken_by_lines_that_tell_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.02)
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    with heard_by(sink), phase("starting"), phase("reading the images", 1200, "images") as current:
        current.to(400)
        wait_for(lambda: stream.getvalue().count("\n") >= 2)
    sink.close()
    lines = set(stream.getvalue().splitlines())
    assert lines <= {
        "  reading the images: 400 of 1,200 images, 0:00",
        "  reading the images: 400 of 1,200 images, 0:01",
    }
    said = stream.getvalue()
    time.sleep(0.06)
    assert stream.getvalue() == said  # nothing goes on any more


def test_an_epoch_in_a_pipe_tells_its_step_and_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.02)
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    sink({"event": "phase", "state": "begin", "what": "training", "done": 0, "total": None, "unit": "", "seconds": 0})
    wait_for(lambda: "  training, 0:0" in stream.getvalue())
    sink({"event": "progress", "epoch": 3, "epochs": 30, "step": 40, "steps": 92, "loss": 0.5, "images_per_s": 1204.0,
          "data_share": 0.031, "eta_s": 250.0})  # fmt: skip
    wait_for(lambda: "  ep 3/30: 40 of 92  loss .500  1,204 img/s  data 3%  eta 4:10" in stream.getvalue())
    sink({"event": "validate", "epoch": 3, "done": 10, "total": 367})
    wait_for(lambda: "  ep 3 validation: 10 of 367\n" in stream.getvalue())
    sink.close()


def test_a_terminal_shows_a_bar_for_a_phase_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "BAR_S", 0.02)
    stream = Terminal()
    sink = ConsoleSink(stream)
    with heard_by(sink), phase("writing the report"):
        wait_for(lambda: "writing the report" in ESCAPE.sub("", stream.getvalue()))
        assert sink._bar.visible
    assert not sink._bar.visible
    sink.close()


def test_the_end_of_the_last_phase_starts_no_thread_after_the_sink_was_closed() -> None:
    sink = ConsoleSink(io.StringIO())
    with heard_by(sink), phase("starting"):
        sink.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "imgcls-beat"]


def test_quiet_people_and_short_work_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []
    for quiet in (True, False):
        streams.append(io.StringIO())
        sink = ConsoleSink(streams[-1], quiet=quiet)
        if quiet:
            monkeypatch.setattr(console, "LINE_S", 0.01)
        with heard_by(sink), phase("x"):
            time.sleep(0.05 if quiet else 0)
        sink.close()
        monkeypatch.undo()
    assert [stream.getvalue() for stream in streams] == ["", ""]


def test_a_beat_goes_on_until_it_is_closed_and_leaves_no_thread() -> None:
    shown: list[int] = []
    beat = Beat(lambda: shown.append(1), 0.01)
    beat.start()
    beat.start()  # once is enough
    wait_for(lambda: len(shown) > 2)
    beat.close()
    after = len(shown)
    assert not [thread for thread in threading.enumerate() if thread.name == "imgcls-beat"]
    long = Beat(lambda: shown.append(1), 3600)
    long.start()
    long.close()  # does not wait for its turn
    assert len(shown) == after


def test_the_innermost_phase_is_shown_and_an_epoch_line_ends_its_steps() -> None:
    doing = Doing()
    assert doing.quiet
    base: Event = {"event": "phase", "done": 0, "total": None, "unit": "", "seconds": 0}
    doing(base | {"state": "begin", "what": "training"})
    doing({"event": "progress", "epoch": 1, "epochs": 2, "step": 1, "steps": 5})
    assert doing.bar()[:3] == ("ep 1/2", 1, 5)
    doing({"event": "epoch"})
    assert doing.bar()[0] == "training"
    doing(base | {"state": "begin", "what": "inner", "unit": "images"})
    doing(base | {"state": "going", "what": "inner", "unit": "images", "done": 7})
    assert doing.line().startswith("  inner: 7 images, ")
    doing(base | {"state": "end", "what": "training"})  # an inner one that did not end goes with it
    assert doing.quiet


def test_the_log_keeps_what_took_longer_than_a_second(tmp_path: Path) -> None:
    sink = LogSink(Run(tmp_path))
    base: Event = {"event": "phase", "what": "judging images", "done": 367, "total": 367, "unit": "images"}
    for state, seconds in (("begin", 0.0), ("going", 5.0), ("end", 0.4), ("end", 75.2)):
        sink(base | {"state": state, "seconds": seconds})
    assert (tmp_path / "log.txt").read_text().split("  ", 1)[1] == "judging images (367 images): 1:15\n"
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_beat_ends_without_a_word_where_nobody_reads_any_more(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def show() -> None:
        raise error

    beat = Beat(show, 0.005)
    beat.start()
    thread = beat._thread
    assert thread is not None
    thread.join(20)
    beat.close()
    assert not thread.is_alive() and capsys.readouterr().err == ""


def test_an_event_does_not_change_what_a_beat_is_about_to_show() -> None:
    sink, asked, ended = ConsoleSink(io.StringIO()), threading.Event(), threading.Event()
    begin = {"event": "phase", "state": "begin", "what": "x", "done": 0, "total": None, "unit": "", "seconds": 0}
    sink._doing(begin)

    class Slow(Doing):
        @property
        def quiet(self) -> bool:
            found = super().quiet
            asked.set()
            ended.wait(0.2)  # the event must wait for the line
            return found

    sink._doing.__class__ = Slow
    failed: list[Exception] = []

    def alive() -> None:
        try:
            sink._alive()
        except IndexError as error:
            failed.append(error)

    beat = threading.Thread(target=alive)
    beat.start()
    asked.wait(20)
    sink({**begin, "state": "end"})
    ended.set()
    beat.join()
    sink.close()
    assert not failed
